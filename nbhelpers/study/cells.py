"""The heavy computations of the notebooks as independent cells, phase by phase; notebooks then find the artefacts.

A cell is a seed's fine-tuning, its scores, the pruning, recovery or test predictions of one score, a student, or a
choice. Cells of a later phase need those of the earlier ones; within a phase the order does not matter, and no two
cells of a phase make the same artefact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from nbhelpers.models import load_config
from nbhelpers.profiles import Profile
from nbhelpers.study.baseline import COUNTING, tfidf_logits
from nbhelpers.study.choices import best_score
from nbhelpers.study.comparison import LINES, open_test_part
from nbhelpers.study.conversion import block_model
from nbhelpers.study.fine_tuning import finetune_model
from nbhelpers.study.forgetting import read_as_language_models
from nbhelpers.study.inputs import runs_of
from nbhelpers.study.predictions import answers_right, split_logits
from nbhelpers.study.pruning import pruned_logits, pruners
from nbhelpers.study.recovery import (
    ARMS,
    PARTS,
    SCAN_SHARE,
    budget_lengths,
    budget_seeds,
    choose_score,
    extend_arm,
    full_steps,
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
    epoch_steps,
    scan_distillation,
    scan_student,
    scan_trials,
    student_names,
    student_shapes,
    student_variants,
)
from nbhelpers.study.teacher import taught_splits, teacher_logits
from nbhelpers.study.work import Amounts, Work
from nbhelpers.workspace import Run, WorkspaceError

# --- what a cell computes, where it is more than one call ---


def scores_in(profile: Profile) -> tuple[str, ...]:
    """Return all scores of a profile; SparseGPT is none."""
    return tuple(name for name in pruners(profile) if name != "sparsegpt")


def score_seed(seed_run: Run) -> None:
    """Make all scores of a seed, and the dense model's logits that later cells share."""
    build_scores(seed_run, scores_in(seed_run.profile))
    split_logits(seed_run, "fine_tuned", "validation")


def teach(seed_run: Run, split: str) -> None:
    """Make the teacher's logits of a split, where there is such a split."""
    if split in taught_splits(seed_run):
        teacher_logits(seed_run, split)


def recover_part(run: Run, seed_run: Run, part: str) -> None:
    """Recover the best score at the main sparsity with a part of the recipe."""
    recover_model(seed_run, best_score(run), run.profile.main_sparsity, part)


def take_out(run: Run, sparsity: float) -> None:
    """Recover the best score without whole heads and neurons, where they can be taken out."""
    if sparsity in structured_sparsities(run):
        recover_model(run, best_score(run), sparsity, "structured", "structures")


def prune_blocks(run: Run) -> None:
    """Recover the best score at the main sparsity in blocks of four."""
    block_model(run, best_score(run), run.profile.main_sparsity)


def evaluate_recovered(seed_run: Run, criterion: str) -> None:
    """Evaluate a seed's recovered models of one score on the test reviews."""
    for (score, _), name in recovered_names(seed_run).items():
        if score == criterion:
            answers_right(seed_run, name, "test")


def read_if_tied(seed_run: Run) -> None:
    """Read a seed's models as language models, where their next-token head is their embedding."""
    if load_config(seed_run.folder("fine_tuned")).tie_word_embeddings:
        read_as_language_models(seed_run)


def evaluate_dense(seed_run: Run) -> None:
    """Evaluate a seed's dense model and its control on the test reviews."""
    for name in LINES:
        answers_right(seed_run, name, "test")


# --- the cells of a run ---

NOTHING = Work()


@dataclass(frozen=True)
class Cell:
    """One computation: its name, the notebook that would compute it otherwise, the function, and what it takes."""

    name: str
    notebook: str
    compute: Callable[[], object]
    work: Work = NOTHING


def recovery_cells(run: Run, amounts: Amounts) -> tuple[list[Cell], list[Cell]]:
    """Return the cells that train dense models further: those before the best score is decided, and those after."""
    profile, seeds, first = run.profile, runs_of(run), run.seed

    def work(steps: int) -> Work:
        return amounts.train(steps or full_steps(run), profile.batch_size) + amounts.judge("validation")

    def cell(name: str, compute: Callable, steps: int = 0, notebook: str = "03") -> Cell:
        return Cell(name, notebook, compute, work(steps))

    before = [cell(f"control-{s.seed}", lambda s=s: train_control(s)) for s in seeds]
    before += [
        cell(f"recover-{s.seed}-{c}-{share:g}", lambda s=s, c=c, share=share: recover_model(s, c, share))
        for s in seeds
        for c, share in recoveries(profile)
    ]
    after = [
        cell(f"part-{s.seed}-{part}", lambda s=s, part=part: recover_part(run, s, part))
        for s in seeds
        for part in PARTS
        if part != profile.recipe
    ]
    after += [
        cell(f"budget-{s.seed}-{arm}-{steps}", lambda s=s, arm=arm, n=steps: extend_arm(run, s, arm, n), steps)
        for steps in budget_lengths(run)
        if steps
        for s in budget_seeds(run, steps)
        for arm in ARMS
    ]
    after += [
        cell(f"structured-{first}-{share:g}", lambda share=share: take_out(run, share))
        for share in profile.structured_sparsities
    ]
    after += [cell(f"structured-{s.seed}", lambda s=s: extend_arm(run, s, "structured", 0)) for s in seeds[1:]]
    return before, [*after, cell(f"blocks-{first}", lambda: prune_blocks(run), notebook="04")]


