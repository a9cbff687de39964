"""Figures of reviews and of training."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from nbhelpers.evaluation import wilson_interval
from nbhelpers.report.style import COLORS, axes, color, in_percent, label, name_lines, note


def lengths(counts: dict[str, list[int]], max_tokens: int) -> Figure:
    """Draw a histogram of review lengths in tokens by class, with the truncation limit."""
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
    """Draw training loss (running mean) and validation accuracy over steps, one curve per model.

    lines: accuracies to draw across, by name; reviews: how many the accuracy was measured on, for Wilson's intervals.
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
    """Draw a confusion matrix [true, predicted] with its counts."""
    figure, (ax,) = axes(width=4.2, height=3.4)
    sns.heatmap(matrix, annot=True, fmt="d", cmap="Blues", cbar=False, square=True, ax=ax)
    ax.set_xticklabels(names)
    ax.set_yticklabels(names, rotation=0)
    ax.set(xlabel="predicted", ylabel="true", title="Where the errors are")
    return figure
