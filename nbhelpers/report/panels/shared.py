"""Panels: in JupyterLab a figure with sliders; under papermill, in HTML and on paper the same figure, at one position.

A panel has a ``figure``, ``controls`` (widgets by name) and ``update(**values)``, which changes what the figure shows.
It changes artists that exist already: drawing a new figure at every move would take longer than a slider may lag.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nbhelpers.report.plots.shared import draw_cells
from nbhelpers.report.style import COLORS


def can_be_moved() -> bool:
    """Return True where somebody may sit in front of this notebook, which is not where the pipeline runs it."""
    return "NBHELPERS_BATCH" not in os.environ


# --- figures that change ---


def blank(columns: int, height: float, width: float = 10.5, **options) -> tuple:
    """Return a figure that belongs to no backend, its title, which is empty, and its axes [columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    title = figure.suptitle("", x=0.01, ha="left", fontsize="medium")
    return figure, title, figure.subplots(1, columns, squeeze=False, **options)[0]


def draw_ring(ax):
    """Draw the ring that marks the position of the sliders on a curve, and return it."""
    return ax.plot([], [], "o", color=COLORS["dense"], markersize=13, markerfacecolor="none", zorder=5)[0]


class NumberedBars:
    """Horizontal bars with their values as numbers, the first on top."""

    def __init__(self, ax, names: list[str], colors: list[str], spell: Callable[[float], str], **font):
        self.bars, self.spell = ax.barh(range(len(names)), np.zeros(len(names)), color=colors), spell
        self.numbers = [ax.text(0, y, "", va="center", **font) for y in range(len(names))]
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()

    def set(self, values: Iterable[float]) -> None:
        for bar, number, value in zip(self.bars, self.numbers, values, strict=True):
            bar.set_width(value)
            number.set(x=value + 0.02, text=self.spell(value))


def draw_shares(ax, table: pd.DataFrame) -> Callable[[np.ndarray], None]:
    """Draw a table of shares as coloured cells; returns a function that shows other values in them."""
    draw_cells(ax, table, ".0%", (0, 1))

    def show(values: np.ndarray) -> None:
        ax.collections[0].set_array(values)
        for text, value in zip(ax.texts, np.ravel(values), strict=True):
            text.set(text=f"{value:.0%}", color="black" if value > 0.6 else "white")

    return show


# --- showing ---


def picture(figure: Figure) -> bytes:
    """Return a figure as PNG for a screen: fast rather than small."""
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def explore(panel) -> None:
    """Show a panel: with its controls where they can be moved, and as a picture everywhere else."""

    def values() -> dict:
        return {name: control.value for name, control in panel.controls.items()}

    panel.update(**values())
    image = widgets.Image(value=picture(panel.figure), format="png", layout={"max_width": "100%"})
    # Positions are computed once: a new layout takes as long as the drawing.
    panel.figure.set_layout_engine("none")
    shown = {"image/png": base64.b64encode(image.value).decode(), "text/plain": panel.__doc__.splitlines()[0]}
    if can_be_moved():

        def redraw(_) -> None:
            panel.update(**values())
            image.value = picture(panel.figure)

        for control in panel.controls.values():
            control.observe(redraw, names="value")
        actions = getattr(panel, "actions", {}).items()
        buttons = [make_button(text, lambda _, act=act: redraw(act(**values()))) for text, act in actions]
        row = widgets.HBox([*panel.controls.values(), *buttons], layout={"flex_flow": "row wrap"})
        # Both in one output: a viewer that cannot show a widget shows the picture.
        shown |= widgets.VBox([row, image])._repr_mimebundle_()
    display(shown, raw=True)


def make_button(text: str, action: Callable, width: str = "auto") -> widgets.Button:
    """Return a button that calls action(button) and is disabled meanwhile."""
    button = widgets.Button(description=text, layout={"width": width})

    def clicked(_) -> None:
        button.disabled = True
        try:
            action(button)
        finally:
            button.disabled = False

    button.on_click(clicked)
    return button


def slider(description: str, options: Iterable, value, spell: Callable[[object], str]) -> widgets.SelectionSlider:
    """Return a slider over measured values, and only these."""
    return widgets.SelectionSlider(options=[(spell(o), o) for o in options], value=value, description=description)
