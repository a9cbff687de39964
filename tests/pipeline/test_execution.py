"""Notebooks in kernels of this interpreter: the executed copy, what fails in them, and how far they are."""

import io
import json
import sys
import time

import nbformat
import pytest
from conftest import PROJECT
from stand_ins import write_notebook

from nbhelpers import measurement
from nbhelpers.pipeline import execution

CHECK = f"""import os, sys, warnings, matplotlib, pathlib
assert sys.executable == {sys.executable!r}, sys.executable
assert {str(PROJECT)!r} in sys.path, sys.path
assert 'inline' in matplotlib.get_backend()
assert os.environ['NBHELPERS_BATCH'] == '1'
os.write(2, b'flood'); print('flood', file=sys.stderr); warnings.warn('flood')
print(sys.executable); pathlib.Path(os.environ['NBHELPERS_ROOT']) / 'x'"""


def execute(folder, tmp_path, *cells):
    write_notebook(folder, "01_first", *cells)
    parameters = {"profile": "smoke", "seed": 0, "overrides": ""}
    notebook = folder / "01_first.ipynb"
    with execution.Kernels({notebook: tmp_path / "failed" / "01_first.ipynb"}) as kernels:
        return kernels.execute(notebook, parameters)


@pytest.fixture
def folder(workspace, tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks {x} $HOME")


def test_the_copy_is_whole_comes_from_this_interpreter_and_names_no_machine(folder, workspace, monkeypatch, capfd):
    decoy = workspace / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "decoy", "language": "python"}
    (decoy / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(workspace / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = execute(folder, workspace, CHECK)
    assert execution.output_faults(notebook) == []
    assert "flood" not in "".join(capfd.readouterr())
    execution.scrub(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = json.dumps([cell.outputs for cell in code])
    assert "./.venv" in shown or str(PROJECT) not in sys.executable
    assert str(workspace) not in shown and str(PROJECT) not in shown
    assert "papermill" not in nbformat.writes(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert code[1].source.splitlines()[1:] == ['profile = "smoke"', "seed = 0", 'overrides = ""']
    nbformat.validate(notebook)


@pytest.mark.parametrize("solutions", ["", "1"])
def test_solutions_are_executed_only_where_that_is_asked_for(folder, workspace, monkeypatch, solutions):
    monkeypatch.setenv("NBHELPERS_SOLUTIONS", solutions)
    write_notebook(folder, "01_first", "x = 1", "x = 2", "print(x)")
    written = nbformat.read(folder / "01_first.ipynb", as_version=4)
    written.cells[-2].metadata.tags = ["solution"]
    nbformat.write(written, folder / "01_first.ipynb")
    notebook = folder / "01_first.ipynb"
    with execution.Kernels({notebook: workspace / "failed" / "01_first.ipynb"}) as kernels:
        executed = kernels.execute(notebook, {"profile": "smoke", "seed": 0, "overrides": ""})
    assert executed.cells[-1].outputs[0].text == ("2\n" if solutions else "1\n")
    assert execution.output_faults(executed) == []


def test_an_error_and_a_dead_kernel_are_named_with_their_cell(folder, workspace):
    with pytest.raises(execution.NotebookError, match=r"^cell In \[5\]: KeyError: 'the\\nmatter'$"):
        execute(folder, workspace, "1 + 1", "raise KeyError('the\\nmatter')")
    assert "Traceback" in (workspace / "failed" / "01_first.ipynb").read_text()
    with pytest.raises(execution.NotebookError, match=r"^cell 5 of 6 \(os\._exit\(9\)\): its kernel died"):
        execute(folder, workspace, "os._exit(9)", "1 + 1")


def test_the_next_kernel_is_waiting_while_a_notebook_runs_and_an_unused_one_is_shut_down(folder, workspace):
    shown = "import sys; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    for name in ("01_first", "02_second", "03_third"):
        write_notebook(folder, name, shown)
    copies = {path: workspace / "failed" / path.name for path in sorted(folder.glob("*.ipynb"))}
    first, second, third = copies
    with execution.Kernels(copies) as kernels:
        for notebook, following in ((first, second), (second, third)):
            executed = kernels.execute(notebook, {"profile": "smoke", "seed": 0, "overrides": ""})
            assert executed.cells[-1].outputs[0].text == "['matplotlib', 'torch', 'transformers']\n"
            assert list(kernels.waiting) == [following] and kernels.running is None
        waiting = kernels.waiting[third].provisioner.pid
        assert measurement.memory_of_tree(waiting) > 0
    assert measurement.memory_of_tree(waiting) == 0
    assert not list((workspace / "failed").glob("03*"))


def test_a_notebook_that_leaves_early_without_an_error_is_found():
    cells = [nbformat.v4.new_code_cell(source) for source in ("import sys; sys.exit(0)", "1 + 1")]
    cells[0].execution_count = 1
    cells[0].outputs = [nbformat.v4.new_output("error", ename="SystemExit", evalue="0", traceback=[])]
    found = execution.output_faults(nbformat.v4.new_notebook(cells=cells))
    assert found == ["cell 1 shows a SystemExit", "cell 2 was not executed"]


def test_paths_are_taken_out_of_outputs(workspace):
    text = f"{PROJECT}/a {workspace}/b /tmp/ipykernel_12/34.py:5: Warning"
    assert execution.without_paths(text) == "./a ./b <cell>:5: Warning"


# --- how far it is ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def until(condition):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 20
        time.sleep(0.05)


def test_the_pipeline_shows_cells_and_computation_in_one_line_of_a_terminal(tmp_path):
    state, stream = tmp_path / "state", Terminal()
    with execution.Follower("01_fine_tune", state, stream) as follower:
        follower.write("\r01_fine_tune |##  | cell 2 of 4")
        state.write_text("fine-tuning: 40 %, 01:10 left")
        until(lambda: "40 %" in stream.getvalue())
    frames = stream.getvalue().split("\r")
    assert any("cell 2 of 4  fine-tuning: 40 %, 01:10 left" in frame for frame in frames)
    assert frames[-1] == "\x1b[K" and not state.exists()


def test_the_pipeline_says_a_line_now_and_then_in_a_pipe(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "IN_LOGS", 0)
    state, stream = tmp_path / "state", io.StringIO()
    with execution.Follower("01_fine_tune", state, stream) as follower:
        assert follower.bar is False
        state.write_text("fine-tuning: 40 %, 01:10 left")
        until(stream.getvalue)
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().splitlines()[0] == f"{'01_fine_tune':22} fine-tuning: 40 %, 01:10 left"
