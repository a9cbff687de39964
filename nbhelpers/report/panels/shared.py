"""Panels: in JupyterLab a figure with sliders; under papermill, in HTML and on paper the same figure, at one position.

A panel has a ``figure``, ``controls`` (a widget a name) and ``update(**values)``, which moves what the figure shows. It
redraws artists that are there already: making a figure anew at every move would take longer than a slider may lag.
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


def can_be_moved() -> bool:
    """Whether somebody may sit in front of this notebook: not where the pipeline runs it."""
    return "NBHELPERS_BATCH" not in os.environ


# --- showing ---


def blank(columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure that belongs to no backend and its axes [columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def picture(figure: Figure) -> bytes:
    """A figure as PNG, for a screen: fast rather than small."""
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def explore(panel) -> None:
    """Show a panel: with its controls where they can be moved, and as a picture everywhere else."""

    def values() -> dict:
        return {name: control.value for name, control in panel.controls.items()}

    if can_be_moved() and hasattr(panel, "prepare"):
        panel.prepare()
    panel.update(**values())
    image = widgets.Image(value=picture(panel.figure), format="png", layout={"max_width": "100%"})
    # What was laid out once stays where it is: to lay it out again takes as long as to draw it.
    panel.figure.set_layout_engine("none")
    shown = {"image/png": base64.b64encode(image.value).decode(), "text/plain": panel.__doc__.splitlines()[0]}
    if can_be_moved():

        def moved(_) -> None:
            panel.update(**values())
            image.value = picture(panel.figure)

        for control in panel.controls.values():
            control.observe(moved, names="value")
        buttons = [button_of(text, action, values, moved) for text, action in getattr(panel, "actions", {}).items()]
        row = widgets.HBox([*panel.controls.values(), *buttons], layout={"flex_flow": "row wrap"})
        # Both in one output: who cannot show a widget shows the picture.
        shown |= widgets.VBox([row, image])._repr_mimebundle_()
    display(shown, raw=True)


def button_of(text: str, action: Callable, values: Callable[[], dict], moved: Callable) -> widgets.Button:
    """A button that does action(**values), can not be pressed meanwhile, and has the figure redrawn."""
    button = widgets.Button(description=text, layout={"width": "auto"})

    def clicked(_) -> None:
        button.disabled = True
        try:
            action(**values())
            moved(None)
        finally:
            button.disabled = False

    button.on_click(clicked)
    return button


def slider(description: str, options: Iterable, value, spell: Callable[[object], str]) -> widgets.SelectionSlider:
    """A slider over values that were measured, and only these."""
    return widgets.SelectionSlider(options=[(spell(o), o) for o in options], value=value, description=description)


def share_slider(description: str, value: float) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value,
        min=0,
        max=0.99,
        step=0.01,
        description=description,
        readout_format=".0%",
        style={"description_width": "6em"},
    )


class Heatmap:
    """A table drawn as coloured cells with their numbers, which can be given other values."""

    def __init__(self, ax, table: pd.DataFrame, spell: str = "{:.0%}"):
        self.spell, shape = spell, table.shape
        self.image = ax.imshow(np.zeros(shape), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        places = [(x, y) for y in range(shape[0]) for x in range(shape[1])]
        self.texts = [ax.text(x, y, "", ha="center", va="center", fontsize="small") for x, y in places]
        ax.set_xticks(range(shape[1]), [str(name) for name in table.columns], rotation=30, ha="right")
        ax.set_yticks(range(shape[0]), [str(name) for name in table.index])
        ax.grid(False)

    def set(self, values: np.ndarray) -> None:
        self.image.set_data(values)
        for text, value in zip(self.texts, np.ravel(values), strict=True):
            text.set(
                text="" if np.isnan(value) else self.spell.format(value), color="black" if value > 0.6 else "white"
            )
