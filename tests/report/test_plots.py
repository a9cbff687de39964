"""Every kind of figure is drawn from a small input and shows its numbers; colours mean what they say."""

import io
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers.profiles import get_profile
from nbhelpers.report import plots, style
from nbhelpers.report.style import COLORS
from nbhelpers.workspace import open_run

NAMES = [f"a.h.{layer}.{module}.weight" for layer in (0, 1) for module in ("attn.c_attn", "mlp.c_fc")]


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def drawn(figure):
    """Return the axes of a figure after a full draw, where most errors of a figure come to light."""
    figure.canvas.draw()
    return figure.axes


def shown(texts):
    return [text.get_text() for text in texts]


def heights(lines):
    return [np.asarray(line.get_ydata()).tolist() for line in lines]


def colors(lines):
    return [line.get_color() for line in lines]


def span(band):
    """Return the lowest and the highest point of a filled band."""
    points = band.get_paths()[0].vertices[:, 1]
    return points.min(), points.max()


def dots(ax):
    return [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]


# --- style ---


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("recovered_merged_97p5", "merged"),
        ("movement_first_order", "movement_first_order"),
        ("sparse_merged_90", "sparse"),
        ("fine_tuned", "dense"),
        ("dense, same extra steps", "control"),
        ("fine_tuned_extra", "control"),
        ("student_distilled_random_2", "student"),
        ("TF-IDF + logistic regression", "baseline"),
        ("something else", "dense"),
    ],
)
def test_a_name_has_the_colour_of_what_it_stands_for(name, meaning):
    assert style.color(name) == COLORS[meaning]
    assert len(set(COLORS.values())) == len(COLORS)


@pytest.mark.parametrize(
    ("reading", "title"),
    [
        ("at 90%, it keeps 3.5 points. The rest.", "At 90%, it keeps 3.5 points"),
        ("`a.b` gains 2 (p = 0.03); the others lose.", "A.b gains 2 (p = 0.03)"),
        ("Only one sentence", "Only one sentence"),
    ],
)
def test_a_figure_is_titled_by_the_first_sentence_of_its_reading(reading, title):
    assert style.finding_of(reading) == title


def test_a_long_title_takes_lines_and_height():
    figure, _ = style.axes(width=5)
    before = figure.get_size_inches()[1]
    style.head(figure, "word " * 30)
    assert figure.get_suptitle().count("\n") >= 1 and figure.get_size_inches()[1] > before


def test_show_saves_the_figure_and_its_reading_and_closes_it(workspace, monkeypatch):
    displayed = []
    monkeypatch.setattr(style, "display", displayed.append)
    run = open_run(get_profile("smoke"), 0)
    for name in ("first", "again"):
        figure = plots.confusion(np.eye(2, dtype=int), ["negative", "positive"])
        style.show(run, name, figure, "Half of them are right.")
    first, again = ((run.reports / "figures" / f"{name}.png").read_bytes() for name in ("first", "again"))
    assert first == again and figure.get_suptitle() == "Half of them are right"
    captions = json.loads((run.reports / "results.json").read_text())["captions"]
    assert captions == dict.fromkeys(("first", "again"), "Half of them are right.")
    assert displayed[2].data == again and not plt.fignum_exists(figure.number)
    assert displayed[2].width == round(plt.imread(io.BytesIO(again)).shape[1] * 100 / 130)


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0.5, 20))
def test_places_are_kept_apart_in_their_order_and_inside(places, gap):
    moved = style.keep_apart(places, gap, 0, 100)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in moved)
    needed = min(gap, 100 / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= needed - 1e-6 for a, b in itertools.pairwise(order))


def test_places_that_have_room_stay_where_they_are():
    assert style.keep_apart([10, 50, 90], 20, 0, 100) == [10, 50, 90]
    assert style.keep_apart([50, 50, 90], 20, 0, 100) == [40, 60, 90]
    assert style.keep_apart([100, 100], 20, 0, 100) == [80, 100]


