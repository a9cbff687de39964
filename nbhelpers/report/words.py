"""Numbers and findings in sentences."""

from collections.abc import Callable

import pandas as pd

from nbhelpers.profiles import get_profile
from nbhelpers.report.chapters import STAGES
from nbhelpers.workspace import Run, open_run


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


LEGEND = (
    "Accuracy with its 95 % interval. Active parameters are non-zero block weights plus all others; sparsity is a "
    "share of the block weights. Speed-up and p (McNemar's exact test) are against the fine-tuned dense model."
)
# The models of the headline: the key in results.json, and what the page calls them.
LEADING = {"dense": "Fine-tuned, dense", "sparse": "Pruned and sparse", "student": "Best student"}
LEADING |= {"compressed": "Everything at once"}

# --- numbers in words ---


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def interval(row) -> str:
    """Accuracy and its interval of a row or dict, in percent."""
    return f"{percent(row['accuracy'])} ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"


def millions(value: float) -> str:
    return f"{value / 1e6:.2f}"


def p_value(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def in_points(found: dict, more: str) -> str:
    """A difference of accuracies in points, with its interval and what else stands in the brackets."""
    gap, low, high = (f"{100 * found[key]:+z.1f}" for key in ("difference", "low", "high"))
    return f"{gap} points ({low} to {high}, {more})"


def seeds_of(run: Run) -> str:
    last = run.seed + run.profile.seeds - 1
    return f"seeds {run.seed} to {last}" if last > run.seed else f"seed {run.seed}"


# A column of the comparison: heading, what it needs, and how a row's cell reads.
COLUMNS: list[tuple[str, tuple[str, ...], Callable]] = [
    ("model", ("model",), lambda row: row["model"].replace("_", " ")),
    ("accuracy", ("accuracy", "accuracy_low", "accuracy_high"), interval),
    ("F1", ("f1",), lambda row: f"{row['f1']:.3f}"),
    ("active parameters, M", ("active_parameters",), lambda row: millions(row["active_parameters"])),
    ("of all, M", ("total_parameters",), lambda row: millions(row["total_parameters"])),
    ("sparsity", ("encoder_sparsity",), lambda row: percent(row["encoder_sparsity"], 0)),
    ("file, MB", ("file_bytes",), lambda row: millions(row["file_bytes"])),
    ("latency, ms", ("latency_ms",), lambda row: f"{row['latency_ms']:.1f}"),
    ("speed-up", ("speedup",), lambda row: f"{row['speedup']:.2f}"),
    ("peak memory, MB", ("peak_memory_bytes",), lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}"),
    ("p", ("p_value",), lambda row: p_value(row["p_value"])),
]


def columns_of(table: pd.DataFrame, headings: tuple[str, ...] = ()) -> list[tuple[str, str, Callable]]:
    """Heading, the column that it sorts by, and the cell of what a table can fill, of all columns or of some."""
    wanted = [column for column in COLUMNS if not headings or column[0] in headings]
    return [(heading, needs[0], cell) for heading, needs, cell in wanted if set(needs) <= set(table.columns)]


def comparison_cells(run: Run, headings: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the comparison as texts, of all columns or of some; none before notebook 06 has run."""
    if not has_comparison(run):
        return [], []
    table = run.load_table("comparison")
    columns = columns_of(table, headings)
    rows = [[cell(row) for *_, cell in columns] for row in table.to_dict("records")]
    return [heading for heading, *_ in columns], rows


def has_comparison(run: Run) -> bool:
    return (run.reports / "tables" / "comparison.csv").is_file()


def against_counting(found: dict) -> str:
    """How the fine-tuned model stands to TF-IDF, which it has to say also where it does not beat it."""
    gap, over = found["against_tfidf"], found["tfidf"]["seeds"]
    more = p_equals(gap["p_value"]) + (f"; over {over} seeds" if over > 1 else "")
    return (
        f"TF-IDF with logistic regression, trained on the same reviews, gets {percent(found['tfidf']['accuracy'])}; "
        f"against it the fine-tuned model is at {in_points(gap, more)}."
    )


def headline(results: dict) -> str:
    """What the comparison found, in a few sentences; empty before notebook 06 has run."""
    found = results.get("comparison", {})
    if not {*LEADING, "test_reviews", "tfidf", "against_tfidf"} <= found.keys():
        return ""
    dense, sparse, student, compressed = (found[name] for name in LEADING)
    return (
        f"On {found['test_reviews']:,} test reviews the fine-tuned model gets {interval(dense)} right. With "
        f"{percent(sparse['encoder_sparsity'], 0)} of its block weights removed, the sparse model gets "
        f"{interval(sparse)}, runs {sparse['speedup']:.1f} times as fast and takes {millions(sparse['file_bytes'])} MB "
        f"on disk instead of {millions(dense['file_bytes'])}. The best student gets {interval(student)} and runs "
        f"{student['speedup']:.1f} times as fast. With everything at once (shallow, pruned, low-rank embedding, int8) "
        f"it gets {interval(compressed)}, runs {compressed['speedup']:.1f} times as fast and takes "
        f"{millions(compressed['file_bytes'])} MB. {against_counting(found)}"
    )


def finding(results: dict) -> str:
    """The finding in Markdown; empty before notebook 06 has run."""
    promised = [metric.removeprefix("finding.") for metric in STAGES["06_comparison"].metrics if "finding." in metric]
    if not set(promised) <= results.get("finding", {}).keys():
        return ""
    return finding_text(results["finding"])


def reference() -> str:
    """The finding of profile thorough in Markdown, where its report is at hand; else empty."""
    return finding(open_run(get_profile("thorough")).results())


# --- the comparison on the page ---


def gains(model: dict, dense: dict) -> list[str]:
    """What a model of the headline costs and buys against the dense one, a few words each."""
    said = []
    if model["encoder_sparsity"] > 0:
        said.append(f"{percent(model['encoder_sparsity'], 0)} of the block weights removed")
    if model is dense:
        said.append("the model that the others are measured against")
    else:
        points = f"{100 * (model['accuracy'] - dense['accuracy']):+z.1f}"
        said.append(f"{model['speedup']:.2f} times the speed")
        p = p_equals(model["p_value"]).replace(" ", "\N{NO-BREAK SPACE}")
        said.append(f"{points} points to the dense model, {p}")
    return [*said, f"{millions(model['file_bytes'])} MB on disk"]


def context(results: dict) -> str:
    """What one has to know beside the headline's numbers: the seed, the control, and counting words."""
    found, said = results.get("comparison", {}), []
    if "test_reviews" in found:
        said.append(f"On {found['test_reviews']:,} test reviews, each accuracy with its 95 % interval.")
        said += ["Models of the first seed."] * (results["run"]["profile"]["seeds"] > 1)
    if "control" in found:
        said.append(f"The same extra training without pruning leaves the dense model at {interval(found['control'])}.")
    if {"tfidf", "against_tfidf"} <= found.keys():
        said.append(against_counting(found))
    return " ".join(said)


def spell(value) -> str:
    """A metric as a reader would write it; nested ones as "key value, key value"."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {spell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(spell, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def all_numbers(results: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every section of ``results.json`` that holds metrics: its name, and each metric's name and value in words."""
    return [
        (name.replace("_", " "), [(metric.replace("_", " "), spell(value)) for metric, value in metrics.items()])
        for name, metrics in results.items()
        if name not in ("captions", "run") and metrics
    ]


def facts(run: Run, about: dict) -> list[tuple[str, str]]:
    """What made a run: versions, seed, revision and every setting of the profile, in words."""
    said = [(name, spell(value)) for name, value in about.get("versions", {}).items()]
    said += [("seed", str(run.seed)), ("revision", about.get("revision", "unknown"))]
    return said + [(name.replace("_", " "), spell(value)) for name, value in about.get("profile", {}).items()]


def in_time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}"
