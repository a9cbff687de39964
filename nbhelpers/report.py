"""The report's page: all that a run has shown, in one file that needs no network, ``reports/<profile>/index.html``.

Its template is page.html, with picture.html, page.css and page.js beside it. Everything reads without the script.
"""

import base64
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import jinja2
import mistune
import pandas as pd

from nbhelpers.profiles import get_profile
from nbhelpers.stages import STAGES, Stage, in_order, promised_files
from nbhelpers.workspace import Run, open_run, write_text

TITLE = "What can a language model live without?"
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
    # Here and not above: it brings all of transformers, which the pipeline's --list does not need.
    from nbhelpers.comparison import finding_text

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


def cards(results: dict) -> list[dict]:
    """The headline's models: name, look, accuracy, interval, gains, and places in % on a scale that all share."""
    found = results.get("comparison", {})
    shown = {name: found[key] for key, name in LEADING.items() if key in found}
    if not shown or "dense" not in found:
        return []
    # Here and not above: with the figures' style come seaborn and all of transformers, which the pipeline's --list does
    # not need.
    from nbhelpers.picture import look

    others = {"TF-IDF": found["tfidf"]["accuracy"]} if "tfidf" in found else {}
    low = min([model["accuracy_low"] for model in shown.values()] + [*others.values()]) - 0.01
    high = max([model["accuracy_high"] for model in shown.values()] + [*others.values()]) + 0.01

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return [
        {
            "name": name,
            "look": look(model["model"]),
            "accuracy": percent(model["accuracy"]),
            "interval": f"{100 * model['accuracy_low']:.1f} to {100 * model['accuracy_high']:.1f}",
            "gains": gains(model, found["dense"]),
            "places": [place(model[key]) for key in ("accuracy_low", "accuracy", "accuracy_high")],
            "others": {other: place(value) for other, value in others.items()},
        }
        for name, model in shown.items()
    ]


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


def comparison(run: Run, results: dict) -> dict:
    """What the page shows of the comparison: headings, models with their cells and looks, and the picture.

    Empty before notebook 06 has run.
    """
    if not has_comparison(run):
        return {"header": [], "models": [], "picture": None}
    from nbhelpers.picture import draw, look

    table = run.load_table("comparison")
    columns = columns_of(table)
    models = []
    for row in table.to_dict("records"):
        name, *cells = (cell(row) for *_, cell in columns)
        values = ["" if pd.isna(row[key]) else row[key] for _, key, _ in columns[1:]]
        models.append({"name": name, "look": look(row["model"]), "cells": list(zip(cells, values, strict=True))})
    tfidf = results.get("comparison", {}).get("tfidf")
    lines = {f"TF-IDF {percent(tfidf['accuracy'])}": tfidf["accuracy"]} if tfidf else {}
    return {"header": [heading for heading, *_ in columns], "models": models, "picture": draw(table, lines)}


def for_script(header: list[str], models: list[dict]) -> list[dict]:
    """What the page's script shows of a model: its name, and its numbers as [heading, text]."""
    return [
        {"name": model["name"], "numbers": list(zip(header[1:], (text for text, _ in model["cells"]), strict=True))}
        for model in models
    ]


# --- the rest of the page ---

markdown = mistune.create_markdown()  # of texts that hold no HTML: what looks like it is escaped


def figure(run: Run, name: str, caption: str) -> dict[str, str | int]:
    """A figure as the page embeds it: caption as text and as HTML, bytes in base 64, width and height in pixels."""
    data = (run.reports / "figures" / f"{name}.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return {
        "file": f"figures/{name}.png",
        "name": name.replace("_", " "),
        "text": caption.replace("`", ""),
        "caption": markdown(caption),
        "data": base64.b64encode(data).decode(),
        "width": width,
        "height": height,
    }


def chapter(run: Run, stage: Stage, captions: dict[str, str]) -> dict:
    """What the page shows of a stage: its question, its notebook and its figures in the order of their captions."""
    names = {path.stem for path in promised_files(run, stage) if path.suffix == ".png" and path.is_file()}
    order = [name for name in captions if name in names] + sorted(names - captions.keys())
    notebook = f"notebooks/{stage.name}.html"
    return {
        "number": stage.number,
        "name": stage.name[3:].replace("_", " ").capitalize(),
        "question": stage.question,
        "notebook": notebook if (run.reports / notebook).is_file() else "",
        "figures": [figure(run, name, captions.get(name, name.replace("_", " "))) for name in order],
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


def beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def allowed(text: str) -> str:
    """The source by which a Content-Security-Policy lets this very style or script run, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def template() -> jinja2.Template:
    """page.html, in which every text is escaped, also inside JSON, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("page.html")


def write_index(run: Run, stages: dict[str, Stage] | None = None) -> Path:
    """Write ``index.html`` of a run from what it has recorded so far."""
    results = run.results()
    chapters = [chapter(run, stage, results.get("captions", {})) for stage in in_order(stages or STAGES)]
    css, script = beside("page.css"), beside("page.js")
    compared = comparison(run, results)
    text = template().render(
        title=TITLE,
        profile=run.profile.name,
        seeds=seeds_of(run),
        css=css,
        script=script,
        allowed={"style": allowed(css), "script": allowed(script)},
        headline=headline(results),
        cards=cards(results),
        context=context(results),
        finding=markdown(finding(results)),
        legend=LEGEND,
        chapters=[c for c in chapters if c["figures"] or c["notebook"]],
        sections=all_numbers(results),
        facts=facts(run, results.get("run", {})),
        data=for_script(compared["header"], compared["models"]),
        **compared,
    )
    write_text(run.reports / "index.html", text)
    return run.reports / "index.html"
