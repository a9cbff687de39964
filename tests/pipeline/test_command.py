"""The command line: what it runs, skips and refuses, and what it says; on two stand-in notebooks."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import PROJECT
from stand_ins import FIRST, SECOND, STAGES, environment, files, write_notebook

from nbhelpers.pipeline import command, grid
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run

pytest_plugins = ["stand_ins"]


# --- a run that goes well ---


def test_a_run_writes_reports_and_one_line_per_notebook(call, workspace):
    done = call()
    assert (done.code, done.err) == (0, "")
    assert done.lines[0] == "profile smoke (as defined), seed 0, model tiny, data movie-reviews"
    assert re.match(r"machine: \d+ cores, \d+ GiB of memory; 1 at a time, each trains 4,000 and", done.lines[1])
    assert re.fullmatch(r"01_first +\d+\.\d min +\d+\.\d GB   1 figure, 1 table", done.lines[2])
    assert re.fullmatch(r"02_second +\d+\.\d min +\d+\.\d GB   1 table", done.lines[3])
    assert "index.html" in done.lines[5] and "jupyter lab notebooks/" in done.lines[-1]
    assert len(done.lines) <= 8
    written = files(workspace / "reports" / "smoke")
    for name in ("index.html", "notebooks/01_first.html", "notebooks/01_first.ipynb", "notebooks/02_second.html"):
        assert name in written
    assert files(workspace / ".artifacts") == [f"smoke/seed-0/stages/{name}.json" for name in STAGES]


def test_overrides_and_seed_reach_the_notebook(call, workspace):
    assert call("--seed", "2", "--set", "epochs=4", "--set", "data_revision=a b", "--only", "01").code == 0
    line = (workspace / "reports" / "smoke-seed-2" / "runs.txt").read_text().strip()
    assert line == "01_first epochs=4 'data_revision=a b'"


def test_only_and_from_choose_and_fresh_notebooks_are_skipped(call, runs):
    call()
    assert call().out.count("up to date") == 2
    assert runs() == ["01_first", "02_second"]
    for options in (("--only", "02"), ("--from", "02_second"), ("--only", "02,01")):
        call("--force", *options)
    assert runs()[2:] == ["02_second", "02_second", "01_first", "02_second"]


def test_force_is_a_moment_that_ends_with_the_run(call, notebooks, workspace, monkeypatch):
    monkeypatch.delenv("NBHELPERS_FORCE", raising=False)
    write_notebook(notebooks, "01_first", FIRST, "(reports / 'force.txt').write_text(os.environ['NBHELPERS_FORCE'])")
    before = time.time()
    assert call("--force", "--only", "01").code == 0
    moment = float((workspace / "reports" / "smoke" / "force.txt").read_text())
    assert before - 0.001 <= moment <= time.time()
    assert "NBHELPERS_FORCE" not in command.os.environ


# --- several jobs ---


def test_the_cells_of_stale_notebooks_are_computed_first_and_the_time_is_said(call, workspace, monkeypatch):
    computed = []

    def run_grid(run, jobs, notebooks, rates):
        computed.append((jobs, notebooks))
        return iter(["a line"])

    monkeypatch.setattr(grid, "run_grid", run_grid)
    done = call("--jobs", "3", "--set", "epochs=200")
    assert (done.code, done.err, computed) == (0, "", [(3, {"01", "02"})])
    run = open_run(get_profile("smoke", epochs=200))
    work = [[cell.work for cell in phase] for phase in grid.phases(run, {"01", "02"})]
    # Two seeds and three processes: each phase lasts as long as one of its cells.
    seconds = sum(phase[0].trained / 4000 + phase[0].judged / 13000 for phase in work) + 25 + 20
    assert re.fullmatch(r"machine: .*; 3 at a time, each trains 4,000 and judges 13,000 tokens .*", done.lines[1])
    assert done.lines[1].endswith(f": about {round(seconds / 60)} minutes")
    assert re.fullmatch(r"computations +0\.0 min; about 1 minute left", done.lines[2])
    (workspace / "reports" / "smoke" / "tables" / "second.csv").unlink()
    call("--jobs", "3", "--set", "epochs=200")
    assert computed[1:] == [(3, {"02"})]
    done = call("--jobs", "3", "--set", "epochs=200")
    assert done.code == 0 and "computations" not in done.out and len(computed) == 2, "all is fresh: no cell"
    call("--jobs", "3", "--set", "epochs=200", "--force")
    assert computed[2:] == [(3, {"01", "02"})], "forced: all cells"
    call("--set", "epochs=200", "--force")
    assert len(computed) == 3, "one process: the notebooks compute as they go"


def test_as_many_processes_compute_as_there_are_cores_and_memory_for(monkeypatch):
    monkeypatch.setattr(grid, "cores", lambda: 8)
    monkeypatch.setattr(grid.torch.cuda, "is_available", lambda: False)
    for gigabytes, jobs in ((64, 8), (14, 4), (1, 1)):
        monkeypatch.setattr(grid.psutil, "virtual_memory", lambda g=gigabytes: Mock(available=g * 2**30))
        assert grid.automatic_jobs() == jobs
    monkeypatch.setattr(grid.torch.cuda, "is_available", lambda: True)
    assert grid.automatic_jobs() == 1, "they would share the GPU"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (grid.GridError("cell score-0: KeyError: 'x'"), 1, "cell score-0: KeyError: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted before the first notebook; "),
    ],
)
def test_a_grid_that_fails_says_how_to_go_on(call, monkeypatch, error, code, said):
    monkeypatch.setattr(grid, "run_grid", Mock(side_effect=error))
    done = call("--jobs", "2", "--from", "01")
    assert done.code == code
    assert done.err == f"error: {said}go on with: ./run_all.sh --profile smoke --jobs 2 --from 01\n"


# --- a run that does not go well ---


def test_a_failure_stops_with_name_cell_error_and_the_way_to_go_on(call, workspace, notebooks):
    options = ("--set", "epochs=4", "--set", "data_revision=a b")
    write_notebook(notebooks, "01_first", "1 + 1", "raise KeyError('the matter')", FIRST)
    done = call(*options)
    assert done.code == 1 and "02_second" not in done.out
    first, second = done.err.splitlines()
    # In [1] sets the parameters, In [2] is the set-up.
    assert first == "error: 01_first, cell In [4]: KeyError: 'the matter'"
    again = "./run_all.sh --profile smoke --set epochs=4 --set 'data_revision=a b' --from 01"
    assert second.endswith(f"01_first.ipynb; go on with: {again}")
    copy = Path(re.search(r"see (.*); go", second)[1])
    assert "Traceback" in copy.read_text()
    assert not (workspace / "reports" / "smoke" / "notebooks").exists()
    write_notebook(notebooks, "01_first", FIRST)
    assert call(*options, "--from", "01").code == 0
    assert not copy.exists()


def test_a_failure_leaves_the_last_good_copy(call, workspace, notebooks):
    call()
    before = (workspace / "reports" / "smoke" / "notebooks" / "01_first.ipynb").read_bytes()
    write_notebook(notebooks, "01_first", FIRST, "1 / 0")
    done = call("--only", "01")
    assert done.code == 1 and "ZeroDivisionError: division by zero" in done.err
    assert done.err.strip().endswith("--only 01")
    assert (workspace / "reports" / "smoke" / "notebooks" / "01_first.ipynb").read_bytes() == before
    assert "stale" in call("--list").lines[0]


def test_what_an_earlier_run_left_does_not_count_as_new(call, notebooks):
    call()
    write_notebook(notebooks, "01_first", "1 + 1")
    done = call()
    assert done.code == 1
    assert "01_first, it ran, but figures/01_dot.png was not written by this run (and 2 more)" in done.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--profile", "nonsense"], "nonsense"),
        (["--set", "epochs=banana"], "banana"),
        (["--set", "epochs"], "'epochs'"),
        (["--seed", "-1"], "seed must be a whole number from 0 to"),
        (["--seed", str(2**31)], "(got 2147483648)"),
        (["--seed", "x"], "--seed"),
        (["--only", "09"], "'09'"),
        (["--from", "nine"], "'nine'"),
        (["--only", "01", "--from", "02"], "--from"),
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "two"], "--jobs"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--only", "02"], "02_second needs 01: run notebook 01 first (./run_all.sh --profile smoke --only 01)"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(call, workspace, arguments, complaint):
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and complaint in done.err
    assert len(done.err.splitlines()) == 1
    assert list(workspace.iterdir()) == []


def test_a_missing_notebook_or_parameter_is_one_line(call, notebooks):
    write_notebook(notebooks, "02_second", SECOND, parameters='profile = "quick"\nseed = 0')
    done = call()
    assert done.code == 2 and "02_second.ipynb has no parameter overrides" in done.err
    (notebooks / "02_second.ipynb").unlink()
    done = call()
    assert done.code == 2 and "02_second.ipynb is missing" in done.err and len(done.err.splitlines()) == 1


# --- two at once ---

HOLD = """
import pathlib, sys, time
from filelock import FileLock
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True)
with FileLock(path):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other(workspace):
    """Another process that holds the workspace as a run does."""
    path = command.lock_path(open_run(get_profile("smoke")))
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_has_ended(call, workspace, other):
    before = files(workspace)
    done = call()
    assert done.code == 2
    assert re.search(r"error: \S+seed-0 is in use by another run: wait", done.err) and len(done.err.splitlines()) == 1
    assert files(workspace) == before
    listed = call("--list")
    assert listed.code == 0
    assert [line.split(maxsplit=1)[1] for line in listed.lines] == [
        "missing (a run of this profile and seed is under way)"
    ] * 2
    assert call("--seed", "1").code == 0, "another seed is another workspace"
    other.kill()
    other.wait()
    assert call("--list").lines[0].split() == ["01_first", "missing"]
    assert call().code == 0, "a killed run holds nothing"


def test_ctrl_c_ends_the_kernel_with_130_and_says_how_to_go_on(notebooks, workspace):
    started = workspace / "started"
    wait = f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\nimport threading\nthreading.Event().wait(120)"
    write_notebook(notebooks, "01_first", wait)
    script = (
        "import sys, pathlib; from nbhelpers.pipeline import command; from nbhelpers.report.chapters import Stage\n"
        "command.preflight = lambda run: None\n"
        "known = {'01_first': Stage('01_first', '?')}\n"
        f"sys.exit(command.main(['--profile', 'smoke'], pathlib.Path({str(notebooks)!r}), known))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, env=environment(), **pipes)
    try:
        limit = time.monotonic() + 120
        while not (started.exists() and started.read_text()):
            assert process.poll() is None and time.monotonic() < limit, "the notebook did not start"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "error: interrupted in 01_first; go on with: ./run_all.sh --profile smoke --from 01\n"
    with pytest.raises(ProcessLookupError):
        command.os.kill(int(started.read_text()), 0)
