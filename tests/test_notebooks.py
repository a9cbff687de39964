"""The committed notebooks: their form, and all six through the pipeline at profile smoke."""

import contextlib
import datetime
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from nbhelpers.exercises import __main__
from nbhelpers.pipeline.promises import artifacts, broken_promises, parameters_of
from nbhelpers.profiles import get_profile
from nbhelpers.report import words
from nbhelpers.report.chapters import NOTEBOOKS, STAGES, promised_files
from nbhelpers.study.inputs import runs_of
from nbhelpers.workspace import open_run

PROJECT = Path(__file__).parent.parent
# What nobody wants to wait for in a notebook that --jobs has prepared.
HEAVY = ("fine_tuned", "calibration", "scores_", "pruned_", "recover", "gradual", "taught", "structured_", "student_")
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
EXERCISE = re.compile(r"### Exercise (\d) \*\((easy|medium|hard)\)\*: \w.*\n\n.*\n\n\*\*Answer:\*\* .*\.")
CHECK = re.compile(r"exercises\.(check_\w+)\(")
pytestmark = pytest.mark.skipif(not PATHS, reason="the folder notebooks/ has no notebooks yet")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def exercises_of(notebook):
    """(task, cell for the answer, solution) of each exercise: three cells that follow each other."""
    tasks = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("### Exercise")]
    return [notebook.cells[i : i + 3] for i in tasks]


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


def test_it_says_what_one_can_do_after_it_and_what_it_takes(notebook):
    first = notebook.cells[0].source
    objectives = re.search(r"^\*\*After this notebook you can\*\* (.*)\.$", first, re.MULTILINE)[1]
    assert 3 <= len(re.findall(r"\*\w+\*", objectives)) <= 5
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", first, re.MULTILINE)
    assert [name for name, _ in rows] == ["Reads", "Writes", "Time", "You need"]
    assert "minute" in dict(rows)["Time"]


def test_it_asks_before_it_shows(notebook):
    asking = [i for i, cell in enumerate(notebook.cells) if "> **Predict first.** " in cell.source]
    assert len(asking) >= 2
    for i in asking:
        question = notebook.cells[i].source.split("> **Predict first.** ")[1]
        assert "?" in question
        assert notebook.cells[i].source.endswith(question), "nothing stands between a question and what answers it"
        assert any(cell.cell_type == "code" for cell in notebook.cells[i + 1 : i + 4])


def test_its_exercises_have_a_task_a_cell_for_the_answer_and_a_solution(notebook):
    found = exercises_of(notebook)
    headings = [EXERCISE.fullmatch(task.source) for task, *_ in found]
    assert 3 <= len(found) <= 6 and all(headings)
    assert [int(heading[1]) for heading in headings] == list(range(1, len(found) + 1))
    assert {heading[2] for heading in headings} == {"easy", "medium", "hard"}
    for number, (_, answer, solution) in enumerate(found, 1):
        *lines, last = answer.source.splitlines()
        assert answer.metadata == {"tags": ["exercise"]} and lines.count("answer = ...") == 1
        assert any(line.startswith("# Hint: ") for line in lines)
        assert last.startswith("exercises.check_") and last.endswith(";"), "or the notebook would show True or False"
        folded = {"source_hidden": True, "outputs_hidden": True}
        assert solution.metadata == {"tags": ["solution"], "jupyter": folded}
        assert solution.source.startswith(f"# Solution to exercise {number}")
        assert CHECK.findall(answer.source) == CHECK.findall(solution.source) and len(CHECK.findall(last)) == 1
    assert len(tagged(notebook, "exercise")) == len(tagged(notebook, "solution")) == len(found)


def test_every_check_is_used_in_exactly_one_notebook():
    used = [set(CHECK.findall(path.read_text(encoding="utf-8"))) for path in PATHS]
    checks = {name for name in vars(exercises) if name.startswith("check_")}
    assert set().union(*used) == checks and sum(map(len, used)) == len(checks)


# --- all six, once ---


