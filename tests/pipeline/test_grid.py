"""The grid: cells in several processes leave the same bits as in one, and no process or half artefact after an end."""

import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from stand_ins import environment

from nbhelpers.pipeline import grid
from nbhelpers.profiles import get_profile
from nbhelpers.study import cells, fine_tuning, inputs
from nbhelpers.workspace import Run, open_run

SETTINGS = {"precision": "no", "sparsities": "0.9", "train_size": "16"}
SET = [word for field, value in SETTINGS.items() for word in ("--set", f"{field}={value}")]
# Two seeds of two cells that need each other, and what is cheap beside them.
TEACHING = ["teach-0-train", "teach-0-transfer", "teach-1-train", "teach-1-transfer"]
CELLS = [["finetune-0", "finetune-1"], ["score-0", "score-1", *TEACHING, "tfidf-0"]]


def open_small() -> Run:
    return open_run(get_profile("smoke", **SETTINGS))


def call(*arguments, root, **options):
    command = [sys.executable, "-m", "nbhelpers.pipeline.grid", "--profile", "smoke", *SET, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(NBHELPERS_ROOT=str(root)), cwd=root, **pipes, **options)


def tensors_of(run: Run) -> dict:
    """Every weight and tensor of a run as bytes: {(seed, artefact, file): {name: bytes}}, of all seeds."""
    return {
        (one.seed, record["name"], path.name): {k: t.numpy().tobytes() for k, t in load_file(path).items()}
        for one in inputs.runs_of(run)
        for record in one.records()
        for path in one.folder(record["name"]).glob("*.safetensors")
    }


def test_two_processes_leave_the_same_bits_as_one(workspace, tmp_path_factory, monkeypatch, capfd, alone):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, numbers = open_small(), {"01", "02"}
    assert [[cell.name for cell in phase] for phase in cells.phases(run, numbers)] == CELLS
    names = [line.split()[2] for line in grid.run_grid(run, jobs=2, notebooks=numbers)]
    out, err = capfd.readouterr()
    assert out == err == "" and sorted(names[:2]) == CELLS[0] and sorted(names[2:]) == CELLS[1]
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [line for line in children if "loky" in line and "resource_tracker" not in line]
    found = tensors_of(run)
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path_factory.mktemp("one")))
    for phase in cells.phases(run, numbers):
        for cell in reversed(phase):
            cell.compute()
    expected = tensors_of(run)
    assert found.keys() == expected.keys() and len(found) > 20
    assert [key for key in found if found[key] != expected[key]] == []


def test_the_failed_cell_is_named(workspace):
    run = open_run(get_profile("smoke", **SETTINGS | {"seeds": "1"}))
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(grid.GridError, match=r"cell score-0: WorkspaceError: fine_tuned is missing"):
        list(grid.run_grid(run, jobs=1, notebooks={"02"}))
    assert signal.getsignal(signal.SIGINT) == interrupt, "one job is computed here, and Ctrl-C still ends it"


def fail_in_a_process(how):
    if how == "died":
        os._exit(9)
    return os.getpid()


def test_a_process_that_died_is_an_error_of_the_grid():
    with pytest.raises(grid.GridError, match="a process of the grid died; out of memory"):
        list(grid.in_parallel(fail_in_a_process, [("died",), ("well",)], 2, "no"))


# --- the command line ---


def test_listed_commands_run_and_the_next_finds_what_the_last_left(workspace, capsys):
    grid.main(["--profile", "smoke", *SET, "--set", "data_revision=a b", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# phase 1: in any order",
        *(f"# phase {n}: in any order, after phase {n - 1}" for n in range(2, 11)),
    ]
    names = [cell.name for phase in cells.phases(open_small()) for cell in phase]
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [words[-1] for words in commands] == names
    assert commands[0][:3] == [sys.executable, "-m", "nbhelpers.pipeline.grid"]
    assert list(workspace.iterdir()) == []
    for name in ("finetune-1", "score-1"):
        grid.main(commands[names.index(name)][3:])
        assert capsys.readouterr().out.startswith(f"{name} ")
    made = {record["name"] for record in open_run(get_profile("smoke"), 1).records()}
    assert {"fine_tuned", "scores_merged", "logits_fine_tuned_validation"} <= made


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cell", "recover-0-nonsense"], "the cell must be one of finetune-0, finetune-1"),
        (["--profile", "nonsense"], "nonsense"),
        (["--cell", "score-0"], "fine_tuned is missing"),
    ],
)
def test_a_wrong_cell_or_setting_is_one_line(workspace, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        grid.main(["--profile", "smoke", *arguments])
    # sys.exit with a text prints it and ends with code 1.
    assert ended.value.code.startswith("error: ") and complaint in ended.value.code
    assert len(ended.value.code.splitlines()) == 1
    assert capsys.readouterr().out == ""
    assert list(workspace.iterdir()) == []


# --- an end in the middle ---


def wait_for(what, seconds=120):
    """The first true result of ``what``, or a failure."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_an_end_in_the_middle_leaves_no_process_and_a_usable_workspace(workspace, how):
    process = call("--jobs", "2", root=workspace, start_new_session=True)
    family = []
    try:
        wait_for(lambda: list(workspace.rglob("*.partial")) or process.poll() is not None)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        else:
            process.kill()
        err = process.communicate(timeout=60)[1]
        wait_for(lambda: not [child for child in family if child.is_running() and child.status() != "zombie"], 60)
    finally:
        for child in family:
            if child.is_running():
                child.kill()
        process.kill()
    if how == "ctrl-c":
        assert process.returncode == 130
        assert err == "error: interrupted; what is done is kept, the same command goes on\n"
    else:
        assert process.returncode == -signal.SIGKILL
    for one in inputs.runs_of(open_small()):
        for record in one.records():
            one.folder(record["name"])  # checks the sums
    fine_tuning.finetune_model(open_small())
    assert not list((workspace / ".artifacts" / "smoke" / "seed-0").glob("*.partial"))
    assert np.isfinite(open_small().predict("fine_tuned", ["A film."])).all()
