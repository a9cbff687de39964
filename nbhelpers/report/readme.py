"""The generated parts of the README, between its markers: the results, and the measurements of ``nbhelpers.tools``."""

from pathlib import Path

import pandas as pd

from nbhelpers.profiles import get_profile
from nbhelpers.report.chapters import STAGES, in_order
from nbhelpers.report.style import label
from nbhelpers.report.words import (
    LEGEND,
    comparison_cells,
    finding,
    gigabytes,
    headline,
    in_points,
    in_time,
    interval,
    millions,
    p_equals,
    reference,
    seeds_of,
)
from nbhelpers.system.files import write_text
from nbhelpers.workspace import Run, WorkspaceError, open_run

README = Path(__file__).parents[2] / "README.md"
RESULTS = ("<!-- generated:start -->", "<!-- generated:end -->")
FRONT = ("<!-- front:start -->", "<!-- front:end -->")
MEASURED = ("<!-- measured:start -->", "<!-- measured:end -->")
LABELS = ("<!-- labels:start -->", "<!-- labels:end -->")
BENCHMARK = README.parent / "reports" / "benchmark"
SETTINGS = README.parent / "reports" / "settings"
README_FRONT, README_FIGURES = "06_accuracy_latency", ("03_recovered", "06_rivals")
# Of the comparison's columns, what a second table says.
IN_SHORT = ("model", "accuracy", "sparsity", "file, MB", "speed-up", "p")


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table in Markdown; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def made_with(run: Run, results: dict) -> str:
    """Return profile, seeds, size and computing time of a run, and the devices that it ran on."""
    parameters = results["fine_tuning"]["total_parameters"]
    made = f"profile `{run.profile.name}`, {seeds_of(run)}, a model of {millions(parameters)}M parameters"
    made += f", {results['run']['versions']['device']}"
    if "effort" not in results:
        return made
    effort = results["effort"]
    shares = sorted(effort.get("device_minutes", {}).items(), key=lambda item: -item[1])
    if len(shares) < 2:
        return f"{made}; {in_time(effort['process_minutes'])} of one process's computing, on {effort['cores']} cores"
    parts = [f"{in_time(minutes)} on {device}" for device, minutes in shares]
    return f"{made}, on which all times were measured; of one process's computing {' and '.join(parts)}"


def figure_lines(run: Run, name: str) -> list[str]:
    """Return a figure and its caption in Markdown. Raises ``WorkspaceError`` where it is missing."""
    path = run.reports / "figures" / f"{name}.png"
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: run notebook {name[:2]}")
    caption = run.results().get("captions", {}).get(name, name.replace("_", " "))
    return [f"![{caption}](reports/{run.reports.name}/figures/{name}.png)", "", caption, ""]


def front_block(run: Run) -> str:
    """Return the headline and one figure. Raises ``WorkspaceError`` before notebook 06."""
    text = headline(run.results())
    if not text:
        raise WorkspaceError(f"{run.reports} has no comparison: run notebook 06")
    return "\n".join([text, "", *figure_lines(run, README_FRONT)]).strip()


