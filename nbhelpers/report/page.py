"""The report's page: all results of a run in one file that needs no network, ``reports/<profile>/index.html``.

Its template is templates/page.html, with picture.html, page.css and page.js. Everything can be read without the script.
"""

import base64
import hashlib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import mistune
import pandas as pd
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import LogLocator, MaxNLocator
from nbconvert import HTMLExporter

from nbhelpers.report import style
from nbhelpers.report.chapters import STAGES, Stage, in_order, promised_files
from nbhelpers.report.words import (
    LEADING,
    LEGEND,
    PACKED,
    all_numbers,
    comparison_cells,
    context,
    facts,
    finding,
    gains,
    headline,
    percent,
    seeds_of,
)
from nbhelpers.system.files import write_text
from nbhelpers.workspace import Run

TEMPLATES = Path(__file__).with_name("templates")
TITLE = "What can a language model live without?"


def cards(results: dict) -> list[dict]:
    """Return the headline's models: name, look, accuracy, interval, gains, and places in % on a shared scale."""
    found = results.get("comparison", {})
    shown = {name: found[key] for key, name in LEADING.items() if key in found}
    if not shown or "dense" not in found:
        return []
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


def comparison(run: Run, results: dict) -> dict:
    """Return headings, models with their cells and looks, and the picture; empty before notebook 06 has run."""
    header, rows = comparison_cells(run)
    if not rows:
        return {"header": [], "models": [], "picture": None}
    models = [{"name": name, "look": look(model), "cells": cells} for (name, model), *cells in rows]
    tfidf = results.get("comparison", {}).get("tfidf")
    lines = {f"TF-IDF {percent(tfidf['accuracy'])}": tfidf["accuracy"]} if tfidf else {}
    return {"header": header, "models": models, "picture": draw(run.load_table("comparison"), lines)}


# --- the page ---

markdown = mistune.create_markdown()  # escapes what looks like HTML


def figure(run: Run, name: str, caption: str) -> dict[str, str | int]:
    """Return a figure for the page: caption as text and as HTML, bytes in base 64, width and height in pixels."""
    data = (run.reports / "figures" / f"{name}.png").read_bytes()
    width, height = style.png_size(data)
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
    """Return a stage for the page: its question, its notebook and its figures in the order of their captions."""
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


def read_template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def allowed(text: str) -> str:
    """Return the source by which a Content-Security-Policy allows exactly this style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def template() -> jinja2.Template:
    """Return page.html, in which every text is escaped, and a missing name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def write_index(run: Run, stages: dict[str, Stage] | None = None) -> Path:
    """Write ``index.html`` of a run from what it has recorded so far, and return its path."""
    results = run.results()
    chapters = [chapter(run, stage, results.get("captions", {})) for stage in in_order(stages or STAGES)]
    css, script = read_template("page.css"), read_template("page.js")
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
        legend=f"{LEGEND} {PACKED}",
        chapters=[c for c in chapters if c["figures"] or c["notebook"]],
        sections=all_numbers(results),
        facts=facts(run, results.get("run", {})),
        **comparison(run, results),
    )
    write_text(run.reports / "index.html", text)
    return run.reports / "index.html"


# --- notebooks as HTML ---


def formula_image(match: re.Match) -> str:
    """Return a displayed formula as an embedded SVG, which needs no network, or unchanged where that fails."""
    source = match[1].strip()
    image = io.BytesIO()
    try:
        # Without the style of the figures, which would put a margin around a formula.
        with matplotlib.style.context("default"):
            mathtext.math_to_image(f"${source}$", image, prop=FontProperties(size=15), format="svg")
    except ValueError:
        return match[0]
    alt = source.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}">'


# Solutions are folded in JupyterLab; on paper and without scripts they are shown.
FOLD_SOLUTIONS = """<script>
for (const cell of document.querySelectorAll(".celltag_solution")) {
  const fold = document.createElement("details");
  const summary = Object.assign(document.createElement("summary"), { textContent: "Solution" });
  summary.style = "cursor: pointer; margin: 0 0 1em 6em; font: 14px sans-serif";
  fold.append(summary);
  cell.replaceWith(fold);
  fold.append(cell);
}
</script>
"""


def notebook_html(notebook, title: str) -> str:
    """Return an executed notebook as one HTML file with everything embedded, its solutions folded."""
    shown = notebook.copy()
    shown.cells = [cell.copy() for cell in notebook.cells]
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\$\$(.+?)\$\$", formula_image, cell.source, flags=re.DOTALL)
    exporter = HTMLExporter(template_name="lab", require_js_url="", mathjax_url="", mermaid_js_url="")
    text, _ = exporter.from_notebook_node(shown, resources={"metadata": {"name": title}})
    before, end = text.rsplit("</body>", 1)
    return f"{before}{FOLD_SOLUTIONS}</body>{end}"


