"""Every model side by side on the test reviews, over all seeds, and what that shows: notebook 06."""

from functools import partial

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria, masks, processes
from nbhelpers.compression import best_compressed, depth
from nbhelpers.evaluation import (
    evaluate_model,
    holm,
    mcnemar,
    over_seeds,
    paired_difference,
    significance_table,
)
from nbhelpers.experiments import (
    answers_right,
    dataset,
    latency_batch,
    model_bytes,
    model_name,
    open_test,
    reviews_of,
    right_over_seeds,
    runs_of,
    split_logits,
    student_names,
)
from nbhelpers.forgetting import as_language_model, bits_per_byte, other_domain_texts
from nbhelpers.measurement import measure_inference_efficiency
from nbhelpers.models import load_tokenizer
from nbhelpers.progress import track
from nbhelpers.pruning import (
    MAIN,
    best_comparator,
    best_criterion,
    contenders,
    converted_sparsities,
    prune_model,
    recoveries,
    scores_of,
    structured_sparsities,
)
from nbhelpers.report import in_points
from nbhelpers.sparse import count_actual_params
from nbhelpers.workspace import Run

COST = ["latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "peak_memory_bytes"]
LINES = ("fine_tuned", "fine_tuned_extra")  # the dense model, and the same with the steps of a recovery


def compared_models(run: Run) -> list[str]:
    """The models of the first seed that notebook 06 compares: dense ones, recovered, sparse, compact, and 05's."""
    main, best = run.profile.main_sparsity, best_criterion(run)
    recovered = [model_name("recovered", c, main) for c in contenders(run)]
    sparse = [model_name("sparse", best, sparsity) for sparsity in converted_sparsities(run.profile)]
    compact = [model_name("compact", best, sparsity) for sparsity in structured_sparsities(run)]
    return [*LINES, *recovered, *sparse, *compact, *student_names(run.profile)]


def recovered_names(run: Run) -> dict[tuple[str, float], str]:
    """The recovered models by (criterion, sparsity)."""
    return {(c, s): model_name("recovered", c, s) for c, s in recoveries(run)}


def open_test_part(run: Run) -> dict:
    """Declare all models of all seeds for the test reviews (``open_test``); returns the record of the first seed.

    Which these are was settled on validation; they need not all exist yet.
    """
    everywhere = [*LINES, *recovered_names(run).values()]
    first, *others = runs_of(run)
    record = open_test(first, list(dict.fromkeys([*compared_models(run), *everywhere, "tfidf"])))
    for one in others:
        open_test(one, everywhere)
    return record


def comparison_table(run: Run, names: list[str]) -> pd.DataFrame:
    """One row a model of the first seed; ``speedup`` and ``p_value`` are against the first."""
    labels = dataset(run, "test").labels
    models = {name: run.load_model(name) for name in names}
    batch = latency_batch(run, run.profile.latency_batches[-1])
    cost = measure_inference_efficiency(models, [batch], run.profile.latency_repeats).set_index("model")
    reference = answers_right(run, names[0], "test")
    rows = []
    for name, model in models.items():
        quality, size = evaluate_model(split_logits(run, name, "test"), labels), count_actual_params(model)
        quality.pop("n")
        rows.append(
            {
                "model": name,
                **quality,
                "total_parameters": size["total"],
                "active_parameters": size["active"],
                "encoder_sparsity": size["encoder_sparsity"],
                "file_bytes": model_bytes(run, name),
                **cost.loc[
                    name, ["latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "peak_memory_bytes"]
                ].to_dict(),
                "p_value": mcnemar(answers_right(run, name, "test"), reference),
            }
        )
    return pd.DataFrame(rows)


# --- over seeds ---


def answers_of_all(run: Run, names: list[str]) -> dict[str, np.ndarray]:
    """Which test reviews each model gets right: bool [seeds, n], with one seed where only the first has the model."""
    everywhere = {*LINES, *recovered_names(run).values()}
    return {
        name: right_over_seeds(run, name, "test") if name in everywhere else answers_right(run, name, "test")[None]
        for name in names
    }


def rival_scores(run: Run) -> list[tuple[str, float]]:
    """Every other (criterion, sparsity) than the merge's, at the sparsities at which the merge is recovered too."""
    return [(c, s) for c, s in recoveries(run) if c != "merged" and s in run.profile.recovery_sparsities]


def rivals(run: Run) -> list[tuple[str, str]]:
    """Pairs of recovered models: the merge against every other score at each sparsity at which both are recovered."""
    names = recovered_names(run)
    return [(names["merged", s], names[c, s]) for c, s in rival_scores(run)]


def compare_rivals(run: Run) -> pd.DataFrame:
    """``significance_table`` of all ``rivals``, with the columns criterion (the other) and sparsity."""
    pairs = rivals(run)
    table = significance_table(answers_of_all(run, sorted({name for pair in pairs for name in pair})), pairs)
    others = rival_scores(run)
    return table.assign(criterion=[c for c, _ in others], sparsity=[s for _, s in others])


# --- what was unlearned ---


def prune_at(run: Run, criterion: str, sparsity: float) -> torch.nn.Module:
    """The fine-tuned model right after pruning by a criterion."""
    return prune_model(run, masks.select(scores_of(run, criterion), sparsity))


def unlearned(run: Run, count: int = 40) -> pd.DataFrame:
    """Bits per byte of each body as a language model, before and after: a row a model, domain and seed.

    On validation reviews and on text of another domain, ``count`` each; "pruned_..." has not been recovered.
    """
    main, tokenizer, scores = run.profile.main_sparsity, load_tokenizer(run.profile), contenders(run)
    reviews = reviews_of(run.profile, run.seed)["validation"]["text"][:]
    texts = {"reviews": reviews[:: max(1, len(reviews) // count)][:count], "other": other_domain_texts(count)}
    rows = []
    for one in runs_of(run):
        recovered = [model_name("recovered", score, main) for score in scores]
        # One model at a time: a dozen of full size would not fit into every memory.
        models = {name: partial(one.load_model, name) for name in ("pretrained", *LINES)}
        models |= {model_name("pruned", c, main): partial(prune_at, one, c, main) for c in scores}
        models |= {name: partial(one.load_model, name) for name in recovered}
        for name, load in track(models.items(), "reading as language models"):
            body = as_language_model(load().to(processes.device())).eval()
            for domain, part in texts.items():
                bits = bits_per_byte(body, tokenizer, part)
                rows.append({"model": name, "domain": domain, "seed": one.seed, "bits_per_byte": bits})
    return pd.DataFrame(rows)


# --- the finding ---


def find(run: Run) -> dict:
    """What the study found: everything chosen on validation, every difference taken on the test reviews.

    leaders: at each sparsity the score that was best on validation, and its difference to the second; merge: the merge
    against the best single criterion; comparator: the best comparator against the best of the three and their merge
    (own); recovery: of the best of all (best), accuracy on validation before and after; control: the dense model with
    and without the extra steps; kept: the best against the control; further: the same at each higher sparsity, with
    the score that leads there; compressed: the smallest model that validation accepted against the dense one.
    """
    curves, main = run.load_table("curves"), run.profile.main_sparsity
    mean = curves[curves["split"] == "validation"].groupby(["stage", "sparsity", "criterion"])["accuracy"].mean()
    best, comparator = best_criterion(run), best_comparator(run)
    single, own = (mean["recovered", main][list(names)].idxmax() for names in (criteria.CRITERIA, MAIN))
    names, small = recovered_names(run), best_compressed(run)

    def difference(a: str, b: str) -> dict:
        return paired_difference(right_over_seeds(run, a, "test"), right_over_seeds(run, b, "test"))

    leaders = []
    for sparsity in run.profile.recovery_sparsities:
        ranked = mean["recovered", sparsity][list(contenders(run))].sort_values(ascending=False, kind="stable").index
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
    tests["compressed"] |= {"layers": depth(run, small), "times_smaller": smaller}
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


def points(found: dict) -> str:
    """A paired difference in words: ``"+0.4 points (-0.5 to +1.3, p = 0.4)"``, p adjusted for the number of tests."""
    p = "p < 0.001" if found["p_adjusted"] < 0.001 else f"p = {found['p_adjusted']:.2g}"
    return in_points(found, p)


def verdict(found: dict) -> str:
    """Whether a paired difference is beyond chance, in words."""
    if found["p_adjusted"] >= 0.05:
        return "not distinguishable from none"
    return "better beyond chance" if found["difference"] > 0 else "worse beyond chance"


def finding_text(found: dict) -> str:
    """The finding on one page, in Markdown."""
    share, recovery, dense = f"{found['sparsity']:.0%}", found["recovery"], found["dense"]["accuracy"]
    small = found["compressed"]
    layers = "1 layer left" if small["layers"] == 1 else f"{small['layers']} layers left"
    names = ("best", "own", "single", "comparator_name")
    best, own, single, comparator = (found[key].replace("_", " ") for key in names)
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    leads = [row for row in found["leaders"] if row["p_adjusted"] < 0.05]
    leaders = ", ".join(
        f"{row['best'].replace('_', ' ')} at {row['sparsity']:.0%} ({row['accuracy']:.1%}; {points(row)} to "
        f"{row['second'].replace('_', ' ')})"
        for row in found["leaders"]
    )
    further = "".join(
        f"; {row['sparsity']:.0%} ({row['best'].replace('_', ' ')}) {points(row)}: {verdict(row)}"
        for row in found["further"]
    )
    return "\n".join(
        [
            "Everything was chosen on validation reviews; every difference below is taken on the same "
            f"{found['test_reviews']:,} test reviews, {seeds} (difference, 95 % interval, exact paired p, corrected).",
            "",
            "- **Which score wins where.** Best on validation after recovery, accuracy and lead on the test reviews: "
            f"{leaders}. Leads beyond chance: {len(leads)} of {len(found['leaders'])}.",
            f"- **Do the three criteria together beat the best of them?** At {share}, the merge against {single}: "
            f"{points(found['merge'])}: {verdict(found['merge'])}.",
            f"- **And what the literature offers?** {comparator.capitalize()}, its best score right after pruning, "
            f"against {own}: {points(found['comparator'])}: {verdict(found['comparator'])}.",
            f"- **What recovery is worth.** {best.capitalize()} at {share} (validation): {recovery['before']:.1%} "
            f"right after pruning, {recovery['after']:.1%} after recovery.",
            f"- **What the dense control says.** The same extra steps change the dense model ({dense:.1%}) by "
            f"{points(found['control'])}. Against that control, removing {share} of the block weights is worth "
            f"{points(found['kept'])}: {verdict(found['kept'])}{further}.",
            f"- **Everything at once.** {layers}, {small['encoder_sparsity']:.0%} of the block weights removed, a "
            f"low-rank embedding, int8: {small['speedup']:.1f} times as fast as the fine-tuned model, its file "
            f"{small['times_smaller']:.0f} times smaller ({small['file_bytes'] / 1e6:.2f} MB), at {points(small)} to "
            f"it, first seed: {verdict(small)}.",
            "- **What none of this shows.** One small model, one task, one language, one recipe of recovery; that a "
            "weight can go does not say what it did, and the same accuracy is not the same behaviour.",
        ]
    )
