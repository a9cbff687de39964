"""One function per kind of figure; a colour means the same thing in all six notebooks (``report.style``)."""
# ruff: noqa: F401

from nbhelpers.report.plots.comparison import compare_and_visualize, forgotten, reliability, rivals, unlearned
from nbhelpers.report.plots.pruning import accuracy_curves, sensitivity
from nbhelpers.report.plots.shared import (
    by_layer_and_module,
    differences,
    grouped_bars,
    heatmaps,
    intervals,
    lines,
    small_tensors,
    tradeoff,
)
from nbhelpers.report.plots.speed import ENGINE_NAMES, engine_speeds, roofline, step_sizes
from nbhelpers.report.plots.training import confusion, learning_curves, lengths
from nbhelpers.report.plots.weights import (
    dropped_heads,
    dropped_neurons,
    overlap_along_training,
    overlap_over_seeds,
    score_distributions,
)