def student_cells(run: Run, amounts: Amounts) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of the students, and those that compress them."""
    profile, first = run.profile, run.seed

    def work(steps: int, layers: int) -> Work:
        return amounts.train(steps, profile.distill_batch_size, layers) + amounts.judge("validation", layers=layers)

    shapes = {shape: parts.get("layers", 0) for shape, parts in student_shapes(profile).items()}
    steps = {"direct": epoch_steps(run, profile.distill_epochs + profile.compress_epochs)}
    students = [
        Cell(
            f"student-{first}-{variant}-{shape}",
            "05",
            lambda v=variant, shape=shape: distil_variant(run, v, shape),
            work(steps.get(variant, epoch_steps(run, profile.distill_epochs)), shapes[shape]),
        )
        for variant, shape in student_variants(profile)
    ]
    compressed = [
        Cell(
            f"compress-{first}-{shape}",
            "05",
            lambda shape=shape: compress_student(run, shape),
            work(epoch_steps(run, profile.compress_epochs), layers),
        )
        for shape, layers in shapes.items()
    ]
    return students, compressed


def phases(run: Run, notebooks: set[str] | None = None) -> list[list[Cell]]:
    """Return the cells of a run, phase by phase; only those of some notebooks ("03"), where these are given."""
    profile, seeds, first, amounts = run.profile, runs_of(run), run.seed, Amounts(run)
    validation, test = amounts.judge("validation"), amounts.judge("test")
    recovered, further = recovery_cells(run, amounts)
    students, compressed = student_cells(run, amounts)

    def of_seeds(word: str, notebook: str, function: Callable[[Run], object], work: Work) -> list[Cell]:
        return [Cell(f"{word}-{s.seed}", notebook, lambda s=s: function(s), work) for s in seeds]

    def of_names(word: str, notebook: str, names: tuple[str, ...], function: Callable, work: Work) -> list[Cell]:
        return [
            Cell(f"{word}-{s.seed}-{name}", notebook, lambda s=s, name=name: function(s, name), work)
            for s in seeds
            for name in names
        ]

    fine_tuning = Work(amounts.tokens["train"]) + validation
    # Reviews of the calibration pass are read one by one, which takes twice as long.
    scoring = amounts.train(2 * profile.calibration_reviews, 1) + validation
    short = amounts.train(max(2, full_steps(run) // SCAN_SHARE), profile.batch_size) + validation
    trial = amounts.train(profile.scan_steps, profile.distill_batch_size, profile.student_layers[0])
    # Texts of some 300 tokens, one by one and in float32, with a product for each token of the vocabulary.
    unlearning = Work(judged=4 * 300 * 40 * (3 + 2 * len(profile.scores)))
    kept = len([share for score, share in recoveries(profile) if score == "magnitude"])
    every = [
        of_seeds("finetune", "01", finetune_model, fine_tuning * profile.epochs),
        [
            *of_seeds("score", "02", score_seed, scoring),
            *(
                Cell(f"teach-{s.seed}-{split}", "02", lambda s=s, split=split: teach(s, split), amounts.judge(split))
                for s in seeds
                for split in ("train", "transfer")
                if split in amounts.tokens
            ),
            Cell(f"tfidf-{first}", "01", lambda: tfidf_logits(run, "validation")),
        ],
        [
            *of_names(
                "rates", "03", ("pruned", "control"), scan_rates, short * (1 + len(profile.recovery_learning_rates))
            ),
            *of_names("prune", "03", pruners(profile), pruned_logits, validation * len(profile.sparsities)),
            *(
                Cell(f"scan-{first}-{a:g}-{t:g}", "05", lambda a=a, t=t: scan_student(run, a, t), trial)
                for a, t in scan_trials(profile)
            ),
        ],
        [Cell("choose-distillation", "05", lambda: scan_distillation(run))],
        [*recovered, *students],
        [Cell("choose-score", "03", lambda: choose_score(run))],
        [*further, *compressed],
        [Cell("choose-compressed", "05", lambda: choose_compressed(run))],
        [Cell("open-test", "06", lambda: open_test_part(run))],
        [
            *of_seeds("evaluate-dense", "06", evaluate_dense, test * len(LINES)),
            *of_names("evaluate", "06", profile.scores, evaluate_recovered, test * kept),
            *(
                Cell(f"evaluate-{first}-{name}", "06", lambda name=name: answers_right(run, name, "test"), test)
                for name in student_names(profile)
            ),
            *(Cell(f"evaluate-{first}-{name}", "06", lambda n=name: tfidf_logits(run, "test", n)) for name in COUNTING),
            *of_seeds("unlearned", "06", read_if_tied, unlearning),
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
        for split in taught_splits(seed_run):
            teacher_logits(seed_run, split)
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
