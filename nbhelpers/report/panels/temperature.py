"""Panel of notebook 05: softened probabilities."""

import ipywidgets as widgets
import numpy as np
from scipy.special import expit, rel_entr

from nbhelpers.models import LABEL_NAMES
from nbhelpers.report.panels.shared import blank, explore, slider
from nbhelpers.report.style import COLORS, label
from nbhelpers.study import inputs, predictions
from nbhelpers.workspace import Run

# --- 05: softened probabilities ---


class TemperaturePanel:
    """What a temperature does to the probabilities of one review, and to what a student is asked for.

    logits: {"teacher": [n, 2], and of students}; texts and labels [n]. Of the reviews, nine are offered: those between
    the teacher's worst and its best, and those on which teacher and student differ most.
    """

    T = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)

    def __init__(self, logits: dict[str, np.ndarray], texts: list[str], labels: np.ndarray):
        self.logits, self.texts, self.labels = logits, texts, labels
        teacher, *students = (values[:, 1] - values[:, 0] for values in logits.values())
        spread = np.argsort(teacher)[np.linspace(0, len(teacher) - 1, 6).astype(int)]
        apart = np.argsort(-np.abs(teacher - students[0]))[:3] if students else []
        rows = list(dict.fromkeys(map(int, [*spread, *apart])))
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
        self.figure, (bars, curve) = blank(2, 10.5, 3.4)
        names, shades = list(self.logits), [COLORS["dense"], COLORS["student"], COLORS["magnitude"]]
        self.bars = bars.barh(range(len(names)), np.zeros(len(names)), color=shades)
        self.numbers = [bars.text(0, y, "", va="center") for y in range(len(names))]
        bars.axvline(0.5, color=COLORS["baseline"], linestyle="--")
        bars.set_yticks(range(len(names)), [label(name) for name in names])
        bars.set(xlim=(0, 1.2), xlabel="P(positive) at T")
        bars.invert_yaxis()
        self.grid = np.linspace(self.T[0], self.T[-1], 80)
        self.lines = [
            curve.plot([], [], color=shade, label=label(n))[0] for n, shade in zip(names, shades, strict=False)
        ]
        self.here = curve.axvline(1, color=COLORS["merged"])
        curve.axhline(0.5, color=COLORS["baseline"], linestyle="--")
        curve.set(xlim=(1, self.T[-1]), ylim=(0, 1), xlabel="temperature T", ylabel="P(positive)")
        self.title = self.figure.suptitle("", x=0.01, ha="left", fontsize="medium")

    def update(self, review: int, temperature: float) -> None:
        at = {name: predictions.probabilities(values[review], temperature) for name, values in self.logits.items()}
        for bar, number, p in zip(self.bars, self.numbers, at.values(), strict=True):
            bar.set_width(p[1])
            number.set(x=p[1] + 0.02, text=f"{p[1]:.3f}")
        for line, values in zip(self.lines, self.logits.values(), strict=True):
            line.set_data(self.grid, expit((values[review, 1] - values[review, 0]) / self.grid))
        self.here.set_xdata([temperature, temperature])
        teacher, *students = at.values()
        text = f"{self.name_of(review)}\nat T = {temperature:g} the teacher says {teacher[1]:.1%} positive"
        if students:
            loss = temperature**2 * rel_entr(teacher, students[0]).sum()
            text += f"; T² KL(teacher, student) = {loss:.3f}"
        self.title.set_text(text)


def temperature_panel(run: Run) -> None:
    """A chosen review and T: the softened probabilities of the teacher and of the best student."""
    students = run.load_table("students")
    best = students.loc[students["accuracy"].idxmax(), "model"]
    part = inputs.reviews_of(run.profile, run.seed)["validation"]
    models = {"teacher": "fine_tuned", "student": best}
    logits = {shown: predictions.split_logits(run, name, "validation") for shown, name in models.items()}
    explore(TemperaturePanel(logits, part["text"][:], np.array(part["label"][:])))
