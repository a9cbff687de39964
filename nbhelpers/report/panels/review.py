"""A box for a text of one's own: what the models say of it, and which words carried that (leave-one-out)."""

import html
import re
from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
from IPython.display import HTML, display
from scipy.special import expit
from torch import nn

from nbhelpers.evaluation import predict_logits
from nbhelpers.models import LABEL_NAMES
from nbhelpers.report.panels.shared import can_be_moved, make_button
from nbhelpers.report.style import label
from nbhelpers.workspace import Run

MOST_PIECES = 48  # into which a text is cut: of a longer one, several words are left out at a time
REVIEW = (
    "I expected little, and for an hour it is as slow and silly as its trailer. But then the story finds its feet, "
    "and the ending is wonderful."
)


def margins(run: Run, model: nn.Module) -> Callable[[list[str]], np.ndarray]:
    """Return a function(texts) -> the model's logit of positive minus that of negative, float [n]."""

    def margin(texts: list[str]) -> np.ndarray:
        logits = predict_logits(model, run.encode(texts), run.profile.eval_batch_size)
        return logits[:, 1] - logits[:, 0]

    return margin


def word_groups(text: str) -> list[str]:
    """Return a text in at most ``MOST_PIECES`` pieces of about equally many words; joined again they are the text."""
    words = re.findall(r"\S+\s*", text.lstrip())
    size = max(1, -(-len(words) // MOST_PIECES))
    return ["".join(words[i : i + size]) for i in range(0, len(words), size)]


def leave_one_out(margin: Callable[[list[str]], np.ndarray], text: str) -> tuple[float, list, list]:
    """Return the margin of a text, its pieces, and how far the margin falls when each piece is left out.

    Above 0 a piece spoke for positive, below for negative (occlusion: Zeiler and Fergus, 2014; Li et al., 2016). A text
    without words is one piece.
    """
    pieces = word_groups(text) or [text]
    without = ["".join(pieces[:i] + pieces[i + 1 :]) for i in range(len(pieces))]
    whole, *rest = margin([text, *without])
    return float(whole), pieces, [float(whole - value) for value in rest]


def marked(pieces: list[str], effects: list[float]) -> str:
    """Return a text as HTML: blue and underlined what spoke for positive, orange and dotted what spoke for negative."""
    words, largest = [], max(map(abs, effects))
    for piece, effect in zip(pieces, effects, strict=True):
        rgb, line = ("0,114,178", "solid") if effect > 0 else ("213,94,0", "dotted")
        strength = abs(effect) / largest if largest else 0.0
        style = f"background:rgba({rgb},{0.45 * strength:.2f});"
        style += f"border-bottom:2px {line} rgba({rgb},{strength:.2f})" if strength > 0.2 else ""
        words.append(f'<span style="{style}" title="{effect:+.2f}">{html.escape(piece)}</span>')
    return "".join(words)


def verdicts(run: Run, models: dict, text: str) -> str:
    """Return what each model says of a text and which words carried it, as an HTML table and a sentence."""
    rows, answers = [], {}
    for name, model in models.items():
        whole, pieces, effects = leave_one_out(margins(run, model), text)
        answers[name] = LABEL_NAMES[int(whole > 0)]
        answer = f"{answers[name]}, P(positive) {expit(whole):.2f}"
        cells = (f"<b>{html.escape(label(name))}</b>", answer, marked(pieces, effects))
        style = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
        rows.append("".join(f'<td style="{style}">{cell}</td>' for cell in cells))
    groups = {answer: [label(n) for n, a in answers.items() if a == answer] for answer in answers.values()}
    together = " ".join(f"{', '.join(names)}: {answer}." for answer, names in groups.items())
    verdict = f"All agree: {next(iter(groups))}." if len(groups) == 1 else f"They disagree. {together}"
    reading = "Blue and underlined: without this the answer would be less positive. Orange and dotted: less negative."
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<p><b>{html.escape(verdict)}</b></p><table>{table}</table><p>{reading}</p>"


def review_box(run: Run, *names: str, text: str = REVIEW) -> None:
    """Show a box for a review of one's own, with what the models of a run say of it and which words carried that."""
    models = {name: run.load_model(name) for name in names}
    answer = verdicts(run, models, text)
    if not can_be_moved():
        display(HTML(f"<p>“{html.escape(text)}”</p>{answer}"))
        return
    box = widgets.Textarea(text, rows=4, layout={"width": "100%"})
    output = widgets.HTML(answer)

    def ask(_) -> None:
        if box.value.strip():
            output.value = verdicts(run, models, box.value)

    button = make_button("ask the models", ask, "12em")
    shown = widgets.VBox([box, button, output])._repr_mimebundle_()
    display({**shown, "text/html": answer}, raw=True)
