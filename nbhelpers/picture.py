"""The page's picture: test accuracy against what a model costs, a mark a model, placed here for every cost at once.

picture.html turns what ``draw`` returns into SVG; the page's script moves the marks from one cost to the next.
"""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator

from nbhelpers import plots

# Outlines of the figures' markers around (0, 0), of about the same area.
OUTLINES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M-4.5-4.5h9v9h-9z",
    "D": "M0-6.2 6.2 0 0 6.2-6.2 0z",
    "^": "M0-6 6 5H-6z",
    "v": "M0 6 6-5H-6z",
    "P": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "*": "M0-7 1.8-2.2 6.7-2.2 2.8 1 4.1 5.8 0 3-4.1 5.8-2.8 1-6.7-2.2-1.8-2.2z",
}


@dataclass(frozen=True)
class Cost:
    """What the horizontal axis may show: a column of the comparison, divided by ``unit``."""

    key: str
    column: str
    unit: float
    name: str
    label: str


COSTS = (
    Cost("speed", "speedup", 1, "Speed-up", "times the dense speed (log scale, more is better)"),
    Cost("latency", "latency_ms", 1, "Latency", "milliseconds a batch (log scale, less is better)"),
    Cost("size", "file_bytes", 1e6, "File size", "MB on disk (log scale, less is better)"),
)


@dataclass(frozen=True)
class Frame:
    """Width and height of a drawing, the edges of its axes, and how far apart marks have to stand, all in pixels."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    apart: float


# Two, so that a phone shows no shrunken text.
FRAMES = (Frame("wide", 780, 500, 52, 764, 34, 444, 11.5), Frame("narrow", 360, 430, 40, 352, 34, 376, 7.5))


def look(model: str) -> dict[str, str]:
    """The outline and the colour of a model's mark, those that the figures give it."""
    kind = next((kind for kind in plots.MARKERS if kind in model), "dense")
    return {"outline": OUTLINES[plots.MARKERS[kind]], "color": plots.color(model)}


def side_by_side(places: list[float], apart: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed to stand ``apart`` from each other, or closer where all would not fit."""
    apart = min(apart, (high - low) / max(1, len(places) - 1))

    def span(group: list[int]) -> tuple[float, float]:
        half = apart * (len(group) - 1) / 2
        centre = sum(places[i] for i in group) / len(group)
        centre = min(max(centre, low + half), high - half)
        return centre - half, centre + half

    groups: list[list[int]] = []
    for i in sorted(range(len(places)), key=places.__getitem__):
        groups.append([i])
        # Within rounding, so that groups that just fill the axis do not count as too near.
        while len(groups) > 1 and span(groups[-1])[0] - span(groups[-2])[1] < apart - 1e-9:
            last = groups.pop()
            groups[-1] += last
    moved = {i: span(group)[0] + apart * n for group in groups for n, i in enumerate(group)}
    return [round(moved[i], 1) for i in range(len(places))]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    values = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from ``low`` to ``high``; where that is hardly any, round numbers."""
    values = LogLocator(subs=(1, 2, 5), numticks=10).tick_values(low, high)
    within = [float(value) for value in values if low <= value <= high]
    return within if len(within) > 2 else ticks(low, high, 4)


def draw(table: pd.DataFrame, lines: dict[str, float]) -> dict | None:
    """Axes, ticks, lines and marks of the picture in pixels, for each of ``FRAMES``.

    table: comparison, of which ``COSTS`` that are no column are left out; lines: accuracies to draw across, by label.
    None where there is no cost at all. Raises ``ValueError`` for a number that is missing or infinite, or no cost.
    """
    costs = [cost for cost in COSTS if cost.column in table]
    if not costs:
        return None
    used = table[["accuracy", "accuracy_low", "accuracy_high", *(cost.column for cost in costs)]]
    if not all(map(math.isfinite, used.to_numpy(dtype=float).ravel())):
        raise ValueError("the comparison has accuracies or costs that are missing or infinite")
    if not (used[[cost.column for cost in costs]] > 0).all(axis=None):
        raise ValueError("the comparison has costs that are not above zero")
    return {
        "costs": costs,
        "frames": [{"frame": frame, **drawing(table, costs, frame, lines)} for frame in FRAMES],
    }


def drawing(table: pd.DataFrame, costs: list[Cost], frame: Frame, lines: dict[str, float]) -> dict:
    """What one frame shows: vertical ticks and lines [(y, text)], an axis a cost, and the marks by cost."""
    low = min([table["accuracy_low"].min(), *lines.values()])
    high = max([table["accuracy_high"].max(), *lines.values()])

    def y(accuracy: float) -> float:
        share = (accuracy - low) / max(high - low, 1e-9)
        return round(frame.bottom - 8 - share * (frame.bottom - frame.top - 24), 1)

    axes, places = [], {}
    for cost in costs:
        values = table[cost.column] / cost.unit
        left, right = values.min() / 1.3, values.max() * 1.3
        scale = (frame.right - frame.left) / math.log(right / left)

        def x(value: float, left=left, scale=scale) -> float:
            return frame.left + scale * math.log(value / left)

        axes.append({"cost": cost, "ticks": [(round(x(value), 1), f"{value:g}") for value in log_ticks(left, right)]})
        exact = [x(value) for value in values]
        places[cost.key] = side_by_side(exact, frame.apart, frame.left + 6, frame.right - 6)
    marks = [
        {
            "x": {cost.key: places[cost.key][i] for cost in costs},
            "y": y(row["accuracy"]),
            "top": round(y(row["accuracy_high"]) - y(row["accuracy"]), 1),
            "bottom": round(y(row["accuracy_low"]) - y(row["accuracy"]), 1),
        }
        for i, row in enumerate(table.to_dict("records"))
    ]
    return {
        "axes": axes,
        "marks": marks,
        "ticks": [(y(value), f"{100 * value:g} %") for value in ticks(low, high, 7)],
        "lines": [(y(value), text) for text, value in lines.items()],
    }
