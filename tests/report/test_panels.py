"""Panels follow their sliders, and the review box its text: what they show is computed here by other means."""

import base64
import copy
import html
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from nbhelpers import masks, selection
from nbhelpers.report.panels import criteria, pruning, review, review_box, shared
from nbhelpers.report.panels.criteria import CriteriaPanel, independent, ranks
from nbhelpers.report.panels.latency import LatencyPanel
from nbhelpers.report.panels.pruning import SparsityPanel
from nbhelpers.report.panels.review import leave_one_out, marked, verdicts, word_groups
from nbhelpers.report.panels.temperature import TemperaturePanel

NAMES = [f"a.h.{layer}.{module}.weight" for layer in (0, 1) for module in ("attn.c_attn", "mlp.c_fc")]


def cells(ax):
    """Return the values of a heatmap, which are also its numbers in percent."""
    values = np.asarray(ax.collections[0].get_array())
    assert [text.get_text() for text in ax.texts] == [f"{value:.0%}" for value in values.flat]
    return values


# --- 02: thresholds and merges ---


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (4, 4), (2, 9), (5, 5)]
    return {
        c: {n: torch.rand(shape, generator=generator) for n, shape in zip(NAMES, shapes, strict=True)}
        for c in ("magnitude", "movement", "gradient")
    }


def shown_share(panel):
    return float(panel.bars.numbers[-1].get_text().rstrip("%")) / 100


@pytest.mark.parametrize(("agreement", "least"), [("all", 3), ("majority", 2), ("any", 1)])
def test_the_criteria_panel_flags_what_the_merge_flags(scores, agreement, least):
    panel, quantiles = CriteriaPanel(scores, 0.5), {"magnitude": 0.3, "movement": 0.6, "gradient": 0.8}
    panel.update(merge=agreement, **quantiles)
    # The threshold of a quantile is the highest score that is flagged.
    flags = {c: {n: ~m for n, m in selection.select(s, quantiles[c]).items()} for c, s in scores.items()}
    votes = {n: sum(flags[c][n].int() for c in scores) for n in NAMES}
    flagged = torch.cat([(votes[n] >= least).flatten() for n in NAMES]).float().mean()
    assert shown_share(panel) == pytest.approx(flagged.item(), abs=6e-4)
    _, kept_axes, shared_axes = panel.figure.axes
    kept = np.array([[1 - (votes[n] >= least).float().mean() for n in NAMES[i : i + 2]] for i in (0, 2)])
    assert cells(kept_axes) == pytest.approx(kept, abs=1e-6)
    a, b = (torch.cat([flags[c][n].flatten() for n in NAMES]) for c in ("magnitude", "gradient"))
    assert cells(shared_axes)[0, 2] == pytest.approx((a & b).sum().item() / a.sum().item())


def test_the_mean_rank_flags_the_mean_of_the_shares(scores):
    panel = CriteriaPanel(scores, 0.5)
    panel.update(merge="mean_rank", magnitude=0.2, movement=0.4, gradient=0.6)
    assert shown_share(panel) == pytest.approx(0.4, abs=0.01)


def test_a_large_model_is_followed_by_a_sample(scores, monkeypatch):
    monkeypatch.setattr(criteria, "MOST_WEIGHTS", 40)
    panel = CriteriaPanel(scores, 0.5)
    assert panel.sizes.sum() == pytest.approx(40, abs=2) and (panel.sizes > 0).all()


def test_independent_criteria_and_ranks_by_hand():
    q = [0.5, 0.4, 0.2]
    assert independent(q, "all") == pytest.approx(0.5 * 0.4 * 0.2)
    assert independent(q, "any") == pytest.approx(1 - 0.5 * 0.6 * 0.8)
    two = 0.5 * 0.4 * 0.8 + 0.5 * 0.6 * 0.2 + 0.5 * 0.4 * 0.2
    assert independent(q, "majority") == pytest.approx(two + 0.5 * 0.4 * 0.2)
    assert ranks(np.array([3.0, 1.0, 1.0, 2.0])).tolist() == [0.875, 0.125, 0.375, 0.625], "equals keep their order"


# --- 03: pruning, review by review ---


