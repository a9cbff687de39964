"""Figures, tables and metrics that a notebook has promised: there, whole and finite, or skipped with a reason."""

import pandas as pd
import pytest
from stand_ins import DOT, FIRST, PIXEL, SET_UP, STAGES

from nbhelpers.pipeline import promises
from nbhelpers.profiles import get_profile
from nbhelpers.report import chapters
from nbhelpers.report.chapters import Stage
from nbhelpers.workspace import open_run


@pytest.fixture
def run(workspace):
    return open_run(get_profile("smoke"))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (DOT, "pass", "figures/01_dot.png is missing"),
        (repr(PIXEL), repr(PIXEL[:-20]), "01_dot.png is not a whole PNG"),
        ("a,b\\n1,x\\n2,y\\n", "a,b\\n", "tables/first.csv has no rows"),
        ("a,b\\n1,x\\n2,y\\n", "", "tables/first.csv is empty"),
        ("a,b\\n1,x\\n2,y\\n", "a,b\\n1,x\\n,y\\n", "missing or infinite in column a"),
        ("a,b\\n1,x\\n2,y\\n", "a,b\\n1,x\\ninf,y\\n", "missing or infinite in column a"),
        ('"x": [0.5', '"z": [0.5', "metric first.x is missing"),
        ('"x": [0.5', '"x": [float("nan")', "metric first.x is not finite"),
    ],
)
def test_a_broken_promise_is_found(run, old, new, complaint):
    assert old in FIRST
    scope = {"profile": "smoke", "seed": 0, "overrides": "", "NAME": "x"}
    exec(f"{SET_UP}\n{FIRST.replace(old, new)}", scope)
    (fault,) = promises.broken_promises(run, STAGES["01_first"])
    assert complaint in fault


def test_kept_promises_have_no_faults_and_a_changed_table_is_one(run):
    stage = STAGES["01_first"]
    exec(f"{SET_UP}\n{FIRST}", {"profile": "smoke", "seed": 0, "overrides": "", "NAME": "x"})
    assert promises.broken_promises(run, stage) == []
    run.save_table("first", pd.DataFrame({"a": [1]}))
    path = run.reports / "tables" / "first.csv"
    path.write_text(path.read_text().replace("1", "2"))
    assert promises.broken_promises(run, stage) == ["tables/first.csv is damaged or was changed"]


def test_a_table_may_have_no_rows_where_its_stage_says_so(run):
    stage = Stage("01_first", "?", tables=("a", "b"), gaps=("a", "b.x"))
    for name in "ab":
        run.save_table(name, pd.DataFrame({"x": [], "y": []}))
    assert promises.broken_promises(run, stage) == ["tables/b.csv has no rows"]
    run.save_table("b", pd.DataFrame({"x": [1.0, None], "y": [1.0, 2.0]}))
    assert promises.broken_promises(run, stage) == []


def test_a_skipped_promise_is_not_broken_until_the_stage_runs_again(run, capsys):
    stage = Stage("01_first", "?", figures=("01_heads",), tables=("heads",), metrics=("a.heads", "a.b"))
    run.record("a", b=1.0)
    run.skip("this model has no heads", "01_heads", "heads", "a.heads")
    assert "this model has no heads" in capsys.readouterr().out
    assert run.results()["skipped"]["01_heads"] == "this model has no heads"
    assert promises.broken_promises(run, stage) == [] and chapters.promised_files(run, stage) == []
    promises.forget_metrics(run, stage)
    assert len(promises.broken_promises(run, stage)) == 4 and run.results()["skipped"] == {}
