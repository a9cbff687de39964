"""What people look at: the report's page, the notebooks as HTML, and the part of the README that is generated.

python -m nbhelpers.page index  [--profile P --seed N]      reports/<profile>/index.html
python -m nbhelpers.page readme [--profile P --seed N]      README.md, between its markers

Without --profile, the page is that of quick; the README leads with thorough where its report has a finding.
"""

import argparse
import base64
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
import mistune
import pandas as pd
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from nbconvert import HTMLExporter

from nbhelpers.profiles import ProfileError, get_profile
from nbhelpers.stages import STAGES, Stage, in_order, promised_files
from nbhelpers.workspace import Run, WorkspaceError, open_run, write_text

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- generated:start -->", "<!-- generated:end -->"
MEASURED = ("<!-- measured:start -->", "<!-- measured:end -->")
BENCHMARK = README.parent / "reports" / "benchmark"
TITLE = "What can a language model live without?"
README_FIGURES = ("03_recovered", "06_rivals", "06_accuracy_latency")
LEGEND = (
    "Accuracy with its 95 % interval. Active parameters are non-zero block weights plus all others; sparsity is a "
    "share of the block weights. Speed-up and p (McNemar's exact test) are against the fine-tuned dense model."
)

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


# Of these, what a second table says.
IN_SHORT = ("model", "accuracy", "sparsity", "file, MB", "speed-up", "p")