@pytest.fixture
def pruned_run(toy_model, monkeypatch):
    """A stand-in for a run after notebook 03: a toy model, one that was recovered, and scores."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    data = SimpleNamespace(input_ids=rng.integers(1, 20, (12, 6)).tolist(), labels=rng.integers(2, size=12))
    weights = pruning.prunable_weights(toy_model)
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}
    recovered = masks.apply_masks(toy_model, selection.select(scores, 0.5))
    models = {"fine_tuned": toy_model, "recovered_merged_90": recovered}
    curves = pd.DataFrame({"stage": ["pruned", "pruned", "recovered"], "sparsity": [0.5, 0.9, 0.9]})
    curves = curves.assign(criterion="merged", split="validation", accuracy=0.75)
    monkeypatch.setattr(pruning.inputs, "dataset", lambda run, part: data)
    monkeypatch.setattr(pruning.scoring, "scores_of", lambda run, criterion: scores)
    return SimpleNamespace(
        load_model=models.__getitem__,
        load_table=lambda name: curves,
        profile=SimpleNamespace(main_sparsity=0.9),
        data=data,
        scores=scores,
        models=models,
    )


def p_right(model, run, rows):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([run.data.input_ids[i] for i in rows])).logits.numpy()
    return softmax(logits, axis=1)[np.arange(len(rows)), run.data.labels[rows]]


def test_the_sparsity_panel_evaluates_the_model_that_its_sliders_name(pruned_run):
    dense = copy.deepcopy(pruned_run.models["fine_tuned"])
    panel = SparsityPanel(pruned_run)
    # 0.9, then 0.5: the weights are restored before each masking.
    for stage, sparsity in (("pruned", 0.9), ("recovered", 0.9), ("pruned", 0.5)):
        panel.update(criterion="merged", stage=stage, sparsity=sparsity)
        pruned = masks.apply_masks(copy.deepcopy(dense), selection.select(pruned_run.scores, sparsity))
        model = pruned if stage == "pruned" else pruned_run.models["recovered_merged_90"]
        expected = np.stack([p_right(m, pruned_run, panel.rows) for m in (dense, model)], 1)
        assert np.asarray(panel.dots.get_offsets()) == pytest.approx(expected, abs=1e-5)
        right = (expected[:, 1] > 0.5).sum()
        assert f"{sparsity:.0%} removed: {right} of these {len(panel.rows)} reviews right" in panel.title.get_text()
    panel.update(criterion="merged", stage="recovered", sparsity=0.5)
    assert "merged was not recovered at 50%" in panel.title.get_text()


# --- 04: latency, 05: temperature ---


@pytest.fixture
def latency():
    positions = itertools.product((0.0, 0.5, 0.9), (1, 8), (1, 2))
    table = pd.DataFrame(positions, columns=["sparsity", "batch", "threads"])
    table["dense_ms"], table["speedup"] = 10 * table["batch"] / table["threads"], 1 / (1 - table["sparsity"])
    table["latency_ms"] = table["dense_ms"] / table["speedup"]
    for end, factor in (("low", 0.9), ("high", 1.1)):
        table[f"latency_{end}_ms"], table[f"speedup_{end}"] = factor * table["latency_ms"], factor * table["speedup"]
    return LatencyPanel(table, lambda **position: {"speedup": 7.5} | position)


def test_the_latency_panel_shows_the_row_that_was_measured_and_what_is_measured_now(latency):
    sliders = {"sparsity": 0.9, "batch": 8, "threads": 2}
    latency.update(**sliders)
    assert [bar.get_width() for bar in latency.pair] == pytest.approx([40, 4])
    assert latency.title.get_text().endswith("4.0 ms instead of 40.0, 10.00 times as fast")
    latency.actions["measure now"](**sliders)
    latency.update(**sliders)
    assert "measured now 7.50" in latency.title.get_text() and latency.star.get_ydata() == [7.5]
    latency.update(sparsity=0.5, batch=1, threads=1)
    assert [bar.get_width() for bar in latency.pair] == pytest.approx([10, 5]) and len(latency.star.get_ydata()) == 0
    assert latency.lines[1, 1][0].get_alpha() == 1.0 and latency.lines[8, 2][0].get_alpha() < 0.5


def test_the_temperature_panel_softens_by_its_definition():
    rng = np.random.default_rng(0)
    logits = {"teacher": 4 * rng.normal(size=(30, 2)), "student": 4 * rng.normal(size=(30, 2))}
    panel = TemperaturePanel(logits, [f"review {i}" for i in range(30)], rng.integers(2, size=30))
    panel.update(review=3, temperature=4)
    p, q = (softmax(values[3] / 4) for values in logits.values())
    assert [bar.get_width() for bar in panel.bars.bars] == pytest.approx([p[1], q[1]])
    assert f"= {16 * (p * np.log(p / q)).sum():.3f}" in panel.title.get_text()
    differences = [v[:, 1] - v[:, 0] for v in logits.values()]
    assert panel.controls["review"].value in np.argsort(-np.abs(differences[0] - differences[1]))[:3]


# --- showing ---


def test_a_batch_run_shows_a_picture_and_no_widget(latency, monkeypatch):
    displayed = []
    monkeypatch.setattr(shared, "display", lambda bundle, raw: displayed.append(bundle))
    shared.explore(latency)
    assert set(displayed[0]) == {"image/png", "text/plain"}
    assert base64.b64decode(displayed[0]["image/png"]).startswith(b"\x89PNG")


def test_a_moved_slider_and_a_button_redraw_the_picture(latency, monkeypatch):
    monkeypatch.delenv("NBHELPERS_BATCH")
    boxes, displayed = [], []
    original = shared.widgets.VBox
    monkeypatch.setattr(shared.widgets, "VBox", lambda parts: boxes.append(parts) or original(parts))
    monkeypatch.setattr(shared, "display", lambda bundle, raw: displayed.append(bundle))
    shared.explore(latency)
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(displayed[0])
    row, image = boxes[0]
    pictures = [bytes(image.value)]
    latency.controls["batch"].value = 1
    pictures.append(bytes(image.value))
    row.children[-1].click()
    pictures.append(bytes(image.value))
    assert len(set(pictures)) == 3 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert not row.children[-1].disabled


# --- the review box ---

WEIGHTS = {"good": 2.0, "bad": -3.0, "fine": 0.5}


def bag_of_words(texts):
    """Return the margins of a linear model: the sum of the words' weights and a bias."""
    return np.array([0.25 + sum(WEIGHTS.get(word.strip(".,"), 0.0) for word in text.split()) for text in texts])


