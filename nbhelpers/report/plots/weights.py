"""Figures of scores: their distributions, and how far verdicts agree."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from nbhelpers.models import position
from nbhelpers.report.plots.shared import draw_lines, heatmaps
from nbhelpers.report.style import COLORS, axes, color, describe, in_percent, label, legend_beside, name_lines


def score_distributions(scores: dict[str, dict[str, torch.Tensor]], thresholds: dict[str, float]) -> Figure:
    """Draw histograms of log10 score by layer, one panel per criterion, with the threshold of each."""
    figure, row = axes(len(scores), width=3.8 * len(scores), height=3.4)
    for ax, (criterion, tensors) in zip(row, scores.items(), strict=True):
        layers = sorted({position(name)[0] for name in tensors})
        for layer, shade in zip(layers, sns.color_palette("crest", len(layers)), strict=True):
            values = torch.cat([t.flatten() for n, t in tensors.items() if position(n)[0] == layer])
            # Zero has no logarithm; it is shown at the smallest score that is not zero.
            logs = values.clamp(min=values[values > 0].min()).log10().numpy()
            ax.hist(logs, bins=80, histtype="step", density=True, color=shade, label=f"layer {layer}")
        ax.axvline(np.log10(thresholds[criterion]), color=COLORS["sparse"], linestyle="--")
        ax.set_xlim(np.log10(thresholds[criterion]) - 3, None)
        ax.set_title(criterion, color=color(criterion))
        ax.set(xlabel="log10 of the score", ylabel="density" if ax is row[0] else "")
    row[0].legend(fontsize="small")
    return figure


def overlap_over_seeds(table: pd.DataFrame) -> Figure:
    """Draw the overlap of the sets that different seeds drop: one dot per pair of seeds, and both chance levels.

    table: of ``stability.stability_over_seeds``, with a column criterion.
    """
    names = list(dict.fromkeys(table["criterion"]))
    figure, (ax,) = axes(width=2.5 + 1.2 * len(names), height=3.8)
    for i, name in enumerate(names):
        part = table[table["criterion"] == name]
        ax.plot(i + np.linspace(-0.15, 0.15, len(part) + 2)[1:-1], part["overlap"], "o", color=color(name))
        for level, style in (("chance_by_layer", "-"), ("chance", ":")):
            ax.plot([i - 0.3, i + 0.3], [part[level].mean()] * 2, style, color=COLORS["baseline"], linewidth=2)
    for style, text in (("o", "a pair of seeds"), ("-", "chance, matrix by matrix"), (":", "chance over all weights")):
        ax.plot([], [], style, color=COLORS["dense" if style == "o" else "baseline"], linewidth=2, label=text)
    ax.set_xticks(range(len(names)), [label(name) for name in names])
    ax.set(xlim=(-0.6, len(names) - 0.4), ylabel="share dropped by the other seed too")
    ax.set_title("Do other seeds drop the same weights?")
    in_percent(ax.yaxis)
    legend_beside(ax)
    return figure


def overlap_along_training(table: pd.DataFrame) -> Figure:
    """Draw the overlap with the finally flagged set against optimizer steps: a line and a chance level per criterion.

    table: of ``stability.along_training``. The axis is logarithmic from step 1 on; step 0 stands beside it.
    """
    figure, (ax,) = axes(width=7.4, height=4)
    draw_lines(ax, table, "step", "overlap", "criterion")
    for name, part in table.sort_values("step").groupby("criterion", sort=False):
        ax.plot(part["step"], part["chance_by_layer"], ":", color=color(name), linewidth=1.2)
    ax.axhline(table["chance"].mean(), linestyle="--", color=COLORS["baseline"], zorder=0)
    ax.set_xscale("symlog", base=2, linthresh=1)
    # The last step is no power of two: without a label too near to its own.
    last = table["step"].max()
    steps = [step for step in sorted(table["step"].unique()) if step == last or 1.6 * step < last]
    ax.set_xticks(steps, [str(step) for step in steps])
    ax.set_xlim(-0.3, None)
    ax.minorticks_off()
    in_percent(ax.yaxis)
    ax.set(xlabel="optimizer steps", ylabel="share that is flagged in the end too")
    ax.set_title("dashed: chance; dotted: chance, matrix by matrix")
    name_lines(ax)
    return figure


def dropped_heads(shares: pd.DataFrame) -> Figure:
    """Draw the share of each attention head that is dropped: heatmaps of layers and heads, one per criterion.

    shares: of ``stability.structure_shares``, with a column criterion.
    """
    heads = shares[shares["kind"] == "head"]
    tables = {
        name: part.pivot(index="layer", columns="index", values="dropped")
        for name, part in heads.groupby("criterion", sort=False)
    }
    figure = heatmaps(tables, "How much of each head is dropped", bar="share of weights dropped")
    for ax in figure.axes[: len(tables)]:
        ax.tick_params(axis="x", rotation=0)
        ax.set_xlabel("head")
    return figure


def dropped_neurons(shares: pd.DataFrame) -> Figure:
    """Draw the share of each MLP neuron that is dropped, sorted: one panel per criterion, one line per layer.

    shares: of ``stability.structure_shares``, with a column criterion. A flat line: all neurons lose the same share.
    """
    neurons = shares[shares["kind"] == "neuron"]
    panels = list(neurons.groupby("criterion", sort=False))
    figure, row = axes(len(panels), width=3.4 * len(panels) + 0.6, height=3.6, sharey=True)
    for ax, (name, part) in zip(row, panels, strict=True):
        layers = list(part.groupby("layer"))
        for (layer, values), shade in zip(layers, sns.color_palette("crest", len(layers)), strict=True):
            place = np.linspace(0, 1, len(values))
            ax.plot(place, np.sort(values["dropped"]), color=shade, label=f"layer {layer}")
        ax.set_title(label(name), color=color(name))
        ax.set(xlabel="neurons, sorted", ylabel="share of its weights dropped" if ax is row[0] else "")
        for axis in (ax.xaxis, ax.yaxis):
            in_percent(axis)
    row[0].legend(fontsize="small")
    describe(figure, "How much of each neuron is dropped")
    return figure
