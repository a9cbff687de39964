"""Numbers and findings in sentences."""

from collections.abc import Callable

import pandas as pd

from nbhelpers.evaluation import is_significant
from nbhelpers.profiles import get_profile
from nbhelpers.report.chapters import STAGES
from nbhelpers.report.style import label
from nbhelpers.sparse.speed import IN_BLOCKS
from nbhelpers.workspace import Run, open_run


def points(found: dict) -> str:
    """Return a paired difference as ``"+0.4 points (-0.5 to +1.3, p = 0.4)"``, p adjusted for the number of tests."""
    p = "p < 0.001" if found["p_adjusted"] < 0.001 else f"p = {found['p_adjusted']:.2g}"
    return in_points(found, p)


def verdict(found: dict) -> str:
    """Return in words if a paired difference is statistically significant."""
    if not is_significant(found):
        return "no significant difference"
    return "significantly better" if found["difference"] > 0 else "significantly worse"


def finding_text(found: dict) -> str:
    """Return the finding on one page, in Markdown."""
    share, recovery, dense = f"{found['sparsity']:.0%}", found["recovery"], found["dense"]["accuracy"]
    small = found["compressed"]
    layers = "1 layer left" if small["layers"] == 1 else f"{small['layers']} layers left"
    best, own, single, comparator = (label(found[key]) for key in ("best", "own", "single", "comparator_name"))
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    leads = [row for row in found["leaders"] if is_significant(row)]
    leaders = ", ".join(
        f"{label(row['best'])} at {row['sparsity']:.0%} ({row['accuracy']:.1%}; {points(row)} to "
        f"{label(row['second'])})"
        for row in found["leaders"]
    )
    further = "".join(
        f"; {row['sparsity']:.0%} ({label(row['best'])}) {points(row)}: {verdict(row)}" for row in found["further"]
    )
    lengths = "; ".join(f"after {row['steps']:,} steps {points(row)}" for row in found["budget"])
    return "\n".join(
        [
            "Everything was chosen on validation reviews; every difference below is taken on the same "
            f"{found['test_reviews']:,} test reviews, {seeds} (difference, 95 % interval, exact paired p, corrected).",
            "",
            "- **Which score wins where.** Best on validation after recovery, accuracy and lead on the test reviews: "
            f"{leaders}. Significant leads: {len(leads)} of {len(found['leaders'])}.",
            f"- **Do the three criteria together beat the best of them?** At {share}, the merge against {single}: "
            f"{points(found['merge'])}: {verdict(found['merge'])}.",
            f"- **And a score of the literature?** {comparator.capitalize()} against {own}: "
            f"{points(found['comparator'])}: {verdict(found['comparator'])}.",
            f"- **What recovery brings back.** {best.capitalize()} at {share} (validation): {recovery['before']:.1%} "
            f"right after pruning, {recovery['after']:.1%} after recovery.",
            f"- **What the dense control says.** The same extra steps change the dense model ({dense:.1%}) by "
            f"{points(found['control'])}. Compared with that control, removing {share} of the block weights changes "
            f"accuracy by {points(found['kept'])}: {verdict(found['kept'])}{further}.",
            f"- **How many steps it takes.** {best.capitalize()} at {share} against the control with as many steps: "
            f"{lengths}.",
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
    "share of the block weights. Speed-up and p (exact paired test) are against the fine-tuned dense model."
)
PACKED = "Against packed: the speed against the dense model without padding and without tokens that nobody reads."
# The models of the headline: the key in results.json, and what the page calls them.
LEADING = {"dense": "Fine-tuned, dense", "sparse": "Pruned and sparse", "student": "Best student"}
LEADING |= {"compressed": "Everything at once"}

# --- numbers in words ---


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def interval(row) -> str:
    """Return the accuracy of a row or dict with its interval, in percent."""
    return f"{percent(row['accuracy'])} ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"


def millions(value: float) -> str:
    return f"{value / 1e6:.2f}"


def p_value(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def in_points(found: dict, p: str) -> str:
    """Return a difference of accuracies in points, with its interval and its p."""
    gap, low, high = (f"{100 * found[key]:+z.1f}" for key in ("difference", "low", "high"))
    return f"{gap} points ({low} to {high}, {p})"


def seeds_of(run: Run) -> str:
    last = run.seed + run.profile.seeds - 1
    return f"seeds {run.seed} to {last}" if last > run.seed else f"seed {run.seed}"


# A column of the comparison: heading, the key that it is sorted by, and how a row's cell reads.
COLUMNS: list[tuple[str, str, Callable]] = [
    ("model", "model", lambda row: row["model"].replace("_", " ")),
    ("accuracy", "accuracy", interval),
    ("F1", "f1", lambda row: f"{row['f1']:.3f}"),
    ("active parameters, M", "active_parameters", lambda row: millions(row["active_parameters"])),
    ("of all, M", "total_parameters", lambda row: millions(row["total_parameters"])),
    ("sparsity", "encoder_sparsity", lambda row: percent(row["encoder_sparsity"], 0)),
    ("file, MB", "file_bytes", lambda row: millions(row["file_bytes"])),
    ("training steps", "train_steps", lambda row: f"{row['train_steps']:,}"),
    ("latency, ms", "latency_ms", lambda row: f"{row['latency_ms']:.1f}"),
    ("speed-up", "speedup", lambda row: f"{row['speedup']:.2f}"),
    ("against packed", "speedup_packed", lambda row: f"{row['speedup_packed']:.2f}"),
    ("peak memory, MB", "peak_memory_bytes", lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}"),
    ("p", "p_value", lambda row: p_value(row["p_value"])),
]


def comparison_cells(run: Run, headings: tuple[str, ...] = ()) -> tuple[list[str], list[list[tuple]]]:
    """Return headings and rows of the comparison, of all its columns or of some; none before notebook 06 has run.

    A cell is its text and the value that it is sorted by.
    """
    if not (run.reports / "tables" / "comparison.csv").is_file():
        return [], []
    table = run.load_table("comparison")
    columns = [column for column in COLUMNS if column[1] in table and (not headings or column[0] in headings)]
    rows = [
        [(write(row), "" if pd.isna(row[key]) else row[key]) for _, key, write in columns]
        for row in table.to_dict("records")
    ]
    return [heading for heading, *_ in columns], rows


def against_counting(found: dict) -> str:
    """Return how the fine-tuned model compares with TF-IDF."""
    gap, seeds = found["against_tfidf"], found["tfidf"]["seeds"]
    p = p_equals(gap["p_value"]) + (f"; over {seeds} seeds" if seeds > 1 else "")
    return (
        f"TF-IDF with logistic regression, trained on the same reviews, gets {percent(found['tfidf']['accuracy'])}; "
        f"against it the fine-tuned model is at {in_points(gap, p)}."
    )


def headline(results: dict) -> str:
    """Return the result of the comparison in a few sentences; empty before notebook 06 has run."""
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
    """Return the finding in Markdown; empty before notebook 06 has run."""
    promised = [metric.removeprefix("finding.") for metric in STAGES["06_comparison"].metrics if "finding." in metric]
    if not set(promised) <= results.get("finding", {}).keys():
        return ""
    return finding_text(results["finding"])


def reference() -> str:
    """Return the finding of profile thorough in Markdown, or "" where it has no report."""
    return finding(open_run(get_profile("thorough")).results())


# --- the words of the page ---


def gains(model: dict, dense: dict) -> list[str]:
    """Return what a model of the headline costs and saves compared with the dense one, in a few words each."""
    parts = []
    if model["encoder_sparsity"] > 0:
        parts.append(f"{percent(model['encoder_sparsity'], 0)} of the block weights removed")
    if model is dense:
        parts.append("the model that the others are measured against")
    else:
        points = f"{100 * (model['accuracy'] - dense['accuracy']):+z.1f}"
        parts.append(f"{model['speedup']:.2f} times the speed")
        p = p_equals(model["p_value"]).replace(" ", "\N{NO-BREAK SPACE}")
        parts.append(f"{points} points to the dense model, {p}")
    return [*parts, f"{millions(model['file_bytes'])} MB on disk"]


def context(results: dict) -> str:
    """Return what is needed to read the headline's numbers: the seed, the control, and TF-IDF."""
    found, parts = results.get("comparison", {}), []
    if "test_reviews" in found:
        parts.append(f"On {found['test_reviews']:,} test reviews, each accuracy with its 95 % interval.")
        parts += ["Models of the first seed."] * (results["run"]["profile"]["seeds"] > 1)
    if "control" in found:
        parts.append(f"The same extra training without pruning leaves the dense model at {interval(found['control'])}.")
    if {"tfidf", "against_tfidf"} <= found.keys():
        parts.append(against_counting(found))
    return " ".join(parts)


def spell(value) -> str:
    """Return a metric as text; a nested one as "key value, key value"."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {spell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(spell, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def all_numbers(results: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every section of ``results.json`` that holds metrics: its name, and its metrics and values as text."""
    return [
        (name.replace("_", " "), [(metric.replace("_", " "), spell(value)) for metric, value in metrics.items()])
        for name, metrics in results.items()
        if name not in ("captions", "run") and metrics
    ]


def facts(run: Run, about: dict) -> list[tuple[str, str]]:
    """Return what a run was made with: versions, seed, revision and every setting of the profile, as text."""
    parts = [(name, spell(value)) for name, value in about.get("versions", {}).items()]
    parts += [("seed", str(run.seed)), ("revision", about.get("revision", "unknown"))]
    return parts + [(name.replace("_", " "), spell(value)) for name, value in about.get("profile", {}).items()]


def in_time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}"


def passes(even: pd.DataFrame, engine: str, against: str) -> str:
    """Return from which sparsity on an engine is faster than a dense product, in words; even: of ``break_even``."""
    found = even[(even["engine"] == engine) & (even["against"] == against)]["sparsity"]
    low, high = found.min(), found.max()
    if found.isna().all():
        return "at none of the sparsities measured"
    where = f"from {low:.0%} on" if f"{low:.0%}" == f"{high:.0%}" else f"from {low:.0%} to {high:.0%} on"
    return where + (f" in {found.notna().sum()} of {len(found)} shapes" if found.isna().any() else "")


def engines_text(table: pd.DataFrame, even: pd.DataFrame) -> str:
    """Return what the speeds of the engines show; table: of ``compare_engines``; even: of ``break_even``."""
    int8 = table[table["name"] == "int8"]["speedup"]
    sparse = f"Sparse products in fp32 pass fp32 dense {passes(even, 'numba', 'dense')}"
    if int8.empty:
        return f"{sparse}. This machine has no int8 product."
    blocks = f", int8 in blocks of four {passes(even, IN_BLOCKS, 'int8')}" if IN_BLOCKS in set(table["name"]) else ""
    first = f"int8 dense is {int8.min():.1f} to {int8.max():.1f} times as fast as fp32 dense, without a zero"
    return f"{first}. {sparse} and int8 dense {passes(even, 'numba', 'int8')}{blocks}."
