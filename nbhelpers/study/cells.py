"""The heavy computations of the notebooks as independent cells, phase by phase; notebooks then find the artefacts.

A cell is a seed's fine-tuning, its scores, the pruning, recovery or test predictions of one score, a student, or a
choice. Cells of a later phase need those of the earlier ones; within a phase the order does not matter, and no two
cells of a phase make the same artefact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from nbhelpers.study.choices import best_comparator, best_score, distillation_scales
from nbhelpers.study.comparison import LINES, open_test_part, recovered_names
from nbhelpers.study.conversion import block_model, compact_model, structured_sparsities
from nbhelpers.study.fine_tuning import finetune_model
from nbhelpers.study.inputs import runs_of
from nbhelpers.study.predictions import answers_right, split_logits
from nbhelpers.study.pruning import (
    PRUNERS,
    choose_comparator,
    choose_score,
    pruned_logits,
    recover_all,
    recover_model,
    recover_otherwise,
    recoveries,
    scan_recovery_rates,
    train_control,
)
from nbhelpers.study.scoring import SCORES, build_scores, scores_of
from nbhelpers.study.students import (
    choose_compressed,
    compress_all,
    compress_student,
    distil_all,
    distil_variant,
    scan_distillation,
    scan_student,
    scan_trials,
    student_names,
    student_variants,
)
from nbhelpers.study.teacher import teacher_logits
from nbhelpers.workspace import Run, WorkspaceError

# --- what a cell computes, where it is more than one call ---


def score_seed(seed_run: Run) -> None:
    """Make all scores of a seed, and what later cells share: the dense model's logits."""
    build_scores(seed_run, SCORES)
    teacher_logits(seed_run)
    split_logits(seed_run, "fine_tuned", "validation")


def recover_score(run: Run, seed_run: Run, criterion: str) -> None:
    """Make all recoveries of one score and seed; which ones, the comparator of all seeds decides."""
    sparsities = [s for c, s in recoveries(run.profile, best_comparator(run)) if c == criterion]
    if sparsities:
        scan_recovery_rates(seed_run, criterion)
    for sparsity in sparsities:
        recover_model(seed_run, criterion, sparsity)


def recover_best_otherwise(run: Run, seed_run: Run, method: str) -> None:
    """Recover the best score by another method, and evaluate it on validation."""
    name = recover_otherwise(seed_run, method, best_score(run), run.profile.main_sparsity)
    answers_right(seed_run, name, "validation")


def compact(run: Run, sparsity: float) -> None:
    """Make a model without whole heads and neurons, where they can be taken out of it."""
    if sparsity in structured_sparsities(run):
        compact_model(run, best_score(run), sparsity)


def evaluate_recovered(run: Run, seed_run: Run, criterion: str) -> None:
    """Evaluate a seed's recovered models of one score on the test reviews."""
    for (score, _), name in recovered_names(run).items():
        if score == criterion:
            answers_right(seed_run, name, "test")


def evaluate_dense(seed_run: Run) -> None:
    """Evaluate a seed's dense model and its control on the test reviews."""
    for name in LINES:
        answers_right(seed_run, name, "test")


# --- the cells of a run ---


@dataclass(frozen=True)
class Cell:
    """One computation: its name, the notebook that would compute it otherwise, and the function that does it."""

    name: str
    notebook: str
    compute: Callable[[], object]


