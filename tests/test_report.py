"""The picture's geometry, the headline's cards, and what the page's template does with what it is given."""

import itertools
import json
import re

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers.report import page, style, words


def table(**columns) -> pd.DataFrame:
    accuracy = np.array([0.8, 0.7, 0.75])
    names = ["fine_tuned", "sparse_merged_90", "student_distilled_2"]
    frame = {"model": names, "accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return pd.DataFrame(frame | {"speedup": [1.0, 4.0, 2.0], "file_bytes": [8e6, 2e6, 4e6]} | columns)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.5, 20))
def test_marks_stand_apart_in_their_order_and_inside(places, apart):
    moved = page.side_by_side(places, apart, 0, 100)
    assert all(-0.1 <= place <= 100.1 for place in moved)
    needed = min(apart, 100 / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= needed - 0.11 for a, b in itertools.pairwise(order)), "within rounding to 0.1"


def test_marks_that_have_room_stay_where_they_are():
    assert page.side_by_side([10, 50, 90], 20, 0, 100) == [10, 50, 90]
    assert page.side_by_side([50, 50, 90], 20, 0, 100) == [40, 60, 90]
    assert page.side_by_side([100, 100], 20, 0, 100) == [80, 100]


def test_the_picture_has_every_model_at_every_cost_it_knows():
    drawn = page.draw(table(), {"TF-IDF": 0.9})
    assert [cost.key for cost in drawn["costs"]] == ["speed", "size"]
    for part in drawn["frames"]:
        frame, marks = part["frame"], part["marks"]
        assert len(marks) == 3 and [axis["cost"].key for axis in part["axes"]] == ["speed", "size"]
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


def test_a_narrow_range_of_costs_has_ticks_as_well():
    drawn = page.draw(table(speedup=[1.0, 1.1, 1.05]), {})
    assert len(drawn["frames"][0]["axes"][0]["ticks"]) >= 2


def test_a_table_without_costs_has_no_picture_and_one_with_gaps_is_refused():
    assert page.draw(table().drop(columns=["speedup", "file_bytes"]), {}) is None
    with pytest.raises(ValueError, match="missing or infinite"):
        page.draw(table(speedup=[1.0, np.nan, 2.0]), {})
    with pytest.raises(ValueError, match="above zero"):
        page.draw(table(speedup=[1.0, 0.0, 2.0]), {})


def test_a_mark_looks_as_in_the_figures():
    assert page.OUTLINES.keys() == set(style.MARKERS.values())
    look = page.look("recovered_merged_90")
    assert look == {"outline": page.OUTLINES["s"], "color": style.COLORS["merged"]}
    assert page.look("fine_tuned")["outline"] == page.OUTLINES["D"]


MODEL = {"accuracy_low": 0.8, "accuracy_high": 0.9, "speedup": 1.0, "file_bytes": 7e6, "encoder_sparsity": 0.0}
MODEL |= {"model": "fine_tuned", "accuracy": 0.85, "p_value": 1.0}


def test_the_headline_is_numbers_with_what_they_cost():
    sparse = {"model": "sparse_x", "accuracy": 0.84, "encoder_sparsity": 0.9, "speedup": 3.0, "p_value": 1e-5}
    found = {"dense": MODEL, "sparse": MODEL | sparse, "student": MODEL | {"model": "student"}, "control": MODEL}
    dense, second, third = page.cards({"comparison": found})
    assert (dense["accuracy"], dense["interval"], dense["others"]) == ("85.0\N{NO-BREAK SPACE}%", "80.0 to 90.0", {})
    said = " / ".join(second["gains"]).replace("\N{NO-BREAK SPACE}", " ")
    assert said == (
        "90 % of the block weights removed / 3.00 times the speed / "
        "-1.0 points to the dense model, p < 0.001 / 7.00 MB on disk"
    )
    assert "removed" not in " ".join(third["gains"])
    assert dense["places"] == sorted(dense["places"]) and 0 < dense["places"][0] < dense["places"][2] < 100
    assert page.cards({}) == [] and page.cards({"comparison": {"sparse": MODEL}}) == []


def test_the_context_says_which_seed_and_what_the_control_has():
    found = {"test_reviews": 2500, "control": MODEL}
    results = {"comparison": found, "run": {"profile": {"seeds": 3}}}
    text = words.context(results).replace("\N{NO-BREAK SPACE}", " ")
    assert "On 2,500 test reviews" in text and "Models of the first seed." in text and "85.0 % (80.0 to 90.0)." in text
    results["run"]["profile"]["seeds"] = 1
    assert "first seed" not in words.context(results) and words.context({}) == ""


def test_the_template_refuses_what_it_was_not_given_and_numbers_that_are_none():
    with pytest.raises(jinja2.UndefinedError):
        page.template().render()
    environment = page.template().environment
    with pytest.raises(ValueError, match="JSON"):
        environment.from_string("{{ x | tojson }}").render(x=float("nan"))
    hostile = "</script><!-- \u2028 & 'x'"
    written = environment.from_string("{{ x | tojson }}").render(x=hostile)
    assert json.loads(written) == hostile and "<" not in written


def test_the_policy_names_the_very_script_and_style():
    # echo -n "alert('Hello, world.');" | openssl sha256 -binary | openssl base64: the example of the specification.
    assert page.allowed("alert('Hello, world.');") == "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"
    source = page.read_template("page.html")
    assert not re.search(r"\son\w+=|\sstyle=", source), "the policy would refuse these"


def test_a_formula_looks_the_same_whatever_style_is_set():
    match = re.match(r"(.+)", "s = |w|")
    sizes = []
    for box in ("standard", "tight"):
        with matplotlib.rc_context({"savefig.bbox": box}):
            sizes.append(len(page.formula_image(match)))
    assert sizes[0] == sizes[1]