# --- training ---


def test_learning_curves_show_loss_accuracy_and_reference_lines():
    losses = np.random.default_rng(0).random(48)
    long = pd.DataFrame({"steps": [24, 48], "accuracy": [0.6, 0.8], "losses": [losses[:24], losses[24:]]})
    short = pd.DataFrame({"steps": [2, 4], "accuracy": [0.6, 0.8], "losses": [[0.8, 0.6], [0.5, 0.3]]})
    left, right = drawn(plots.learning_curves({"fine_tuned": short, "student_2": long}, {"chance": 0.5}, "t", 40))
    assert left.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    # Fewer than twelve steps are shown as they are; more as a running mean of a twelfth of them.
    assert heights(left.lines[:1]) == [[0.8, 0.6, 0.5, 0.3]]
    assert left.lines[1].get_ydata() == pytest.approx([losses[max(0, i - 3) : i + 1].mean() for i in range(48)])
    assert heights(right.lines) == [[0.6, 0.8], [0.6, 0.8], [0.5, 0.5]]
    assert colors(left.lines) == [COLORS["dense"], COLORS["student"]]
    # Wilson's interval of 24 of 40, by hand.
    assert right.collections[0].get_segments()[0][:, 1] == pytest.approx([0.4460, 0.7365], abs=1e-4)


# --- tables as cells ---


def test_heatmaps_share_one_scale_and_write_their_numbers():
    tables = {
        name: plots.by_layer_and_module(dict(zip(NAMES, np.arange(4) / 10 + i, strict=True)))
        for i, name in enumerate(["magnitude", "movement"])
    }
    assert tables["magnitude"].index.tolist() == [0, 1]
    assert tables["magnitude"].loc[1, "attn.c_attn"] == 0.2
    first, second, bar = drawn(plots.heatmaps(tables, "title", bar="kept"))
    assert all(ax.collections[0].get_clim() == pytest.approx((0, 1.3)) for ax in (first, second))
    assert shown(first.texts) == ["0%", "10%", "20%", "30%"] and bar.get_ylabel() == "kept"
    assert plots.heatmaps(tables, "title", limits=(-1, 2)).axes[0].collections[0].get_clim() == (-1, 2)


def test_small_tensors_show_numbers_and_masks():
    tensor = torch.arange(25.0).reshape(5, 5)
    left, right = drawn(plots.small_tensors({"score": -tensor, "kept": tensor > 12}, "title"))
    assert shown(left.texts)[:2] == ["0.00", "-1.00"], "without the sign of -0.0"
    assert set(shown(right.texts)) == {"0", "1"}


def test_sensitivity_shows_the_change_against_the_untouched_model():
    rows = [(-1, "none", 0.0, 0.4)]
    rows += [(i, m, s, 0.4 + i + s) for s in (0.5, 0.9) for i in range(2) for m in ("attn.c_attn", "mlp.c_fc")]
    table = pd.DataFrame(rows, columns=["layer", "module", "sparsity", "value"])
    first, second, _ = drawn(plots.sensitivity(table, "validation loss"))
    assert [ax.get_title(loc="left") for ax in (first, second)] == [f"{s}% of the matrix removed" for s in (50, 90)]
    assert shown(first.texts) == ["+0.500", "+0.500", "+1.500", "+1.500"]


def test_dropped_heads_and_neurons_show_their_shares():
    rng = np.random.default_rng(0)
    criteria = ("magnitude", "gradient")
    rows = [
        (criterion, layer, kind, i, rng.random())
        for criterion, layer in itertools.product(criteria, range(3))
        for kind, count in (("head", 3), ("neuron", 20))
        for i in range(count)
    ]
    shares = pd.DataFrame(rows, columns=["criterion", "layer", "kind", "index", "dropped"])
    for ax, name in zip(drawn(plots.dropped_heads(shares)), criteria, strict=False):
        expected = shares[(shares["criterion"] == name) & (shares["kind"] == "head")]["dropped"]
        assert ax.get_title(loc="left") == name and shown(ax.texts) == [f"{value:.0%}" for value in expected]
    panels = drawn(plots.dropped_neurons(shares))
    expected = sorted(shares.query("criterion == 'gradient' and kind == 'neuron' and layer == 2")["dropped"])
    assert heights([panels[1].lines[2]]) == [expected]
    assert panels[1].lines[2].get_xdata()[[0, -1]].tolist() == [0, 1]


