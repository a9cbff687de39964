"""The generated parts of the README, between its markers: the results, and what commands of their own have measured."""

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


# --- the README ---


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def made_with(run: Run, results: dict) -> str:
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


def pictured(run: Run, name: str) -> list[str]:
    """A figure and its reading in Markdown. Raises ``WorkspaceError`` where it is missing."""
    path = run.reports / "figures" / f"{name}.png"
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: run notebook {name[:2]}")
    caption = run.results().get("captions", {}).get(name, name.replace("_", " "))
    return [f"![{caption}](reports/{run.reports.name}/figures/{name}.png)", "", caption, ""]


def front_block(run: Run) -> str:
    """What the README begins with: the headline and one picture. Raises ``WorkspaceError`` before notebook 06."""
    said = headline(run.results())
    if not said:
        raise WorkspaceError(f"{run.reports} has no comparison: run notebook 06")
    return "\n".join([said, "", *pictured(run, README_FRONT)]).strip()


def readme_block(run: Run) -> str:
    """The README's results. Raises ``WorkspaceError`` when the run lacks something that they show."""
    header, rows = comparison_cells(run)
    results = run.results()
    if not rows or not finding(results):
        raise WorkspaceError(f"{run.reports} has no comparison or no finding: run notebook 06")
    lines = ["### The finding", "", finding(results), ""]
    for name in README_FIGURES:
        lines += pictured(run, name)
    lines += ["### Every model, side by side", "", *markdown_table(header, rows), ""]
    lines.append(f"{LEGEND} Models of the first seed; {made_with(run, results)}.")
    return "\n".join(lines + default_run(run))


def default_run(leader: Run) -> list[str]:
    """What the default run shows, in short, where another run leads and the default has been compared too."""
    run = open_run(get_profile("quick"))
    header, rows = comparison_cells(run, IN_SHORT)
    if leader.profile.name == "quick" or not rows:
        return []
    about = f"The default run, {made_with(run, run.results())}, on your machine in minutes:"
    return ["", "### The default run", "", about, "", *markdown_table(header, rows)]


def leading_profile() -> str:
    """The profile that the README leads with: thorough where its report has a finding, and otherwise quick."""
    return "thorough" if reference() else "quick"


def measured_table(path: Path) -> pd.DataFrame:
    """A table that a command of its own has left in reports. Raises ``WorkspaceError`` where it is missing."""
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: see the README on how it is measured")
    return pd.read_csv(path)


def trainer_line(part: pd.DataFrame) -> str:
    """What was measured of training and prediction of one shape, against ``transformers.Trainer``."""
    about, said = part.iloc[0], []
    step = about["seconds"] * about["batch_size"] / about["reviews"]
    for row in part[part["name"] != "ours"].to_dict("records"):
        task = {"train": "training", "predict": "prediction"}[row["task"]]
        range_ = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        said.append(f"{task} takes `{row['name']}` {row['speedup']:.2f} times as long ({range_})")
    return (
        f"- `{about['shape']}`, {about['reviews']} reviews of at most {about['length']} tokens, batches of "
        f"{about['batch_size']}, {about['precision']}: {step:.2g} s a step; {'; '.join(said)}."
    )


def selection_line(table: pd.DataFrame) -> str:
    """What was measured of scores, thresholds and masks, against ``torch.nn.utils.prune``."""
    ours, other, merge = (table.set_index("engine").loc[name] for name in ("ours", "torch", "merge"))

    def cost(row) -> str:
        return f"{row['seconds']:.1f} s and {gigabytes(row['extra_bytes'])} GB"

    return (
        f"- {ours['weights']:,.0f} weights scored, thresholded and masked: {cost(ours)}. `torch.nn.utils.prune`: "
        f"{cost(other)}, {other['times_ours']:.0f} times as long. By the merge of three criteria, whose scores count: "
        f"{cost(merge)}."
    )


def full_size_block() -> str:
    """What a run of every stage at the size of GPT-2 took, and what was measured against other tools, in words."""
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
    """The best settings of a start, in words, and how much the trials differ."""
    rows = trials[trials["start"] == start]
    accuracy = rows["accuracy"]
    best = rows.loc[accuracy.idxmax()]  # of equals the first, as ``search.best_settings`` takes it
    said = f"learning rate {best['learning_rate']:g}, {best['epochs']} epochs, dropout {best['dropout']:g}"
    said += f", layer decay {best['layer_decay']:g}, {best['prefix_share']:.0%} of the loss on the way"
    return (
        f"- {start.replace('_', ' ')}: {interval(best)} on validation with {said}; median of the trials "
        f"{100 * accuracy.median():.1f} %, worst {100 * accuracy.min():.1f} %."
    )


def labels_block() -> str:
    """What pre-training is worth at how many labels, and the best trials, in words and a figure."""
    labels = measured_table(SETTINGS / "labels.csv")
    header = ["labels", "model", "test accuracy", "to TF-IDF", "minutes"]
    rows = [
        [
            f"{row['labels']:,}",
            label(row["model"]),
            interval(row),
            "" if row["model"] == "tfidf" else in_points(found_of(row), p_equals(row["p_value"])),
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
        one = trials.iloc[0]
        about = f"The trials of `{path.stem}`: {trials['trial'].nunique()} of each start, {one['labels']:,} labels, "
        about += f"at most {one['max_tokens']} tokens, judged on {one['n']:,} validation reviews."
        lines += [about, "", *(best_trial_line(trials, start) for start in trials["start"].unique())]
    return "\n".join(lines)


def found_of(row: dict) -> dict:
    """The difference of a row of ``labels.csv``, with the keys of ``evaluation.paired_difference``."""
    return {"difference": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}


def write_between(path: Path, blocks: dict[tuple[str, str], str]) -> None:
    """Put blocks between the marker lines of a file, all or none. Raises ``WorkspaceError`` when it lacks a marker."""
    text = path.read_text(encoding="utf-8")
    for (start, end), block in blocks.items():
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise WorkspaceError(f"{path} needs the lines {start} and {end}, once each and in this order")
        text = f"{text.split(start)[0]}{start}\n{block}\n{end}{text.split(end)[1]}"
    write_text(path, text)


def write_readme(run: Run, path: Path = README) -> None:
    """Write what a run has shown into the README. Raises ``WorkspaceError`` when one of the two lacks something."""
    write_between(path, {FRONT: front_block(run), RESULTS: readme_block(run)})


def write_measured(path: Path = README) -> None:
    """Write what commands of their own have measured into the README. Raises ``WorkspaceError`` where it is missing."""
    write_between(path, {MEASURED: full_size_block(), LABELS: labels_block()})
