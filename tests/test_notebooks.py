"""The committed notebooks: their form, and all six through the pipeline at profile smoke."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.stages import NOTEBOOKS, STAGES, broken_promises, parameters_of
from nbhelpers.workspace import open_run

PROJECT = Path(__file__).parent.parent
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not PATHS, reason="the folder notebooks/ has no notebooks yet")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_is_a_notebook_for_each_stage_and_no_other():
    assert [path.stem for path in PATHS] == sorted(STAGES)


def test_it_is_stripped(notebook):
    for cell in code_of(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set().union(*(cell.metadata for cell in notebook.cells)) <= {"tags", "jupyter"}


def test_it_is_valid_and_its_cells_have_ids(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    ids = [cell.id for cell in notebook.cells]
    assert all(ids) and len(set(ids)) == len(ids)


def test_its_kernel_is_python3(notebook):
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_has_one_parameters_cell_with_three_flat_scalars(notebook, request):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    scope = {}
    exec(tagged[0].source, scope)
    del scope["__builtins__"]
    assert scope == {"profile": "quick", "seed": 0, "overrides": ""}
    assert all("#" in line for line in tagged[0].source.splitlines()), "a comment each"
    assert parameters_of(request.node.callspec.params["notebook"]) == set(scope)


def test_its_cells_are_small(notebook):
    lines = [len(cell.source.splitlines()) for cell in code_of(notebook)]
    assert max(lines) <= 20
    assert statistics.median(lines) <= 8


def test_it_begins_with_a_title_and_a_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "Question" in first.source


# --- all six, once ---


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A smoke run of all notebooks from the command line, started in another folder: its workspace and its output."""
    root = tmp_path_factory.mktemp("smoke")
    environment = os.environ | {"NBHELPERS_ROOT": str(root), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-P", "-m", "nbhelpers.pipeline", "--profile", "smoke"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, done


@pytest.fixture
def run(executed, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(executed[0]))
    return open_run(get_profile("smoke"))


def test_the_terminal_gets_a_line_a_notebook(executed):
    _, done = executed
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == sorted(STAGES)
    assert len(lines) <= 14


def test_every_promise_is_kept_and_nothing_unpromised_is_written(run):
    for stage in STAGES.values():
        assert broken_promises(run, stage) == []
    figures = {path.stem for path in (run.reports / "figures").iterdir()}
    tables = {path.stem for path in (run.reports / "tables").iterdir()}
    assert figures == {name for stage in STAGES.values() for name in stage.figures}
    assert tables == {name for stage in STAGES.values() for name in stage.tables}
    assert len(figures) >= 20
    captions = run.results()["captions"]
    assert figures == captions.keys() and all(len(text) > 20 for text in captions.values())


def test_no_executed_notebook_shows_an_error_or_this_machine(run, executed):
    for name in STAGES:
        path = run.reports / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in code_of(notebook) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert all(cell.execution_count for cell in code_of(notebook))
        assert str(executed[0]) not in path.read_text() and str(PROJECT) not in path.read_text()
    assert sum(path.stat().st_size for path in run.reports.rglob("*") if path.is_file()) < 25e6


def test_the_comparison_has_a_row_for_every_kind_of_model(run):
    table = run.load_table("comparison")
    names = " ".join(table["model"])
    for kind in ("fine_tuned", "fine_tuned_extra", "magnitude", "movement", "gradient", "merged", "sparse", "student"):
        assert kind in names
    needed = "model accuracy accuracy_low accuracy_high f1 total_parameters active_parameters encoder_sparsity "
    needed += "file_bytes latency_ms speedup peak_memory_bytes p_value"
    assert set(needed.split()) <= set(table.columns)
    assert table["accuracy"].between(table["accuracy_low"], table["accuracy_high"]).all()
    assert (table["active_parameters"] <= table["total_parameters"]).all()
    dense = table.set_index("model").loc["fine_tuned"]
    assert (dense["speedup"], dense["p_value"], dense["encoder_sparsity"]) == (1, 1, 0)


def test_the_tables_of_the_contract_are_there(run):
    significance = {"comparison", "metric", "difference", "low", "high", "p_value", "p_adjusted", "n", "seeds"}
    assert significance <= set(run.load_table("significance").columns)
    curves = run.load_table("curves")
    assert {"criterion", "sparsity", "stage", "split", "accuracy"} <= set(curves.columns)
    assert set(curves["stage"]) <= {"pruned", "recovered"}
    assert pd.api.types.is_numeric_dtype(curves["sparsity"])


def test_the_models_of_the_run_can_be_loaded_and_asked(run):
    names = run.models()
    assert {"pretrained", "fine_tuned", "fine_tuned_extra"} <= set(names)
    for name in ("fine_tuned", next(name for name in names if name.startswith("sparse"))):
        probabilities = run.predict(name, ["A film to forget.", "", "A joy from start to end!"])
        assert probabilities.shape == (3,) and ((probabilities >= 0) & (probabilities <= 1)).all()


def test_a_second_run_skips_everything(executed):
    root, _ = executed
    environment = os.environ | {"NBHELPERS_ROOT": str(root), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "nbhelpers.pipeline", "--profile", "smoke"]
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("up to date") == len(STAGES)