@pytest.fixture
def run(toy_model):
    """A stand-in for a run with one model and a tokenizer of its own."""
    return SimpleNamespace(
        encode=lambda texts: [[1 + len(word) % 19 for word in text.split()][:16] or [1] for text in texts],
        profile=SimpleNamespace(eval_batch_size=4),
        load_model=lambda name: toy_model,
    )


def test_a_linear_model_owes_each_word_its_weight():
    whole, pieces, effects = leave_one_out(bag_of_words, "A good film, bad end.")
    assert whole == pytest.approx(0.25 + 2 - 3)
    assert pieces == ["A ", "good ", "film, ", "bad ", "end."]
    assert effects == pytest.approx([0, 2, 0, -3, 0])
    assert leave_one_out(bag_of_words, "  ")[1:] == (["  "], [0.0]), "a text without words is one piece"


@pytest.mark.parametrize("text", ["one", " leading and  double  spaces\nand lines ", "w " * 500])
def test_the_pieces_are_the_text(text):
    pieces = word_groups(text)
    assert "".join(pieces) == text.lstrip() and len(pieces) <= 48
    sizes = [len(piece.split()) for piece in pieces]
    assert len({*sizes[:-1]}) <= 1 and sizes[-1] <= sizes[0], "about equal"


def test_marked_words_are_escaped_and_show_their_direction():
    text = marked(["<b>good</b> ", "bad"], [2.0, -3.0])
    assert "<b>" not in text and html.escape("<b>good</b> ") in text
    good, bad = text.split("</span>")[:2]
    assert "solid" in good and 'title="+2.00"' in good and "dotted" in bad and 'title="-3.00"' in bad


def test_the_answer_is_that_of_the_models(run, toy_model, monkeypatch):
    text = "A dull plot, a good cast."
    with torch.inference_mode():
        logits = toy_model(input_ids=torch.tensor(run.encode([text]))).logits[0].numpy()
    answer = verdicts(run, {"fine_tuned": toy_model}, text)
    assert f"P(positive) {softmax(logits)[1]:.2f}" in answer and "All agree" in answer
    monkeypatch.setattr(review, "margins", lambda run, model: lambda texts: np.full(len(texts), model))
    answer = verdicts(run, {"fine_tuned": 1.0, "fine_tuned_extra": -1.0}, "A film.")
    assert "They disagree. fine tuned: positive. fine tuned extra: negative." in answer


def test_a_batch_run_shows_the_answer_without_a_box(run, monkeypatch):
    displayed = []
    monkeypatch.setattr(review, "display", lambda *things, **options: displayed.append((things, options)))
    review_box(run, "fine_tuned", text="A <script> of a film.")
    ((page,), options) = displayed[0]
    assert "A &lt;script&gt; of a film." in page.data and "<script>" not in page.data and options == {}


def test_the_box_answers_when_its_button_is_pressed(run, monkeypatch):
    monkeypatch.delenv("NBHELPERS_BATCH")
    made = {}
    monkeypatch.setattr(review.widgets, "VBox", lambda parts: made.update(parts=parts) or parts[0])
    monkeypatch.setattr(review, "display", lambda bundle, raw: made.update(bundle=bundle))
    review_box(run, "fine_tuned")
    box, button, output = made["parts"]
    before = output.value
    assert made["bundle"]["text/html"] == before
    box.value = "Dull."
    button.click()
    assert output.value != before and "Dull." in output.value
    box.value = "   "
    button.click()
    assert "Dull." in output.value
