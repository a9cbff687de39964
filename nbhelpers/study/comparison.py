"""Every model side by side on the test reviews, over all seeds, and what that shows: notebook 06."""

import numpy as np
import pandas as pd

from nbhelpers import criteria
from nbhelpers.evaluation import (
    calibration_error,
    evaluate_model,
    holm,
    mcnemar,
    over_seeds,
    paired_difference,
    reliability,
    significance_table,
)
from nbhelpers.measurement import measure_inference_efficiency
from nbhelpers.sparse import convert_to_sparse, count_actual_params
from nbhelpers.study.artefacts import layer_count, model_bytes, model_name, training_effort
from nbhelpers.study.baseline import tfidf_right
from nbhelpers.study.choices import best_comparator, best_compressed, best_score
from nbhelpers.study.conversion import converted_sparsities, int8_sources, structured_sparsities
from nbhelpers.study.inputs import dataset, latency_batch
from nbhelpers.study.predictions import answers_right, open_test, right_over_seeds, split_logits
from nbhelpers.study.pruning import contenders, recoveries
from nbhelpers.study.scoring import MAIN
from nbhelpers.study.students import student_names
from nbhelpers.workspace import Run

COST = ["latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "speedup_packed", "peak_memory_bytes"]
PACKED = "packed"  # the dense model without padding and without tokens that nobody reads
LINES = ("fine_tuned", "fine_tuned_extra")  # the dense model, and the same with the steps of a recovery


def compared_models(run: Run) -> list[str]:
    """Return the models of the first seed that notebook 06 compares: those of 01, 03, 04 and 05, in this order."""
    main, best = run.profile.main_sparsity, best_score(run)
    recovered = [model_name("recovered", c, main) for c in contenders(best_comparator(run))]
    sparse = [model_name("sparse", best, sparsity) for sparsity in converted_sparsities(run.profile)]
    compact = [model_name("compact", best, sparsity) for sparsity in structured_sparsities(run)]
    int8 = [f"int8_{name}" for name in int8_sources(run, best)]
    return [*LINES, *recovered, *sparse, *compact, *int8, *student_names(run.profile)]


def recovered_names(run: Run) -> dict[tuple[str, float], str]:
    """Return the names of the recovered models by (criterion, sparsity)."""
    return {(c, s): model_name("recovered", c, s) for c, s in recoveries(run.profile, best_comparator(run))}


def open_test_part(run: Run) -> dict:
    """Register all models for the test reviews (``open_test``), those of all seeds; returns the record.

    Which these are was settled on validation; they need not all exist yet.
    """
    every_seed = [*LINES, *recovered_names(run).values()]
    return open_test(run, list(dict.fromkeys([*compared_models(run), *every_seed, "tfidf"])))


def comparison_table(run: Run, names: list[str]) -> pd.DataFrame:
    """Return one row per model of the first seed; ``speedup`` and ``p_value`` are against the first.

    ``speedup_packed`` is against the first model packed, measured in the same turns; ``train_steps`` and
    ``train_tokens`` are what a model was trained since the fine-tuned model.
    """
    labels = dataset(run, "test").labels
    models = {name: run.load_model(name) for name in names}
    batch = latency_batch(run, run.profile.latency_batches[-1])
    timed = models | {PACKED: convert_to_sparse(models[names[0]], "dense")}
    cost = measure_inference_efficiency(timed, [batch], run.profile.latency_repeats).set_index("model")
    cost["speedup_packed"] = cost.loc[PACKED, "latency_ms"] / cost["latency_ms"]
    reference = answers_right(run, names[0], "test")
    rows = []
    for name, model in models.items():
        quality, size = evaluate_model(split_logits(run, name, "test"), labels), count_actual_params(model)
        quality.pop("n")
        steps, tokens = training_effort(run, name)
        rows.append(
            {
                "model": name,
                **quality,
                "total_parameters": size["total"],
                "active_parameters": size["active"],
                "encoder_sparsity": size["encoder_sparsity"],
                "file_bytes": model_bytes(run, name),
                "train_steps": steps,
                "train_tokens": tokens,
                **cost.loc[name, COST].to_dict(),
                "p_value": mcnemar(answers_right(run, name, "test"), reference),
            }
        )
    return pd.DataFrame(rows)


def calibrated_models(run: Run) -> list[str]:
    """Return the models whose probabilities notebook 06 examines: one of each kind, as validation chose them."""
    best, main = best_score(run), run.profile.main_sparsity
    student = f"student_distilled_{run.profile.student_layers[0]}"
    return ["fine_tuned", "int8_fine_tuned", model_name("recovered", best, main), student, best_compressed(run)]


def calibration_table(run: Run) -> pd.DataFrame:
    """Return the ``reliability`` of ``calibrated_models`` on the test reviews, with the columns model and error.

    error: the model's expected calibration error.
    """
    labels, parts = dataset(run, "test").labels, []
    for name in calibrated_models(run):
        table = reliability(split_logits(run, name, "test"), labels)
        parts.append(table.assign(model=name, error=calibration_error(table)))
    return pd.concat(parts, ignore_index=True)


# --- over seeds ---


def answers_of_all(run: Run, names: list[str]) -> dict[str, np.ndarray]:
    """Return which test reviews each model gets right: bool [seeds, n], one seed where only the first has the model."""
    every_seed = {*LINES, *recovered_names(run).values()}

    def right(name: str) -> np.ndarray:
        if name in every_seed:
            return right_over_seeds(run, name, "test")
        return (tfidf_right(run, "test") if name == "tfidf" else answers_right(run, name, "test"))[None]

    return {name: right(name) for name in names}


def rival_scores(run: Run) -> list[tuple[str, float]]:
    """Return every other (criterion, sparsity) than the merge's, at the sparsities at which the merge is recovered."""
    return [(c, s) for c, s in recovered_names(run) if c != "merged" and s in run.profile.recovery_sparsities]


def rivals(run: Run) -> list[tuple[str, str]]:
    """Return pairs of recovered models: the merge and every other score, at each sparsity that both have."""
    names = recovered_names(run)
    return [(names["merged", s], names[c, s]) for c, s in rival_scores(run)]


def compare_rivals(run: Run) -> pd.DataFrame:
    """Return the ``significance_table`` of all ``rivals``, with the columns criterion (the other) and sparsity."""
    pairs = rivals(run)
    correct = answers_of_all(run, sorted({name for pair in pairs for name in pair}))
    table = significance_table(correct, pairs, "the merge against every other score")
    others = rival_scores(run)
    return table.assign(criterion=[c for c, _ in others], sparsity=[s for _, s in others])


# --- the finding ---


def find(run: Run) -> dict:
    """Return what the study found: everything chosen on validation, every difference taken on the test reviews.

    leaders: at each sparsity the score that was best on validation, and its difference to the second; merge: the merge
    against the best single criterion; comparator: the best comparator against the best of the three and their merge
    (own); recovery: of the best of all (best), accuracy on validation before and after; control: the dense model with
    and without the extra steps; kept: the best against the control; further: the same at each higher sparsity, with
    the score that leads there; compressed: the smallest model that validation accepted against the dense one.
    """
    curves, main = run.load_table("curves"), run.profile.main_sparsity
    mean = curves[curves["split"] == "validation"].groupby(["stage", "sparsity", "criterion"])["accuracy"].mean()
    best, comparator = best_score(run), best_comparator(run)
    single, own = (mean["recovered", main][list(names)].idxmax() for names in (criteria.CRITERIA, MAIN))
    names, small = recovered_names(run), best_compressed(run)

    def difference(a: str, b: str) -> dict:
        return paired_difference(right_over_seeds(run, a, "test"), right_over_seeds(run, b, "test"))

    leaders = []
    for sparsity in run.profile.recovery_sparsities:
        ranked = (
            mean["recovered", sparsity][list(contenders(comparator))].sort_values(ascending=False, kind="stable").index
        )
        first, second = (names[criterion, sparsity] for criterion in ranked[:2])
        row = {"sparsity": sparsity, "best": ranked[0], "second": ranked[1], **difference(first, second)}
        leaders.append(row | over_seeds(right_over_seeds(run, first, "test")))
    tests = {
        "merge": difference(names["merged", main], names[single, main]),
        "comparator": difference(names[comparator, main], names[own, main]),
        "control": difference("fine_tuned_extra", "fine_tuned"),
        "kept": difference(names[best, main], "fine_tuned_extra"),
        "compressed": paired_difference(*(answers_right(run, name, "test") for name in (small, "fine_tuned"))),
    }
    further = [
        {"sparsity": row["sparsity"], "best": row["best"]}
        | difference(names[row["best"], row["sparsity"]], "fine_tuned_extra")
        for row in leaders
        if row["sparsity"] > main
    ]
    for family in (leaders, [*tests.values(), *further]):
        for row, adjusted in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row["p_adjusted"] = adjusted
    rows = run.load_table("comparison").set_index("model")
    smaller = rows.loc["fine_tuned", "file_bytes"] / rows.loc[small, "file_bytes"]
    tests["compressed"] |= {"layers": layer_count(run, small), "times_smaller": smaller}
    tests["compressed"] |= rows.loc[small, ["accuracy", "encoder_sparsity", "speedup", "file_bytes"]].to_dict()
    return {
        "seeds": run.profile.seeds,
        "test_reviews": len(dataset(run, "test")),
        "sparsity": main,
        "best": best,
        "own": own,
        "single": single,
        "comparator_name": comparator,
        "leaders": leaders,
        **tests,
        "further": further,
        "recovery": {"before": mean["pruned", main, best], "after": mean["recovered", main, best]},
        "dense": over_seeds(right_over_seeds(run, "fine_tuned", "test")),
    }
