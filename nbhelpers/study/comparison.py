"""Every model side by side on the test reviews, over all seeds, and what that shows: notebook 06."""

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria
from nbhelpers.evaluation import (
    calibration_error,
    evaluate_model,
    holm,
    over_seeds,
    paired_difference,
    reliability,
    significance_table,
)
from nbhelpers.measurement import measure_inference_efficiency
from nbhelpers.sparse import convert_to_sparse, count_actual_params
from nbhelpers.study.artefacts import layer_count, model_bytes, model_name, training_effort
from nbhelpers.study.baseline import COUNTING, CountingModel, fit_counting, tfidf_logits
from nbhelpers.study.choices import best_compressed, best_score
from nbhelpers.study.conversion import converted_sparsities, int8_sources
from nbhelpers.study.inputs import dataset, latency_batch, latency_reviews, reviews_of
from nbhelpers.study.predictions import answers_right, open_test, right_over_seeds, split_logits
from nbhelpers.study.recovery import (
    CONTROL,
    SCANNED,
    budget_lengths,
    budget_seeds,
    full_steps,
    recovered_names,
    structured_sparsities,
    with_steps,
)
from nbhelpers.study.scoring import MAIN
from nbhelpers.study.students import distilled_names, student_names
from nbhelpers.workspace import Run

