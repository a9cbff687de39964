"""What a word was worth: against a model whose words have known weights."""

import html

import numpy as np
import pytest
from scipy.special import expit

from nbhelpers.report import panels
from nbhelpers.report.panels import review
from nbhelpers.report.panels.review import leave_one_out, marked, verdicts, word_groups

WORTH = {"good": 2.0, "bad": -3.0, "fine": 0.5}


def bag_of_words(texts):
    """The margin of a linear model: the sum of its words' weights and a bias."""
    return np.array([0.25 + sum(WORTH.get(word.strip(".,"), 0.0) for word in text.split()) for text in texts])


def test_a_linear_model_owes_each_word_its_weight():
    whole, pieces, effects = leave_one_out(bag_of_words, "A good film, bad end.")
    assert whole == pytest.approx(0.25 + 2 - 3)
    assert pieces == ["A ", "good ", "film, ", "bad ", "end."]
    assert effects == pytest.approx([0, 2, 0, -3, 0])


@pytest.mark.parametrize("text", ["one", "one two", " leading and  double  spaces\nand lines ", "w " * 500])
def test_the_pieces_are_the_text(text):
    pieces = word_groups(text, 48)
    assert "".join(pieces) == text.lstrip() and len(pieces) <= 48


def test_pieces_of_a_long_text_are_about_equal():
    sizes = [len(piece.split()) for piece in word_groups("w " * 500, 48)]
    assert max(sizes) == 11 and set(sizes[:-1]) == {11}


def test_a_text_without_words_is_one_piece():
    assert leave_one_out(bag_of_words, "  ")[1:] == (["  "], [0.0])


def test_what_is_marked_is_escaped_and_says_its_direction():
    text = marked(["<b>good</b> ", "bad"], [2.0, -3.0], 3.0)
    assert "<b>" not in text and html.escape("<b>good</b> ") in text
    good, bad = text.split("</span>")[:2]
    assert "solid" in good and 'title="+2.00"' in good and "dotted" in bad and 'title="-3.00"' in bad


def test_the_models_of_a_run_are_asked_as_the_run_would(study):
    models = {name: study.run.load_model(name) for name in ("fine_tuned", f"sparse_{study.best}_90")}
    text = "A dull plot, a good cast."
    said = verdicts(study.run, models, text)
    for name in models:
        assert f"P(positive) {study.run.predict(name, [text])[0]:.2f}" in said
    margin = review.margins(study.run, models["fine_tuned"])([text, "x"])
    assert expit(margin) == pytest.approx(study.run.predict("fine_tuned", [text, "x"]), abs=1e-6)
    assert "All agree" in said or "They disagree" in said


def test_models_that_disagree_are_named(study, monkeypatch):
    ways = {"fine_tuned": 1.0, "fine_tuned_extra": -1.0}
    monkeypatch.setattr(attribution, "margins", lambda run, way: lambda texts: np.full(len(texts), way))
    said = verdicts(study.run, ways, "A film.")
    assert "They disagree. fine tuned: positive. fine tuned extra: negative." in said


def test_a_batch_run_shows_the_answer_without_a_box(study, monkeypatch):
    shown = []
    monkeypatch.setattr(attribution, "display", lambda *things, **how: shown.append((things, how)))
    panels.review_box(study.run, "fine_tuned", text="A <script> of a film.")
    ((page,), how) = shown[0]
    assert "A &lt;script&gt; of a film." in page.data and "<script>" not in page.data and how == {}


def test_the_box_asks_when_its_button_is_pressed(study, monkeypatch):
    monkeypatch.delenv("NBHELPERS_BATCH")
    made = {}
    monkeypatch.setattr(attribution.widgets, "VBox", lambda parts: made.update(parts=parts) or parts[0])
    monkeypatch.setattr(attribution, "display", lambda bundle, raw: made.update(bundle=bundle))
    panels.review_box(study.run, "fine_tuned")
    box, button, output = made["parts"]
    before = output.value
    assert made["bundle"]["text/html"] == before
    box.value = "Dull."
    button.click()
    assert output.value != before and "Dull." in output.value
    box.value = "   "
    button.click()
    assert "Dull." in output.value
