"""Panel of notebook 05: softened probabilities."""

import ipywidgets as widgets
import numpy as np
from scipy.special import expit, rel_entr

from nbhelpers.models import LABEL_NAMES
from nbhelpers.report.panels.shared import NumberedBars, blank, explore, slider
from nbhelpers.report.style import COLORS, label
from nbhelpers.study import inputs, predictions
from nbhelpers.workspace import Run


class TemperaturePanel:
    """The effect of a temperature on the probabilities of one review, and on the targets of a student.

    logits: {"teacher": [n, 2], "student": [n, 2]}; texts and labels [n]. Up to nine reviews are offered: from the
    teacher's worst to its best, and those on which teacher and student differ most.
    """

    T = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)

    def __init__(self, logits: dict[str, np.ndarray], texts: list[str], labels: np.ndarray):
        self.logits, self.texts, self.labels = logits, texts, labels
        teacher, student = (values[:, 1] - values[:, 0] for values in logits.values())
        spread = np.argsort(teacher)[np.linspace(0, len(teacher) - 1, 6).astype(int)]
        most_different = np.argsort(-np.abs(teacher - student))[:3]
        rows = list(dict.fromkeys(map(int, [*spread, *most_different])))
        self.controls = {
            "review": widgets.Dropdown(
                options=[(self.name_of(i), i) for i in rows], value=rows[-1], description="review"
            ),
            "temperature": slider("T", self.T, 4, "{:g}".format),
        }
        self.draw()

    def name_of(self, i: int) -> str:
        return f"{LABEL_NAMES[int(self.labels[i])]}: {' '.join(self.texts[i].split())[:60]}..."

    def draw(self) -> None:
        self.figure, self.title, (bars, curve) = blank(2, 3.4)
        shades = [COLORS["dense"], COLORS["student"]]
        self.bars = NumberedBars(bars, [label(name) for name in self.logits], shades, "{:.3f}".format)
        bars.axvline(0.5, color=COLORS["baseline"], linestyle="--")
        bars.set(xlim=(0, 1.2), xlabel="P(positive) at T")
        self.grid = np.linspace(self.T[0], self.T[-1], 80)
        self.lines = [curve.plot([], [], color=shade)[0] for shade in shades]
        self.position = curve.axvline(1, color=COLORS["merged"])
        curve.axhline(0.5, color=COLORS["baseline"], linestyle="--")
        curve.set(xlim=(1, self.T[-1]), ylim=(0, 1), xlabel="temperature T", ylabel="P(positive)")

    def update(self, review: int, temperature: float) -> None:
        teacher, student = (predictions.probabilities(values[review], temperature) for values in self.logits.values())
        self.bars.set([teacher[1], student[1]])
        for line, values in zip(self.lines, self.logits.values(), strict=True):
            line.set_data(self.grid, expit((values[review, 1] - values[review, 0]) / self.grid))
        self.position.set_xdata([temperature, temperature])
        loss = temperature**2 * rel_entr(teacher, student).sum()
        self.title.set_text(
            f"{self.name_of(review)}\nat T = {temperature:g} the teacher says {teacher[1]:.1%} positive; "
            f"T² KL(teacher, student) = {loss:.3f}"
        )


def temperature_panel(run: Run) -> None:
    """Show the softened probabilities of the teacher and of the best student for a chosen review and T."""
    students = run.load_table("students")
    best = students.loc[students["accuracy"].idxmax(), "model"]
    part = inputs.reviews_of(run.profile, run.seed)["validation"]
    models = {"teacher": "fine_tuned", "student": best}
    logits = {role: predictions.split_logits(run, name, "validation") for role, name in models.items()}
    explore(TemperaturePanel(logits, part["text"][:], np.array(part["label"][:])))
