"""Panels follow their sliders: what they show is computed here once more, by other means."""

import base64

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from nbhelpers import masks, selection
from nbhelpers.report.panels import shared
from nbhelpers.report.panels.criteria import CriteriaPanel, independent, ranks
from nbhelpers.report.panels.latency import LatencyPanel
from nbhelpers.report.panels.pruning import SparsityPanel
from nbhelpers.report.panels.temperature import TemperaturePanel

NAMES = [f"a.h.{layer}.{module}.weight" for layer in (0, 1) for module in ("attn.c_attn", "mlp.c_fc")]


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (4, 4), (2, 9), (5, 5)]
    return {
        c: {n: torch.rand(shape, generator=generator) for n, shape in zip(NAMES, shapes, strict=True)}
        for c in ("magnitude", "movement", "gradient")
    }


def shown_share(panel):
    return float(panel.numbers[-1].get_text().rstrip("%")) / 100


@pytest.mark.parametrize("agreement", ["all", "majority", "any"])
def test_the_criteria_panel_flags_what_the_merge_flags(scores, agreement):
    panel, quantiles = CriteriaPanel(scores, 0.5), {"magnitude": 0.3, "movement": 0.6, "gradient": 0.8}
    panel.update(merge=agreement, **quantiles)
    # The threshold of a quantile is the highest score that is flagged.
    flags = {c: {n: ~m for n, m in selection.select(s, quantiles[c]).items()} for c, s in scores.items()}
    votes = {n: sum(flags[c][n].int() for c in scores) for n in NAMES}
    least = {"all": 3, "majority": 2, "any": 1}[agreement]
    total = sum(v.numel() for v in votes.values())
    assert shown_share(panel) == pytest.approx(sum((v >= least).sum().item() for v in votes.values()) / total, abs=6e-4)
    kept = np.array([[1 - (votes[n] >= least).float().mean() for n in NAMES[i : i + 2]] for i in (0, 2)])
    assert np.asarray(panel.kept.image.get_array()) == pytest.approx(kept, abs=1e-6)
    a, b = (torch.cat([flags[c][n].flatten() for n in NAMES]) for c in ("magnitude", "gradient"))
    assert panel.shared.image.get_array()[0, 2] == pytest.approx((a & b).sum().item() / a.sum().item())


def test_the_mean_rank_flags_the_mean_of_the_shares(scores):
    panel = CriteriaPanel(scores, 0.5)
    panel.update(merge="mean_rank", magnitude=0.2, movement=0.4, gradient=0.6)
    assert shown_share(panel) == pytest.approx(0.4, abs=0.01)


def test_a_large_model_is_followed_by_a_sample(scores, monkeypatch):
    monkeypatch.setattr(panels, "MOST_WEIGHTS", 40)
    panel = CriteriaPanel(scores, 0.5)
    assert panel.sizes.sum() == pytest.approx(40, abs=2) and (panel.sizes > 0).all()
    panel.update(merge="all", magnitude=0.5, movement=0.5, gradient=0.5)
    assert shown_share(panel) < 0.5


def test_what_independent_criteria_would_flag():
    q = [0.5, 0.4, 0.2]
    assert independent(q, "all") == pytest.approx(0.5 * 0.4 * 0.2)
    assert independent(q, "any") == pytest.approx(1 - 0.5 * 0.6 * 0.8)
    two = 0.5 * 0.4 * 0.8 + 0.5 * 0.6 * 0.2 + 0.5 * 0.4 * 0.2
    assert independent(q, "majority") == pytest.approx(two + 0.5 * 0.4 * 0.2)


def test_ranks_are_shares_and_equals_keep_their_order():
    assert ranks(np.array([3.0, 1.0, 1.0, 2.0])).tolist() == [0.875, 0.125, 0.375, 0.625]


def test_the_sparsity_panel_asks_the_model_that_its_sliders_name(study):
    panel = SparsityPanel(study.run)
    rows, labels = panel.rows, panel.labels
    for stage, name in (("recovered", "recovered_magnitude_90"), ("pruned", None)):
        panel.update(criterion="magnitude", stage=stage, sparsity=0.9)
        if name:
            model = study.run.load_model(name)
        else:
            scores = study.run.load_tensors("scores_magnitude")
            model = masks.apply_masks(study.run.load_model("fine_tuned"), selection.select(scores, 0.9))
        shown = np.asarray(panel.dots.get_offsets())[:, 1]
        for i, label, chance in zip(rows, labels, shown, strict=True):
            ids = panel.ids[list(rows).index(i)]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
            assert chance == pytest.approx(softmax(logits)[label], abs=1e-5)
    # The weights were put back before each masking.
    panel.update(criterion="magnitude", stage="pruned", sparsity=0.5)
    again = SparsityPanel(study.run)
    again.update(criterion="magnitude", stage="pruned", sparsity=0.5)
    assert np.array_equal(panel.dots.get_offsets(), again.dots.get_offsets())


