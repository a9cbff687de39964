"""The six notebooks: the question of each, what it needs, and the figures, tables and metrics that it promises."""

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
        """Numbers of the notebooks that make what this one needs."""
        return {need if need.isdigit() else maker_of(need) for need in self.needs}


def promise(section: str, metrics: str) -> tuple[str, ...]:
    """``"section.metric"`` for each word of ``metrics``."""
    return tuple(f"{section}.{metric}" for metric in metrics.split())


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "01_fine_tune",
            "How well does a small GPT-2 tell good reviews from bad ones, and is it worth more than counting words?",
            figures=("01_lengths", "01_learning_curves", "01_accuracy", "01_confusion", "01_gradients"),
            tables=("fine_tuning",),
            metrics=promise("fine_tuning", "tfidf_accuracy untrained_accuracy against_tfidf minutes"),
        ),
        Stage(
            "02_criteria_scoring",
            "Small, unmoved, without gradient: do the three criteria mean the same weights?",
            needs=("pretrained", "fine_tuned"),
            figures=(
                "02_five_by_five",
                "02_distributions",
                "02_retention",
                "02_agreement",
                "02_heads",
                "02_neurons",
                "02_along_training",
                "02_stability",
                "02_votes",
                "02_flagged",
            ),
            tables=("retention", "structure_shares", "along_training", "stability", "flagged"),
            metrics=promise(
                "criteria",
                "sparsity thresholds overlap correlation flagged_by_all_at_median most_uneven known_after_a_tenth "
                "kappa_over_seeds",
            ),
        ),
        Stage(
            "03_prune_and_recover",
            "How many weights can go, who chooses best, and what does recovery bring back?",
            needs=("pretrained", "fine_tuned", "calibration", "scores_*"),
            figures=(
                "03_five_by_five",
                "03_pruned",
                "03_comparators",
                "03_who_paid",
                "03_scopes",
                "03_sensitivity",
                "03_recovered",
                "03_recovery_worth",
                "03_ways",
                "03_against_control",
            ),
            tables=("scopes", "sensitivity", "recovery_rates", "curves", "recovery_ways", "recovery_significance"),
            metrics=promise(
                "pruning",
                "sparsity seeds dense_accuracy control_accuracy best_criterion best_comparator best_accuracy "
                "best_before_recovery recovered ways comparators rates revived",
            ),
        ),
        Stage(
            "04_sparse_conversion",
            "What does it take for zeros to save time and memory?",
            needs=("fine_tuned", "calibration", "scores_*", "recovered_*"),
            figures=(
                "04_bytes",
                "04_break_even",
                "04_layer",
                "04_roofline",
                "04_speedup",
                "04_latency",
                "04_files",
                "04_structured",
            ),
            tables=("engines", "break_even", "latency", "compact_shapes", "structured"),
            gaps=("break_even.sparsity",),
            metrics=promise(
                "sparse",
                "model largest_logit_difference validation_accuracy masked_speedup layer_speedup_at_90 "
                "best_model_speedup file_ratio limits structured unstructured_rival",
            ),
        ),
        Stage(
            "05_distillation",
            "Can a shallower model be taught the same?",
            needs=("fine_tuned",),
            figures=("05_softened", "05_scan", "05_learning_curves", "05_accuracy", "05_speed", "05_compressed"),
            tables=("distillation_scan", "students", "student_speed", "compression", "compressed_speed"),
            metrics=promise(
                "distillation",
                "alpha temperature teacher_accuracy best_student best_accuracy soft_targets_worth_points "
                "teacher_layers_worth_points speedup compressed",
            ),
        ),
        Stage(
            "06_comparison",
            "Which model is worth its bytes and milliseconds, and which differences are real?",
            needs=(
                "pretrained",
                "fine_tuned",
                "scores_*",
                "fine_tuned_extra",
                "recovered_*",
                "sparse_*",
                "compact_*",
                "student_*",
                "compressed_*",
            ),
            figures=(
                "06_accuracy",
                "06_differences",
                "06_rivals",
                "06_accuracy_size",
                "06_accuracy_latency",
                "06_cost",
                "06_forgotten",
                "06_unlearned",
            ),
            tables=("comparison", "significance", "forgotten", "forgotten_associations", "unlearned"),
            metrics=promise(
                "comparison",
                "test_reviews models dense control recovered sparse student compressed tfidf against_tfidf forgotten "
                "test_part",
            )
            + promise("finding", "seeds leaders own merge comparator recovery control kept further compressed"),
            gaps=("forgotten.learned", "forgotten_associations"),
        ),
    )
}


def in_order(stages: dict[str, Stage]) -> list[Stage]:
    """The stages, each after those that make what it needs; by number where that leaves a choice."""
    waiting, ordered = sorted(stages.values(), key=lambda stage: stage.name), []
    while waiting:
        blocked = {stage.number for stage in waiting}
        ready = [stage for stage in waiting if not stage.after & (blocked - {stage.number})]
        if not ready:
            raise ValueError(f"the notebooks {', '.join(sorted(blocked))} need each other in a circle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def before(stage: Stage, stages: dict[str, Stage]) -> list[Stage]:
    """The stages that make what a stage needs."""
    return [other for other in in_order(stages) if other.number in stage.after - {stage.number}]


def promised_files(run: Run, stage: Stage) -> list[Path]:
    """The figures and tables that a stage promises to leave, less those that ``Run.skip`` has given a reason for."""
    skipped = run.results().get("skipped", {})
    files = [run.reports / "figures" / f"{name}.png" for name in stage.figures if name not in skipped]
    return files + [run.reports / "tables" / f"{name}.csv" for name in stage.tables if name not in skipped]
