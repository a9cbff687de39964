"""What all figures have in common: colours, markers, titles that state a finding, names beside their lines."""

import itertools
import re
import textwrap

import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nbhelpers.workspace import Run

# Okabe and Ito's palette, told apart by colour-blind readers and by their grey.
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
}
MARKERS = {
    "pruned": "o",
    "recovered": "s",
    "dense": "D",
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
    # Texts of an SVG stay texts, and the names in it are the same each time.
    "svg.fonttype": "none",
    "svg.hashsalt": "nbhelpers",
}


def finding_of(reading: str) -> str:
    """The first sentence of what is said of a figure, or its first half where a semicolon ends that."""
    first = re.split(r"(?<=[\w%)`])[.;](?:\s|$)", reading.strip(), maxsplit=1)[0].replace("`", "")
    return first[:1].upper() + first[1:]


def head(figure: Figure, title: str) -> None:
    """Give a figure its title, in as many lines as its width asks for, and the height that they take."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, max(24, int(11.5 * width)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.set_size_inches(width, height + 0.22 * len(lines))


def describe(figure: Figure, text: str) -> None:
    """Say under a figure of several panels what all of them show."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize="small", color=COLORS["control"])


def show(run: Run, name: str, figure: Figure, reading: str) -> None:
    """Save a figure under the finding that it shows, show it, and under it the text that reads it.

    reading: its first sentence is the finding and becomes the figure's title; all of it goes to the report.
    """
    head(figure, finding_of(reading))
    run.save_figure(name, figure)
    run.record("captions", **{name: reading})
    display(figure)
    plt.close(figure)
    display(Markdown(reading))


def color(name: str, unknown: str | None = COLORS["dense"]) -> str | None:
    """The colour of a criterion, a model, a stage or an engine: by the first known word in its name."""
    if name in COLORS:
        return COLORS[name]
    words = name.replace("_", " ").split()
    aliases = {
        "numba": "sparse",
        "fine": "dense",
        "extra": "control",
        "tf-idf": "baseline",
        "tfidf": "baseline",
        "chance": "baseline",
        "untrained": "baseline",
    }
    if "extra" in words:
        return COLORS["control"]
    for word in words:
        word = aliases.get(word.lower(), word.lower())
        if word in COLORS:
            return COLORS[word]
    return unknown


def label(name: str) -> str:
    """A model's or criterion's name as a reader would write it."""
    return name.replace("_", " ").replace("tfidf", "TF-IDF")


def axes(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.6, **options):
    """A figure and its axes as an array [columns], or [rows, columns]."""
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return figure, grid[0] if rows == 1 else grid


def in_percent(axis) -> None:
    """Label the ticks of an axis, whose values are shares, in percent: as exactly as they are."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))


def plain_numbers(axis, steps: tuple = (1, 2, 5)) -> None:
    """Ticks of a log axis at these multiples of the powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def note(ax, x: float, value: float, text: str, ha: str = "left") -> None:
    """A small text on a horizontal line at ``value``; x is a share of the axis."""
    ax.text(x, value, text, transform=ax.get_yaxis_transform(), va="bottom", ha=ha, fontsize="small")


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights moved as little as it takes for neighbours to be ``gap`` apart, within 0 and 1 where there is room."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = list(heights)
    for below, above in itertools.pairwise(order):
        found[above] = max(found[above], found[below] + gap)
    if order and found[order[-1]] > 1:
        found[order[-1]] = max(1.0, heights[order[-1]])
        for above, below in itertools.pairwise(reversed(order)):
            found[below] = min(found[below], found[above] - gap)
    return found


def name_lines(ax, unit: float = 12.5) -> None:
    """Write the name of each labelled line of an axes beside its last point, instead of a legend.

    unit: points of height that a name takes. Call it when the axes' limits are final.
    """
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_") and len(line.get_xdata())]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in named]
    ax.autoscale_view()  # otherwise the limits are found when the figure is drawn
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform(end)[1] for end in ends]
    gap = unit / (72 * ax.bbox.height / ax.figure.dpi)
    for line, end, place in zip(named, ends, spread(heights, gap), strict=True):
        shade = line.get_color()
        ax.annotate(
            line.get_label(),
            end,
            (1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=shade,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "alpha": 0.4, "linewidth": 0.8, "shrinkB": 4},
        )
