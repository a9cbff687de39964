"""The pipeline on two small stand-in notebooks, the command line's errors, and the report's page."""

import ast
import base64
import html.parser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pandas as pd
import pytest

from nbhelpers import profiles
from nbhelpers.pipeline import __main__, execution, grid, promises
from nbhelpers.pipeline.__main__ import main
from nbhelpers.profiles import get_profile
from nbhelpers.report import __main__, chapters, page, readme
from nbhelpers.report.chapters import Stage
from nbhelpers.report.words import finding_text
from nbhelpers.system.code import syntax_as_lists, without_docstrings
from nbhelpers.system.machine import versions
from nbhelpers.workspace import WorkspaceError, open_run

PROJECT = Path(__file__).parent.parent
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
    print(NAME, overrides, os.environ["NBHELPERS_FORCE"], file=runs)"""
FIRST = f"""(reports / "figures" / "01_dot.png").write_bytes({PIXEL!r})
(reports / "tables" / "first.csv").write_text("a,b\\n1,x\\n2,y\\n")
path = reports / "results.json"
results = json.loads(path.read_text()) if path.exists() else {{}}
path.write_text(json.dumps(results | {{"first": {{"x": [0.5, {{"y": 1}}]}}, "captions": {{"01_dot": "A dot <b>"}}}}))"""
SECOND = """(reports / "tables" / "second.csv").write_text("a,gap\\n1,\\n2,3\\n")"""


def write_notebook(folder, name, *cells, parameters=PARAMETERS):
    code = [nbformat.v4.new_code_cell(source) for source in (f"NAME = {name!r}\n{SET_UP}", *cells)]
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    title = nbformat.v4.new_markdown_cell(f"# {name}\n$$s = |w|$$")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[title, first, *code], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(workspace, tmp_path_factory, monkeypatch):
    """A folder with the two stand-ins; what the real ones need from data and models is not asked for."""
    folder = tmp_path_factory.mktemp("notebooks {x} $HOME")
    write_notebook(folder, "01_first", FIRST)
    write_notebook(folder, "02_second", SECOND)
    monkeypatch.setattr(pipeline, "preflight", lambda run: None)
    monkeypatch.setattr(pipeline, "measure_gflops", lambda: 100.0)
    return folder


@pytest.fixture
def call(notebooks, capfd):
    """main() on the stand-ins, with profile smoke: returns exit code, standard output, standard error."""

    def run(*arguments, known=STAGES):
        code = main(["--profile", "smoke", *arguments], notebooks, known)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def runs(workspace, report="smoke"):
    return [line.split()[0] for line in (workspace / "reports" / report / "runs.txt").read_text().splitlines()]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- a run that goes well ---


def test_a_run_writes_reports_and_says_so_in_a_line_each(call, workspace):
    code, out, err = call()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "profile smoke (as defined), seed 0, model tiny, data movie-reviews"
    assert re.match(r"machine: \d+ cores, \d+ GiB of memory, 100 GFLOP/s .* about \d+ minutes here", lines[1])
    assert re.fullmatch(r"01_first +\d\.\d min +\d\.\d GB   1 figure, 1 table", lines[2])
    assert re.fullmatch(r"02_second +\d\.\d min +\d\.\d GB   1 table", lines[3])
    assert "index.html" in lines[5] and "jupyter lab notebooks/" in lines[-1]
    assert len(lines) <= 8
    written = files(workspace / "reports" / "smoke")
    for name in ("index.html", "notebooks/01_first.html", "notebooks/01_first.ipynb", "notebooks/02_second.html"):
        assert name in written
    left = [f"smoke/seed-0/stages/{name}.json" for name in STAGES]
    assert [name for name in files(workspace / ".artifacts") if not name.endswith(".lock")] == left


def test_the_executed_copy_is_whole_and_names_no_machine(call, workspace):
    leak = "import sys; print(sys.executable); pathlib.Path(os.environ['NBHELPERS_ROOT']) / 'x'"
    notebooks_with(call, leak)
    notebook = nbformat.read(workspace / "reports" / "smoke" / "notebooks" / "01_first.ipynb", as_version=4)
    text = nbformat.writes(notebook)
    assert str(workspace) not in text and str(PROJECT) not in text and "papermill" not in text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert code[1].source.splitlines()[1:] == ['profile = "smoke"', "seed = 0", 'overrides = ""']
    nbformat.validate(notebook)


def notebooks_with(call, *cells):
    """Run 01 with more cells; the folder is the one that the fixture made."""
    folder = call.__closure__[[c for c in call.__code__.co_freevars].index("notebooks")].cell_contents
    write_notebook(folder, "01_first", FIRST, *cells)
    return call("--only", "01")


def test_the_kernel_is_this_interpreter_whatever_kernels_are_installed(call, workspace, tmp_path_factory, monkeypatch):
    decoy = tmp_path_factory.mktemp("jupyter")
    (decoy / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "decoy", "language": "python"}
    (decoy / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(decoy))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    check = f"import sys, matplotlib, nbhelpers; assert sys.executable == {sys.executable!r}, sys.executable\n"
    check += f"assert nbhelpers.__file__.startswith({str(PROJECT)!r})\n"
    check += "assert 'inline' in matplotlib.get_backend()"
    code, _, err = notebooks_with(call, check)
    assert (code, err) == (0, "")


def test_what_kernels_print_does_not_reach_the_terminal(call):
    noise = "import os, sys, warnings; os.write(2, b'flood'); print('flood', file=sys.stderr); warnings.warn('flood')"
    code, out, err = notebooks_with(call, noise)
    assert code == 0 and "flood" not in out + err


def test_overrides_and_seed_reach_the_notebook(call, workspace):
    assert call("--seed", "2", "--set", "epochs=4", "--set", "data=a b.csv", "--only", "01")[0] == 0
    line = (workspace / "reports" / "smoke-seed-2" / "runs.txt").read_text().strip()
    assert line == "01_first epochs=4 'data=a b.csv'"


def test_a_local_path_is_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "reviews.csv").write_text("text,label\n")
    (tmp_path / "mini").mkdir()
    monkeypatch.chdir(tmp_path)
    found = profiles.overrides_of(["data=reviews.csv", "model=mini", "epochs=2"])
    assert found == {"data": str(tmp_path / "reviews.csv"), "model": "mini", "epochs": "2"}


# --- what is up to date ---


def test_what_is_up_to_date_is_skipped(call, workspace):
    call()
    code, out, _ = call()
    assert code == 0
    assert out.count("up to date") == 2
    assert runs(workspace) == ["01_first", "02_second"]


def test_force_runs_again_and_tells_the_notebook(call, workspace):
    call()
    assert call("--force")[0] == 0
    lines = (workspace / "reports" / "smoke" / "runs.txt").read_text().splitlines()
    assert [line.split() for line in lines] == [["01_first"], ["02_second"], ["01_first", "1"], ["02_second", "1"]]


def test_only_and_from_choose(call, workspace):
    call()
    call("--force", "--only", "02")
    call("--force", "--from", "02_second")
    call("--force", "--only", "02,01")
    assert runs(workspace)[2:] == ["02_second", "02_second", "01_first", "02_second"]


def test_list_says_fresh_missing_and_stale_with_the_reason(call, workspace, notebooks):
    def listed(*options):
        code, out, err = call("--list", *options)
        assert (code, err) == (0, "")
        return [re.split(r" +", line, maxsplit=1)[1] for line in out.splitlines()]

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
    assert runs(workspace) == ["01_first", "02_second", "01_first"]


def test_jobs_compute_the_cells_of_what_is_not_fresh_first(call, workspace, monkeypatch):
    computed = []
    monkeypatch.setattr(grid, "run_grid", lambda run, jobs, notebooks: computed.append((jobs, notebooks)))
    code, out, err = call("--jobs", "3", "--set", "epochs=2")
    assert (code, err, computed) == (0, "", [(3, ["01", "02"])])
    assert out.splitlines()[2] == "4 heavy computations first, 3 at a time; the notebooks then find them"
    (workspace / "reports" / "smoke" / "tables" / "second.csv").unlink()
    call("--jobs", "3", "--set", "epochs=2")
    assert computed[1:] == [(3, ["02"])]
    code, out, _ = call("--jobs", "3", "--set", "epochs=2")
    assert code == 0 and "heavy" not in out and len(computed) == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (grid.GridError("cell score-0: KeyError: 'x'"), 1, "cell score-0: KeyError: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted before the first notebook; "),
    ],
)
def test_a_grid_that_does_not_end_well_says_how_to_go_on(call, monkeypatch, error, code, said):
    monkeypatch.setattr(grid, "run_grid", Mock(side_effect=error))
    found, _, err = call("--jobs", "2", "--from", "01")
    assert found == code
    assert err == f"error: {said}go on with: ./run_all.sh --profile smoke --jobs 2 --from 01\n"


def test_the_grid_is_listed_with_the_same_settings(call, workspace):
    code, out, err = call("--list", "--grid", "--seed", "4", "--set", "data=a b")
    assert (code, err) == (0, "") and not list(workspace.iterdir())
    lines = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    words = ["-m", "nbhelpers.grid", "--profile", "smoke", "--seed", "4", "--set"]
    assert lines[0] == [sys.executable, *words, "data=a b", "--cell", "finetune-4"]


def test_prose_in_a_notebook_does_not_make_it_stale(call, notebooks):
    call()
    path = notebooks / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, path)
    assert call("--list")[1].count("fresh") == 2


def test_code_counts_and_comments_and_docstrings_do_not():
    def dump(source):
        return syntax_as_lists(without_docstrings(ast.parse(source)))

    code = 'def f(x):\n    """One."""\n    return x + 1\n'
    assert dump(code) == dump('# why\ndef f(x):\n    """Two."""\n\n    return (x + 1)  # so\n')
    assert dump(code) != dump(code.replace("+ 1", "+ 2"))
    assert dump('x = "text"') != dump('x = "other"')
    assert dump("x = 0") != dump("x = False") and dump("return_ = None") != dump("return_ = []")


def test_the_outline_of_code_is_the_same_in_later_pythons():
    tree = ast.parse("def f(x):\n    return x\n")
    before = syntax_as_lists(tree)
    # What Python 3.12 added to every function, on which 3.11 leaves nothing.
    tree.body[0].type_params, tree.body[0]._fields = [], (*tree.body[0]._fields, "type_params")
    assert syntax_as_lists(tree) == before


def test_a_changed_artefact_makes_what_is_made_from_it_stale(call, workspace):
    known = STAGES | {"02_second": Stage("02_second", "?", needs=("fine_tuned",), tables=("second",))}
    known["02_second"] = Stage("02_second", "?", needs=("fine_tuned",), tables=("second",), gaps=("second.gap",))
    run = open_run(get_profile("smoke"))
    run.cached("fine_tuned", {"x": 1}, lambda folder: (folder / "a").write_text("1"), made_by="01")
    assert call(known=known)[0] == 0
    run.cached("fine_tuned", {"x": 2}, lambda folder: (folder / "a").write_text("2"), made_by="01")
    out = call("--list", known=known)[1]
    assert out.count("stale (fine_tuned is not the same any more)") == 2


def test_order_follows_needs():
    of = {name: Stage(name, "?", needs=needs) for name, needs in {"01_c": ("03",), "02_b": (), "03_a": ("02",)}.items()}
    assert [stage.name for stage in chapters.in_order(of)] == ["02_b", "03_a", "01_c"]
    of["02_b"] = Stage("02_b", "?", needs=("01",))
    with pytest.raises(ValueError, match="circle"):
        chapters.in_order(of)
    assert [stage.number for stage in chapters.in_order(chapters.STAGES)] == ["01", "02", "03", "04", "05", "06"]


# --- a run that does not go well ---


def test_a_failure_stops_with_name_cell_error_and_the_way_to_go_on(call, workspace, notebooks):
    write_notebook(notebooks, "01_first", "1 + 1", "raise KeyError('the\\nmatter')", FIRST)
    code, out, err = call("--set", "epochs=4", "--set", "data=a b.csv")
    assert code == 1
    assert "02_second" not in out
    lines = err.splitlines()
    assert len(lines) == 2 and "Traceback" not in err
    # In [1] and In [2] set the parameters, In [3] is the set-up.
    assert lines[0] == "error: 01_first, cell In [5]: KeyError: 'the\\nmatter'"
    again = "./run_all.sh --profile smoke --set epochs=4 --set 'data=a b.csv' --from 01"
    assert lines[1].endswith(f"01_first.ipynb; go on with: {again}")
    copy = Path(re.search(r"see (.*); go", lines[1])[1])
    assert "Traceback" in copy.read_text()
    assert not (workspace / "reports" / "smoke" / "notebooks").exists()
    write_notebook(notebooks, "01_first", FIRST)
    assert call("--set", "epochs=4", "--set", "data=a b.csv", "--from", "01")[0] == 0
    assert not copy.exists()


def test_a_failure_leaves_the_last_good_copy(call, workspace, notebooks):
    call()
    before = (workspace / "reports" / "smoke" / "notebooks" / "01_first.ipynb").read_bytes()
    write_notebook(notebooks, "01_first", FIRST, "1 / 0")
    code, _, err = call("--only", "01")
    assert code == 1 and "ZeroDivisionError: division by zero" in err and err.strip().endswith("--only 01")
    assert (workspace / "reports" / "smoke" / "notebooks" / "01_first.ipynb").read_bytes() == before
    assert "stale" in call("--list")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((f"(reports / 'figures' / '01_dot.png').write_bytes({PIXEL!r})", "pass"), "figures/01_dot.png is missing"),
        ((f"write_bytes({PIXEL!r})", f"write_bytes({PIXEL[:-20]!r})"), "01_dot.png is not a whole PNG"),
        (("a,b\\n1,x\\n2,y\\n", "a,b\\n"), "tables/first.csv has no rows"),
        (("a,b\\n1,x\\n2,y\\n", ""), "tables/first.csv is empty"),
        (("a,b\\n1,x\\n2,y\\n", "a,b\\n1,x\\n,y\\n"), "missing or infinite in column a"),
        (("a,b\\n1,x\\n2,y\\n", "a,b\\n1,x\\ninf,y\\n"), "missing or infinite in column a"),
        (('"x": [0.5', '"z": [0.5'), "metric first.x is missing"),
        (('"x": [0.5', '"x": [float("nan")'), "metric first.x is not finite"),
    ],
)
def test_a_broken_promise_is_found(workspace, change, complaint):
    first = FIRST.replace(f'(reports / "figures" / "01_dot.png").write_bytes({PIXEL!r})', "DOT")
    first = first.replace("DOT", f"(reports / 'figures' / '01_dot.png').write_bytes({PIXEL!r})")
    broken = first.replace(*change)
    assert broken != first
    scope = {"profile": "smoke", "seed": 0, "overrides": "", "NAME": "x"}
    set_up = SET_UP.replace('os.environ["NBHELPERS_FORCE"]', "''")
    exec(f"{set_up}\n{first}", dict(scope))
    run = open_run(get_profile("smoke"))
    assert promises.broken_promises(run, STAGES["01_first"]) == []
    for file in (run.reports / "figures").glob("*"):
        file.unlink()
    (run.reports / "results.json").unlink()
    exec(f"{set_up}\n{broken}", dict(scope))
    faults = promises.broken_promises(run, STAGES["01_first"])
    assert len(faults) == 1 and complaint in faults[0]


def test_a_table_may_have_no_rows_where_its_stage_says_so(workspace):
    run, stage = open_run(get_profile("smoke")), Stage("01_first", "?", tables=("a", "b"), gaps=("a", "b.x"))
    for name in "ab":
        run.save_table(name, pd.DataFrame({"x": [], "y": []}))
    assert promises.broken_promises(run, stage) == ["tables/b.csv has no rows"]
    run.save_table("b", pd.DataFrame({"x": [1.0, None], "y": [1.0, 2.0]}))
    assert promises.broken_promises(run, stage) == []


def test_what_does_not_apply_is_no_broken_promise_until_the_stage_runs_again(workspace, capsys):
    run = open_run(get_profile("smoke"))
    stage = Stage("01_first", "?", figures=("01_heads",), tables=("heads",), metrics=("a.heads", "a.b"))
    run.record("a", b=1.0)
    run.skip("this model has no heads", "01_heads", "heads", "a.heads")
    assert "this model has no heads" in capsys.readouterr().out
    assert run.results()["skipped"]["01_heads"] == "this model has no heads"
    assert promises.broken_promises(run, stage) == [] and chapters.promised_files(run, stage) == []
    promises.forget_metrics(run, stage)
    assert len(promises.broken_promises(run, stage)) == 4 and run.results()["skipped"] == {}


def test_what_an_earlier_run_left_does_not_pass_for_new(call, notebooks):
    call()
    write_notebook(notebooks, "01_first", "1 + 1")
    code, _, err = call()
    assert code == 1
    assert "01_first, it ran, but figures/01_dot.png was not written by this run (and 2 more)" in err


def test_a_notebook_that_leaves_early_without_an_error_is_found(call):
    code, _, err = notebooks_with(call, "import sys; sys.exit(0)", "1 + 1")
    assert code == 1 and "01_first" in err and "SystemExit" in err


def test_a_dead_kernel_is_reported(call):
    code, _, err = notebooks_with(call, "os._exit(9)")
    assert code == 1
    assert "01_first, cell 6 of 6 (os._exit(9)): its kernel died" in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--profile", "nonsense"], "no profile 'nonsense'"),
        (["--set", "epochs=banana"], "epochs is 'banana'"),
        (["--set", "no_such_field=1"], "no field 'no_such_field'"),
        (["--set", "name=quick"], "no field 'name'"),
        (["--set", "epochs"], "'epochs' is not an override"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**31)], "seed is 2147483648: it takes a whole number of at least 0 and below"),
        (["--seed", "x"], "--seed"),
        (["--only", "09"], "no notebook '09': there are 01, 02"),
        (["--from", "nine"], "no notebook 'nine'"),
        (["--only", "01", "--from", "02"], "exclude each other"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--jobs", "two"], "--jobs"),
        (["--grid"], "--grid goes with --list"),
        (["--jobs", "2", "--force"], "--force and --jobs exclude each other: delete"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--only", "02"], "02_second needs 01: run notebook 01 first (./run_all.sh --profile smoke --only 01)"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(call, workspace, arguments, complaint):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and complaint in err
    assert len(err.splitlines()) == 1
    assert list(workspace.iterdir()) == []


def test_a_missing_notebook_or_parameter_is_one_line(call, notebooks):
    write_notebook(notebooks, "02_second", SECOND, parameters='profile = "quick"\nseed = 0')
    code, _, err = call()
    assert code == 2 and "02_second.ipynb has no parameter overrides" in err
    (notebooks / "02_second.ipynb").unlink()
    code, _, err = call()
    assert code == 2 and "02_second.ipynb is missing" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "complaint"),
    [("data=no/such/file.csv", "does not exist"), ("data={empty}", "holds no reviews"), ("data={unlabelled}", "label")],
)
def test_bad_data_is_one_line_before_a_kernel_starts(workspace, tmp_path_factory, capfd, override, complaint):
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty").mkdir()
    (folder / "unlabelled.csv").write_text("text,stars\nGood,5\n")
    override = override.format(empty=folder / "empty", unlabelled=folder / "unlabelled.csv")
    code = main(["--profile", "smoke", "--set", override])
    err = capfd.readouterr().err
    assert code == 2 and err.startswith("error: ") and complaint in err and len(err.splitlines()) == 1
    assert list(workspace.iterdir()) == []


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(notebooks, workspace):
    started, pid = workspace / "started", workspace / "pid"
    wait = f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\npathlib.Path({str(started)!r}).touch()\n"
    write_notebook(notebooks, "01_first", wait + "import threading\nthreading.Event().wait(60)")
    script = (
        "import sys, pathlib; from nbhelpers import pipeline; from nbhelpers.stages import Stage\n"
        "pipeline.preflight = lambda run: None\n"
        "known = {'01_first': Stage('01_first', '?')}\n"
        f"sys.exit(pipeline.main(['--profile', 'smoke'], pathlib.Path({str(notebooks)!r}), known))"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        reader = subprocess.run(
            ["bash", "-c", 'for i in {1..600}; do [ -e "$0" ] && exit 0; sleep 0.1; done; exit 1', str(started)]
        )
        assert reader.returncode == 0, "the notebook did not start"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "error: interrupted in 01_first; go on with: ./run_all.sh --profile smoke --from 01\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# --- the report ---


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.images = [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("a", "link", "script", "img"):
            self.found.append(attributes.get("href") or attributes.get("src") or "")
        if tag == "img":
            self.images.append(attributes)


def test_the_page_stands_alone_and_its_links_lead_somewhere(call, workspace):
    call()
    reports = workspace / "reports" / "smoke"
    text = (reports / "index.html").read_text()
    links = Links()
    links.feed(text)
    assert [image["alt"] for image in links.images] == ["A dot <b>"], "captions are escaped and stand as alt texts"
    embedded = links.images[0]["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(embedded) == PIXEL
    local = [link for link in links.found if link and not link.startswith(("data:", "#"))]
    assert {"notebooks/01_first.html", "notebooks/02_second.html"} <= set(local)
    assert all((reports / link).is_file() for link in local)
    assert all(f'id="{link[1:]}"' in text for link in links.found if link.startswith("#"))
    assert "What is first?" in text and "A dot &lt;b&gt;" in text


def test_a_notebooks_page_fetches_nothing_and_draws_formulas(call, workspace):
    call("--only", "01")
    text = (workspace / "reports" / "smoke" / "notebooks" / "01_first.html").read_text()
    links = Links()
    links.feed(text)
    assert not [link for link in links.found if link.startswith(("http:", "https:", "//"))]
    assert "data:image/svg+xml;base64" in text and "s = |w|$" not in text


MODEL = {"accuracy": 0.9, "accuracy_low": 0.88, "accuracy_high": 0.92, "speedup": 1.0, "file_bytes": 7e6}
MODEL |= {"encoder_sparsity": 0.0, "p_value": 1.0, "model": "fine_tuned"}


GAP = {"difference": -0.029, "low": -0.052, "high": -0.005, "p_value": 0.021, "p_adjusted": 0.04, "n": 1000, "seeds": 2}
COUNTED = {"tfidf": MODEL | {"accuracy": 0.862, "seeds": 2}, "against_tfidf": GAP}
FINDING = {
    "seeds": 2,
    "test_reviews": 1000,
    "sparsity": 0.9,
    "best": "merged",
    "own": "merged",
    "single": "movement",
    "comparator_name": "movement_first_order",
    "leaders": [{"sparsity": 0.9, "best": "merged", "second": "<wanda>", "accuracy": 0.9} | GAP],
    **dict.fromkeys(("merge", "comparator", "control", "kept"), GAP),
    "further": [{"sparsity": 0.95, "best": "<taylor>"} | GAP],
    "compressed": GAP
    | {"layers": 1, "encoder_sparsity": 0.9, "speedup": 12.0, "times_smaller": 25.0, "file_bytes": 5.5e5},
    "recovery": {"before": 0.7, "after": 0.8},
    "dense": {"accuracy": 0.9},
}


@pytest.fixture
def compared(workspace):
    """A run that has the results of notebook 06."""
    run = open_run(get_profile("smoke"))
    sparse = MODEL | {
        "accuracy": 0.875,
        "speedup": 2.25,
        "file_bytes": 2.5e6,
        "encoder_sparsity": 0.9,
        "model": "sparse",
    }
    others = {"student": MODEL, "compressed": MODEL | {"model": "compressed", "speedup": 12.0, "file_bytes": 5.5e5}}
    run.record("comparison", test_reviews=1000, dense=MODEL, sparse=sparse, **others, **COUNTED)
    run.record("fine_tuning", total_parameters=6_967_808)
    run.record("finding", **FINDING)
    run.record("captions", **{name: f"Caption of {name}" for name in readme.README_FIGURES})
    run.save_table("comparison", pd.DataFrame([MODEL, sparse | {"p_value": 0.0001}]))
    (run.reports / "figures").mkdir()
    for name in (readme.README_FRONT, *readme.README_FIGURES):
        (run.reports / "figures" / f"{name}.png").write_bytes(PIXEL)
    return run


def test_the_readme_is_rewritten_between_its_markers_only(compared, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("Before\n{}\nold\n{}\nBetween\n{}\nold\n{}\nAfter\n".format(*readme.FRONT, *readme.RESULTS))
    readme.write_readme(compared, path)
    once = path.read_text()
    readme.write_readme(compared, path)
    assert path.read_text() == once
    assert once.startswith(f"Before\n{readme.FRONT[0]}\n") and once.endswith(f"{readme.RESULTS[1]}\nAfter\n")
    assert "old" not in once and f"{readme.FRONT[1]}\nBetween\n{readme.RESULTS[0]}\n" in once
    plain = once.replace("\N{NO-BREAK SPACE}", " ")
    assert "1,000 test reviews the fine-tuned model gets 90.0 % (88.0 to 92.0) right" in plain
    assert "runs 2.2 times as fast and takes 2.50 MB on disk instead of 7.00" in plain
    assert "embedding, int8) it gets 90.0 % (88.0 to 92.0), runs 12.0 times as fast and takes 0.55 MB" in plain
    assert all(f"](reports/smoke/figures/{name}.png)" in once for name in (readme.README_FRONT, *readme.README_FIGURES))
    assert (
        "gets 86.2 %; against it the fine-tuned model is at -2.9 points (-5.2 to -0.5, p = 0.021; over 2 seeds)."
        in plain
    )
    assert f"\n### The finding\n\n{finding_text(FINDING)}\n\n!" in once
    rows = [line for line in plain.splitlines() if line.startswith("|")]
    assert "Models of the first seed; profile `smoke`, seeds 0 to 1, a model of 6.97M parameters, " in once
    assert f", {versions()['device']}." in once
    assert "The default run" not in once
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert rows[3].startswith("| sparse | 87.5 % (88.0 to 92.0) |") and rows[3].endswith("| < 0.001 |")


@pytest.mark.parametrize(("minutes", "words"), [(12.34, "12 minutes"), (660.0, "11.0 hours")])
def test_the_readme_says_what_the_results_took(compared, minutes, words):
    compared.record("effort", process_minutes=minutes, cores=2, device_minutes={"chip (torch 2)": minutes})
    assert readme.made_with(compared, compared.results()).endswith(f"; {words} of one process's computing, on 2 cores")
    compared.record("effort", device_minutes={"chip (torch 2)": 3.0, "card (torch 1)": minutes})
    shares = f"of one process's computing {words} on card (torch 1) and 3 minutes on chip (torch 2)"
    assert readme.made_with(compared, compared.results()).endswith(f", on which all times were measured; {shares}")


def test_the_readme_leads_with_thorough_once_it_has_a_finding(compared, workspace, tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("\n".join((*readme.FRONT, *readme.RESULTS)))
    monkeypatch.setattr(page, "README", path)
    monkeypatch.setattr(readme.write_readme, "__defaults__", (path,))
    monkeypatch.setattr(page, "write_measured", lambda: None)
    monkeypatch.setattr(sys, "argv", ["page", "readme"])
    reports = workspace / "reports"
    (reports / "smoke").rename(reports / "quick")
    __main__.main()
    assert "Profile `quick`, seed 0" in path.read_text().replace("profile", "Profile")
    assert "The default run" not in path.read_text()
    shutil.copytree(reports / "quick", reports / "thorough")
    __main__.main()
    first, second = path.read_text().split("### The default run")
    assert "reports/thorough/figures/06_rivals.png" in first and "profile `thorough`, seeds 0 to 2" in first
    assert (
        "The default run, profile `quick`, seed 0, a model of 6.97M parameters, " in second and "reports/" not in second
    )
    assert "| model | accuracy | sparsity | file, MB | speed-up | p |" in second
    results = json.loads((reports / "thorough" / "results.json").read_text())
    del results["finding"]["leaders"]
    (reports / "thorough" / "results.json").write_text(json.dumps(results))
    assert readme.leading_profile() == "quick"


def test_a_readme_without_a_finding_is_refused(compared):
    results = compared.results()
    del results["finding"]
    (compared.reports / "results.json").write_text(json.dumps(results))
    with pytest.raises(WorkspaceError, match="no finding: run notebook 06"):
        readme.readme_block(compared)
    assert "The finding" not in page.write_index(compared).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        " ".join((*readme.FRONT, *reversed(readme.RESULTS))),
        " ".join((*readme.FRONT, readme.RESULTS[0])),
    ],
)
def test_a_readme_without_markers_is_refused(compared, tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(WorkspaceError, match=r"(front|generated):start"):
        readme.write_readme(compared, path)
    assert path.read_text() == text


def test_what_was_measured_at_full_size_stands_in_the_readme(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "BENCHMARK", tmp_path)
    path = tmp_path / "README.md"
    monkeypatch.setattr(page, "labels_block", lambda: "labels")
    path.write_text("Before\n{}\nstale\n{}\n{}\n{}\nAfter\n".format(*readme.MEASURED, *readme.LABELS))
    with pytest.raises(WorkspaceError, match=r"full_size\.csv is missing"):
        readme.write_measured(path)
    stages_ = [
        {"notebook": "01_fine_tune", "minutes": 2.04, "peak_memory_bytes": 5.23e9, "device": "cpu, 2 threads"},
        {"notebook": "02_criteria_scoring", "minutes": 1.0, "peak_memory_bytes": 4e9, "device": "cpu, 2 threads"},
    ]
    pd.DataFrame(stages_).to_csv(tmp_path / "full_size.csv", index=False)
    about = {"shape": "mini", "reviews": 160, "length": 512, "batch_size": 8, "device": "cpu", "precision": "bf16"}
    ratios = {"seconds": 12.3, "speedup": 2.188, "speedup_low": 2.1, "speedup_high": 2.3}
    timed = [about | ratios | {"task": "train", "name": name} for name in ("ours", "trainer")]
    pd.DataFrame(timed).to_csv(tmp_path / "training.csv", index=False)
    selected = [
        {"engine": "ours", "seconds": 0.3, "extra_bytes": 106e6, "weights": 84934656, "times_ours": 1},
        {"engine": "torch", "seconds": 13.1, "extra_bytes": 4315e6, "weights": 84934656, "times_ours": 43.3},
        {"engine": "merge", "seconds": 30, "extra_bytes": 2.9e9, "weights": 84934656, "times_ours": 100},
    ]
    pd.DataFrame(selected).to_csv(tmp_path / "selection.csv", index=False)
    readme.write_measured(path)
    text = path.read_text()
    assert text.startswith("Before\n") and text.endswith("\nAfter\n") and "stale" not in text
    assert "Not measured: 03 prune and recover, 04 sparse conversion, 05 distillation, 06 comparison." in text
    assert "| 01 fine tune | 5.2 |\n| 02 criteria scoring | 4.0 |" in text
    assert "bf16: 0.61 s a step; training takes `trainer` 2.19 times as long (2.10 to 2.30)." in text
    assert "84,934,656 weights" in text and "13.1 s and 4.3 GB, 43 times as long" in text
    assert "{}\nlabels\n{}".format(*readme.LABELS) in text


def test_what_pretraining_is_worth_stands_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SETTINGS", tmp_path)
    with pytest.raises(WorkspaceError, match=r"labels\.csv is missing"):
        readme.labels_block()
    line = {"labels": 6000, "max_tokens": 512, "accuracy_low": 0.871, "accuracy_high": 0.9, "seeds": 1, "n": 2495}
    judged = [
        line | {"model": "tfidf", "accuracy": 0.88, "difference": 0.0, "p_value": 1.0},
        line
        | {
            "model": "from_scratch",
            "accuracy": 0.82,
            "difference": -0.06,
            "p_value": 1e-9,
            "minutes": 8.2,
            "device": "a card",
        }
        | {"difference_low": -0.075, "difference_high": -0.045},
    ]
    pd.DataFrame(judged).to_csv(tmp_path / "labels.csv", index=False)
    shared = {"layer_decay": 1.0, "epochs": 2, "dropout": 0.1, "prefix_share": 0.5, "n": 5000}
    shared |= {"accuracy_low": 0.7, "accuracy_high": 0.9, "labels": 1500, "max_tokens": 160, "head_share": 0.3}
    trials = [
        shared | {"start": "pretrained", "trial": i, "accuracy": accuracy, "learning_rate": rate}
        for i, (accuracy, rate) in enumerate([(0.8, 1e-3), (0.85, 1.5e-4), (0.7, 3e-5)])
    ]
    pd.DataFrame(trials).to_csv(tmp_path / "quick.csv", index=False)
    text = readme.labels_block().replace("\N{NO-BREAK SPACE}", " ")
    assert "labels.png" not in text, "there is one number of labels only"
    assert "On 2,495 test reviews, of which a model reads at most 512 tokens; minutes" in text
    assert "are those of one fine-tuning beside others, on a card." in text
    assert "| 6,000 | TF-IDF | 88.0 % (87.1 to 90.0) |  |  |" in text
    assert "| from scratch | 82.0 % (87.1 to 90.0) | -6.0 points (-7.5 to -4.5, p < 0.001) | 8.2 |" in text
    assert "`quick`: 3 of each start, 1,500 labels, at most 160 tokens, judged on 5,000 validation reviews." in text
    assert "- pretrained: 85.0 % (70.0 to 90.0) on validation with learning rate 0.00015, 2 epochs" in text
    assert "median of the trials 80.0 %, worst 70.0 %." in text


def test_the_page_shows_the_comparison(compared):
    text = page.write_index(compared).read_text().replace("\N{NO-BREAK SPACE}", " ")
    for piece in ("87.5 % (88.0 to 92.0)", "2.25 times the speed", "&lt; 0.001", "Caption of 03_recovered"):
        assert piece in text
    assert "<h2>The finding</h2>" in text and "<li><strong>What recovery is worth.</strong> Merged at 90%" in text
    assert "&lt;wanda&gt;" in text and "<wanda>" not in text


def test_the_page_shows_figures_that_are_promised_and_there(compared):
    figures = compared.reports / "figures"
    for name in ("02_stability", "02_of_an_earlier_version"):
        (figures / f"{name}.png").write_bytes(PIXEL)
    stage = chapters.STAGES["02_criteria_scoring"]
    assert [figure["name"] for figure in page.chapter(compared, stage, {})["figures"]] == ["02 stability"]
    compared.skip("there is one seed", "02_stability")
    assert page.chapter(compared, stage, {})["figures"] == []


def test_paths_are_taken_out_of_outputs(workspace):
    text = f"{PROJECT}/a {workspace}/b /tmp/ipykernel_12/34.py:5: Warning"
    assert execution.without_paths(text) == "./a ./b <cell>:5: Warning"


# --- two at once ---

HOLD = """
import sys, time
from nbhelpers.lock import only_one
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run
with only_one(open_run(get_profile("smoke"), 0)) as at:
    at("02_second")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(workspace):
    """Another process that holds the workspace, in its second notebook."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_one_is_named(call, workspace, other):
    before = files(workspace)
    code, _, err = call()
    assert code == 2
    assert re.search(rf"is in use by process {other.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d: wait", err)
    assert files(workspace) == before


def test_the_list_says_which_notebook_runs_and_by_whom(call, other):
    code, out, _ = call("--list")
    first, second = out.splitlines()
    assert (code, first.split()) == (0, ["01_first", "missing"])
    assert re.fullmatch(rf"02_second +running \(process {other.pid} on .*\)", second)


def test_the_lock_of_a_process_that_was_killed_is_cleared(call, workspace, other):
    other.kill()
    other.wait()
    assert (workspace / ".artifacts/smoke/seed-0/.running.json").exists()
    assert call()[0] == 0
    assert not (workspace / ".artifacts/smoke/seed-0/.running.json").exists()


def test_another_seed_is_another_workspace(call, other):
    assert call("--seed", "1")[0] == 0
