"""Every figure is drawn from a small input, and colours mean what they say."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from nbhelpers.profiles import get_profile
from nbhelpers.report import plots, style
from nbhelpers.report.style import COLORS, color
from nbhelpers.workspace import open_run


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def drawn(figure: Figure) -> Figure:
    """The figure after a full draw, which is where most errors of a figure come to light."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return figure


NAMES = ["a.h.0.attn.c_attn.weight", "a.h.0.mlp.c_fc.weight", "a.h.1.attn.c_attn.weight", "a.h.1.mlp.c_fc.weight"]


def scores() -> dict:
    generator = torch.Generator().manual_seed(0)
    found = {c: {n: torch.rand(4, 6, generator=generator) for n in NAMES} for c in ("magnitude", "movement")}
    found["movement"][NAMES[0]][0] = 0.0
    return found


def comparison() -> pd.DataFrame:
    names = ["fine_tuned", "fine_tuned_extra", "recovered_magnitude_90", "sparse_merged_90", "student_distilled_2"]
    accuracy = np.linspace(0.8, 0.9, len(names))
    return pd.DataFrame(
        {
            "model": names,
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.02,
            "accuracy_high": accuracy + 0.02,
            "file_bytes": [13e6, 13e6, 13e6, 7e6, 9e6],
            "latency_ms": [90.0, 90.0, 91.0, 30.0, 50.0],
            "peak_memory_bytes": [60e6, 60e6, 60e6, 40e6, 50e6],
        }
    )


# --- colours ---


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("magnitude", "magnitude"),
        ("movement", "movement"),
        ("recovered_gradient_90", "gradient"),
        ("recovered_merged_97p5", "merged"),
        ("pruned_movement_80", "movement"),
        ("sparse_merged_90", "sparse"),
        ("fine_tuned", "dense"),
        ("fine-tuned", "dense"),
        ("dense", "dense"),
        ("fine_tuned_extra", "control"),
        ("dense, same extra steps", "control"),
        ("control", "control"),
        ("student_distilled_2", "student"),
        ("student_labels_only_1", "student"),
        ("student_distilled_random_2", "student"),
        ("TF-IDF + logistic regression", "baseline"),
        ("chance", "baseline"),
        ("untrained head", "baseline"),
        ("something else", "dense"),
    ],
)
def test_a_name_has_the_colour_of_what_it_stands_for(name, meaning):
    assert color(name) == COLORS[meaning]


def test_no_two_meanings_share_a_colour():
    assert len(set(COLORS.values())) == len(COLORS)


def test_a_label_reads_without_underscores():
    assert style.label("recovered_magnitude_90") == "recovered magnitude 90"


# --- figures ---


def test_lengths_marks_the_limit():
    figure = drawn(plots.lengths({"negative": [5, 9, 30], "positive": [7, 12, 50]}, max_tokens=20))
    (ax,) = figure.axes
    assert [line.get_xdata()[0] for line in ax.lines] == [20]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["negative", "positive"]


def test_learning_curves_show_loss_accuracy_and_reference_lines():
    curve = pd.DataFrame({"steps": [2, 4], "loss": [0.7, 0.4], "accuracy": [0.6, 0.8]})
    curve["losses"] = [[0.8, 0.6], [0.5, 0.3]]
    figure = drawn(plots.learning_curves({"fine_tuned": curve, "student_2": curve}, {"chance": 0.5}, "title", 40))
    left, right = figure.axes
    # Fewer than twelve steps: the running mean is of one step, the losses themselves.
    assert [line.get_xdata().tolist() for line in left.lines] == [[1, 2, 3, 4]] * 2
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[0.8, 0.6, 0.5, 0.3]] * 2
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[0.6, 0.8]] * 2
    assert right.lines[2].get_ydata()[0] == 0.5
    assert left.lines[0].get_color() == COLORS["dense"]
    assert left.lines[1].get_color() == COLORS["student"]
    # Wilson's interval of 24 of 40, by hand.
    bars = right.collections[0].get_segments()
    assert bars[0][:, 1] == pytest.approx([0.4460, 0.7365], abs=1e-4)
    drawn(plots.learning_curves({"a": curve}, {}, "one curve, no lines", 40))


