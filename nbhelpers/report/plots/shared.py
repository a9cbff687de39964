"""Kinds of figures that several notebooks draw."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from nbhelpers.models import position
from nbhelpers.report.style import (
    COLORS,
    axes,
    color,
    describe,
    in_percent,
    label,
    legend_beside,
    mark,
    name_lines,
    number_marks,
    plain_numbers,
)


def intervals(table: pd.DataFrame, value: str, title: str, xlabel: str, reference: float | None = None) -> Figure:
    """Draw a dot and its interval per row of a table with columns model, <value>, <value>_low, <value>_high."""
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
    """Draw the paired differences of ``evaluation.significance_table`` in points with their intervals."""
    points = 100 * significance[["difference", "low", "high"]]
    table = points.set_axis(["points", "points_low", "points_high"], axis=1)
    table.insert(0, "model", significance["comparison"].str.split(" - ").str[0])
    return intervals(table, "points", title, "points of accuracy, 95 % interval", 0)


def by_layer_and_module(values: dict[str, float]) -> pd.DataFrame:
    """Return numbers by parameter name as a table, layers in rows (bottom layer first) and modules in columns."""
    rows = [(*position(name), value) for name, value in values.items()]
    table = pd.DataFrame(rows, columns=["layer", "module", "value"])
    return table.pivot(index="layer", columns="module", values="value")


def draw_cells(ax, table: pd.DataFrame, fmt: str, limits: tuple[float, float], **options) -> None:
    """Draw a table as coloured cells with their numbers; limits: values at the two ends of the colour scale."""
    low, high = limits
    options = {"annot": True, "annot_kws": {"fontsize": "small"}, "cmap": "viridis", "cbar": False} | options
    sns.heatmap(table, vmin=low, vmax=high, fmt=fmt, ax=ax, **options)
    ax.tick_params(axis="y", rotation=0)
    ax.set_xticks(ax.get_xticks(), [str(name) for name in table.columns], rotation=30, ha="right")
    ax.set(xlabel="", ylabel="")


def heatmaps(
    tables: dict[str, pd.DataFrame], title: str, fmt: str = ".0%", bar: str = "", limits: tuple = (None, None)
) -> Figure:
    """Draw tables side by side as heatmaps with their numbers, on one colour scale, which ``bar`` names."""
    figure, row = axes(
        len(tables), width=max(4.5, 3.4 * len(tables)), height=1.7 + 0.42 * max(map(len, tables.values()))
    )
    low = min(np.nanmin(table.to_numpy()) for table in tables.values()) if limits[0] is None else limits[0]
    high = max(np.nanmax(table.to_numpy()) for table in tables.values()) if limits[1] is None else limits[1]
    numbers = max(table.size for table in tables.values()) <= 120
    for ax, (name, table) in zip(row, tables.items(), strict=True):
        last = {"cbar": True, "cbar_kws": {"label": bar}} if ax is row[-1] else {}
        draw_cells(ax, table, fmt, (low, high), annot=numbers, **last)
        ax.set_title(label(name), color=color(name))
    row[0].set_ylabel(next(iter(tables.values())).index.name)
    describe(figure, title)
    return figure


def small_tensors(tensors: dict[str, torch.Tensor], title: str) -> Figure:
    """Draw small tensors side by side with their numbers, each on its own scale; bool tensors as 0 and 1."""
    figure, row = axes(len(tensors), width=3 * len(tensors), height=3.2)
    for ax, (name, tensor) in zip(row, tensors.items(), strict=True):
        array = tensor.detach().float().numpy() + 0.0  # without the sign of -0.0
        fmt = ".0f" if tensor.dtype == torch.bool else ".2f"
        sns.heatmap(array, annot=True, fmt=fmt, cmap="viridis", cbar=False, square=True, ax=ax)
        ax.set(title=name, xticks=[], yticks=[])
    describe(figure, title)
    return figure


def draw_lines(ax, table: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """Draw one line per value of ``hue``, with bands where the table has <y>_low and <y>_high."""
    for name, part in table.sort_values(x).groupby(hue, sort=False):
        shade = color(str(name), unknown=None)
        (line,) = ax.plot(part[x], part[y], marker="o", color=shade, label=label(str(name)))
        if f"{y}_low" in part:
            ax.fill_between(part[x], part[f"{y}_low"], part[f"{y}_high"], alpha=0.12, color=line.get_color())


def lines(
    table: pd.DataFrame, x: str, y: str, hue: str, title: str, xlabel: str, ylabel: str, logx: bool = False
) -> Figure:
    """Draw the lines of ``draw_lines``, each with its name at its end."""
    figure, (ax,) = axes(width=7.4, height=4)
    draw_lines(ax, table, x, y, hue)
    if logx:
        ax.set_xscale("log", base=2)
        ticks = sorted(table[x].unique())
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    name_lines(ax)
    return figure


def grouped_bars(table: pd.DataFrame, x: str, y: str, hue: str, title: str, ylabel: str) -> Figure:
    """Draw bars by x and hue, with error bars where the table has <y>_low and <y>_high."""
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
    slanted = {"rotation": 30, "ha": "right"} if len(groups) > 5 else {}
    ax.set_xticks(range(len(groups)), [label(str(group)) for group in groups], **slanted)
    ax.set(title=title, xlabel=label(x), ylabel=ylabel)
    if len(hues) > 1:
        legend_beside(ax)
    return figure


def tradeoff(table: pd.DataFrame, x: str, xlabel: str, title: str, ylabel: str = "test accuracy") -> Figure:
    """Draw accuracy with its interval against a cost (log axis), a numbered mark per model, named beside the axes."""
    figure, (ax,) = axes(width=8.6, height=4.6)
    ordered = table.sort_values("accuracy", ascending=False)
    heights = np.linspace(0.97, 0.03, len(ordered))
    for number, (height, (_, row)) in enumerate(zip(heights, ordered.iterrows(), strict=True), 1):
        look = mark(row["model"])
        error = [[row["accuracy"] - row["accuracy_low"]], [row["accuracy_high"] - row["accuracy"]]]
        ax.errorbar(row[x], row["accuracy"], yerr=error, alpha=0.85, elinewidth=0.7, **look)
        ax.plot(1.05, height, transform=ax.transAxes, clip_on=False, **look)
        text = f"{number:>2}  {label(row['model'])}, {row['accuracy']:.1%}"
        ax.text(1.075, height, text, transform=ax.transAxes, fontsize=9, va="center", color=look["color"])
    ax.set_xscale("log")
    low, high = table[x].min() / 1.2, table[x].max() * 1.2
    ax.set_xlim(low, high)
    plain_numbers(ax.xaxis, (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7))
    in_percent(ax.yaxis)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    number_marks(ax, ordered[[x, "accuracy"]].to_numpy())
    return figure