def run_smoke(root, here):
    """The pipeline with profile smoke, which has two seeds, and two processes for what is heavy."""
    environment = os.environ | {"NBHELPERS_ROOT": str(root), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "nbhelpers.pipeline", "--profile", "smoke", "--jobs", "2"]
    return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A smoke run of all notebooks from the command line, started in another folder: its workspace and its output."""
    root = tmp_path_factory.mktemp("smoke")
    done = run_smoke(root, root)
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
    count = int(re.fullmatch(r"(\d+) heavy computations first, 2 at a time; the notebooks then find them", lines[2])[1])
    cells, rest = lines[3 : 3 + count], lines[3 + count :]
    assert all(re.fullmatch(r" +\d+\.\d min  [\w.-]+ +\d+\.\d s", line) for line in cells)
    assert [line.split()[0] for line in rest[:6]] == sorted(STAGES)
    assert len(rest) <= 11


def test_the_notebooks_find_what_the_cells_have_computed(run):
    begun = (run.reports / "figures" / "01_lengths.png").stat().st_mtime
    heavy = [r for one in runs_of(run) for r in artifacts(one).values() if r["name"].startswith(HEAVY)]
    assert {r["seed"] for r in heavy} == {0, 1} and {r["name"] for r in heavy} >= {"fine_tuned", "student_distilled_1"}
    late = [r["name"] for r in heavy if datetime.datetime.fromisoformat(r["created"]).timestamp() > begun]
    assert late == []


def test_every_promise_is_kept_and_nothing_unpromised_is_written(run):
    for stage in STAGES.values():
        assert broken_promises(run, stage) == []
    figures = {path.stem for path in (run.reports / "figures").glob("*.png")}
    assert {path.stem for path in (run.reports / "figures").glob("*.svg")} == figures
    tables = {path.stem for path in (run.reports / "tables").iterdir()}
    promised = [path for stage in STAGES.values() for path in promised_files(run, stage)]
    assert figures == {path.stem for path in promised if path.suffix == ".png"}
    assert tables == {path.stem for path in promised if path.suffix == ".csv"}
    assert run.profile.seeds > 1 and {"02_stability", "06_rivals"} <= figures
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


def test_every_exercise_waits_for_an_answer_and_every_solution_is_right(run):
    for name in STAGES:
        path = run.reports / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        for cell in tagged(notebook, "exercise"):
            assert {output.output_type for output in cell.outputs} == {"stream"}
            # a kernel may send one line in two messages
            assert "".join(output.text for output in cell.outputs) == "Not answered yet\n"
        for cell in tagged(notebook, "solution"):
            said = "".join(output.get("text", "") for output in cell.outputs)
            assert re.search(r"^Right: ", said, re.MULTILINE), f"{name}: {cell.source}"
            assert "Not yet" not in said
        assert not any(__main__.right_answers(path))


def test_the_comparison_has_a_row_for_every_kind_of_model(run):
    table = run.load_table("comparison")
    names = " ".join(table["model"])
    for kind in (
        "fine_tuned",
        "fine_tuned_extra",
        "magnitude",
        "movement",
        "gradient",
        "merged",
        "sparse",
        "student",
        "compressed",
    ):
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
    done = run_smoke(executed[0], PROJECT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("up to date") == len(STAGES) and "heavy" not in done.stdout


def test_the_page_and_the_readme_show_the_finding(run, tmp_path):
    finding = words.finding(run.results())
    assert "2 seeds" in finding and finding.count("\n- **") >= 5
    assert "<h2>The finding</h2>" in (run.reports / "index.html").read_text()
    readme = tmp_path / "README.md"
    readme.write_text("\n".join((*readme.FRONT, *readme.RESULTS)))
    readme.write_readme(run, readme)
    assert finding in readme.read_text() and "TF-IDF" in readme.read_text()


# --- in JupyterLab ---

BEGIN = """from nbhelpers import attribution, panels
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run

run = open_run(get_profile("smoke"))"""


def panel_cells():
    """The cells of all notebooks that show a panel and need nothing but the run."""
    cells = [cell for path in PATHS for cell in nbformat.read(path, as_version=4).cells]
    sources = [cell.source for cell in cells if "panel" in cell.metadata.get("tags", [])]
    return [s for s in sources if s.startswith("panels.") or s == 'attribution.review_box(run, "fine_tuned")']


@contextlib.contextmanager
def jupyter_lab(folder, root):
    """A JupyterLab that serves a folder, for the workspace ``root``; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "NBHELPERS_BATCH"}
    environment |= {"NBHELPERS_ROOT": str(root), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    # Neither settings nor kernels of whoever runs the tests.
    environment |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    options += ["--IdentityProvider.token=secret", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        started = time.monotonic()
        while time.monotonic() - started < 60:
            assert server.poll() is None, (folder / "log.txt").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/panels.ipynb?token=secret"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def lab(executed, browser, tmp_path_factory):
    """A page of JupyterLab in which all panels have been run on the smoke run; their cells come in order."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (BEGIN, *panel_cells())])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "panels.ipynb")
    with jupyter_lab(folder, executed[0]) as address:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(address)
        idle = "window.jupyterapp && document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')"
        page.wait_for_function(idle, timeout=60_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".widget-textarea textarea", timeout=120_000)
        yield page
        page.close()


def test_there_is_a_panel_of_each_kind():
    kinds = {source.split("(")[0] for source in panel_cells()}
    assert kinds == {f"panels.{name}_panel" for name in ("criteria", "sparsity", "latency", "temperature")} | {
        "attribution.review_box"
    }


@pytest.mark.parametrize("name", ["criteria", "sparsity", "latency", "temperature"])
def test_a_panel_follows_its_slider_in_jupyterlab(lab, name):
    number = next(i for i, source in enumerate(panel_cells(), 1) if name in source)
    cell = lab.locator(".jp-CodeCell").nth(number)
    image, handle = cell.locator("img.widget-image"), cell.locator(".noUi-handle").first
    image.scroll_into_view_if_needed()
    before = image.get_attribute("src")
    assert image.evaluate("image => image.naturalWidth") > 500
    handle.focus()
    # To wherever there is room.
    handle.press("Home" if handle.get_attribute("aria-valuenow") != handle.get_attribute("aria-valuemin") else "End")
    changed = "([image, before]) => image.getAttribute('src') != before && image.complete && image.naturalWidth"
    lab.wait_for_function(changed, arg=[image.element_handle(), before], timeout=20_000)
    assert cell.locator(".jp-OutputArea-output[data-mime-type*=stderr], .jp-RenderedText .ansi-red-fg").count() == 0


def test_the_box_answers_a_review_in_jupyterlab(lab):
    cell = lab.locator(".jp-CodeCell").nth(1 + panel_cells().index('attribution.review_box(run, "fine_tuned")'))
    cell.scroll_into_view_if_needed()
    cell.locator(".widget-textarea textarea").fill("A <b>dull</b> film.")
    cell.get_by_role("button", name="ask the models").click()
    cell.get_by_text("<b>dull</b>").first.wait_for(timeout=20_000)
    assert "fine tuned" in cell.locator(".widget-html").inner_text()
    assert cell.locator(".widget-html b", has_text="dull").count() == 0