def test_the_loss_curve_of_a_long_training_is_a_running_mean():
    losses = np.random.default_rng(0).random(48)
    curve = pd.DataFrame({"steps": [24, 48], "accuracy": [0.6, 0.8], "losses": [losses[:24], losses[24:]]})
    (line,) = plots.learning_curves({"fine_tuned": curve}, {}, "title", 40).axes[0].lines
    expected = [losses[max(0, i - 3) : i + 1].mean() for i in range(48)]
    assert line.get_ydata() == pytest.approx(expected)


def test_confusion_writes_the_counts():
    figure = drawn(plots.confusion(np.array([[40, 10], [5, 45]]), ["negative", "positive"]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["40", "10", "5", "45"]


def test_intervals_draw_a_row_a_model_the_first_on_top():
    table = comparison()
    figure = drawn(plots.intervals(table, "accuracy", "title", "accuracy", reference=0.5))
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()][-1] == "fine tuned"
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == table["accuracy"].tolist()[::-1]
    drawn(plots.intervals(table, "accuracy", "no reference", "accuracy"))


def test_by_layer_and_module_is_a_table_with_the_bottom_layer_first():
    table = plots.by_layer_and_module(dict(zip(NAMES, [0.1, 0.2, 0.3, 0.4], strict=True)))
    assert table.index.tolist() == [0, 1]
    assert table.loc[1, "attn.c_attn"] == 0.3
    assert table.loc[0, "mlp.c_fc"] == 0.2


@pytest.mark.parametrize("count", [1, 3])
def test_heatmaps_share_one_scale_and_write_their_numbers(count):
    tables = {
        name: plots.by_layer_and_module(dict(zip(NAMES, np.arange(4) / 10 + i, strict=True)))
        for i, name in enumerate(["magnitude", "movement", "gradient"][:count])
    }
    figure = drawn(plots.heatmaps(tables, "title", bar="kept"))
    panels = [ax for ax in figure.axes if ax.texts]
    assert len(panels) == count
    assert all(ax.collections[0].get_clim() == pytest.approx((0.0, 0.3 + count - 1)) for ax in panels)
    assert [text.get_text() for text in panels[0].texts] == ["0%", "10%", "20%", "30%"]
    drawn(plots.heatmaps(tables, "fixed", limits=(0, 1)))


def test_small_tensors_show_numbers_and_masks():
    tensor = torch.arange(25.0).reshape(5, 5)
    figure = drawn(plots.small_tensors({"score": tensor, "kept": tensor > 12}, "title"))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts][:2] == ["0.00", "1.00"]
    assert {text.get_text() for text in right.texts} == {"0", "1"}


def test_score_distributions_draw_every_layer_and_the_threshold_and_survive_zeros():
    figure = drawn(plots.score_distributions(scores(), {"magnitude": 0.1, "movement": 0.01}))
    assert len(figure.axes) == 2
    assert [ax.lines[0].get_xdata()[0] for ax in figure.axes] == pytest.approx([-1, -2])
    assert all(len(ax.patches) == 2 for ax in figure.axes)


def test_lines_have_bands_where_there_are_intervals_and_known_colours():
    table = pd.DataFrame(
        {
            "batch": [1, 8, 1, 8],
            "ms": [1.0, 2.0, 3.0, 4.0],
            "ms_low": [0.5, 1.5, 2.5, 3.5],
            "ms_high": [1.5, 2.5, 3.5, 4.5],
            "model": ["dense", "dense", "sparse_90", "sparse_90"],
        }
    )
    figure = drawn(plots.lines(table, "batch", "ms", "model", "title", "batch", "ms", logx=True))
    (ax,) = figure.axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 2.0], [3.0, 4.0]]
    assert [line.get_color() for line in ax.lines] == [COLORS["dense"], COLORS["sparse"]]
    assert len(ax.collections) == 2
    without = table.drop(columns=["ms_low", "ms_high"]).assign(model=["a", "a", "b", "b"])
    assert not drawn(plots.lines(without, "batch", "ms", "model", "t", "x", "y")).axes[0].collections