# --- scores ---


def test_score_distributions_draw_every_layer_and_the_threshold_and_survive_zeros():
    scores = {c: {n: torch.rand(4, 6) for n in NAMES} for c in ("magnitude", "movement")}
    scores["movement"][NAMES[0]][0] = 0.0
    panels = drawn(plots.score_distributions(scores, {"magnitude": 0.1, "movement": 0.01}))
    assert [ax.lines[0].get_xdata()[0] for ax in panels] == pytest.approx([-1, -2])
    assert all(len(ax.patches) == 2 for ax in panels)


def test_overlap_over_seeds_has_a_dot_per_pair_and_both_chance_levels():
    table = pd.DataFrame({"criterion": ["magnitude"] * 2 + ["merged"] * 2, "overlap": [0.97, 0.96, 0.7, 0.72]})
    table = table.assign(chance=0.5, chance_by_layer=[0.55] * 2 + [0.6] * 2)
    (ax,) = drawn(plots.overlap_over_seeds(table))
    assert heights(dots(ax)) == [[0.97, 0.96], [0.7, 0.72]]
    assert colors(dots(ax)) == [COLORS["magnitude"], COLORS["merged"]]
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata())]
    assert levels == pytest.approx([0.55, 0.5, 0.6, 0.5])


def test_overlap_along_training_has_a_line_and_a_chance_level_per_criterion_and_shows_step_zero():
    table = pd.DataFrame({"criterion": ["magnitude"] * 4 + ["gradient"] * 3, "step": [0, 1, 2, 3, 1, 2, 3]})
    table["overlap"] = [0.9, 0.92, 0.95, 1, 0.6, 0.8, 1]
    table = table.assign(chance=0.5, chance_by_layer=[0.51] * 4 + [0.6] * 3)
    (ax,) = drawn(plots.overlap_along_training(table))
    assert heights(ax.lines[:4]) == [[0.9, 0.92, 0.95, 1], [0.6, 0.8, 1], [0.51] * 4, [0.6] * 3]
    assert colors(ax.lines[2:4]) == [COLORS["magnitude"], COLORS["gradient"]]
    assert shown(ax.get_xticklabels()) == ["0", "1", "3"]
    steps = np.diff(ax.transData.transform([(step, 0.5) for step in (0, 1, 2, 4)])[:, 0])
    assert steps[1] == pytest.approx(steps[2]) and steps[0] > 0, "a log axis, with step 0 on it"


# --- lines and bars ---


def test_lines_have_bands_and_known_colours_and_are_named_at_their_ends():
    table = pd.DataFrame(
        {"batch": [1, 8, 1, 8], "ms": [1.0, 2.0, 3.0, 4.0], "model": ["dense"] * 2 + ["sparse_90"] * 2}
    )
    table = table.assign(ms_low=table["ms"] - 0.5, ms_high=table["ms"] + 0.5)
    (ax,) = drawn(plots.lines(table, "batch", "ms", "model", "title", "batch", "ms", logx=True))
    assert heights(ax.lines) == [[1.0, 2.0], [3.0, 4.0]]
    assert colors(ax.lines) == [COLORS["dense"], COLORS["sparse"]]
    assert [span(band) for band in ax.collections] == [(0.5, 2.5), (2.5, 4.5)]
    assert ax.get_legend() is None
    assert {text.get_text(): text.xy for text in ax.texts} == {"dense": (8, 2.0), "sparse 90": (8, 4.0)}
    # There is room, so each name stands at the height of its line's end.
    for text in ax.texts:
        height = ax.transAxes.inverted().transform(ax.transData.transform(text.xy))[1]
        assert text.xyann[1] == pytest.approx(height, abs=0.01)
    without = table.drop(columns=["ms_low", "ms_high"])
    assert not plots.lines(without, "batch", "ms", "model", "t", "x", "y").axes[0].collections


