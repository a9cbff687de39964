"""One function per kind of figure; a colour means the same thing in all six notebooks (``report.style``)."""

from nbhelpers.models import position
from nbhelpers.report.plots.comparison import compare_and_visualize, forgotten, rivals, unlearned
from nbhelpers.report.plots.pruning import accuracy_curves, sensitivity
from nbhelpers.report.plots.shared import (
    by_layer_and_module,
    differences,
    draw_lines,
    grouped_bars,
    heatmaps,
    intervals,
    lines,
    number_marks,
    small_tensors,
    tradeoff,
)
from nbhelpers.report.plots.speed import break_even, roofline, step_sizes
from nbhelpers.report.plots.training import confusion, learning_curves, lengths
from nbhelpers.report.plots.weights import (
    dropped_heads,
    dropped_neurons,
    overlap_along_training,
    overlap_over_seeds,
    score_distributions,
)
from nbhelpers.report.style import COLORS, MARKERS, color, label, show

__all__ = [
    "COLORS",
    "MARKERS",
    "accuracy_curves",
    "break_even",
    "by_layer_and_module",
    "color",
    "compare_and_visualize",
    "confusion",
    "differences",
    "draw_lines",
    "dropped_heads",
    "dropped_neurons",
    "forgotten",
    "grouped_bars",
    "heatmaps",
    "intervals",
    "label",
    "learning_curves",
    "lengths",
    "lines",
    "number_marks",
    "overlap_along_training",
    "overlap_over_seeds",
    "position",
    "rivals",
    "roofline",
    "score_distributions",
    "sensitivity",
    "show",
    "small_tensors",
    "step_sizes",
    "tradeoff",
    "unlearned",
]
