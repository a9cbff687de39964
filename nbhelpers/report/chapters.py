"""The six notebooks: the question of each, its inputs, and the figures, tables and metrics that it promises."""

from dataclasses import dataclass
from pathlib import Path

from nbhelpers.workspace import Run, maker_of

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@dataclass(frozen=True)
class Stage:
    """A notebook, what it needs and what it promises to leave in ``reports/<profile>/``.

    needs: artefacts by name or pattern ("recovered_*"), or numbers of notebooks ("05"); figures and tables: names
    without extension; metrics: "section.metric" in ``results.json``; gaps: "table.column" that may hold empty cells,
    or "table" that may have no rows.
    """

    name: str
    question: str
    needs: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def after(self) -> set[str]:
        """Return the numbers of the notebooks that make what this one needs."""
        return {need if need.isdigit() else maker_of(need) for need in self.needs}


def names(text: str, prefix: str = "") -> tuple[str, ...]:
    """Return the words of a text, each with a prefix: ``"01_"`` for figures, ``"section."`` for metrics."""
    return tuple(f"{prefix}{name}" for name in text.split())


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "01_fine_tune",
            "How well does a small GPT-2 tell good reviews from bad ones, and is it worth more than counting words?",
            figures=names("lengths learning_curves accuracy confusion gradients", prefix="01_"),
            tables=("fine_tuning",),
            metrics=names("tfidf_accuracy untrained_accuracy against_tfidf minutes", prefix="fine_tuning."),
        ),
        Stage(
            "02_criteria_scoring",
            "Small, unmoved, without gradient: do the three criteria mean the same weights?",
            needs=("pretrained", "fine_tuned"),
            figures=names(
                "five_by_five distributions retention agreement heads neurons along_training stability votes flagged",
                prefix="02_",
            ),
            tables=("retention", "structure_shares", "along_training", "stability", "flagged"),
            metrics=names(
                "sparsity thresholds overlap correlation flagged_by_all_at_median most_uneven known_after_a_tenth "
                "kappa_over_seeds",
                prefix="criteria.",
            ),
        ),
        Stage(
            "03_prune_and_recover",
            "How many weights can go, who chooses best, and what does recovery bring back?",
            needs=("pretrained", "fine_tuned", "calibration", "scores_*"),
            figures=names(
                "five_by_five pruned comparators who_paid scopes sensitivity recovered parts budget against_control",
                prefix="03_",
            ),
            tables=names("scopes sensitivity recovery_rates curves recovery_parts budget recovery_significance"),
            metrics=names(
                "sparsity seeds steps dense_accuracy control_accuracy best_criterion best_accuracy "
                "best_before_recovery recovered parts right_after_pruning rates revived",
                prefix="pruning.",
            ),
        ),
        Stage(
            "04_sparse_conversion",
            "What do zeros and small numbers save in time and memory?",
            needs=("fine_tuned", "calibration", "scores_*", "recovered_*"),
            figures=names("bytes engines roofline speedup routes", prefix="04_"),
            tables=("engines", "break_even", "latency", "compact_shapes", "int8", "routes"),
            gaps=("break_even.sparsity",),
            metrics=names(
                "model largest_logit_difference validation_accuracy masked_speedup layer_speedup_at_90 "
                "best_model_speedup file_ratio limits structured unstructured_rival int8",
                prefix="sparse.",
            ),
        ),
        Stage(
            "05_distillation",
            "Can a shallower model be taught the same?",
            needs=("fine_tuned",),
            figures=names("softened scan learning_curves accuracy speed compressed", prefix="05_"),
            tables=names("distillation_scan students student_int8 student_speed compression compressed_speed"),
            metrics=names(
                "alpha temperature teacher_accuracy best_student best_accuracy soft_targets_points over_direct_points "
                "speedup compressed",
                prefix="distillation.",
            ),
        ),
        Stage(
            "06_comparison",
            "Which model is worth its bytes and milliseconds, and which differences are real?",
            needs=names(
                "pretrained fine_tuned scores_* fine_tuned_extra recovered_* sparse_* compact_* int8_* student_* "
                "compressed_*",
            ),
            figures=names(
                "accuracy differences rivals accuracy_size accuracy_latency cost reliability forgotten unlearned",
                prefix="06_",
            ),
            tables=names("comparison significance calibration forgotten forgotten_associations unlearned"),
            metrics=names(
                "test_reviews models dense control recovered sparse student compressed tfidf tfidf_taught "
                "against_tfidf forgotten test_part calibration",
                prefix="comparison.",
            )
            + names(
                "seeds leaders own merge comparator recovery control kept further budget compressed",
                prefix="finding.",
            ),
            gaps=("forgotten.learned", "forgotten_associations"),
        ),
    )
}


def in_order(stages: dict[str, Stage]) -> list[Stage]:
    """Return the stages, each after those that make what it needs; by number where that leaves a choice.

    Raises ``ValueError`` where stages need each other in a circle.
    """
    waiting, ordered = sorted(stages.values(), key=lambda stage: stage.name), []
    while waiting:
        missing = {stage.number for stage in waiting}
        ready = [stage for stage in waiting if not stage.after & (missing - {stage.number})]
        if not ready:
            raise ValueError(f"the notebooks {', '.join(sorted(missing))} need each other in a circle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def before(stage: Stage, stages: dict[str, Stage]) -> list[Stage]:
    """Return the stages that make what a stage needs."""
    return [other for other in in_order(stages) if other.number in stage.after - {stage.number}]


def promised_files(run: Run, stage: Stage) -> list[Path]:
    """Return the figures and tables that a stage promises, without those that ``Run.skip`` has given a reason for."""
    skipped = run.results().get("skipped", {})
    files = [run.reports / "figures" / f"{name}.png" for name in stage.figures if name not in skipped]
    return files + [run.reports / "tables" / f"{name}.csv" for name in stage.tables if name not in skipped]