@pytest.mark.parametrize("seeds", [1, 3])
def test_accuracy_curves_have_a_panel_per_stage_a_line_per_criterion_and_a_band(seeds):
    rows = [
        (criterion, sparsity, stage, seed, 0.6 + 0.1 * seed)
        for stage, criterion in itertools.product(("pruned", "recovered"), ("magnitude", "merged"))
        for sparsity in (0.9, 0.5)
        for seed in range(seeds)
    ]
    curves = pd.DataFrame(rows, columns=["criterion", "sparsity", "stage", "seed", "accuracy"])
    curves = curves.assign(accuracy_low=0.55, accuracy_high=0.65)
    pruned, recovered = drawn(plots.accuracy_curves(curves, dense=0.8, control=0.85))
    assert colors(pruned.lines[:2]) == [COLORS["magnitude"], COLORS["merged"]]
    assert pruned.lines[0].get_xdata().tolist() == [0.5, 0.9]
    assert pruned.lines[0].get_ydata() == pytest.approx([0.6 if seeds == 1 else 0.7] * 2)
    # With one seed the interval, with several from the lowest to the highest.
    assert span(pruned.collections[0]) == pytest.approx((0.55, 0.65) if seeds == 1 else (0.6, 0.8))
    assert len(recovered.lines) == len(pruned.lines) + 1, "the control is drawn where there is recovery"


def test_grouped_bars_have_a_bar_per_group_and_hue_and_leave_a_gap():
    table = pd.DataFrame({"size": ["1", "1", "8"], "kind": ["dense", "sparse", "dense"], "ms": [4.0, 2.0, 8.0]})
    table = table.assign(ms_low=table["ms"] - 1, ms_high=table["ms"] + 2)
    (ax,) = drawn(plots.grouped_bars(table, "size", "ms", "kind", "title", "ms"))
    bars = [container for container in ax.containers if hasattr(container, "patches")]
    found = np.array([[patch.get_height() for patch in group] for group in bars])
    assert np.array_equal(found, [[4.0, 8.0], [2.0, np.nan]], equal_nan=True)
    error = bars[0].errorbar.lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in error] == [[3, 6], [7, 10]]


def test_a_bar_per_step_says_size_and_accuracy():
    table = pd.DataFrame(
        {"step": ["fine-tuned", "distilled", "int8"], "layers": [4, 1, 1], "accuracy": [0.9, 0.87, 0.861]}
    )
    (ax,) = drawn(plots.step_sizes(table.assign(file_bytes=[8e6, 5e6, 1.5e6]), "title"))
    assert [bar.get_width() for bar in ax.patches] == [8.0, 5.0, 1.5]
    assert shown(ax.get_yticklabels()) == ["fine-tuned, 4 layers", "distilled, 1 layer", "int8, 1 layer"]
    assert shown(ax.texts)[-1] == "1.50 MB, 86.1% right"


def test_speeds_and_roofline_show_the_engines():
    engines = pd.DataFrame(
        {"in": 4, "out": 8, "tokens": 64, "sparsity": [0.5, 0.9] * 2, "name": ["numba"] * 2 + ["dense"] * 2}
    )
    engines = engines.assign(speedup=[1.0, 3.0, 1, 1], speedup_low=0.9, speedup_high=3.5, intensity=8.0, gflops=20.0)
    (ax,) = drawn(plots.engine_speeds(engines))
    assert heights(ax.lines) == [[1.0, 3.0], [1, 1]] and "fp32 sparse" in shown(ax.texts)
    limits = {"memory_gbs": 10.0, "dense_gflops": 50.0, "int8_gops": 200.0, "cache_gbs": float("nan")}
    (ax,) = drawn(plots.roofline(engines, limits))
    for roof, height in zip(ax.lines, (50, 200), strict=False):
        assert roof.get_ydata() == pytest.approx(np.minimum(10 * roof.get_xdata(), height))
    assert shown(ax.get_legend().get_texts()) == ["fp32 sparse", "fp32 dense"]


