"""Kinds of figures that several notebooks draw."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from nbhelpers.models import position
from nbhelpers.report.style import (
    COLORS,
    MARKERS,
    axes,
    color,
    describe,
    in_percent,
    label,
    name_lines,
    plain_numbers,
    spread,
)


def intervals(table: pd.DataFrame, value: str, title: str, xlabel: str, reference: float | None = None) -> Figure:
    """A dot and its interval per row; table has columns model, <value>, <value>_low, <value>_high."""
    figure, (ax,) = axes(width=7, height=0.9 + 0.34 * len(table))
    for y, (_, row) in enumerate(table.iloc[::-1].iterrows()):
        shade = color(row["model"])
        ax.plot([row[f"{value}_low"], row[f"{value}_high"]], [y, y], color=shade, linewidth=2)
        ax.plot(row[value], y, marker="o", color=shade)
    ax.set_yticks(range(len(table)), [label(name) for name in table["model"][::-1]])
    ax.set_ylim(-0.6, len(table) - 0.4)
    if reference is not None:
        ax.axvline(reference, color=COLORS["baseline"], linestyle="--", zorder=0)
    ax.set(xlabel=xlabel, title=title)
    return figure


def differences(significance: pd.DataFrame, title: str) -> Figure:
    """Paired differences of accuracy in points with their intervals, from rows of ``evaluation.significance_table``."""
    points = 100 * significance[["difference", "low", "high"]]
    table = points.set_axis(["points", "points_low", "points_high"], axis=1)
    table.insert(0, "model", significance["comparison"].str.split(" - ").str[0])
    return intervals(table, "points", title, "points of accuracy, 95 % interval", 0)


def by_layer_and_module(values: dict[str, float]) -> pd.DataFrame:
    """Numbers by parameter name as a table, layers in rows (bottom layer first) and modules in columns."""
    rows = [(*position(name), value) for name, value in values.items()]
    table = pd.DataFrame(rows, columns=["layer", "module", "value"])
    return table.pivot(index="layer", columns="module", values="value")


def heatmaps(
    tables: dict[str, pd.DataFrame], title: str, fmt: str = ".0%", bar: str = "", limits: tuple = (None, None)
) -> Figure:
    """Tables side by side as heatmaps with their numbers, on one colour scale."""
    cells = max(table.size for table in tables.values())
    figure, row = axes(
        len(tables), width=max(4.5, 3.4 * len(tables)), height=1.7 + 0.42 * max(map(len, tables.values()))
    )
    low = min(np.nanmin(t.to_numpy()) for t in tables.values()) if limits[0] is None else limits[0]
    high = max(np.nanmax(t.to_numpy()) for t in tables.values()) if limits[1] is None else limits[1]
    for i, (ax, (name, table)) in enumerate(zip(row, tables.items(), strict=True)):
        last = i == len(tables) - 1
        options = {"annot": cells <= 120, "fmt": fmt, "annot_kws": {"fontsize": "small"}, "cbar": last}
        sns.heatmap(
            table, vmin=low, vmax=high, cmap="viridis", ax=ax, cbar_kws={"label": bar} if last else None, **options
        )
        ax.set_title(label(name), color=color(name))
        ax.set_ylabel(table.index.name if i == 0 else "")
        ax.tick_params(axis="y", rotation=0)
        ax.set_xlabel("")
        ax.set_xticks(ax.get_xticks(), [str(name) for name in table.columns], rotation=30, ha="right")
    describe(figure, title)
    return figure


def small_tensors(tensors: dict[str, torch.Tensor], title: str) -> Figure:
    """5x5 tensors side by side with their numbers, each on its own scale; bool tensors as kept or dropped."""
    figure, row = axes(len(tensors), width=3 * len(tensors), height=3.2)
    for ax, (name, tensor) in zip(row, tensors.items(), strict=True):
        array = tensor.detach().float().numpy() + 0.0  # without the sign of -0.0
        fmt = ".0f" if tensor.dtype == torch.bool else ".2f"
        sns.heatmap(array, annot=True, fmt=fmt, cmap="viridis", cbar=False, square=True, ax=ax)
        ax.set(title=name, xticks=[], yticks=[])
    describe(figure, title)
    return figure


def draw_lines(ax, table: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """One line per value of ``hue``, with bands where the table has <y>_low and <y>_high."""
    for name, part in table.sort_values(x).groupby(hue, sort=False):
        shade = color(str(name), unknown=None)
        (line,) = ax.plot(part[x], part[y], marker="o", color=shade, label=label(str(name)))
        if f"{y}_low" in part:
            ax.fill_between(part[x], part[f"{y}_low"], part[f"{y}_high"], alpha=0.12, color=line.get_color())


def lines(
    table: pd.DataFrame, x: str, y: str, hue: str, title: str, xlabel: str, ylabel: str, logx: bool = False
) -> Figure:
    """The lines of ``draw_lines``, each with its name at its end."""
    figure, (ax,) = axes(width=7.4, height=4)
    draw_lines(ax, table, x, y, hue)
    if logx:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(table[x].unique()), [f"{v:g}" for v in sorted(table[x].unique())])
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    name_lines(ax)
    return figure


def grouped_bars(table: pd.DataFrame, x: str, y: str, hue: str, title: str, ylabel: str, log: bool = False) -> Figure:
    """Bars by x and hue, with error bars where the table has <y>_low and <y>_high."""
    figure, (ax,) = axes(width=7.4, height=3.8)
    groups, hues = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[hue]))
    # Shades from light to dark for what has no colour of its own: in grey they stay apart.
    shades = sns.color_palette("crest", len(hues))
    for i, name in enumerate(hues):
        part = table[table[hue] == name].set_index(x).reindex(groups)
        places = np.arange(len(groups)) + (i - (len(hues) - 1) / 2) * 0.8 / len(hues)
        error = None
        if f"{y}_low" in part:
            error = np.abs(np.stack([part[y] - part[f"{y}_low"], part[f"{y}_high"] - part[y]]))
        shade = color(str(name), unknown=shades[i])
        ax.bar(places, part[y], 0.8 / len(hues), yerr=error, capsize=2, label=label(str(name)), color=shade)
    many = {"rotation": 30, "ha": "right"} if len(groups) > 5 else {}
    ax.set_xticks(range(len(groups)), [label(str(group)) for group in groups], **many)
    if log:
        ax.set_yscale("log")
    ax.set(title=title, xlabel=label(x), ylabel=ylabel)
    if len(hues) > 1:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tradeoff(table: pd.DataFrame, x: str, xlabel: str, title: str, ylabel: str = "test accuracy") -> Figure:
    """Accuracy with its interval against a cost (log axis), a numbered mark a model; names in a column, best on top."""
    figure, (ax,) = axes(width=8.6, height=4.6)
    ordered = table.sort_values("accuracy", ascending=False)
    places = np.linspace(0.97, 0.03, len(ordered))
    for number, (place, (_, row)) in enumerate(zip(places, ordered.iterrows(), strict=True), 1):
        kind = next((kind for kind in MARKERS if kind in row["model"]), "dense")
        look = {"marker": MARKERS[kind], "color": color(row["model"])}
        error = [[row["accuracy"] - row["accuracy_low"]], [row["accuracy_high"] - row["accuracy"]]]
        ax.errorbar(row[x], row["accuracy"], yerr=error, alpha=0.85, elinewidth=0.7, **look)
        ax.plot(1.05, place, transform=ax.transAxes, clip_on=False, **look)
        text = f"{number:>2}  {label(row['model'])}, {row['accuracy']:.1%}"
        ax.text(1.075, place, text, transform=ax.transAxes, fontsize=9, va="center", color=look["color"])
    ax.set_xscale("log")
    low, high = table[x].min() / 1.2, table[x].max() * 1.2
    ax.set_xlim(low, high)
    plain_numbers(ax.xaxis, (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7))
    in_percent(ax.yaxis)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    number_marks(ax, ordered[[x, "accuracy"]].to_numpy())
    return figure


def number_marks(ax, points: np.ndarray) -> None:
    """Write 1, 2, ... beside the marks at ``points`` [n, 2], so that no two numbers hide each other."""
    ax.autoscale_view()  # otherwise the limits are found when the figure is drawn
    at = (ax.transData + ax.transAxes.inverted()).transform(points)
    gap = 9 / (72 * ax.bbox.height / ax.figure.dpi)
    by_x = np.argsort(at[:, 0], kind="stable")
    # Marks that stand one above the other share a column of numbers.
    columns = np.split(by_x, np.flatnonzero(np.diff(at[by_x, 0]) > 0.03) + 1)
    for column in columns:
        for i, height in zip(column, spread([float(at[i, 1]) for i in column], gap), strict=True):
            look = {"fontsize": 8, "va": "center", "color": ax.containers[i].lines[0].get_color()}
            ax.text(at[i, 0] + 0.012, height, str(i + 1), transform=ax.transAxes, **look)