@pytest.mark.parametrize("control", [None, 0.85])
def test_accuracy_curves_have_a_panel_a_stage_and_a_line_a_criterion(control):
    rows = [
        {"criterion": criterion, "sparsity": sparsity, "stage": stage, "accuracy": 0.7}
        for stage in ("pruned", "recovered")
        for criterion in ("magnitude", "merged")
        for sparsity in (0.9, 0.5)
    ]
    curves = pd.DataFrame(rows).assign(seed=0, accuracy_low=0.65, accuracy_high=0.75)
    figure = drawn(plots.accuracy_curves(curves, dense=0.8, control=control))
    pruned, recovered = figure.axes
    assert [line.get_color() for line in pruned.lines[:2]] == [COLORS["magnitude"], COLORS["merged"]]
    assert pruned.lines[0].get_xdata().tolist() == [0.5, 0.9]
    assert len(recovered.lines) - len(pruned.lines) == (control is not None)
    assert bounds(pruned.collections[0]) == pytest.approx((0.65, 0.75)), "of one seed the interval"


def bounds(band) -> tuple[float, float]:
    """The lowest and the highest point of a filled band."""
    heights = band.get_paths()[0].vertices[:, 1]
    return heights.min(), heights.max()


def test_accuracy_curves_of_several_seeds_are_their_mean_between_the_lowest_and_the_highest():
    rows = [
        {
            "criterion": "merged",
            "sparsity": sparsity,
            "stage": "pruned",
            "seed": seed,
            "accuracy": accuracy + sparsity / 10,
        }
        for sparsity in (0.5, 0.9)
        for seed, accuracy in enumerate((0.6, 0.7, 0.65))
    ]
    curves = pd.DataFrame(rows).assign(accuracy_low=0.0, accuracy_high=1.0)
    (ax,) = drawn(plots.accuracy_curves(curves, dense=0.8)).axes
    assert ax.lines[0].get_ydata() == pytest.approx([0.7, 0.74])
    assert bounds(ax.collections[0]) == pytest.approx((0.65, 0.79))


def test_grouped_bars_have_a_bar_a_group_and_hue_and_error_bars():
    table = pd.DataFrame(
        {
            "size": ["1", "1", "8", "8"],
            "kind": ["dense", "sparse"] * 2,
            "ms": [4.0, 2.0, 8.0, 3.0],
            "ms_low": [3.5, 1.5, 7.0, 2.5],
            "ms_high": [4.5, 2.5, 9.0, 3.5],
        }
    )
    figure = drawn(plots.grouped_bars(table, "size", "ms", "kind", "title", "ms", log=True))
    bars = [container for container in figure.axes[0].containers if hasattr(container, "patches")]
    assert [[patch.get_height() for patch in group] for group in bars] == [[4.0, 8.0], [2.0, 3.0]]
    # A group that lacks a hue leaves a gap.
    drawn(plots.grouped_bars(table.iloc[:3].drop(columns=["ms_low", "ms_high"]), "size", "ms", "kind", "t", "y"))


def test_tradeoff_has_a_point_and_a_name_a_model_the_best_on_top():
    table = comparison()
    figure = drawn(plots.tradeoff(table, "latency_ms", "ms", "title"))
    (ax,) = figure.axes
    best_first = table.iloc[::-1]
    shown, count = [text.get_text() for text in ax.texts], len(table)
    for number, (name, model) in enumerate(zip(shown[:count], best_first["model"], strict=True), 1):
        assert name.strip().startswith(f"{number}  {style.label(model)}, ")
    assert sorted(shown[count:], key=int) == [str(number + 1) for number in range(count)]
    points = [container.lines[0].get_xydata()[0].tolist() for container in ax.containers]
    assert points == best_first[["latency_ms", "accuracy"]].to_numpy().tolist()


def test_compare_and_visualize_gives_the_three_figures_of_a_comparison():
    figures = plots.compare_and_visualize(comparison())
    assert list(figures) == ["accuracy_size", "accuracy_latency", "cost"]
    for figure in figures.values():
        drawn(figure)
    time, memory = figures["cost"].axes
    assert [patch.get_width() for patch in time.patches] == comparison()["latency_ms"].tolist()
    assert [patch.get_width() for patch in memory.patches] == [60.0, 60.0, 60.0, 40.0, 50.0]


