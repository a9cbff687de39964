"""Panel of notebook 03: pruning, review by review."""

import functools

import ipywidgets as widgets
import numpy as np

from nbhelpers import selection
from nbhelpers.evaluation import predict_logits, wilson_interval
from nbhelpers.models import prunable_weights
from nbhelpers.report.panels.shared import blank, draw_ring, explore, slider
from nbhelpers.report.style import COLORS, color, in_percent, label
from nbhelpers.study import artefacts, inputs, predictions, scoring
from nbhelpers.workspace import Run

BATCH_TOKENS, MOST_REVIEWS = 2000, 40  # of the small validation batch: evaluated in a tenth of a second on two cores


def small_batch(run: Run) -> np.ndarray:
    """Return row numbers of some validation reviews with ``BATCH_TOKENS`` tokens together, and at least eight."""
    rows = inputs.dataset(run, "validation").input_ids
    order = np.random.default_rng(0).permutation(len(rows))[:MOST_REVIEWS]
    tokens = np.cumsum([len(rows[i]) for i in order])
    return order[: max(8, int((tokens <= BATCH_TOKENS).sum()))]


class SparsityPanel:
    """The answer to each review of a small batch as weights are removed, and after recovery.

    run: one whose notebook 03 has been run. Each position is evaluated once.
    """

    def __init__(self, run: Run):
        self.run, self.rows = run, small_batch(run)
        data = inputs.dataset(run, "validation")
        self.ids, self.labels = [data.input_ids[i] for i in self.rows], data.labels[self.rows]
        self.model = run.load_model("fine_tuned")
        self.whole = {name: weight.detach().clone() for name, weight in prunable_weights(self.model).items()}
        self.scores = functools.cache(lambda criterion: scoring.scores_of(run, criterion))
        self.dense, self.answers = self.p_right(self.model), {}
        curves = run.load_table("curves")
        self.curves = curves[(curves["split"] == "validation") & curves["criterion"].isin(scoring.MAIN)]
        main = run.profile.main_sparsity
        sparsities = sorted(self.curves["sparsity"].unique())
        self.controls = {
            "criterion": widgets.Dropdown(options=scoring.MAIN, value="merged", description="criterion"),
            "stage": widgets.ToggleButtons(options=["pruned", "recovered"], style={"button_width": "8em"}),
            "sparsity": slider("removed", sparsities, main, "{:.0%}".format),
        }
        self.draw()

    def p_right(self, model) -> np.ndarray:
        """Return P(the right label) of each review."""
        logits = predict_logits(model, self.ids, len(self.ids))
        return predictions.probabilities(logits)[np.arange(len(self.labels)), self.labels]

    def answer(self, *position) -> np.ndarray:
        """Return what ``evaluate`` found at a position, which is evaluated once."""
        if position not in self.answers:
            self.answers[position] = self.evaluate(*position)
        return self.answers[position]

    def evaluate(self, criterion: str, stage: str, sparsity: float) -> np.ndarray:
        """Return P(the right label) of each review by the model at a position."""
        if stage == "recovered":
            return self.p_right(self.run.load_model(artefacts.model_name(stage, criterion, sparsity)))
        weights = prunable_weights(self.model)
        for name, kept in selection.select(self.scores(criterion), sparsity).items():
            weights[name].data.copy_(self.whole[name] * kept)
        return self.p_right(self.model)

    def draw(self) -> None:
        self.figure, self.title, (curve, dots) = blank(2, 3.8)
        self.lines = {}
        for (criterion, stage), part in self.curves.groupby(["criterion", "stage"], sort=False):
            mean = part.groupby("sparsity")["accuracy"].mean()
            style = {"pruned": "--", "recovered": "-"}[stage]
            (self.lines[criterion, stage],) = curve.plot(
                mean.index, mean, style, color=color(criterion), marker="o", ms=4
            )
        self.ring = draw_ring(curve)
        curve.set(xlabel="share of block weights removed", ylabel="accuracy, all validation reviews")
        curve.set_title("dashed: pruned, solid: recovered")
        for axis in (curve.xaxis, curve.yaxis):
            in_percent(axis)
        dots.axhspan(0, 0.5, xmin=0.5, color=COLORS["sparse"], alpha=0.08)
        dots.axhspan(0.5, 1, xmax=0.5, color=COLORS["gradient"], alpha=0.08)
        dots.text(0.98, 0.03, "forgotten", ha="right", color=COLORS["sparse"])
        dots.text(0.02, 0.97, "learned", va="top", color=COLORS["gradient"])
        self.dots = dots.scatter(self.dense, self.dense, s=36, zorder=3)
        dots.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="P(right) by the dense model", ylabel="P(right) by this one"
        )
        dots.set_title("each dot is a review")

    def update(self, criterion: str, stage: str, sparsity: float) -> None:
        rows = self.curves[(self.curves["criterion"] == criterion) & (self.curves["stage"] == stage)]
        accuracies = rows.groupby("sparsity")["accuracy"].mean()
        for key, line in self.lines.items():
            line.set_alpha(1.0 if key == (criterion, stage) else 0.25)
        if sparsity not in accuracies.index:
            self.ring.set_data([], [])
            self.title.set_text(f"{label(criterion)} was not {stage} at {sparsity:.0%}: move the slider")
            return
        now = self.answer(criterion, stage, sparsity)
        self.ring.set_data([sparsity], [accuracies[sparsity]])
        self.dots.set_offsets(np.stack([self.dense, now], 1))
        changed = np.where((self.dense > 0.5) & (now <= 0.5), 1, np.where((self.dense <= 0.5) & (now > 0.5), 2, 0))
        self.dots.set_color(np.array([COLORS["baseline"], COLORS["sparse"], COLORS["gradient"]])[changed])
        low, high = wilson_interval(now > 0.5)
        right, dense = (now > 0.5).sum(), (self.dense > 0.5).sum()
        self.title.set_text(
            f"{label(criterion)}, {stage}, {sparsity:.0%} removed: {right} of these {len(now)} reviews right "
            f"({low:.0%} to {high:.0%}), the dense model {dense}; of all {accuracies[sparsity]:.1%}"
        )


def sparsity_panel(run: Run) -> None:
    """Show which reviews of a small batch stay right, with a slider over the stored scores and models."""
    explore(SparsityPanel(run))
