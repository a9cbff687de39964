"""One function per kind of figure; a colour means the same thing in all six notebooks (``nbhelpers.style``)."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from nbhelpers.evaluation import wilson_interval
from nbhelpers.models import position
from nbhelpers.style import (
    COLORS,
    MARKERS,
    axes,
    color,
    describe,
    in_percent,
    label,
    name_lines,
    note,
    plain_numbers,
    show,
    spread,
)

__all__ = ["COLORS", "MARKERS", "color", "label", "position", "show"]  # what notebooks take from here


def lengths(counts: dict[str, list[int]], max_tokens: int) -> Figure:
    """Histogram of review lengths in tokens by class, with the truncation limit."""
    figure, (ax,) = axes()
    longest = int(np.percentile(np.concatenate(list(counts.values())), 99))
    for name, values in counts.items():
        shade = {"negative": COLORS["sparse"], "positive": COLORS["magnitude"]}.get(name, COLORS["dense"])
        ax.hist(values, bins=np.linspace(0, longest, 50), histtype="step", linewidth=1.8, color=shade, label=name)
    ax.axvline(max_tokens, color=COLORS["dense"], linestyle="--")
    ax.text(max_tokens, ax.get_ylim()[1], f" kept: {max_tokens} tokens", va="top")
    ax.set(xlabel="tokens in a review", ylabel="reviews", title="How long the reviews are")
    ax.legend()
    return figure


def learning_curves(curves: dict[str, pd.DataFrame], lines: dict[str, float], title: str, reviews: int) -> Figure:
    """Training loss (running mean) and validation accuracy over steps, a curve a model, with lines of accuracy.

    reviews: how many the accuracy was measured on; its bars are Wilson's intervals.
    """
    figure, (left, right) = axes(2, width=9)
    for name, curve in curves.items():
        options = {"color": color(name) if len(curves) < 3 else None, "label": label(name)}
        losses = pd.Series(np.concatenate(curve["losses"].to_list()))
        smooth = losses.rolling(max(1, len(losses) // 12), min_periods=1).mean()
        left.plot(np.arange(1, len(losses) + 1), smooth, **options)
        ends = [wilson_interval(np.arange(reviews) < round(a * reviews)) for a in curve["accuracy"]]
        (line,) = right.plot(curve["steps"], curve["accuracy"], marker="o", **options)
        right.vlines(curve["steps"], *np.transpose(ends), color=line.get_color(), alpha=0.4)
    right.set_xlim(0, None)
    for name, value in lines.items():
        right.axhline(value, linestyle="--", color=COLORS["baseline"])
        note(right, 0.02, value, name)
    left.set(xlabel="optimizer steps", ylabel="training loss", title=title)
    right.set(xlabel="optimizer steps", ylabel="validation accuracy", title="bars: 95 % intervals")
    in_percent(right.yaxis)
    if len(curves) > 1:
        name_lines(right)
    return figure


def confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """A confusion matrix [true, predicted] with its counts."""
    figure, (ax,) = axes(width=4.2, height=3.4)
    sns.heatmap(matrix, annot=True, fmt="d", cmap="Blues", cbar=False, square=True, ax=ax)
    ax.set_xticklabels(names)
    ax.set_yticklabels(names, rotation=0)
    ax.set(xlabel="predicted", ylabel="true", title="Where the errors are")
    return figure


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


def score_distributions(scores: dict[str, dict[str, torch.Tensor]], thresholds: dict[str, float]) -> Figure:
    """Histograms of log10 score by layer, one panel a criterion, with the threshold of each."""
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


def accuracy_curves(curves: pd.DataFrame, dense: float, control: float | None = None) -> Figure:
    """Accuracy against sparsity, one panel a stage (pruned, recovered), one line a criterion.

    With several seeds the line is their mean and the band goes from the lowest to the highest; with one it is Wilson's
    interval.
    """
    stages = list(dict.fromkeys(curves["stage"]))
    figure, row = axes(len(stages), width=max(7.4, 4.8 * len(stages)), height=4, sharey=True)
    for ax, stage in zip(row, stages, strict=True):
        for criterion, part in curves[curves["stage"] == stage].groupby("criterion", sort=False):
            one = part["seed"].nunique() == 1
            low, high = ("accuracy_low", "accuracy_high") if one else ("accuracy", "accuracy")
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


def break_even(table: pd.DataFrame, engine: str) -> Figure:
    """Speed-up of an engine over the dense product against sparsity: a panel a batch, a line a shape, quartile bands.

    table: of ``benchmark.compare_engines``.
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
    """Useful work a second of each engine under what the machine allows (Williams, Waterman and Patterson, 2009).

    table: rows of ``benchmark.compare_engines`` at one sparsity and number of tokens; limits: of
    ``benchmark.machine_limits``.
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


def step_sizes(table: pd.DataFrame, title: str) -> Figure:
    """Size of a file after each step of a compression, with the accuracy: ``compression.compress_all``'s table."""
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