def test_show_saves_the_figure_and_its_reading_and_closes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path))
    shown = []
    monkeypatch.setattr(style, "display", shown.append)
    run = open_run(get_profile("smoke"), 0)
    figure = plots.confusion(np.eye(2, dtype=int), ["negative", "positive"])
    style.show(run, "confusion", figure, "Half of them are right.")
    assert (run.reports / "figures" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run.reports / "results.json").read_text())["captions"] == {
        "confusion": "Half of them are right."
    }
    svg = (run.reports / "figures" / "confusion.svg").read_text()
    assert "Half of them are right<" in svg and "<dc:date>" not in svg
    style.show(run, "again", plots.confusion(np.eye(2, dtype=int), ["negative", "positive"]), "Half of them are right.")
    assert (run.reports / "figures" / "again.svg").read_text() == svg
    assert shown[0] is figure
    assert not plt.fignum_exists(figure.number)


def test_differences_are_drawn_in_points_with_the_first_model_of_each_comparison_as_its_label():
    table = pd.DataFrame(
        {
            "comparison": ["sparse_merged_90 - fine_tuned", "student_distilled_2 - fine_tuned"],
            "difference": [-0.02, 0.01],
            "low": [-0.05, -0.03],
            "high": [0.01, 0.04],
        }
    )
    (ax,) = plots.differences(table, "Against the dense model").axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["student distilled 2", "sparse merged 90"]
    spans = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert any(span == pytest.approx([-5, 1]) for span in spans)
    assert any(span == pytest.approx([-3, 4]) for span in spans)


# --- where the useless weights are, and how stable that is ---


def test_overlap_over_seeds_has_a_dot_a_pair_and_both_chance_levels():
    table = pd.DataFrame(
        {
            "criterion": ["magnitude"] * 3 + ["merged"] * 3,
            "overlap": [0.97, 0.96, 0.95, 0.7, 0.72, 0.71],
            "chance": 0.5,
            "chance_by_layer": [0.55] * 3 + [0.6] * 3,
        }
    )
    (ax,) = drawn(plots.overlap_over_seeds(table)).axes
    dots = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in dots] == [[0.97, 0.96, 0.95], [0.7, 0.72, 0.71]]
    assert [line.get_color() for line in dots] == [COLORS["magnitude"], COLORS["merged"]]
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata())]
    assert levels == pytest.approx([0.55, 0.5, 0.6, 0.5])


def test_overlap_over_seeds_needs_two_seeds():
    table = pd.DataFrame(columns=["seed_a", "seed_b", "overlap", "chance", "chance_by_layer", "kappa", "criterion"])
    with pytest.raises(ValueError, match="at least two seeds"):
        plots.overlap_over_seeds(table)


def test_overlap_along_training_has_a_line_and_a_chance_level_a_criterion_and_shows_step_zero():
    table = pd.DataFrame(
        {
            "criterion": ["magnitude"] * 4 + ["gradient"] * 3,
            "step": [0, 1, 2, 3, 1, 2, 3],
            "overlap": [0.9, 0.92, 0.95, 1, 0.6, 0.8, 1],
            "chance": 0.5,
            "chance_by_layer": [0.51] * 4 + [0.6] * 3,
        }
    )
    (ax,) = drawn(plots.overlap_along_training(table)).axes
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0.9, 0.92, 0.95, 1], [0.6, 0.8, 1]]
    assert [line.get_ydata().tolist() for line in ax.lines[2:4]] == [[0.51] * 4, [0.6] * 3]
    assert [line.get_color() for line in ax.lines[2:4]] == [COLORS["magnitude"], COLORS["gradient"]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "3"]
    places = ax.transData.transform([(step, 0.5) for step in (0, 1, 2, 4)])[:, 0]
    assert np.diff(places)[1] == pytest.approx(np.diff(places)[2])
    assert places[0] < places[1]


def structure_shares() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"criterion": criterion, "layer": layer, "kind": kind, "index": i, "dropped": rng.random()}
        for criterion in ("magnitude", "gradient", "merged")
        for layer in range(4)
        for kind, count in (("head", 3), ("neuron", 20))
        for i in range(count)
    ]
    return pd.DataFrame(rows)


def test_dropped_heads_are_heatmaps_of_layers_and_heads():
    shares = structure_shares()
    panels = [ax for ax in drawn(plots.dropped_heads(shares)).axes if ax.texts]
    assert [ax.get_title(loc="left") for ax in panels] == ["magnitude", "gradient", "merged"]
    assert [ax.get_xlabel() for ax in panels] == ["head"] * 3
    for ax, name in zip(panels, ("magnitude", "gradient", "merged"), strict=True):
        expected = shares[(shares["criterion"] == name) & (shares["kind"] == "head")]["dropped"]
        assert [text.get_text() for text in ax.texts] == [f"{value:.0%}" for value in expected]