# --- comparisons ---


def comparison():
    names = ["fine_tuned", "fine_tuned_extra", "recovered_magnitude_90", "sparse_merged_90", "student_distilled_2"]
    table = pd.DataFrame({"model": names, "accuracy": np.linspace(0.8, 0.9, len(names))})
    table = table.assign(accuracy_low=table["accuracy"] - 0.02, accuracy_high=table["accuracy"] + 0.02)
    table["file_bytes"], table["latency_ms"] = [13e6, 13e6, 13e6, 7e6, 9e6], [90.0, 90.0, 91.0, 30.0, 50.0]
    return table.assign(peak_memory_bytes=[60e6, 60e6, 60e6, 40e6, 50e6])


def test_intervals_draw_a_row_per_model_the_first_on_top():
    table = comparison()
    (ax,) = drawn(plots.intervals(table, "accuracy", "title", "accuracy", reference=0.5))
    assert shown(ax.get_yticklabels())[-1] == "fine tuned"
    assert [dot.get_xdata()[0] for dot in dots(ax)] == table["accuracy"].tolist()[::-1]


def test_differences_are_drawn_in_points_with_the_first_model_of_each_comparison_as_its_label():
    table = pd.DataFrame({"comparison": ["sparse_merged_90 - fine_tuned", "student_distilled_2 - fine_tuned"]})
    table["difference"], table["low"], table["high"] = [-0.02, 0.01], [-0.05, -0.03], [0.01, 0.04]
    (ax,) = plots.differences(table, "Against the dense model").axes
    assert shown(ax.get_yticklabels()) == ["student distilled 2", "sparse merged 90"]
    assert [line.get_xdata() for line in ax.lines[:4:2]] == [pytest.approx([-3, 4]), pytest.approx([-5, 1])]


def test_compare_and_visualize_gives_the_three_figures_of_a_comparison():
    table = comparison()
    figures = plots.compare_and_visualize(table)
    assert list(figures) == ["accuracy_size", "accuracy_latency", "cost"]
    time, memory = drawn(figures["cost"])
    assert [patch.get_width() for patch in time.patches] == table["latency_ms"].tolist()
    assert [patch.get_width() for patch in memory.patches] == [60.0, 60.0, 60.0, 40.0, 50.0]
    (ax,) = drawn(figures["accuracy_latency"])
    best_first, names = table.iloc[::-1], shown(ax.texts)
    for number, (name, model) in enumerate(zip(names[:5], best_first["model"], strict=True), 1):
        assert name.strip().startswith(f"{number}  {style.label(model)}, ")
    assert sorted(names[5:]) == list("12345"), "each mark has its number"
    points = [container.lines[0].get_xydata()[0].tolist() for container in ax.containers]
    assert points == best_first[["latency_ms", "accuracy"]].to_numpy().tolist()


