"""The committed notebooks: their form, and all six through the pipeline at profile smoke."""

import contextlib
import datetime
import html.parser
import re
import socket
import statistics
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from conftest import PROJECT, once_per_suite
from stand_ins import environment

from nbhelpers import exercises
from nbhelpers.exercises.__main__ import right_answers
from nbhelpers.pipeline import command
from nbhelpers.pipeline.promises import artifacts, broken_promises, parameters_of
from nbhelpers.profiles import get_profile
from nbhelpers.report import readme, words
from nbhelpers.report.chapters import NOTEBOOKS, STAGES, promised_files
from nbhelpers.study.inputs import runs_of
from nbhelpers.workspace import open_run

# Artefacts that --jobs computes before the first notebook.
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


def test_it_is_valid_stripped_and_runs_on_python3(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    ids = [cell.id for cell in notebook.cells]
    assert all(ids) and len(set(ids)) == len(ids)
    for cell in code_of(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set().union(*(cell.metadata for cell in notebook.cells)) <= {"tags", "jupyter"}
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


def test_it_has_objectives_and_says_what_it_reads_writes_and_takes(notebook):
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
        assert notebook.cells[i].source.endswith(question), "the question ends the cell"
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

# The least that has every figure: one learning rate of recovery, one timing of each kind, and no comparator.
SMALLEST = {"comparators": "", "recovery_learning_rates": "1e-3", "latency_repeats": "1"}
OPTIONS = ["--profile", "smoke", "--jobs", "2"]
OPTIONS += [word for field, value in SMALLEST.items() for word in ("--set", f"{field}={value}")]


def run_smoke(root):
    """Run the pipeline with profile smoke from the command line, in two processes, started in another folder."""
    command = [sys.executable, "-P", "-m", "nbhelpers.pipeline", *OPTIONS]
    done = subprocess.run(
        command,
        env=environment(NBHELPERS_ROOT=str(root), NBHELPERS_SOLUTIONS="1"),
        cwd=root.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (root / "printed.txt").write_text(done.stdout)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The workspace of a smoke run of all notebooks, once per suite; ``printed.txt`` is what it printed."""
    return once_per_suite(tmp_path_factory, "smoke", run_smoke)


@pytest.fixture
def run(executed, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(executed))
    return open_run(get_profile("smoke", **SMALLEST))


def test_the_terminal_gets_one_line_per_notebook(executed):
    lines = (executed / "printed.txt").read_text().splitlines()
    machine = (
        r"machine: \d+ cores?, \d+ GiB of memory; 2 at a time, each trains [\d,]+ and judges [\d,]+ tokens a second: "
    )
    assert re.fullmatch(machine + r"about \d+ minutes?", lines[1])
    assert re.fullmatch(r"computations +\d+\.\d min; about \d+ minutes? left", lines[2])
    assert [line.split()[0] for line in lines[3:9]] == sorted(STAGES)
    assert len(lines) <= 14


def test_the_notebooks_find_the_artefacts_of_the_cells(run):
    begun = (run.reports / "figures" / "01_lengths.png").stat().st_mtime
    heavy = [r for one in runs_of(run) for r in artifacts(one).values() if r["name"].startswith(HEAVY)]
    assert {r["seed"] for r in heavy} == {0, 1} and {r["name"] for r in heavy} >= {"fine_tuned", "student_distilled_1"}
    assert [r["name"] for r in heavy if datetime.datetime.fromisoformat(r["created"]).timestamp() > begun] == []


def test_every_promise_is_kept_and_nothing_unpromised_is_written(run):
    for stage in STAGES.values():
        assert broken_promises(run, stage) == []
    figures = {path.stem for path in (run.reports / "figures").glob("*.png")}
    tables = {path.stem for path in (run.reports / "tables").iterdir()}
    promised = [path for stage in STAGES.values() for path in promised_files(run, stage)]
    assert figures == {path.stem for path in promised if path.suffix == ".png"}
    assert tables == {path.stem for path in promised if path.suffix == ".csv"}
    captions = run.results()["captions"]
    assert figures == captions.keys() and all(len(text) > 20 for text in captions.values())


def test_no_executed_notebook_shows_an_error_or_this_machine(run, executed):
    for name in STAGES:
        path = run.reports / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in code_of(notebook) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert all(cell.execution_count for cell in code_of(notebook))
        assert str(executed) not in path.read_text() and str(PROJECT) not in path.read_text()
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
            printed = "".join(output.get("text", "") for output in cell.outputs)
            assert re.search(r"^Right: ", printed, re.MULTILINE), f"{name}: {cell.source}"
            assert "Not yet" not in printed
        assert not any(right_answers(path))


def test_the_tables_of_the_contract_are_there(run):
    significance = {
        "comparison",
        "family",
        "metric",
        "difference",
        "low",
        "high",
        "p_value",
        "p_adjusted",
        "n",
        "seeds",
    }
    assert significance <= set(run.load_table("significance").columns)
    curves = run.load_table("curves")
    assert {"criterion", "sparsity", "stage", "split", "accuracy"} <= set(curves.columns)
    assert set(curves["stage"]) <= {"pruned", "recovered"}
    assert pd.api.types.is_numeric_dtype(curves["sparsity"])


def test_a_second_run_skips_everything(run, capfd, monkeypatch):
    assert command.main(OPTIONS) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out.count("up to date") == len(STAGES) and "machine" not in printed.out


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("a", "link", "script", "img"):
            self.found.append(attributes.get("href") or attributes.get("src") or "")


def test_the_page_and_the_readme_show_the_finding_and_links_lead_somewhere(run, tmp_path):
    finding = words.finding_text(run.results()["finding"])
    assert "2 seeds" in finding and finding.count("\n- **") >= 5
    text, links = (run.reports / "index.html").read_text(), Links()
    assert "The finding</h2>" in text
    links.feed(text)
    local = {link for link in links.found if link and not link.startswith(("data:", "#", "https:"))}
    assert {f"notebooks/{name}.html" for name in STAGES} <= local
    assert [link for link in local if not (run.reports / link).is_file()] == []
    assert [link for link in links.found if link.startswith("#") and f'id="{link[1:]}"' not in text] == []
    path = tmp_path / "README.md"
    path.write_text("\n".join((*readme.FRONT, *readme.RESULTS)))
    readme.write_readme(run, path)
    assert finding in path.read_text() and "TF-IDF" in path.read_text()


# --- in JupyterLab ---

SLIDERS = ("criteria", "sparsity", "latency", "temperature")
BEGIN = f"""from nbhelpers.report import panels
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run

run = open_run(get_profile("smoke", **{SMALLEST}))"""


def panel_cells():
    """The cells of all notebooks that show a panel and need nothing but the run."""
    cells = [cell for path in PATHS for cell in nbformat.read(path, as_version=4).cells]
    sources = [cell.source for cell in cells if "panel" in cell.metadata.get("tags", [])]
    return [s for s in sources if re.match(r"panels\.(\w+_panel\(run|review_box\(run, \"fine_tuned\"\))", s)]


@contextlib.contextmanager
def jupyter_lab(folder, root):
    """A JupyterLab that serves a folder, for the workspace ``root``; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Neither settings nor kernels of whoever runs the tests.
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    variables = environment(NBHELPERS_ROOT=str(root), **own)
    del variables["NBHELPERS_BATCH"]
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    options += ["--IdentityProvider.token=secret", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=variables, stdout=log, stderr=subprocess.STDOUT
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
    with jupyter_lab(folder, executed) as address:
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
    assert kinds == {f"panels.{name}" for name in (*(f"{slider}_panel" for slider in SLIDERS), "review_box")}


@pytest.mark.parametrize("name", SLIDERS)
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


def test_the_box_shows_predictions_of_a_review_in_jupyterlab(lab):
    cell = lab.locator(".jp-CodeCell").nth(1 + panel_cells().index('panels.review_box(run, "fine_tuned")'))
    cell.scroll_into_view_if_needed()
    cell.locator(".widget-textarea textarea").fill("A <b>dull</b> film.")
    cell.get_by_role("button", name="ask the models").click()
    cell.get_by_text("<b>dull</b>").first.wait_for(timeout=20_000)
    assert "fine tuned" in cell.locator(".widget-html").inner_text()
    assert cell.locator(".widget-html b", has_text="dull").count() == 0
