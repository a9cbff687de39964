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

from nbhelpers import plots
from nbhelpers.plots import COLORS, color
from nbhelpers.profiles import get_profile
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
    assert plots.label("recovered_magnitude_90") == "recovered magnitude 90"


# --- figures ---


def test_lengths_marks_the_limit():
    figure = drawn(plots.lengths({"negative": [5, 9, 30], "positive": [7, 12, 50]}, max_tokens=20))
    (ax,) = figure.axes
    assert [line.get_xdata()[0] for line in ax.lines] == [20]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["negative", "positive"]


def test_learning_curves_show_loss_accuracy_and_reference_lines():
    curve = pd.DataFrame({"steps": [2, 4], "loss": [0.7, 0.4], "accuracy": [0.6, 0.8]})
    curve["losses"] = [[0.8, 0.6], [0.5, 0.3]]
    figure = drawn(plots.learning_curves({"fine_tuned": curve, "student_2": curve}, {"chance": 0.5}, "title"))
    left, right = figure.axes
    # Fewer than twelve steps: the running mean is of one step, the losses themselves.
    assert [line.get_xdata().tolist() for line in left.lines] == [[1, 2, 3, 4]] * 2
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[0.8, 0.6, 0.5, 0.3]] * 2
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[0.6, 0.8]] * 2
    assert right.lines[2].get_ydata()[0] == 0.5
    assert left.lines[0].get_color() == COLORS["dense"]
    assert left.lines[1].get_color() == COLORS["student"]
    drawn(plots.learning_curves({"a": curve}, {}, "one curve, no lines"))


def test_the_loss_curve_of_a_long_training_is_a_running_mean():
    losses = np.random.default_rng(0).random(48)
    curve = pd.DataFrame({"steps": [24, 48], "accuracy": [0.6, 0.8], "losses": [losses[:24], losses[24:]]})
    (line,) = plots.learning_curves({"fine_tuned": curve}, {}, "title").axes[0].lines
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
    curves = pd.DataFrame(rows).assign(accuracy_low=0.65, accuracy_high=0.75)
    figure = drawn(plots.accuracy_curves(curves, dense=0.8, control=control))
    pruned, recovered = figure.axes
    assert [line.get_color() for line in pruned.lines[:2]] == [COLORS["magnitude"], COLORS["merged"]]
    assert pruned.lines[0].get_xdata().tolist() == [0.5, 0.9]
    assert len(recovered.lines) - len(pruned.lines) == (control is not None)


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
    names = [text.get_text() for text in ax.texts]
    assert all(name.startswith(plots.label(model)) for name, model in zip(names, best_first["model"], strict=True))
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
    monkeypatch.setattr(plots, "display", shown.append)
    run = open_run(get_profile("smoke"), 0)
    figure = plots.confusion(np.eye(2, dtype=int), ["negative", "positive"])
    plots.show(run, "confusion", figure, "Half of them are right.")
    assert (run.reports / "figures" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run.reports / "results.json").read_text())["captions"] == {
        "confusion": "Half of them are right."
    }
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