def phases(run: Run, notebooks: set[str] | None = None) -> list[list[Cell]]:
    """Return the cells of a run, phase by phase; only those of some notebooks ("03"), where these are given."""
    profile, seeds = run.profile, runs_of(run)
    first = run.seed

    def of_seeds(word: str, notebook: str, function: Callable[[Run], object]) -> list[Cell]:
        return [Cell(f"{word}-{s.seed}", notebook, lambda s=s: function(s)) for s in seeds]

    def of_scores(word: str, notebook: str, scores: tuple[str, ...], function: Callable) -> list[Cell]:
        return [Cell(f"{word}-{s.seed}-{c}", notebook, lambda s=s, c=c: function(s, c)) for s in seeds for c in scores]

    every = [
        of_seeds("finetune", "01", finetune_model),
        of_seeds("score", "02", score_seed),
        [
            *of_seeds("control", "03", train_control),
            *of_scores("prune", "03", PRUNERS, pruned_logits),
            *(
                Cell(f"scan-{first}-{a:g}-{t:g}", "05", lambda a=a, t=t: scan_student(run, a, t))
                for a, t in scan_trials(profile)
            ),
        ],
        [
            Cell("choose-comparator", "03", lambda: choose_comparator(run)),
            Cell("choose-distillation", "05", lambda: scan_distillation(run)),
        ],
        [
            *of_scores("recover", "03", SCORES, lambda s, c: recover_score(run, s, c)),
            *(
                Cell(
                    f"student-{first}-{v}-{n}",
                    "05",
                    lambda v=v, n=n: distil_variant(run, v, n, *distillation_scales(run)),
                )
                for v, n in student_variants(profile)
            ),
        ],
        [Cell("choose-score", "03", lambda: choose_score(run))],
        [
            *of_scores("otherwise", "03", ("gradual", "taught"), lambda s, m: recover_best_otherwise(run, s, m)),
            *(
                Cell(f"structured-{first}-{share:g}", "04", lambda share=share: compact(run, share))
                for share in profile.structured_sparsities
            ),
            Cell(f"blocks-{first}", "04", lambda: block_model(run, best_score(run), profile.main_sparsity)),
            *(
                Cell(f"compress-{first}-{n}", "05", lambda n=n: compress_student(run, n))
                for n in profile.student_layers
            ),
        ],
        [
            Cell("choose-compressed", "05", lambda: choose_compressed(run)),
            Cell("open-test", "06", lambda: open_test_part(run)),
        ],
        [
            *of_seeds("evaluate-dense", "06", evaluate_dense),
            *of_scores("evaluate", "06", SCORES, lambda s, c: evaluate_recovered(run, s, c)),
        ],
    ]
    wanted = [[cell for cell in phase if notebooks is None or cell.notebook in notebooks] for phase in every]
    return [phase for phase in wanted if phase]


def run_cell(run: Run, name: str) -> None:
    """Compute one cell. Raises ``WorkspaceError`` for an unknown name."""
    cells = {cell.name: cell for phase in phases(run) for cell in phase}
    if name not in cells:
        raise WorkspaceError(f"the cell must be one of {', '.join(cells)} (got {name!r})")
    cells[name].compute()


# --- whole stages, for ``python -m nbhelpers.training`` ---


def finetune_all(run: Run) -> pd.DataFrame:
    """Fine-tune all seeds; returns their learning curves."""
    return pd.concat([finetune_model(s).assign(seed=s.seed) for s in runs_of(run)]).drop(columns="losses")


def score_all(run: Run) -> pd.DataFrame:
    """Make the scores of all seeds; returns one row per score and seed, with its least and largest value."""
    rows = []
    for seed_run in runs_of(run):
        score_seed(seed_run)
        for name in SCORES:
            scores = scores_of(seed_run, name).values()
            rows.append((seed_run.seed, name, min(map(torch.min, scores)).item(), max(map(torch.max, scores)).item()))
    return pd.DataFrame(rows, columns=["seed", "score", "lowest", "highest"])


def distil_and_compress(run: Run) -> pd.DataFrame:
    """Train the students, and the compressed models that come out of them; returns one row per model."""
    students, steps = distil_all(run), compress_all(run)
    last = steps[steps["step"] == "int8"][["model", "layers", "accuracy"]]
    return pd.concat([students, last], ignore_index=True)


def evaluate_all(run: Run) -> pd.DataFrame:
    """Evaluate recovered models, dense ones and students on the test reviews; returns one row per model and seed."""
    open_test_part(run)
    rows = []
    for seed_run in runs_of(run):
        students = student_names(run.profile) if seed_run == run else []
        for name in [*LINES, *recovered_names(run).values(), *students]:
            right = answers_right(seed_run, name, "test")
            rows.append({"seed": seed_run.seed, "model": name, "accuracy": right.mean(), "reviews": len(right)})
    return pd.DataFrame(rows)


STAGES = {
    "finetune": finetune_all,
    "score": score_all,
    "recover": recover_all,
    "distill": distil_and_compress,
    "evaluate": evaluate_all,
}
