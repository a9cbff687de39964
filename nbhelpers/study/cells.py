"""The heavy computations of the notebooks as independent cells, phase by phase; notebooks then find the artefacts.

A cell is a seed's fine-tuning, its scores, the pruning, recovery or test predictions of one score, a student, or a
choice. Cells of a later phase need those of the earlier ones; within a phase the order does not matter, and no two
cells of a phase make the same artefact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from nbhelpers.profiles import Profile
from nbhelpers.study.choices import best_score
from nbhelpers.study.comparison import LINES, open_test_part
from nbhelpers.study.conversion import block_model
from nbhelpers.study.fine_tuning import finetune_model
from nbhelpers.study.inputs import runs_of
from nbhelpers.study.predictions import answers_right, split_logits
from nbhelpers.study.pruning import pruned_logits, pruners
from nbhelpers.study.recovery import (
    ARMS,
    PARTS,
    budget_lengths,
    budget_seeds,
    choose_score,
    extend_arm,
    recover_all,
    recover_model,
    recovered_names,
    recoveries,
    scan_rates,
    structured_sparsities,
    train_control,
)
from nbhelpers.study.scoring import build_scores, scores_of
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
    student_shapes,
    student_variants,
)
from nbhelpers.study.teacher import taught_splits, teacher_logits
from nbhelpers.workspace import Run, WorkspaceError

# --- what a cell computes, where it is more than one call ---


def scores_in(profile: Profile) -> tuple[str, ...]:
    """Return all scores of a profile; SparseGPT is none."""
    return tuple(name for name in pruners(profile) if name != "sparsegpt")


def score_seed(seed_run: Run) -> None:
    """Make all scores of a seed, and what later cells share: the dense model's logits."""
    build_scores(seed_run, scores_in(seed_run.profile))
    for split in taught_splits(seed_run):
        teacher_logits(seed_run, split)
    split_logits(seed_run, "fine_tuned", "validation")


def recover_part(run: Run, seed_run: Run, part: str) -> None:
    """Recover the best score at the main sparsity with a part of the recipe."""
    recover_model(seed_run, best_score(run), run.profile.main_sparsity, part)


def take_out(run: Run, sparsity: float) -> None:
    """Recover the best score without whole heads and neurons, where they can be taken out."""
    if sparsity in structured_sparsities(run):
        recover_model(run, best_score(run), sparsity, "structured", "structures")


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

    def of_scores(word: str, notebook: str, names: tuple[str, ...], function: Callable) -> list[Cell]:
        return [Cell(f"{word}-{s.seed}-{c}", notebook, lambda s=s, c=c: function(s, c)) for s in seeds for c in names]

    every = [
        of_seeds("finetune", "01", finetune_model),
        of_seeds("score", "02", score_seed),
        [
            *of_scores("rates", "03", ("pruned", "control"), scan_rates),
            *of_scores("prune", "03", pruners(profile), pruned_logits),
            *(
                Cell(f"scan-{first}-{a:g}-{t:g}", "05", lambda a=a, t=t: scan_student(run, a, t))
                for a, t in scan_trials(profile)
            ),
        ],
        [Cell("choose-distillation", "05", lambda: scan_distillation(run))],
        [
            *of_seeds("control", "03", train_control),
            *(
                Cell(f"recover-{s.seed}-{c}-{share:g}", "03", lambda s=s, c=c, share=share: recover_model(s, c, share))
                for s in seeds
                for c, share in recoveries(profile)
            ),
            *(
                Cell(
                    f"student-{first}-{v}-{n}",
                    "05",
                    lambda v=v, n=n: distil_variant(run, v, n),
                )
                for v, n in student_variants(profile)
            ),
        ],
        [Cell("choose-score", "03", lambda: choose_score(run))],
        [
            *of_scores(
                "part", "03", [part for part in PARTS if part != profile.recipe], lambda s, p: recover_part(run, s, p)
            ),
            *(
                Cell(f"budget-{s.seed}-{arm}-{steps}", "03", lambda s=s, arm=arm, n=steps: extend_arm(run, s, arm, n))
                for steps in budget_lengths(run)
                if steps
                for s in budget_seeds(run, steps)
                for arm in ARMS
            ),
            *(
                Cell(f"structured-{first}-{share:g}", "03", lambda share=share: take_out(run, share))
                for share in profile.structured_sparsities
            ),
            *(Cell(f"structured-{s.seed}", "03", lambda s=s: extend_arm(run, s, "structured", 0)) for s in seeds[1:]),
            Cell(f"blocks-{first}", "04", lambda: block_model(run, best_score(run), profile.main_sparsity)),
            *(
                Cell(f"compress-{first}-{n}", "05", lambda n=n: compress_student(run, n))
                for n in student_shapes(profile)
            ),
        ],
        [Cell("choose-compressed", "05", lambda: choose_compressed(run))],
        [Cell("open-test", "06", lambda: open_test_part(run))],
        [
            *of_seeds("evaluate-dense", "06", evaluate_dense),
            *of_scores("evaluate", "06", profile.scores, lambda s, c: evaluate_recovered(run, s, c)),
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
        for name in scores_in(run.profile):
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