def test_dropped_neurons_are_sorted_curves_a_layer():
    shares = structure_shares()
    panels = drawn(plots.dropped_neurons(shares)).axes
    assert len(panels) == 3
    assert all(len(ax.lines) == 4 for ax in panels)
    expected = sorted(shares.query("criterion == 'gradient' and kind == 'neuron' and layer == 2")["dropped"])
    assert panels[1].lines[2].get_ydata().tolist() == expected
    assert panels[1].lines[2].get_xdata()[[0, -1]].tolist() == [0, 1]


def test_sensitivity_shows_the_change_against_the_untouched_model():
    rows = [(-1, "none", 0.0, 0.4)]
    rows += [(i, m, s, 0.4 + i + s) for s in (0.5, 0.9) for i in range(2) for m in ("attn.c_attn", "mlp.c_fc")]
    table = pd.DataFrame(rows, columns=["layer", "module", "sparsity", "value"])
    panels = [ax for ax in drawn(plots.sensitivity(table, "validation loss")).axes if ax.texts]
    assert [ax.get_title(loc="left") for ax in panels] == ["50% of the matrix removed", "90% of the matrix removed"]
    assert [text.get_text() for text in panels[0].texts] == ["+0.500", "+0.500", "+1.500", "+1.500"]


def forgotten_table() -> pd.DataFrame:
    groups = {"all": ["all"], "tokens": ["5–90", "91–400"], "negations": ["0", "1–2", "3"], "stars": ["1", "10"]}
    rows = [(name, group) for name, found in groups.items() for group in found]
    table = pd.DataFrame(rows, columns=["feature", "group"])
    table["forgotten"] = np.linspace(0.05, 0.4, len(rows))
    return table.assign(forgotten_low=table["forgotten"] - 0.02, forgotten_high=table["forgotten"] + 0.03)


def test_forgotten_has_a_panel_a_feature_an_interval_a_group_and_the_overall_share():
    table = forgotten_table()
    panels = [ax for ax in drawn(plots.forgotten(table)).axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in panels] == [
        "tokens in the review",
        "words that negate",
        "stars that the review gives",
    ]
    for ax, feature in zip(panels, ["tokens", "negations", "stars"], strict=True):
        part = table[table["feature"] == feature]
        assert [text.get_text() for text in ax.get_xticklabels()] == part["group"].tolist()
        points, overall = ax.lines
        assert points.get_ydata().tolist() == part["forgotten"].tolist()
        assert list(overall.get_ydata()) == [0.05, 0.05]
        assert overall.get_linestyle() == "--"
        ends = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
        assert ends == part[["forgotten_low", "forgotten_high"]].to_numpy().tolist()


def test_forgotten_tells_models_apart_and_leaves_a_gap_where_one_lacks_a_group():
    table = forgotten_table()
    both = pd.concat([table.assign(model="magnitude"), table[table["group"] != "1–2"].assign(model="gradient")])
    figure = drawn(plots.forgotten(both))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["magnitude", "gradient"]
    first, _, second, _ = figure.axes[1].lines
    assert (first.get_color(), second.get_color()) == (COLORS["magnitude"], COLORS["gradient"])
    assert (first.get_xdata() < second.get_xdata()).all()
    assert np.isnan(second.get_ydata()).tolist() == [False, True, False]


@pytest.mark.parametrize("seeds", [1, 3])
def test_unlearned_has_a_panel_a_domain_and_a_dot_a_row_and_starts_at_the_first_model(seeds):
    models, domains = ["pretrained", "fine_tuned", "recovered_magnitude_90"], ["film reviews", "Python"]
    rows = [
        (m, d, 1 + i + j + 0.1 * s) for i, m in enumerate(models) for j, d in enumerate(domains) for s in range(seeds)
    ]
    table = pd.DataFrame(rows, columns=["model", "domain", "bits_per_byte"])
    panels = drawn(plots.unlearned(table)).axes
    assert [ax.get_title(loc="left") for ax in panels] == domains
    assert [text.get_text() for text in panels[0].get_yticklabels()] == [style.label(name) for name in models]
    for j, ax in enumerate(panels):
        middle = 0.1 * (seeds - 1) / 2
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in dots] == [seeds] * 3
        assert dots[2].get_xdata()[0] == 3 + j
        spans = [line.get_xdata() for line in ax.lines[1::2]]
        assert [list(span) for span in spans] == [pytest.approx([1 + j + middle, 1 + i + j + middle]) for i in range(3)]
        assert [text.get_text() for text in ax.texts] == [f"{1 + i + j + middle:.2f}" for i in range(3)]
    low, high = panels[0].get_ylim()
    assert low > high, "the first model stands on top"