def compare_and_visualize(comparison: pd.DataFrame) -> dict[str, Figure]:
    """The three figures of a comparison table: accuracy against size, against latency, and the cost of an iteration."""
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


def overlap_over_seeds(table: pd.DataFrame) -> Figure:
    """Overlap of the sets that runs with other seeds drop: a dot a pair of seeds, and both chance levels a criterion.

    table: of ``stability.stability_over_seeds``, with a column criterion. Raises ``ValueError`` when it has no pairs.
    """
    if table.empty:
        raise ValueError("there is no pair of seeds to compare: make runs with at least two seeds first")
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
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def overlap_along_training(table: pd.DataFrame) -> Figure:
    """Overlap with the set flagged in the end against optimizer steps: a line a criterion, its chance level dotted.

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
    """Share of each attention head that is dropped: heatmaps of layers and heads, one a criterion.

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
    """Share of each MLP neuron that is dropped, neurons sorted by it: a panel a criterion, a line a layer.

    shares: of ``stability.structure_shares``, with a column criterion. A flat line means that all neurons lose alike.
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


def sensitivity(table: pd.DataFrame, value: str, fmt: str = "+.3f") -> Figure:
    """What pruning one matrix alone changes: heatmaps of layers and modules, one a sparsity.

    table: of ``stability.sensitivity``; value: what its column value is, for instance "validation loss".
    """
    untouched = table.loc[table["layer"] == -1, "value"].item()
    pruned = table[table["layer"] >= 0].assign(change=lambda rows: rows["value"] - untouched)
    tables = {
        f"{sparsity:.0%} of the matrix removed": part.pivot(index="layer", columns="module", values="change")
        for sparsity, part in pruned.groupby("sparsity")
    }
    return heatmaps(tables, f"One matrix pruned, the others whole: change of {value}", fmt, f"change of {value}")


def forgotten(table: pd.DataFrame) -> Figure:
    """Share forgotten in each group of reviews with its interval, a panel a feature; dashed: of all reviews.

    table: of ``forgetting.forgotten_by_group``; several of them may be told apart by a column model.
    """
    titles = {
        "tokens": "tokens in the review",
        "confidence": "confidence of the dense model, %",
        "negations": "words that negate",
        "contrasts": "words that contrast",
        "stars": "stars that the review gives",
    }
    models = list(table.groupby("model", sort=False)) if "model" in table else [("dense", table)]
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
    for ax in np.ravel(grid)[len(features) :]:
        ax.set_axis_off()
    first = np.ravel(grid)[0]
    first.set_ylim(0, None)
    in_percent(first.yaxis)
    figure.supylabel("share of right answers forgotten", fontsize="medium")
    if len(models) > 1:
        figure.legend(*first.get_legend_handles_labels(), fontsize="small", loc="outside right center")
    return figure


def unlearned(table: pd.DataFrame) -> Figure:
    """Bits per byte of each model, a panel a domain, a dot a row; a line leads from the first model's mean to its own.

    table: columns model, domain, bits_per_byte; a model may have several rows, one a seed.
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
    """Paired differences in points with their intervals against sparsity, a line a rival; 0 is a draw.

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