def comparison_cells(run: Run, headings: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the comparison as texts, of all columns or of some; none before notebook 06 has run."""
    if not (run.reports / "tables" / "comparison.csv").is_file():
        return [], []
    table = run.load_table("comparison")
    wanted = [column for column in COLUMNS if not headings or column[0] in headings]
    columns = [(heading, cell) for heading, needs, cell in wanted if set(needs) <= set(table.columns)]
    rows = [[cell(row) for _, cell in columns] for row in table.to_dict("records")]
    return [heading for heading, _ in columns], rows


def against_counting(found: dict) -> str:
    """How the fine-tuned model stands to TF-IDF, which it has to say also where it does not beat it."""
    gap, p, over = found["against_tfidf"], p_value(found["against_tfidf"]["p_value"]), found["tfidf"]["seeds"]
    span = f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}, p {p if p.startswith('<') else f'= {p}'}"
    return (
        f"TF-IDF with logistic regression, trained on the same reviews, gets {percent(found['tfidf']['accuracy'])}; "
        f"against it the fine-tuned model is at {100 * gap['difference']:+.1f} points ({span}"
        f"{f'; over {over} seeds' if over > 1 else ''})."
    )


def headline(results: dict) -> str:
    """What the comparison found, in a few sentences; empty before notebook 06 has run."""
    found = results.get("comparison", {})
    if not {"dense", "sparse", "student", "test_reviews", "tfidf", "against_tfidf"} <= found.keys():
        return ""
    dense, sparse, student = found["dense"], found["sparse"], found["student"]
    return (
        f"On {found['test_reviews']:,} test reviews the fine-tuned model gets {interval(dense)} right. With "
        f"{percent(sparse['encoder_sparsity'], 0)} of its block weights removed, the sparse model gets "
        f"{interval(sparse)}, runs {sparse['speedup']:.1f} times as fast and takes {millions(sparse['file_bytes'])} MB "
        f"on disk instead of {millions(dense['file_bytes'])}. The best student gets {interval(student)} and runs "
        f"{student['speedup']:.1f} times as fast. {against_counting(found)}"
    )


def finding(results: dict) -> str:
    """The finding in Markdown; empty before notebook 06 has run."""
    promised = [metric.removeprefix("finding.") for metric in STAGES["06_comparison"].metrics if "finding." in metric]
    if not set(promised) <= results.get("finding", {}).keys():
        return ""
    # Here and not above: it brings all of transformers, which the pipeline's --list does not need.
    from nbhelpers.comparison import finding_text

    return finding_text(results["finding"])


def cards(results: dict) -> list[tuple[str, str, str]]:
    """The headline's numbers: which model, its accuracy, and the interval with the speed-up."""
    found = results.get("comparison", {})
    names = {
        "dense": "fine-tuned, dense",
        "control": "dense, extra steps",
        "recovered": "pruned and recovered",
        "sparse": "sparse",
        "student": "best student",
    }
    shown = []
    for key, name in names.items():
        if key in found:
            model = found[key]
            span = f"{100 * model['accuracy_low']:.1f} to {100 * model['accuracy_high']:.1f}"
            speed = "" if key == "dense" else f"; {model['speedup']:.2f} times the speed"
            shown.append((name, percent(model["accuracy"]), span + speed))
    return shown


# --- the report's page ---


def chapter(run: Run, stage: Stage, captions: dict[str, str]) -> dict:
    """What the page shows of a stage: its question, its notebook and its figures in the order of their captions."""
    names = {path.stem for path in promised_files(run, stage) if path.suffix == ".png" and path.is_file()}
    order = [name for name in captions if name in names] + sorted(names - captions.keys())
    notebook = f"notebooks/{stage.name}.html"
    figures = [
        {
            "name": name.replace("_", " "),
            "caption": captions.get(name, ""),
            "data": base64.b64encode((run.reports / "figures" / f"{name}.png").read_bytes()).decode(),
        }
        for name in order
    ]
    return {
        "number": stage.number,
        "question": stage.question,
        "notebook": notebook if (run.reports / notebook).is_file() else "",
        "figures": figures,
    }


def spell(value) -> str:
    """A metric as a reader would write it; nested ones as "key value, key value"."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {spell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(spell, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_index(run: Run, stages: dict[str, Stage] | None = None) -> Path:
    """Write ``index.html`` of a run from what it has recorded so far."""
    results = run.results()
    about = results.get("run", {})
    header, rows = comparison_cells(run)
    chapters = [chapter(run, stage, results.get("captions", {})) for stage in in_order(stages or STAGES)]
    sections = [
        (name, [(metric.replace("_", " "), spell(value)) for metric, value in metrics.items()])
        for name, metrics in results.items()
        if name not in ("captions", "run") and metrics
    ]
    facts = [(name, spell(value)) for name, value in about.get("versions", {}).items()]
    facts += [("seed", run.seed), ("revision", about.get("revision", "unknown"))]
    facts += [(name.replace("_", " "), spell(value)) for name, value in about.get("profile", {}).items()]
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        source
    )
    text = template.render(
        title=TITLE,
        profile=run.profile.name,
        seed=run.seed,
        headline=headline(results),
        cards=cards(results),
        finding=mistune.create_markdown()(finding(results)),
        header=header,
        rows=rows,
        legend=LEGEND,
        chapters=[c for c in chapters if c["figures"] or c["notebook"]],
        sections=sections,
        facts=facts,
    )
    write_text(run.reports / "index.html", text)
    return run.reports / "index.html"


# --- notebooks as HTML ---


def formula_image(match: re.Match) -> str:
    """A displayed formula as an embedded SVG, so that the page needs no network; left as it is where it cannot be."""
    source = match[1].strip()
    image = io.BytesIO()
    try:
        mathtext.math_to_image(f"${source}$", image, prop=FontProperties(size=15), format="svg")
    except ValueError:
        return match[0]
    alt = source.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}">'


def notebook_html(notebook, title: str) -> str:
    """An executed notebook as one HTML file with everything embedded."""
    shown = notebook.copy()
    shown.cells = [cell.copy() for cell in notebook.cells]
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\$\$(.+?)\$\$", formula_image, cell.source, flags=re.DOTALL)
    exporter = HTMLExporter(template_name="lab", require_js_url="", mathjax_url="", mermaid_js_url="")
    text, _ = exporter.from_notebook_node(shown, resources={"metadata": {"name": title}})
    return text


# --- the README ---


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def made_with(run: Run, results: dict) -> str:
    seeds = f"seeds {run.seed} to {run.seed + run.profile.seeds - 1}" if run.profile.seeds > 1 else f"seed {run.seed}"
    return f"profile `{run.profile.name}`, {seeds}, {results['run']['versions']['device']}"


def readme_block(run: Run) -> str:
    """The generated part of the README. Raises ``WorkspaceError`` when the run lacks something that it shows."""
    header, rows = comparison_cells(run)
    results = run.results()
    if not rows or not headline(results) or not finding(results):
        raise WorkspaceError(f"{run.reports} has no comparison or no finding: run notebook 06")
    lines = [headline(results), "", "### The finding", "", finding(results), ""]
    for name in README_FIGURES:
        path = run.reports / "figures" / f"{name}.png"
        if not path.is_file():
            raise WorkspaceError(f"{path} is missing: run notebook {name[:2]}")
        caption = results.get("captions", {}).get(name, name.replace("_", " "))
        lines += [f"![{caption}](reports/{run.reports.name}/figures/{name}.png)", "", caption, ""]
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
    return "thorough" if finding(open_run(get_profile("thorough")).results()) else "quick"


def benchmark_table(name: str) -> pd.DataFrame:
    """A table of ``reports/benchmark``. Raises ``WorkspaceError`` where it is missing."""
    path = BENCHMARK / f"{name}.csv"
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: see the README on how it is measured")
    return pd.read_csv(path)


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}"


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
    stages, training, selection = (benchmark_table(name) for name in ("full_size", "training", "selection"))
    rows = [
        [row["notebook"].replace("_", " "), gigabytes(row["peak_memory_bytes"])] for row in stages.to_dict("records")
    ]
    about = f"On {stages['device'].iloc[0]}; memory is that of the notebook's kernel."
    missing = [stage.name.replace("_", " ") for stage in in_order(STAGES) if stage.name not in set(stages["notebook"])]
    about += f" Not measured: {', '.join(missing)}." if missing else ""
    lines = [*markdown_table(["notebook", "memory, GB"], rows), "", about, ""]
    lines += [trainer_line(part) for _, part in training.groupby("shape", sort=False)]
    return "\n".join([*lines, selection_line(selection)])


def write_between(path: Path, start: str, end: str, block: str) -> None:
    """Put a block between two marker lines of a file. Raises ``WorkspaceError`` when it has none."""
    text = path.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise WorkspaceError(f"{path} needs the lines {start} and {end}, once each and in this order")
    write_text(path, f"{text.split(start)[0]}{start}\n{block}\n{end}{text.split(end)[1]}")


def write_readme(run: Run, path: Path = README) -> None:
    """Write what a run has shown into the README. Raises ``WorkspaceError`` when one of the two lacks something."""
    write_between(path, START, END, readme_block(run))


def write_measured(path: Path = README) -> None:
    """Write what was measured at full size into the README. Raises ``WorkspaceError`` where that is missing."""
    write_between(path, *MEASURED, full_size_block())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.page", description="Write the report or the README.")
    parser.add_argument("what", choices=["index", "readme"])
    parser.add_argument("--profile")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        profile = options.profile or (leading_profile() if options.what == "readme" else "quick")
        run = open_run(get_profile(profile), options.seed)
        if options.what == "index":
            write_index(run)
        else:
            write_readme(run)
            write_measured()
    except (ProfileError, WorkspaceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
