"""Which notebooks are fresh, missing or stale, and why."""

import re

import nbformat
import pytest
from stand_ins import FIRST, STAGES, write_notebook

from nbhelpers.pipeline import freshness
from nbhelpers.profiles import get_profile
from nbhelpers.report.chapters import Stage
from nbhelpers.workspace import open_run

pytest_plugins = ["stand_ins"]


@pytest.fixture
def listed(call):
    """A function that returns the states that --list prints."""

    def states(*options, known=STAGES):
        done = call("--list", *options, known=known)
        assert (done.code, done.err) == (0, "")
        return [re.split(r" +", line, maxsplit=1)[1] for line in done.lines]

    return states


def test_list_says_fresh_missing_or_stale_with_the_reason(call, listed, workspace, notebooks, runs):
    assert listed() == ["missing", "missing"]
    assert not list(workspace.iterdir()), "--list writes nothing"
    call()
    assert listed() == ["fresh", "fresh"]
    assert listed("--set", "epochs=9") == ["stale (settings changed)"] * 2
    (workspace / "reports" / "smoke" / "tables" / "second.csv").unlink()
    assert listed() == ["fresh", "stale (tables/second.csv is missing)"]
    write_notebook(notebooks, "01_first", FIRST, "1 + 1")
    changed = "stale (01_first, which it needs, is stale or was run otherwise)"
    assert listed() == ["stale (the notebook's code changed)", changed]
    call("--only", "01")
    assert listed()[0] == "fresh"
    assert runs() == ["01_first", "02_second", "01_first"]


def test_prose_in_a_notebook_does_not_make_it_stale(call, listed, notebooks):
    call()
    path = notebooks / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, path)
    assert listed() == ["fresh", "fresh"]


def test_changed_helpers_make_stale_only_what_imports_them(call, listed, notebooks, monkeypatch):
    write_notebook(notebooks, "01_first", FIRST, "from nbhelpers import masks")
    call()
    fingerprint = freshness.code_fingerprint
    monkeypatch.setattr(freshness, "code_fingerprint", lambda *names: fingerprint(*names) + "!" * len(names))
    assert listed() == [
        "stale (code in nbhelpers changed)",
        "stale (01_first, which it needs, is stale or was run otherwise)",
    ]


def test_a_changed_artefact_makes_stale_what_is_made_from_it(call, listed):
    second = Stage("02_second", "?", needs=("fine_tuned",), tables=("second",), gaps=("second.gap",))
    known, run = STAGES | {"02_second": second}, open_run(get_profile("smoke"))

    def make(text):
        run.cached("fine_tuned", {"x": text}, lambda target: (target.folder / "a").write_text(text), made_by="01")

    make("1")
    assert call(known=known).code == 0
    make("2")
    assert listed(known=known) == ["stale (fine_tuned is not the same any more)"] * 2


def test_a_damaged_record_is_named(call, workspace):
    call()
    (workspace / ".artifacts" / "smoke" / "seed-0" / "stages" / "01_first.json").write_text("{")
    done = call("--list")
    assert done.code == 2 and "01_first.json is damaged: delete it, and notebook 01 runs again" in done.err


def test_what_a_notebook_needs_is_asked_for_through_all_that_come_before(workspace):
    known = {name: Stage(name, "?", needs=needs) for name, needs in {"04_c": ("sparse_*", "03"), "03_b": ()}.items()}
    run = open_run(get_profile("smoke"))
    assert freshness.missing_needs(run, known["04_c"], known, {"04"}) == {"03": "03"}
    known["04_c"] = Stage("04_c", "?", needs=("recovered_*",))
    known["03_b"] = Stage("03_b", "?", needs=("fine_tuned",))
    assert freshness.missing_needs(run, known["04_c"], known, {"04"}) == {"recovered_*": "03", "fine_tuned": "01"}
    assert freshness.missing_needs(run, known["04_c"], known, {"03", "04"}) == {}