def test_forgotten_has_a_panel_per_feature_and_a_gap_where_a_model_lacks_a_group():
    groups = {"all": ["all"], "tokens": ["5–90", "91–400"], "negations": ["0", "1–2", "3"], "stars": ["1", "10"]}
    table = pd.DataFrame([(name, group) for name, found in groups.items() for group in found])
    table = table.set_axis(["feature", "group"], axis=1).assign(forgotten=np.linspace(0.05, 0.4, 8))
    table = table.assign(forgotten_low=table["forgotten"] - 0.02, forgotten_high=table["forgotten"] + 0.03)
    both = pd.concat([table.assign(model="magnitude"), table[table["group"] != "1–2"].assign(model="gradient")])
    figure = plots.forgotten(both)
    panels = [ax for ax in drawn(figure) if ax.axison]
    titles = ["tokens in the review", "words that negate", "stars that the review gives"]
    assert [ax.get_title(loc="left") for ax in panels] == titles
    assert shown(figure.legends[0].get_texts()) == ["magnitude", "gradient"]
    negations = table[table["feature"] == "negations"]
    assert shown(panels[1].get_xticklabels()) == negations["group"].tolist()
    first, overall, second, _ = panels[1].lines
    assert colors([first, second]) == [COLORS["magnitude"], COLORS["gradient"]]
    assert heights([first, overall]) == [negations["forgotten"].tolist(), [0.05, 0.05]]
    ends = [segment[:, 1].tolist() for segment in panels[1].collections[0].get_segments()]
    assert ends == negations[["forgotten_low", "forgotten_high"]].to_numpy().tolist()
    assert (first.get_xdata() < second.get_xdata()).all()
    assert np.isnan(second.get_ydata()).tolist() == [False, True, False]


def test_unlearned_has_a_panel_per_domain_and_a_dot_per_row_and_starts_at_the_first_model():
    models, domains = ["pretrained", "fine_tuned", "recovered_magnitude_90"], ["film reviews", "Python"]
    rows = [(m, d, 1 + i + j + 0.1 * s) for i, m in enumerate(models) for j, d in enumerate(domains) for s in range(3)]
    panels = drawn(plots.unlearned(pd.DataFrame(rows, columns=["model", "domain", "bits_per_byte"])))
    assert [ax.get_title(loc="left") for ax in panels] == domains
    assert shown(panels[0].get_yticklabels()) == [style.label(name) for name in models]
    for j, ax in enumerate(panels):
        assert dots(ax)[2].get_xdata() == pytest.approx([3 + j, 3.1 + j, 3.2 + j])
        assert [line.get_xdata() for line in ax.lines[1::2]] == [
            pytest.approx([1.1 + j, 1.1 + i + j]) for i in range(3)
        ]
        assert shown(ax.texts) == [f"{1.1 + i + j:.2f}" for i in range(3)]
    low, high = panels[0].get_ylim()
    assert low > high, "the first model stands on top"


def test_rivals_are_drawn_in_points_with_a_line_per_rival_and_an_interval_per_sparsity():
    table = pd.DataFrame(
        {"criterion": ["magnitude", "random", "random", "magnitude"], "sparsity": [0.9, 0.9, 0.5, 0.5]}
    )
    table = table.assign(
        difference=[0.02, 0.1, 0.05, -0.01], low=[0.01, 0.08, 0.03, -0.02], high=[0.03, 0.12, 0.07, 0.0]
    )
    (ax,) = drawn(plots.rivals(table, "title"))
    found = {line.get_label(): line for line in ax.lines}
    assert found["magnitude"].get_ydata() == pytest.approx([-1, 2]), "from the lower sparsity to the higher"
    assert found["random"].get_ydata() == pytest.approx([5, 10])
    assert found["magnitude"].get_xdata() == pytest.approx([0.5, 0.9], abs=0.01)
    assert not np.isclose(found["magnitude"].get_xdata()[0], found["random"].get_xdata()[0]), "side by side"
    intervals = sorted(tuple(segment[:, 1]) for part in ax.collections for segment in part.get_segments())
    assert np.array(intervals) == pytest.approx(np.array([(-2, 0), (1, 3), (3, 7), (8, 12)]))


def test_reliability_shows_a_line_per_model_beside_the_diagonal():
    table = pd.DataFrame({"model": ["fine_tuned"] * 2 + ["compressed_1"], "confidence": [0.6, 0.9, 0.8]})
    (ax,) = drawn(plots.reliability(table.assign(accuracy=[0.5, 0.95, 0.7], n=[3, 7, 10])))
    assert heights(ax.lines) == [[0.5, 1], [0.5, 0.95], [0.7]]
    assert {"fine tuned", "compressed 1"} <= set(shown(ax.texts))