# --- the picture of accuracy and cost ---

# Outlines of the figures' markers around (0, 0), of about the same area.
OUTLINES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M-4.5-4.5h9v9h-9z",
    "D": "M0-6.2 6.2 0 0 6.2-6.2 0z",
    "^": "M0-6 6 5H-6z",
    "v": "M0 6 6-5H-6z",
    "P": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "X": "M-6-3.2-3.2-6 0-2.8 3.2-6 6-3.2 2.8 0 6 3.2 3.2 6 0 2.8-3.2 6-6 3.2-2.8 0z",
    "*": "M0-7 1.8-2.2 6.7-2.2 2.8 1 4.1 5.8 0 3-4.1 5.8-2.8 1-6.7-2.2-1.8-2.2z",
}


@dataclass(frozen=True)
class Cost:
    """A choice for the horizontal axis: a column of the comparison, divided by ``unit``."""

    key: str
    column: str
    unit: float
    name: str
    label: str


COSTS = (
    Cost("speed", "speedup", 1, "Speed-up", "times the dense speed (log scale, more is better)"),
    Cost("latency", "latency_ms", 1, "Latency", "milliseconds a batch (log scale, less is better)"),
    Cost("size", "file_bytes", 1e6, "File size", "MB on disk (log scale, less is better)"),
)


@dataclass(frozen=True)
class Frame:
    """Width and height of a drawing, the edges of its axes, and the least distance of two marks, all in pixels."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    gap: float


# Two, so that a phone shows no shrunken text.
FRAMES = (Frame("wide", 780, 500, 52, 764, 34, 444, 11.5), Frame("narrow", 360, 430, 40, 352, 34, 376, 7.5))


def look(model: str) -> dict[str, str]:
    """Return the outline and the colour of a model's mark, the same as in the figures."""
    mark = style.mark(model)
    return {"outline": OUTLINES[mark["marker"]], "color": mark["color"]}


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    values = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from ``low`` to ``high``, or round numbers where these are too few."""
    values = LogLocator(subs=(1, 2, 5), numticks=10).tick_values(low, high)
    within = [float(value) for value in values if low <= value <= high]
    return within if len(within) > 2 else ticks(low, high, 4)


def draw(table: pd.DataFrame, lines: dict[str, float]) -> dict:
    """Return axes, ticks, lines and marks of the picture in pixels, for each of ``FRAMES``.

    table: the comparison; lines: accuracies to draw across, by label.
    """
    return {"costs": COSTS, "frames": [{"frame": frame, **drawing(table, frame, lines)} for frame in FRAMES]}


def drawing(table: pd.DataFrame, frame: Frame, lines: dict[str, float]) -> dict:
    """Return one frame: vertical ticks and lines [(y, text)], one axis per cost, and the marks by cost."""
    low = min([table["accuracy_low"].min(), *lines.values()])
    high = max([table["accuracy_high"].max(), *lines.values()])

    def y(accuracy: float) -> float:
        share = (accuracy - low) / max(high - low, 1e-9)
        return round(frame.bottom - 8 - share * (frame.bottom - frame.top - 24), 1)

    axes, places = [], {}
    for cost in COSTS:
        values = table[cost.column] / cost.unit
        left, right = values.min() / 1.3, values.max() * 1.3
        scale = (frame.right - frame.left) / math.log(right / left)

        def x(value: float, left=left, scale=scale) -> float:
            return frame.left + scale * math.log(value / left)

        axes.append({"cost": cost, "ticks": [(round(x(value), 1), f"{value:g}") for value in log_ticks(left, right)]})
        moved = style.keep_apart([x(value) for value in values], frame.gap, frame.left + 6, frame.right - 6)
        places[cost.key] = [round(place, 1) for place in moved]
    marks = [
        {
            "x": {cost.key: places[cost.key][i] for cost in COSTS},
            "y": y(row["accuracy"]),
            "top": round(y(row["accuracy_high"]) - y(row["accuracy"]), 1),
            "bottom": round(y(row["accuracy_low"]) - y(row["accuracy"]), 1),
        }
        for i, row in enumerate(table.to_dict("records"))
    ]
    return {
        "axes": axes,
        "marks": marks,
        "ticks": [(y(value), f"{100 * value:g} %") for value in ticks(low, high, 7)],
        "lines": [(y(value), text) for text, value in lines.items()],
    }
