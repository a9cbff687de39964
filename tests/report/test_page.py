"""The picture's geometry, the headline's cards, the template and its policy, and the order of the chapters."""

import json
import re

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.report import chapters, page, style
from nbhelpers.workspace import open_run


def table(**columns) -> pd.DataFrame:
    frame = pd.DataFrame({"model": ["fine_tuned", "sparse_merged_90", "student_distilled_2"]})
    frame["accuracy"] = [0.8, 0.7, 0.75]
    frame = frame.assign(accuracy_low=frame["accuracy"] - 0.05, accuracy_high=frame["accuracy"] + 0.05)
    costs = {"speedup": [1.0, 4.0, 2.0], "latency_ms": [8.0, 2.0, 4.0], "file_bytes": [8e6, 2e6, 4e6]}
    return frame.assign(**costs | columns)


# --- the picture ---


def test_the_picture_has_every_model_at_every_cost_it_knows():
    drawn = page.draw(table(), {"TF-IDF": 0.9})
    assert [cost.key for cost in drawn["costs"]] == ["speed", "latency", "size"]
    for part in drawn["frames"]:
        frame, marks = part["frame"], part["marks"]
        assert len(marks) == 3 and [axis["cost"].key for axis in part["axes"]] == ["speed", "latency", "size"]
        assert marks[0]["x"]["speed"] < marks[2]["x"]["speed"] < marks[1]["x"]["speed"]
        assert marks[1]["x"]["size"] < marks[2]["x"]["size"] < marks[0]["x"]["size"]
        assert marks[0]["y"] < marks[2]["y"] < marks[1]["y"], "more accurate is higher"
        assert all(mark["top"] < 0 < mark["bottom"] for mark in marks)
        ((y, text),) = part["lines"]
        assert text == "TF-IDF" and frame.top < y < marks[0]["y"]
        ticks = {text: place for place, text in part["axes"][0]["ticks"]}
        assert list(ticks) == ["1", "2", "5"]
        assert [ticks["1"], ticks["2"]] == [marks[0]["x"]["speed"], marks[2]["x"]["speed"]], "a mark stands at its tick"
        steps = np.diff([marks[i]["x"]["speed"] for i in (0, 2, 1)])
        assert abs(steps[0] - steps[1]) < 0.11, "a log scale: twice as fast is always as far, within rounding to 0.1"


def test_a_narrow_range_of_costs_has_ticks():
    drawn = page.draw(table(speedup=[1.0, 1.1, 1.05]), {})
    assert len(drawn["frames"][0]["axes"][0]["ticks"]) >= 2


def test_a_mark_looks_as_in_the_figures():
    assert page.OUTLINES.keys() == set(style.MARKERS.values())
    assert page.look("recovered_merged_90") == {"outline": page.OUTLINES["s"], "color": style.COLORS["merged"]}
    assert page.look("fine_tuned")["outline"] == page.OUTLINES["D"]


def test_the_cards_share_one_scale():
    model = {"accuracy": 0.85, "accuracy_low": 0.8, "accuracy_high": 0.9, "speedup": 1.0, "file_bytes": 7e6}
    model |= {"model": "fine_tuned", "encoder_sparsity": 0.0, "p_value": 1.0}
    better = model | {"model": "student", "accuracy": 0.87}
    dense, student = page.cards({"comparison": {"dense": model, "student": better, "control": model}})
    assert (dense["accuracy"], dense["interval"], dense["others"]) == ("85.0\N{NO-BREAK SPACE}%", "80.0 to 90.0", {})
    assert dense["places"] == sorted(dense["places"]) and 0 < dense["places"][0] < dense["places"][2] < 100
    assert student["places"][1] - dense["places"][1] == pytest.approx(100 * 0.02 / 0.12, abs=0.02)
    assert page.cards({}) == [] and page.cards({"comparison": {"sparse": model}}) == []


# --- the page and its template ---


def test_the_template_refuses_what_it_was_not_given():
    with pytest.raises(jinja2.UndefinedError):
        page.template().render()


def test_the_policy_names_the_very_script_and_style():
    # echo -n "alert('Hello, world.');" | openssl sha256 -binary | openssl base64: the example of the specification.
    assert page.allowed("alert('Hello, world.');") == "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"
    source = page.read_template("page.html")
    assert not re.search(r"\son\w+=|\sstyle=", source), "the policy would refuse these"


def test_the_page_shows_figures_that_are_promised_and_there(workspace):
    run = open_run(get_profile("smoke"))
    (run.reports / "figures").mkdir(parents=True)
    for name in ("02_stability", "02_of_an_earlier_version"):
        matplotlib.image.imsave(run.reports / "figures" / f"{name}.png", np.zeros((2, 3, 3)))
    (figure,) = page.chapter(run, chapters.STAGES["02_criteria_scoring"], {})["figures"]
    assert (figure["name"], figure["width"], figure["height"]) == ("02 stability", 3, 2)
    run.skip("there is one seed", "02_stability")
    assert page.chapter(run, chapters.STAGES["02_criteria_scoring"], {})["figures"] == []
    (run.reports / "results.json").write_text(json.dumps({"finding": {"seeds": 1}}))
    assert "The finding" not in page.write_index(run).read_text(), "one that lacks a number"


def test_a_formula_looks_the_same_whatever_style_is_set():
    match = re.match(r"(.+)", "s = |w|")
    sizes = []
    for box in ("standard", "tight"):
        with matplotlib.rc_context({"savefig.bbox": box}):
            sizes.append(len(page.formula_image(match)))
    assert sizes[0] == sizes[1]


# --- the chapters ---


def test_order_follows_needs():
    needs = {"01_c": ("03",), "02_b": (), "03_a": ("02",)}
    stages = {name: chapters.Stage(name, "?", needs=need) for name, need in needs.items()}
    assert [stage.name for stage in chapters.in_order(stages)] == ["02_b", "03_a", "01_c"]
    stages["02_b"] = chapters.Stage("02_b", "?", needs=("01",))
    with pytest.raises(ValueError, match="circle"):
        chapters.in_order(stages)
    assert [stage.number for stage in chapters.in_order(chapters.STAGES)] == ["01", "02", "03", "04", "05", "06"]
