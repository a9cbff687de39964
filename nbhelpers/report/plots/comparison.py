"""Figures that compare all models, and what they forgot."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.report.plots.shared import tradeoff
from nbhelpers.report.style import COLORS, axes, color, describe, in_percent, label, name_lines


def compare_and_visualize(comparison: pd.DataFrame) -> dict[str, Figure]:
    """Return three figures of a comparison: accuracy against size, against latency, and the cost of an iteration."""
    table = comparison.assign(
        megabytes=comparison["file_bytes"] / 1e6, memory_megabytes=comparison["peak_memory_bytes"] / 1e6
    )
    figure, (left, right) = axes(2, width=10, height=1 + 0.3 * len(table), sharey=True)
    for ax, column, unit in ((left, "latency_ms", "ms a batch"), (right, "memory_megabytes", "MB, weights included")):
        ends = [f"{column.removesuffix('_ms')}_{end}_ms" for end in ("low", "high")]
        error = np.abs(table[ends].to_numpy().T - table[column].to_numpy()) if set(ends) <= set(table) else None
        ax.barh(table["model"].map(label), table[column], xerr=error, color=[color(name) for name in table["model"]])
        ax.bar_label(ax.containers[-1], fmt="%.1f", padding=3, fontsize=8)
        ax.set_xlabel(unit)
    left.invert_yaxis()
    left.set_title("Time of one iteration, with quartiles")
    right.set_title("Peak memory of one iteration")
    return {
        "accuracy_size": tradeoff(table, "megabytes", "file size, MB (log scale)", "Accuracy against size"),
        "accuracy_latency": tradeoff(
            table, "latency_ms", "milliseconds a batch (log scale)", "Accuracy against latency"
        ),
        "cost": figure,
    }


def reliability(table: pd.DataFrame) -> Figure:
    """Draw how often predictions of a confidence are right, a line per model; table: of ``calibration_table``."""
    figure, (ax,) = axes(width=6.8, height=4.6)
    ax.plot([0.5, 1], [0.5, 1], "--", color=COLORS["baseline"], label="_calibrated")
    for name, part in table.groupby("model", sort=False):
        ax.plot(part["confidence"], part["accuracy"], marker="o", color=color(name), label=label(name))
        ax.scatter(
            part["confidence"], part["accuracy"], s=part["n"] / table["n"].max() * 200, color=color(name), alpha=0.3
        )
    ax.set(xlabel="confidence", ylabel="share that is right")
    for axis in (ax.xaxis, ax.yaxis):
        in_percent(axis)
    name_lines(ax)
    describe(figure, "The area of a mark is the number of reviews; dashed: confidence and accuracy are the same")
    return figure


def forgotten(table: pd.DataFrame) -> Figure:
    """Draw the share forgotten in each group of reviews with its interval, one panel per feature; dashed: in all.

    table: of ``forgetting.forgotten_by_group``, with a column model.
    """
    titles = {
        "tokens": "tokens in the review",
        "confidence": "confidence of the dense model, %",
        "negations": "words that negate",
        "contrasts": "words that contrast",
        "stars": "stars that the review gives",
    }
    models = list(table.groupby("model", sort=False))
    features = [name for name in dict.fromkeys(table["feature"]) if name != "all"]
    columns = min(3, -(-len(features) // 2))
    rows = -(-len(features) // columns)
    figure, grid = axes(columns, rows, width=4.2 * columns, height=2.9 * rows, sharey=True)
    for ax, feature in zip(np.ravel(grid), features, strict=False):
        # Groups come low to high from each table; a model that lacks one leaves a gap.
        names = list(dict.fromkeys(table.loc[table["feature"] == feature, "group"]))
        for i, (model, part) in enumerate(models):
            shade = color(model)
            places = np.arange(len(names)) + (i - (len(models) - 1) / 2) * 0.6 / len(models)
            found = part[part["feature"] == feature].set_index("group").reindex(names)
            ax.vlines(places, found["forgotten_low"], found["forgotten_high"], color=shade, linewidth=2)
            ax.plot(places, found["forgotten"], "o", color=shade, label=label(model), clip_on=False)
            ax.axhline(part.loc[part["feature"] == "all", "forgotten"].item(), color=shade, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), names, fontsize="x-small")
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_title(titles.get(feature, label(feature)))
    first, *others = np.ravel(grid)
    for ax in others[len(features) - 1 :]:
        ax.set_axis_off()
    first.set_ylim(0, None)
    in_percent(first.yaxis)
    figure.supylabel("share of right answers forgotten", fontsize="medium")
    figure.legend(*first.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    return figure


def unlearned(table: pd.DataFrame) -> Figure:
    """Draw bits per byte: one panel per domain, one dot per row, a line from the first model's mean to each mean.

    table: columns model, domain, bits_per_byte; a model may have several rows, one per seed.
    """
    models, domains = (list(dict.fromkeys(table[name])) for name in ("model", "domain"))
    means = table.groupby(["domain", "model"])["bits_per_byte"].mean()
    figure, row = axes(len(domains), width=2.6 + 3.4 * len(domains), height=1.2 + 0.36 * len(models), sharey=True)
    for ax, domain in zip(row, domains, strict=True):
        start = means[domain, models[0]]
        ax.axvline(start, color=COLORS["baseline"], linestyle="--", zorder=0)
        for y, model in enumerate(models):
            values = table.loc[(table["domain"] == domain) & (table["model"] == model), "bits_per_byte"]
            mean = means[domain, model]
            ax.plot([start, mean], [y, y], color=color(model), linewidth=2, alpha=0.5)
            ax.plot(values, np.full(len(values), y), "o", color=color(model), alpha=0.8)
            ax.annotate(f"{mean:.2f}", (values.max(), y), (7, 0), textcoords="offset points", va="center", fontsize=9)
        ax.margins(x=0.15)
        ax.set(title=domain, xlabel="bits per byte, less is better")
    row[0].set_yticks(range(len(models)), [label(model) for model in models])
    row[0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def rivals(table: pd.DataFrame, title: str) -> Figure:
    """Draw paired differences in points with their intervals against sparsity, one line per rival.

    table: of ``comparison.compare_rivals``.
    """
    figure, (ax,) = axes(width=7.4, height=4)
    names = list(dict.fromkeys(table["criterion"]))
    for i, (name, part) in enumerate(table.sort_values("sparsity").groupby("criterion", sort=False)):
        # Side by side, so that no interval hides another.
        x = part["sparsity"] + 0.004 * (i - (len(names) - 1) / 2)
        ax.vlines(x, 100 * part["low"], 100 * part["high"], color=color(name), linewidth=2)
        ax.plot(x, 100 * part["difference"], marker="o", color=color(name), label=label(name), linewidth=1)
    ax.axhline(0, color=COLORS["merged"], linestyle="--")
    in_percent(ax.xaxis)
    ax.set(xlabel="share of block weights removed", ylabel="points of accuracy, 95 % interval", title=title)
    name_lines(ax)
    return figure
