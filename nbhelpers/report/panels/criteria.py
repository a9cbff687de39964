"""Panel of notebook 02: thresholds and merges."""

import ipywidgets as widgets
import numpy as np
import pandas as pd

from nbhelpers.criteria import votes_needed
from nbhelpers.models import position
from nbhelpers.report.panels.shared import NumberedBars, blank, draw_shares, explore
from nbhelpers.report.style import COLORS, color, in_percent, label
from nbhelpers.study import scoring
from nbhelpers.workspace import Run

MOST_WEIGHTS = 2_000_000  # of a larger model, a sample of this size follows the sliders


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the share of values below the middle of each value, float32 [n]: round(q * n) of them are below q.

    Of equal values the first ones rank lower, as in ``selection.select``.
    """
    found = np.empty(len(values), np.float32)
    found[np.argsort(values, kind="stable")] = (np.arange(len(values)) + 0.5) / len(values)
    return found


def independent(quantiles: list[float], merge: str) -> float:
    """Return the share of weights that a merge would flag if the criteria were independent."""
    counts = np.ones(1)
    for q in quantiles:
        counts = np.convolve(counts, [1 - q, q])  # how likely 0, 1, 2 ... of them flag a weight
    return float(counts[votes_needed(len(quantiles))[merge] :].sum())


class CriteriaPanel:
    """The weights that are flagged, as each criterion's threshold moves.

    scores: {criterion: {parameter name: score}}. Of more than ``MOST_WEIGHTS`` weights, a random sample is followed.
    """

    def __init__(self, scores: dict, share: float):
        self.names, parameters = list(scores), list(scores[next(iter(scores))])
        self.rows = self.sample({name: scores[self.names[0]][name].numel() for name in parameters})
        self.sizes = np.array([len(rows) for rows in self.rows.values()])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.ranks = {c: ranks(self.flat(tensors)) for c, tensors in scores.items()}
        self.mean_rank = ranks(sum(self.ranks.values()))
        self.cells = pd.DataFrame([position(name) for name in parameters], columns=["layer", "module"])
        look = {"readout_format": ".0%", "style": {"description_width": "6em"}}
        self.controls = {
            c: widgets.FloatSlider(share, min=0, max=0.99, step=0.01, description=c, **look) for c in self.names
        }
        self.controls["merge"] = widgets.Dropdown(options=["all", "majority", "any", "mean_rank"], description="merge")
        self.draw()

    def sample(self, counts: dict[str, int]) -> dict[str, np.ndarray]:
        """Return which weights of each matrix are followed: all of them, or a fixed random sample."""
        keep = min(1.0, MOST_WEIGHTS / sum(counts.values()))
        rng = np.random.default_rng(0)
        return {n: np.sort(rng.choice(k, max(1, round(keep * k)), replace=False)) for n, k in counts.items()}

    def flat(self, tensors: dict) -> np.ndarray:
        return np.concatenate([tensors[name].flatten().numpy()[rows] for name, rows in self.rows.items()])

    def draw(self) -> None:
        self.figure, self.title, (bars, kept, shared) = blank(3, 3.6, 11, width_ratios=(1.1, 1.2, 1.1))
        names = [*self.names, "merged"]
        shades = [color(name) for name in names]
        self.bars = NumberedBars(bars, [label(n) for n in names], shades, "{:.1%}".format, fontsize="small")
        (self.expected,) = bars.plot([], [], "|", color=COLORS["dense"], markersize=22, markeredgewidth=2)
        bars.set(xlim=(0, 1.18), xlabel="share flagged")
        in_percent(bars.xaxis)
        self.show_kept = draw_shares(kept, self.by_layer_and_module(np.zeros(len(self.cells))))
        kept.set(title="kept of each matrix", ylabel="layer")
        self.show_shared = draw_shares(shared, pd.DataFrame(0.0, self.names, self.names))
        shared.set_title("of the row, flagged by the column", fontsize="medium")

    def by_layer_and_module(self, values: np.ndarray) -> pd.DataFrame:
        return self.cells.assign(value=values).pivot(index="layer", columns="module", values="value")

    def update(self, merge: str, **quantiles: float) -> None:
        flags = {c: self.ranks[c] < quantiles[c] for c in self.names}
        if merge == "mean_rank":
            merged = self.mean_rank < np.mean(list(quantiles.values()))
        else:
            merged = sum(flag.view(np.uint8) for flag in flags.values()) >= votes_needed(len(flags))[merge]
        shares = [flag.mean() for flag in (*flags.values(), merged)]
        self.bars.set(shares)
        dropped = np.add.reduceat(merged, self.starts, dtype=np.int64) / self.sizes
        self.show_kept(self.by_layer_and_module(1 - dropped).to_numpy())
        overlap = [[(a & b).sum() / max(1, a.sum()) for b in flags.values()] for a in flags.values()]
        self.show_shared(np.array(overlap))
        text = f"{merge.replace('_', ' ')}: {shares[-1]:.1%} of the weights are flagged"
        if merge == "mean_rank":
            self.expected.set_data([], [])
        else:
            chance = independent(list(quantiles.values()), merge)
            self.expected.set_data([chance], [len(flags)])
            text += f"; criteria that had nothing in common would flag {chance:.1%}"
        self.title.set_text(text)


def criteria_panel(run: Run) -> None:
    """Show a slider per criterion and a choice of merge: flagged share, kept weights by matrix, and overlap follow."""
    explore(CriteriaPanel(scoring.score_weights(run), run.profile.main_sparsity))
