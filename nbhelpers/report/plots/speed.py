"""Figures of time and bytes."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.report.style import (
    COLORS,
    axes,
    color,
    describe,
    in_percent,
    legend_beside,
    name_lines,
    note,
    plain_numbers,
)
from nbhelpers.sparse.speed import IN_BLOCKS

ENGINE_NAMES = {
    "dense": "fp32 dense",
    "int8": "int8 dense",
    "numba": "fp32 sparse",
    "int8_blocks": "int8 sparse",
    IN_BLOCKS: "int8, blocks of 4",
    "torch_csr": "torch.sparse",
}
ENGINE_LINES = {"int8": ":", "int8_blocks": "--"}


def engine_speeds(table: pd.DataFrame) -> Figure:
    """Draw the speed of each engine over the fp32 dense product against sparsity, one panel per matrix shape.

    table: of ``sparse.speed.compare_engines``, of one number of tokens; the bands are quartiles.
    """
    shapes = list(table.groupby(["in", "out"]))
    figure, row = axes(len(shapes), width=1.6 + 2.6 * len(shapes), height=4.2, sharey=True)
    for ax, ((n_in, n_out), part) in zip(row, shapes, strict=True):
        for name, curve in part[part["name"] != "dense"].groupby("name", sort=False):
            look = {"color": color(name), "linestyle": ENGINE_LINES.get(name, "-")}
            ax.plot(curve["sparsity"], curve["speedup"], marker=".", label=ENGINE_NAMES.get(name, name), **look)
            ax.fill_between(
                curve["sparsity"], curve["speedup_low"], curve["speedup_high"], color=color(name), alpha=0.15
            )
        ax.axhline(1, color=COLORS["dense"], linestyle="--")
        ax.set(title=f"{n_in} to {n_out}", xlabel="weights removed", yscale="log")
        in_percent(ax.xaxis)
        plain_numbers(ax.yaxis)
    row[0].set_ylabel("speed, fp32 dense = 1")
    name_lines(row[-1])
    describe(figure, "A panel is a matrix shape: features in to features out")
    return figure


def roofline(table: pd.DataFrame, limits: dict[str, float]) -> Figure:
    """Draw each engine's useful work per second below the machine's limits (Williams, Waterman and Patterson, 2009).

    There are two roofs, those of dense products in fp32 and in int8, where the machine has both. table: rows of
    ``sparse.speed.compare_engines`` at one sparsity and number of tokens; limits: of ``sparse.speed.machine_limits``.
    """
    figure, (ax,) = axes(width=8.2, height=4.4)
    span = np.geomspace(table["intensity"].min() / 3, table["intensity"].max() * 3, 50)
    for name, key in (("dense", "dense_gflops"), ("int8", "int8_gops")):
        if key in limits:
            ax.plot(span, np.minimum(span * limits["memory_gbs"], limits[key]), color=color(name))
            note(ax, 0.99, limits[key], f"{ENGINE_NAMES[name]}, zeros included", ha="right")
    if np.isfinite(limits["cache_gbs"]):
        # Each weight multiplies numbers that are read from the cache: 4 bytes for 2 operations.
        ax.axhline(limits["cache_gbs"] / 2, color=COLORS["sparse"], linestyle=":")
        note(ax, 0.01, limits["cache_gbs"] / 2, "one float from the cache per product")
    marks = {"dense": "D", "int8": "s", "numba": "^", "int8_blocks": "P", IN_BLOCKS: "*", "torch_csr": "v"}
    for name, part in table.groupby("name", sort=False):
        ax.plot(part["intensity"], part["gflops"], marks[name], color=color(name), label=ENGINE_NAMES[name])
    ax.set(xscale="log", yscale="log", xlabel="useful operations per byte of memory traffic")
    ax.set(ylabel="useful operations per second, in billions")
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
