"""Figures of accuracy against sparsity."""

import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.report.plots.shared import heatmaps
from nbhelpers.report.style import COLORS, MARKERS, axes, color, in_percent, label, name_lines, note


def accuracy_curves(curves: pd.DataFrame, dense: float, control: float | None = None) -> Figure:
    """Draw accuracy against sparsity, one panel per stage (pruned, recovered), one line per criterion.

    With several seeds the line is their mean and the band goes from the lowest to the highest; with one it is Wilson's
    interval.
    """
    stages = list(dict.fromkeys(curves["stage"]))
    figure, row = axes(len(stages), width=max(7.4, 4.8 * len(stages)), height=4, sharey=True)
    for ax, stage in zip(row, stages, strict=True):
        for criterion, part in curves[curves["stage"] == stage].groupby("criterion", sort=False):
            one_seed = part["seed"].nunique() == 1
            low, high = ("accuracy_low", "accuracy_high") if one_seed else ("accuracy", "accuracy")
            by_sparsity = part.groupby("sparsity")
            mean = by_sparsity["accuracy"].mean()
            shade = color(criterion)
            ax.plot(mean.index, mean, marker=MARKERS[stage], color=shade, label=label(criterion))
            ax.fill_between(mean.index, by_sparsity[low].min(), by_sparsity[high].max(), color=shade, alpha=0.12)
        ax.axhline(dense, color=COLORS["dense"], linestyle="--")
        note(ax, 0.02, dense, "dense")
        if stage == "recovered" and control is not None:
            ax.axhline(control, color=COLORS["control"], linestyle=":")
            note(ax, 0.98, control, "dense, same extra steps", "right")
        ax.axhline(0.5, color=COLORS["baseline"], linewidth=1)
        note(ax, 0.02, 0.5, "chance")
        ax.set(
            xlabel="share of block weights removed",
            title={"pruned": "right after pruning"}.get(stage, "after recovery"),
        )
        in_percent(ax.xaxis)
    row[0].set_ylabel("validation accuracy")
    in_percent(row[0].yaxis)
    for ax in row:
        name_lines(ax)
    return figure


def sensitivity(table: pd.DataFrame, value: str) -> Figure:
    """Draw what pruning one matrix alone changes: heatmaps of layers and modules, one per sparsity.

    table: of ``stability.sensitivity``; value: the name of its column value in prose, for instance "validation loss".
    """
    untouched = table.loc[table["layer"] == -1, "value"].item()
    pruned = table[table["layer"] >= 0].assign(change=lambda rows: rows["value"] - untouched)
    tables = {
        f"{sparsity:.0%} of the matrix removed": part.pivot(index="layer", columns="module", values="change")
        for sparsity, part in pruned.groupby("sparsity")
    }
    return heatmaps(tables, f"One matrix pruned, the others whole: change of {value}", "+.3f", f"change of {value}")