COST = ["latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "speedup_packed", "peak_memory_bytes"]
PACKED = "_packed"  # ends the name of a model without padding and without tokens that nobody reads
LINES = ("fine_tuned", CONTROL)  # the dense model, and the same with the steps of a recovery


def packed_models(run: Run) -> list[str]:
    """Return the dense models that are also timed packed: the fine-tuned one, and the students."""
    return ["fine_tuned", *distilled_names(run.profile)]


def compared_models(run: Run) -> list[str]:
    """Return the models of the first seed that notebook 06 compares: those of 01, 03, 04 and 05, in this order."""
    main, best = run.profile.main_sparsity, best_score(run)
    recovered = [model_name("recovered", c, main) for c in run.profile.scores]
    sparse = [model_name("sparse", best, sparsity) for sparsity in converted_sparsities(run.profile)]
    compact = [model_name("compact", best, sparsity) for sparsity in structured_sparsities(run)]
    int8 = [f"int8_{name}" for name in int8_sources(run, best)]
    return [*LINES, *recovered, *sparse, *compact, *int8, *student_names(run.profile)]


def rows_of(run: Run) -> list[str]:
    """Return the rows of ``tables/comparison.csv``: ``compared_models``, some of them packed, and what counts words."""
    return [*compared_models(run), *(name + PACKED for name in packed_models(run)), *COUNTING]


def budget_names(run: Run) -> list[str]:
    """Return the models that the budget curve compares on the test reviews: the best score and the control."""
    names = (recovered_names(run)[best_score(run), run.profile.main_sparsity], CONTROL)
    return [with_steps(name, steps) for name in names for steps in budget_lengths(run)]


def of_every_seed(run: Run) -> list[str]:
    """Return the models that every seed has and that are compared over seeds."""
    return [*LINES, *recovered_names(run).values()]


def open_test_part(run: Run) -> dict:
    """Register all models for the test reviews (``open_test``), those of all seeds; returns the record.

    Which these are was settled on validation; they need not all exist yet.
    """
    return open_test(
        run, list(dict.fromkeys([*compared_models(run), *of_every_seed(run), *budget_names(run), *COUNTING]))
    )


def load_row(run: Run, name: str) -> torch.nn.Module:
    """Return the model of a row of the comparison."""
    if name in COUNTING:
        texts = reviews_of(run.profile, run.seed)["test"]["text"]
        chosen = latency_reviews(run, run.profile.latency_batches[-1])
        return CountingModel(fit_counting(run, name), [texts[i] for i in chosen])
    if name.endswith(PACKED):
        return convert_to_sparse(run.load_model(name.removesuffix(PACKED)), "dense")
    return run.load_model(name)


def row_logits(run: Run, name: str) -> np.ndarray:
    """Return the test logits [n, 2] of a row of the comparison; packing changes none."""
    return tfidf_logits(run, "test", name) if name in COUNTING else split_logits(run, name.removesuffix(PACKED), "test")


def row_sizes(run: Run, name: str, model: torch.nn.Module) -> dict:
    """Return parameters, sparsity, bytes and training effort of a row of the comparison."""
    if name in COUNTING:
        size = {"total": model.weights.numel(), "active": model.weights.numel(), "encoder_sparsity": 0.0}
        file_bytes, steps, tokens = model.file_bytes(), 0, 0
    else:
        size, name = count_actual_params(model), name.removesuffix(PACKED)
        file_bytes, (steps, tokens) = model_bytes(run, name), training_effort(run, name)
    return {
        "total_parameters": size["total"],
        "active_parameters": size["active"],
        "encoder_sparsity": size["encoder_sparsity"],
        "file_bytes": file_bytes,
        "train_steps": steps,
        "train_tokens": tokens,
    }


def timed_as(name: str) -> str:
    """Return the row that is timed for a row: pruned models on dense matrices compute what the fine-tuned one does."""
    return LINES[0] if name.startswith(("recovered_", CONTROL)) else name


def comparison_table(run: Run, names: list[str]) -> pd.DataFrame:
    """Return one row per model of the first seed; ``speedup`` and ``p_value`` are against the first.

    ``speedup_packed`` is against the first model packed, measured in the same turns (``timed_as``); ``train_steps`` and
    ``train_tokens`` are what a model was trained since the fine-tuned model; ``p_value`` is that of
    ``paired_difference`` on all seeds that both models have.
    """
    labels, correct = dataset(run, "test").labels, answers_of_all(run, names)
    models = {name: load_row(run, name) for name in names}
    batch = latency_batch(run, run.profile.latency_batches[-1])
    packed = names[0] + PACKED
    timed = {name: model for name, model in models.items() if timed_as(name) == name}
    timed |= {} if packed in models else {packed: load_row(run, packed)}
    cost = measure_inference_efficiency(timed, [batch], run.profile.latency_repeats).set_index("model")
    cost["speedup_packed"] = cost.loc[packed, "latency_ms"] / cost["latency_ms"]
    rows = []
    for name, model in models.items():
        quality = evaluate_model(row_logits(run, name), labels)
        quality.pop("n")
        p_value = paired_difference(correct[name], correct[names[0]])["p_value"]
        sizes, times = row_sizes(run, name, model), cost.loc[timed_as(name), COST].to_dict()
        rows.append({"model": name, **quality, **sizes, **times, "p_value": p_value})
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
    every_seed = of_every_seed(run)

    def right(name: str) -> np.ndarray:
        if name in every_seed:
            return right_over_seeds(run, name, "test")
        return (row_logits(run, name).argmax(1) == dataset(run, "test").labels)[None]

    return {name: right(name) for name in names}


def rival_scores(run: Run) -> list[tuple[str, float]]:
    """Return every other (criterion, sparsity) than the merge's, at the sparsities at which the merge is recovered."""
    return [(c, s) for c, s in recovered_names(run) if c != "merged"]


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
    against the best single criterion; comparator: Taylor against the best of the three and their merge (own);
    recovery: accuracy of the best of all (best) on validation, before and after; control: the dense model with and
    without the extra steps; kept: the best against the control; further: the same at each higher sparsity, with the
    score that leads there; budget: the best against the control after each number of steps; compressed: the smallest
    model that validation accepted against the dense one. family: the rows for whose number p_adjusted is adjusted.
    """
    curves, main = run.load_table("curves"), run.profile.main_sparsity
    mean = curves[curves["split"] == "validation"].groupby(["stage", "sparsity", "criterion"])["accuracy"].mean()
    best, comparator = best_score(run), SCANNED
    single, own = (mean["recovered", main][list(names)].idxmax() for names in (criteria.CRITERIA, MAIN))
    names, small = recovered_names(run), best_compressed(run)

    def difference(a: str, b: str, seeds: int = run.profile.seeds) -> dict:
        return paired_difference(*(right_over_seeds(run, name, "test", seeds) for name in (a, b)))

    leaders = []
    for sparsity in run.profile.recovery_sparsities:
        ranked = (
            mean["recovered", sparsity][[c for c, s in names if s == sparsity]]
            .sort_values(ascending=False, kind="stable")
            .index
        )
        first, second = (names[criterion, sparsity] for criterion in ranked[:2])
        row = {"sparsity": sparsity, "best": ranked[0], "second": ranked[1], **difference(first, second)}
        leaders.append(row | over_seeds(right_over_seeds(run, first, "test")))
    tests = {
        "merge": difference(names["merged", main], names[single, main]),
        "comparator": difference(names[comparator, main], names[own, main]),
        "control": difference(CONTROL, "fine_tuned"),
        "kept": difference(names[best, main], CONTROL),
        "compressed": paired_difference(*(answers_right(run, name, "test") for name in (small, "fine_tuned"))),
    }
    further = [
        {"sparsity": row["sparsity"], "best": row["best"]} | difference(names[row["best"], row["sparsity"]], CONTROL)
        for row in leaders
        if row["sparsity"] > main
    ]
    lengths = budget_lengths(run)
    budget = [
        {"steps": n or full_steps(run)}
        | difference(with_steps(names[best, main], n), with_steps(CONTROL, n), len(budget_seeds(run, n)))
        for n in lengths
    ]
    budget.sort(key=lambda row: row["steps"])
    for name, family in {"leaders": leaders, "finding": [*tests.values(), *further], "budget": budget}.items():
        for row, adjusted in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row |= {"family": name, "p_adjusted": adjusted}
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
        "budget": budget,
        "recovery": {"before": mean["pruned", main, best], "after": mean["recovered", main, best]},
        "dense": over_seeds(right_over_seeds(run, "fine_tuned", "test")),
    }
