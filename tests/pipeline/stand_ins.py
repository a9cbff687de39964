"""Two small notebooks in place of the six, and the command line on them, without kernels."""

import base64
import os
import traceback
from types import SimpleNamespace

import nbformat
import pytest

from nbhelpers.pipeline import command, execution, grid
from nbhelpers.report.chapters import Stage
from nbhelpers.study.work import Rates

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
STAGES = {
    "01_first": Stage("01_first", "What is first?", figures=("01_dot",), tables=("first",), metrics=("first.x",)),
    "02_second": Stage("02_second", "What is second?", needs=("01",), tables=("second",), gaps=("second.gap",)),
}
PARAMETERS = 'profile = "quick"  # which, for instance "a=b"\nseed = 0\noverrides = ""'
SET_UP = """import json, os, pathlib
reports = pathlib.Path(os.environ["NBHELPERS_ROOT"]) / "reports" / (profile + (f"-seed-{seed}" if seed else ""))
for folder in ("figures", "tables"):
    (reports / folder).mkdir(parents=True, exist_ok=True)
with open(reports / "runs.txt", "a") as runs:
    print(NAME, overrides, file=runs)"""
DOT = f'(reports / "figures" / "01_dot.png").write_bytes({PIXEL!r})'
FIRST = f"""{DOT}
(reports / "tables" / "first.csv").write_text("a,b\\n1,x\\n2,y\\n")
path = reports / "results.json"
results = json.loads(path.read_text()) if path.exists() else {{}}
path.write_text(json.dumps(results | {{"first": {{"x": [0.5, {{"y": 1}}]}}, "captions": {{"01_dot": "A dot <b>"}}}}))"""
SECOND = """(reports / "tables" / "second.csv").write_text("a,gap\\n1,\\n2,3\\n")"""


def write_notebook(folder, name, *cells, parameters=PARAMETERS):
    """Write a stand-in: title, parameters, set-up and cells."""
    code = [nbformat.v4.new_code_cell(source) for source in (f"NAME = {name!r}\n{SET_UP}", *cells)]
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    title = nbformat.v4.new_markdown_cell(f"# {name}\n$$s = |w|$$")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[title, first, *code], metadata=metadata), folder / f"{name}.ipynb")


def execute_here(kernels, notebook, parameters):
    """Do what ``Kernels.execute`` does, in this process: a kernel takes seconds to start."""
    copy = kernels.copies[notebook]
    execution.clear(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    executed, scope, count = nbformat.read(notebook, as_version=4), {}, 0
    for cell in executed.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        try:
            exec(cell.source, scope)
        except Exception as error:
            copy.write_text(traceback.format_exc())
            raise execution.NotebookError(f"cell In [{count}]: {type(error).__name__}: {error}") from error
        if "parameters" in cell.metadata.get("tags", []):
            scope.update(parameters)
    return executed


@pytest.fixture
def notebooks(workspace, tmp_path_factory, monkeypatch):
    """A folder with the two stand-ins; the data and models of the real ones are not asked for."""
    folder = tmp_path_factory.mktemp("notebooks {x} $HOME")
    write_notebook(folder, "01_first", FIRST)
    write_notebook(folder, "02_second", SECOND)
    monkeypatch.setattr(command, "preflight", lambda run: None)
    monkeypatch.setattr(grid, "measure_speed", lambda run, jobs: Rates(4000.0, 13000.0))
    monkeypatch.setattr(grid, "automatic_jobs", lambda: 1)
    return folder


@pytest.fixture
def call(notebooks, monkeypatch, capfd):
    """A function that runs the command line on the stand-ins: exit code, standard output, standard error."""
    monkeypatch.setattr(execution.Kernels, "execute", execute_here)

    def run(*arguments, known=STAGES):
        code = command.main(["--profile", "smoke", *arguments], notebooks, known)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, lines=out.splitlines())

    return run


@pytest.fixture
def runs(workspace):
    """A function that returns which stand-ins were executed, in order."""
    path = workspace / "reports" / "smoke" / "runs.txt"
    return lambda: [line.split()[0] for line in path.read_text().splitlines()]


def files(folder):
    """The files below a folder, without locks."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in found if not name.endswith(".lock")]


def environment(**variables):
    """The variables of a process that a test starts: one thread, so that sums are taken in one order everywhere."""
    from conftest import PROJECT

    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"} | variables
