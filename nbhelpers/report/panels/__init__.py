"""Panels: a figure with sliders in JupyterLab; under papermill, in HTML and on paper the figure at one position."""

from nbhelpers.report.panels.criteria import criteria_panel
from nbhelpers.report.panels.latency import latency_panel
from nbhelpers.report.panels.pruning import sparsity_panel
from nbhelpers.report.panels.review import review_box
from nbhelpers.report.panels.temperature import temperature_panel

__all__ = ["criteria_panel", "latency_panel", "review_box", "sparsity_panel", "temperature_panel"]