def comparison_table(run: Run, headings: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the comparison as a table, of all columns or of some; none before notebook 06 has run."""
    header, rows = comparison_cells(run, headings)
    return markdown_table(header, [[text for text, _ in row] for row in rows]) if rows else []


def readme_block(run: Run) -> str:
    """Return the README's results. Raises ``WorkspaceError`` when the run lacks something that they show."""
    table = comparison_table(run)
    results = run.results()
    if not table or not finding(results):
        raise WorkspaceError(f"{run.reports} has no comparison or no finding: run notebook 06")
    lines = ["### The finding", "", finding(results), ""]
    for name in README_FIGURES:
        lines += figure_lines(run, name)
    lines += ["### Every model, side by side", "", *table, ""]
    lines.append(f"{LEGEND} Models of the first seed; {made_with(run, results)}.")
    return "\n".join(lines + default_run(run))


def default_run(leader: Run) -> list[str]:
    """Return the results of the default run in short, where another run leads and the default has results too."""
    run = open_run(get_profile("quick"))
    table = comparison_table(run, IN_SHORT)
    if leader.profile.name == "quick" or not table:
        return []
    took = run.results().get("effort", {}).get("run_minutes")
    about = f"The default run, {made_with(run, run.results())}{f' and {in_time(took)} in all' if took else ''}:"
    return ["", "### The default run", "", about, "", *table]


def leading_profile() -> str:
    """Return the profile that the README leads with: thorough where its report has a finding, and otherwise quick."""
    return "thorough" if reference() else "quick"


def measured_table(path: Path) -> pd.DataFrame:
    """Return a table that ``nbhelpers.tools`` has left in reports. Raises ``WorkspaceError`` where it is missing."""
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: see the README on how it is measured")
    return pd.read_csv(path)


def trainer_line(part: pd.DataFrame) -> str:
    """Return the speed of training and prediction of one shape, compared with ``transformers.Trainer``."""
    about, comparisons = part.iloc[0], []
    step = about["seconds"] * about["batch_size"] / about["reviews"]
    for row in part[part["name"] != "ours"].to_dict("records"):
        task = {"train": "training", "predict": "prediction"}[row["task"]]
        quartiles = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        comparisons.append(f"{task} takes `{row['name']}` {row['speedup']:.2f} times as long ({quartiles})")
    return (
        f"- `{about['shape']}`, {about['reviews']} reviews of at most {about['length']} tokens, batches of "
        f"{about['batch_size']}, {about['precision']}: {step:.2g} s a step; {'; '.join(comparisons)}."
    )


def selection_line(table: pd.DataFrame) -> str:
    """Return the cost of scores, thresholds and masks, compared with ``torch.nn.utils.prune``."""
    ours, other, merge = (table.set_index("engine").loc[name] for name in ("ours", "torch", "merge"))

    def cost(row) -> str:
        return f"{row['seconds']:.1f} s and {gigabytes(row['extra_bytes'])} GB"

    return (
        f"- {ours['weights']:,.0f} weights scored, thresholded and masked: {cost(ours)}. `torch.nn.utils.prune`: "
        f"{cost(other)}, {other['times_ours']:.0f} times as long. By the merge of three criteria, whose scores count: "
        f"{cost(merge)}."
    )


def full_size_block() -> str:
    """Return the memory of every stage at the size of GPT-2, and the comparisons with other tools."""
    names = ("full_size", "training", "selection")
    stages, training, selection = (measured_table(BENCHMARK / f"{name}.csv") for name in names)
    rows = [
        [row["notebook"].replace("_", " "), gigabytes(row["peak_memory_bytes"])] for row in stages.to_dict("records")
    ]
    about = f"On {stages['device'].iloc[0]}; memory is that of the notebook's kernel."
    missing = [stage.name.replace("_", " ") for stage in in_order(STAGES) if stage.name not in set(stages["notebook"])]
    about += f" Not measured: {', '.join(missing)}." if missing else ""
    lines = [*markdown_table(["notebook", "memory, GB"], rows), "", about, ""]
    lines += [trainer_line(part) for _, part in training.groupby("shape", sort=False)]
    return "\n".join([*lines, selection_line(selection)])


def best_trial_line(trials: pd.DataFrame, start: str) -> str:
    """Return the best settings of a start, and how much the trials differ."""
    rows = trials[trials["start"] == start]
    accuracy = rows["accuracy"]
    best = rows.loc[accuracy.idxmax()]  # of equals the first, as ``search.best_settings`` takes it
    settings = f"learning rate {best['learning_rate']:g}, {best['epochs']} epochs, dropout {best['dropout']:g}"
    settings += f", layer decay {best['layer_decay']:g}, {best['prefix_share']:.0%} of the loss on the way"
    return (
        f"- {start.replace('_', ' ')}: {interval(best)} on validation with {settings}; median of the trials "
        f"{100 * accuracy.median():.1f} %, worst {100 * accuracy.min():.1f} %."
    )


def labels_block() -> str:
    """Return accuracy by number of labels with and without pre-training, and the best trials."""
    labels = measured_table(SETTINGS / "labels.csv")
    header = ["labels", "model", "test accuracy", "to TF-IDF", "minutes"]
    rows = [
        [
            f"{row['labels']:,}",
            label(row["model"]),
            interval(row),
            "" if row["model"] == "tfidf" else in_points(difference_of(row), p_equals(row["p_value"])),
            "" if pd.isna(row["minutes"]) else f"{row['minutes']:.{0 if row['minutes'] >= 10 else 1}f}",
        ]
        for row in labels.to_dict("records")
    ]
    tests, tokens = labels["n"].iloc[0], labels["max_tokens"].iloc[0]
    about = f"On {tests:,} test reviews, of which a model reads at most {tokens} tokens; minutes are those of one "
    about += f"fine-tuning beside others, on {' or '.join(labels['device'].dropna().unique())}."
    lines = [*markdown_table(header, rows), "", about, ""]
    if labels["labels"].nunique() > 1:
        lines += ["![Test accuracy over the number of labelled reviews.](reports/settings/labels.png)", ""]
    for path in sorted({*SETTINGS.glob("*.csv")} - {SETTINGS / "labels.csv"}):
        trials = pd.read_csv(path)
        first = trials.iloc[0]
        about = f"The trials of `{path.stem}`: {trials['trial'].nunique()} of each start, {first['labels']:,} labels, "
        about += f"at most {first['max_tokens']} tokens, judged on {first['n']:,} validation reviews."
        lines += [about, "", *(best_trial_line(trials, start) for start in trials["start"].unique())]
    return "\n".join(lines)


def difference_of(row: dict) -> dict:
    """Return the difference of a row of ``labels.csv``, with the keys of ``evaluation.paired_difference``."""
    return {"difference": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}


def write_between(path: Path, blocks: dict[tuple[str, str], str]) -> None:
    """Write blocks between the markers of a file, all or none. Raises ``WorkspaceError`` when it lacks a marker."""
    text = path.read_text(encoding="utf-8")
    for (start, end), block in blocks.items():
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise WorkspaceError(f"{path} needs the lines {start} and {end}, once each and in this order")
        text = f"{text.split(start)[0]}{start}\n{block}\n{end}{text.split(end)[1]}"
    write_text(path, text)


def write_readme(run: Run, path: Path = README) -> None:
    """Write the results of a run into the README. Raises ``WorkspaceError`` when one of the two lacks something."""
    write_between(path, {FRONT: front_block(run), RESULTS: readme_block(run)})


def write_measured(path: Path = README) -> None:
    """Write the measurements of ``nbhelpers.tools`` into the README. Raises ``WorkspaceError`` where one is missing."""
    write_between(path, {MEASURED: full_size_block(), LABELS: labels_block()})
