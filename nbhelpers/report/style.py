"""What all figures have in common: colours, markers, titles that state a finding, names beside their lines."""

import re
import struct
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nbhelpers.workspace import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    "magnitude": "#0072B2",
    "movement": "#E69F00",
    "gradient": "#009E73",
    "merged": "#CC79A7",
    "dense": "#333333",
    "control": "#777777",
    "sparse": "#D55E00",
    "compact": "#8A6D00",
    "student": "#56B4E9",
    "compressed": "#B2182B",
    "baseline": "#999999",
    "random": "#BBBBBB",
    "taylor": "#882255",
    "fisher": "#332288",
    "wanda": "#117733",
    "movement_first_order": "#999933",
    "sparsegpt": "#44AA99",
    "torch_csr": "#661100",
    "int8": "#6A3D9A",
    "int8_blocks": "#E377C2",
    "int8_blocks, 1x4": "#C51B7D",
}
MARKERS = {
    "pruned": "o",
    "recovered": "s",
    "dense": "D",
    "int8": "X",
    "sparse": "^",
    "compact": "P",
    "student": "v",
    "compressed": "*",
}

sns.set_theme(context="notebook", style="ticks")
plt.rcParams |= {
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "font.size": 11,
}


ALIASES = {
    "numba": "sparse",
    "structured": "compact",
    "fine": "dense",
    "extra": "control",
    "tf-idf": "baseline",
    "tfidf": "baseline",
    "chance": "baseline",
    "untrained": "baseline",
}


def finding_of(reading: str) -> str:
    """Return the first sentence of a caption, or its first half where a semicolon ends that, as a title."""
    first = re.split(r"(?<=[\w%)`])[.;](?:\s|$)", reading.strip(), maxsplit=1)[0].replace("`", "")
    return first[:1].upper() + first[1:]


def head(figure: Figure, title: str) -> None:
    """Give a figure its title, in as many lines as its width asks for, and the height that they take."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, max(24, int(11.5 * width)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.set_size_inches(width, height + 0.22 * len(lines))


def describe(figure: Figure, text: str) -> None:
    """Write under a figure of several panels what they have in common."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize="small", color=COLORS["control"])


def png_size(data: bytes) -> tuple[int, int]:
    """Return the width and the height of a PNG in pixels, which its header holds."""
    return struct.unpack(">II", data[16:24])


def show(run: Run, name: str, figure: Figure, reading: str) -> None:
    """Save a figure with its finding as its title, display it, and display its caption below it.

    reading: the caption, which goes to the report; its first sentence is the finding.
    """
    head(figure, finding_of(reading))
    drawn = run.save_figure(name, figure).read_bytes()
    run.record("captions", **{name: reading})
    plt.close(figure)
    scale = plt.rcParams["figure.dpi"] / plt.rcParams["savefig.dpi"]
    display(Image(drawn, width=round(scale * png_size(drawn)[0])))
    display(Markdown(reading))


def color(name: str, unknown: str | None = COLORS["dense"]) -> str | None:
    """Return the colour of a criterion, a model, a stage or an engine, found by the first known word of its name."""
    if name in COLORS:
        return COLORS[name]
    words = name.lower().replace("_", " ").split()
    if "extra" in words:  # fine_tuned_extra is the control, not the dense model
        return COLORS["control"]
    known = [word for word in (ALIASES.get(word, word) for word in words) if word in COLORS]
    return COLORS[known[0]] if known else unknown


def mark(model: str) -> dict[str, str]:
    """Return the marker and the colour of a model."""
    kind = next((kind for kind in MARKERS if kind in model), "dense")
    return {"marker": MARKERS[kind], "color": color(model)}


def label(name: str) -> str:
    """Return the name of a model or criterion as it is written in prose."""
    return name.replace("_", " ").replace("tfidf", "TF-IDF")


def axes(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.6, **options):
    """Return a figure and its axes as an array [columns], or [rows, columns]."""
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return figure, grid[0] if rows == 1 else grid


def in_percent(axis) -> None:
    """Label the ticks of an axis, whose values are shares, in percent."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))


def plain_numbers(axis, steps: tuple = (1, 2, 5)) -> None:
    """Put the ticks of a log axis at these multiples of the powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def note(ax, x: float, value: float, text: str, ha: str = "left") -> None:
    """Write a small text on a horizontal line at ``value``; x is a share of the axis."""
    ax.text(x, value, text, transform=ax.get_yaxis_transform(), va="bottom", ha=ha, fontsize="small")


def legend_beside(ax) -> None:
    """Draw the legend to the right of the axes."""
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def keep_apart(places: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Return places moved as little as needed to be ``gap`` apart from low to high, or closer where room is short."""
    gap = min(gap, (high - low) / max(1, len(places) - 1))

    def span(group: list[int]) -> tuple[float, float]:
        half = gap * (len(group) - 1) / 2
        centre = sum(places[i] for i in group) / len(group)
        centre = min(max(centre, low + half), high - half)
        return centre - half, centre + half

    groups: list[list[int]] = []
    for i in sorted(range(len(places)), key=places.__getitem__):
        groups.append([i])
        # Within rounding, so that groups that just fill the axis do not count as too near.
        while len(groups) > 1 and span(groups[-1])[0] - span(groups[-2])[1] < gap - 1e-9:
            last = groups.pop()
            groups[-1] += last
    moved = {i: span(group)[0] + gap * n for group in groups for n, i in enumerate(group)}
    return [moved[i] for i in range(len(places))]


def in_axes(ax, points, text_height: float) -> tuple[np.ndarray, float]:
    """Return data points [n, 2] as shares of the axes, and a height in points as a share of theirs."""
    ax.autoscale_view()  # otherwise the limits are found when the figure is drawn
    places = (ax.transData + ax.transAxes.inverted()).transform(points)
    return places, text_height / (72 * ax.bbox.height / ax.figure.dpi)


def name_lines(ax) -> None:
    """Write the name of each labelled line beside its last point. Call it when the limits of the axes are final."""
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_") and len(line.get_xdata())]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in named]
    places, gap = in_axes(ax, ends, 12.5)
    for line, end, height in zip(named, ends, keep_apart(places[:, 1].tolist(), gap), strict=True):
        shade = line.get_color()
        ax.annotate(
            line.get_label(),
            end,
            (1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=shade,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "alpha": 0.4, "linewidth": 0.8, "shrinkB": 4},
        )


def number_marks(ax, points: np.ndarray) -> None:
    """Write 1, 2, ... beside the marks at ``points`` [n, 2], so that no two numbers hide each other."""
    places, gap = in_axes(ax, points, 9)
    by_x = np.argsort(places[:, 0], kind="stable")
    # Marks that stand one above the other share a column of numbers.
    for column in np.split(by_x, np.flatnonzero(np.diff(places[by_x, 0]) > 0.03) + 1):
        for i, height in zip(column, keep_apart(places[column, 1].tolist(), gap), strict=True):
            look = {"fontsize": 8, "va": "center", "color": ax.containers[i].lines[0].get_color()}
            ax.text(places[i, 0] + 0.012, height, str(i + 1), transform=ax.transAxes, **look)
