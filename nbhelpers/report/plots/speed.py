"""Figures of time and bytes."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from nbhelpers.report.style import (
    COLORS,
    axes,
    color,
    describe,
    in_percent,
    label,
    legend_beside,
    name_lines,
    note,
    plain_numbers,
)


def break_even(table: pd.DataFrame, engine: str) -> Figure:
    """Draw the speed-up of an engine over the dense product against sparsity: one panel per batch, one line per shape.

    table: of ``sparse.speed.compare_engines``; the bands are quartiles.
    """
    sizes = sorted(table["tokens"].unique())
    figure, row = axes(len(sizes), width=3.7 * len(sizes), height=3.8, sharey=True)
    for ax, size in zip(row, sizes, strict=True):
        part = table[(table["name"] == engine) & (table["tokens"] == size)]
        for i, ((n_in, n_out), curve) in enumerate(part.groupby(["in", "out"])):
            shade = sns.color_palette("viridis", 4)[i % 4]
            ax.plot(curve["sparsity"], curve["speedup"], marker="o", color=shade, label=f"{n_in} to {n_out}")
            ax.fill_between(curve["sparsity"], curve["speedup_low"], curve["speedup_high"], color=shade, alpha=0.15)
        ax.axhline(1, color=COLORS["dense"], linestyle="--")
        note(ax, 0.03, 1, "dense")
        ax.set(title=f"{size:,} tokens", xlabel="share of weights removed")
        in_percent(ax.xaxis)
    row[0].set_ylabel("speed, dense product = 1")
    name_lines(row[-1])
    describe(figure, "A line is a matrix: features in to features out")
    return figure


def roofline(table: pd.DataFrame, limits: dict[str, float]) -> Figure:
    """Draw each engine's useful work per second below the machine's limits (Williams, Waterman and Patterson, 2009).

    table: rows of ``sparse.speed.compare_engines`` at one sparsity and number of tokens; limits: of
    ``sparse.speed.machine_limits``.
    """
    figure, (ax,) = axes(width=8.2, height=4.4)
    span = np.geomspace(table["intensity"].min() / 3, table["intensity"].max() * 3, 50)
    ax.plot(span, np.minimum(span * limits["memory_gbs"], limits["dense_gflops"]), color=COLORS["dense"])
    ax.annotate(
        "dense product, zeros included",
        (1, limits["dense_gflops"]),
        (-2, -3),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize="small",
    )
    if np.isfinite(limits["cache_gbs"]):
        # Each weight multiplies numbers that are read from the cache: 4 bytes for 2 operations.
        ax.axhline(limits["cache_gbs"] / 2, color=COLORS["sparse"], linestyle=":")
        note(ax, 0.01, limits["cache_gbs"] / 2, "one cache read a product")
    marks = {"dense": "D", "numba": "^", "torch_csr": "v", "scipy": "x"}
    for name, part in table.groupby("name", sort=False):
        ax.plot(part["intensity"], part["gflops"], marks[name], color=color(name), label=label(name))
    ax.set(xscale="log", yscale="log", xlabel="useful operations a byte of memory traffic")
    ax.set(ylabel="useful GFLOP a second", title="Roofline: what limits each engine")
    for axis in (ax.xaxis, ax.yaxis):
        plain_numbers(axis)
    legend_beside(ax)
    return figure


def step_sizes(table: pd.DataFrame, title: str) -> Figure:
    """Draw the size of the file after each step of ``students.compress_all``, with the accuracy."""
    figure, (ax,) = axes(width=7, height=0.9 + 0.4 * len(table))
    names = [f"{row.step}, {row.layers} layer{'s' * (row.layers > 1)}" for row in table.itertuples()]
    shades = {"fine-tuned": COLORS["dense"], "int8": COLORS["compressed"]}
    bars = ax.barh(
        names, table["file_bytes"] / 1e6, color=[shades.get(step, COLORS["student"]) for step in table["step"]]
    )
    texts = [f"{row.file_bytes / 1e6:.2f} MB, {row.accuracy:.1%} right" for row in table.itertuples()]
    ax.bar_label(bars, texts, padding=4, fontsize="small")
    ax.set_xlim(0, 1.5 * table["file_bytes"].max() / 1e6)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="megabytes", title=title)
    ax.invert_yaxis()
    return figure