def test_rivals_are_drawn_in_points_with_a_line_a_rival_and_an_interval_a_sparsity():
    table = pd.DataFrame(
        {
            "criterion": ["magnitude", "random", "random", "magnitude"],
            "sparsity": [0.9, 0.9, 0.5, 0.5],
            "difference": [0.02, 0.1, 0.05, -0.01],
            "low": [0.01, 0.08, 0.03, -0.02],
            "high": [0.03, 0.12, 0.07, 0.0],
        }
    )
    (ax,) = drawn(plots.rivals(table, "title")).axes
    found = {line.get_label(): line for line in ax.lines}
    assert found["magnitude"].get_ydata() == pytest.approx([-1, 2]), "from the lower sparsity to the higher"
    assert found["random"].get_ydata() == pytest.approx([5, 10])
    assert found["magnitude"].get_xdata() == pytest.approx([0.5, 0.9], abs=0.01)
    assert not np.isclose(found["magnitude"].get_xdata()[0], found["random"].get_xdata()[0]), "side by side"
    intervals = sorted(tuple(segment[:, 1]) for part in ax.collections for segment in part.get_segments())
    assert np.array(intervals) == pytest.approx(np.array([(-2, 0), (1, 3), (3, 7), (8, 12)]))
    assert ax.lines[-1].get_ydata() == pytest.approx([0, 0]), "a draw"


# --- titles and names ---


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


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.9, 1.0, 0.95, 0.1], [0.0, 0.02], [0.3], []])
def test_names_are_spread_until_none_overlaps(heights):
    found = style.spread(heights, 0.1)
    assert np.all(np.diff(sorted(found)) >= 0.1 - 1e-9) and all(f <= 1.0001 for f in found)
    assert np.array_equal(np.argsort(found, kind="stable"), np.argsort(heights, kind="stable"))


def test_names_that_have_room_stay_where_their_lines_end():
    assert style.spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]


def test_lines_are_named_at_their_ends_and_have_no_legend():
    table = pd.DataFrame({"x": [1, 2, 1, 2], "y": [0.0, 1.0, 0.0, 3.0], "who": ["a_b", "a_b", "c", "c"]})
    (ax,) = drawn(plots.lines(table, "x", "y", "who", "title", "x", "y")).axes
    assert ax.get_legend() is None
    names = {text.get_text(): text.xy for text in ax.texts}
    assert names == {"a b": (2, 1.0), "c": (2, 3.0)}
    # There is room, so each name stands at the height of its line's end.
    for text in ax.texts:
        height = ax.transAxes.inverted().transform(ax.transData.transform(text.xy))[1]
        assert text.xyann[1] == pytest.approx(height, abs=0.01)


def test_a_bar_a_step_says_size_and_accuracy():
    steps = ["fine-tuned", "distilled", "int8", "distilled", "int8"]
    table = pd.DataFrame({"step": steps, "layers": [4, 2, 2, 1, 1], "accuracy": [0.9, 0.89, 0.88, 0.87, 0.861]})
    (ax,) = drawn(plots.step_sizes(table.assign(file_bytes=[8e6, 6e6, 2e6, 5e6, 1.5e6]), "title")).axes
    assert [bar.get_width() for bar in ax.patches] == [8.0, 6.0, 2.0, 5.0, 1.5]
    assert [tick.get_text() for tick in ax.get_yticklabels()][-2:] == ["distilled, 1 layer", "int8, 1 layer"]
    assert "1.50 MB, 86.1% right" in [text.get_text() for text in ax.texts]
    assert ax.patches[2].get_facecolor() == ax.patches[4].get_facecolor() != ax.patches[1].get_facecolor()