def test_the_sparsity_panel_asks_ahead_for_what_there_is_time(study, monkeypatch):
    panel = SparsityPanel(study.run)
    panel.prepare()
    places = set(panel.curves[["criterion", "stage", "sparsity"]].itertuples(index=False, name=None))
    assert set(panel.answers) == places and len(places) > 4
    key = ("magnitude", "pruned", 0.9)
    assert np.array_equal(panel.answers[key], SparsityPanel(study.run).ask(*key))
    monkeypatch.setattr(panels, "AHEAD", 0.0)
    hurried = SparsityPanel(study.run)
    hurried.prepare()
    assert hurried.answers == {}


def test_the_sparsity_panel_says_what_was_not_recovered(study):
    panel = SparsityPanel(study.run)
    panel.curves = panel.curves[panel.curves["sparsity"] != 0.5]
    panel.update(criterion="gradient", stage="recovered", sparsity=0.5)
    assert "gradient was not recovered at 50%" in panel.title.get_text()


@pytest.fixture
def latency():
    rows = [
        {"sparsity": s, "batch": b, "threads": t, "latency_ms": 10 * b * (1 - s) / t, "dense_ms": 10 * b / t}
        for s in (0.0, 0.5, 0.9)
        for b in (1, 8)
        for t in (1, 2)
    ]
    table = pd.DataFrame(rows).assign(speedup=lambda d: d["dense_ms"] / d["latency_ms"])
    for name in ("latency_ms", "speedup"):
        kind = name.removesuffix("_ms")
        table[f"{kind}_low" + ("_ms" if kind != name else "")] = 0.9 * table[name]
        table[f"{kind}_high" + ("_ms" if kind != name else "")] = 1.1 * table[name]
    return table


def test_the_latency_panel_shows_the_row_that_was_measured(latency):
    panel = LatencyPanel(latency)
    panel.update(sparsity=0.9, batch=8, threads=2)
    assert [bar.get_width() for bar in panel.pair] == pytest.approx([40, 4])
    assert "4.0 ms instead of 40.0, 10.00 times as fast" in panel.title.get_text()
    panel.update(sparsity=0.5, batch=1, threads=1)
    assert [bar.get_width() for bar in panel.pair] == pytest.approx([10, 5])
    assert panel.lines[1, 1][0].get_alpha() == 1.0 and panel.lines[8, 2][0].get_alpha() < 0.5


def test_measuring_now_adds_what_came_out(latency):
    panel = LatencyPanel(latency, lambda **where: {"speedup": 7.5} | where)
    (action,) = panel.actions.values()
    where = {"sparsity": 0.9, "batch": 8, "threads": 2}
    action(**where)
    panel.update(**where)
    assert "measured now 7.50" in panel.title.get_text() and panel.star.get_ydata() == [7.5]


def test_the_temperature_panel_softens_by_its_definition():
    rng = np.random.default_rng(0)
    logits = {"teacher": 4 * rng.normal(size=(30, 2)), "student": 4 * rng.normal(size=(30, 2))}
    panel = TemperaturePanel(logits, [f"review {i}" for i in range(30)], rng.integers(2, size=30))
    panel.update(review=3, temperature=4)
    p, q = (softmax(values[3] / 4) for values in logits.values())
    assert [bar.get_width() for bar in panel.bars] == pytest.approx([p[1], q[1]])
    assert f"= {16 * (p * np.log(p / q)).sum():.3f}" in panel.title.get_text()
    differences = [v[:, 1] - v[:, 0] for v in logits.values()]
    assert panel.controls["review"].value in np.argsort(-np.abs(differences[0] - differences[1]))[:3]


# --- showing ---


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(panels, "display", lambda bundle, raw: found.append(bundle))
    return found


def test_a_batch_run_shows_a_picture_and_no_widget(latency, shown):
    shared.explore(LatencyPanel(latency))
    assert set(shown[0]) == {"image/png", "text/plain"}
    assert base64.b64decode(shown[0]["image/png"]).startswith(b"\x89PNG")


def test_a_moved_slider_redraws_the_picture(latency, shown, monkeypatch):
    monkeypatch.delenv("NBHELPERS_BATCH")
    images = []
    original = panels.widgets.Image

    def image(**options):
        images.append(original(**options))
        return images[-1]

    monkeypatch.setattr(panels.widgets, "Image", image)
    panel = LatencyPanel(latency)
    shared.explore(panel)
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(shown[0])
    before = bytes(images[0].value)
    panel.controls["batch"].value = 1
    after = bytes(images[0].value)
    assert before != after and after.startswith(b"\x89PNG")
    panel.controls["batch"].value = 8
    assert bytes(images[0].value) != after
