"""The grid: its cells, its processes, and that they leave what the notebooks would have computed themselves."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from nbhelpers import criteria
from nbhelpers.pipeline import grid
from nbhelpers.pipeline.promises import artifacts
from nbhelpers.profiles import get_profile
from nbhelpers.study import cells, comparison, conversion, fine_tuning, inputs, predictions, pruning, scoring, students
from nbhelpers.workspace import Run, open_run

PROJECT = Path(__file__).parent.parent
SETTINGS = {"precision": "no", "sparsities": "0.9", "epochs": "1", "train_size": "16", "recovery_steps": "1"}
SETTINGS |= {"scan_steps": "1", "recovery_learning_rates": "1e-3"}
SET = [word for field, value in SETTINGS.items() for word in ("--set", f"{field}={value}")]
# A thread each, so that sums are taken in one order everywhere.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def open_small() -> Run:
    return open_run(get_profile("smoke", **SETTINGS))


def call(*arguments, root, **options):
    command = [sys.executable, "-m", "nbhelpers.grid", "--profile", "smoke", *SET, *arguments]
    environment = ENVIRONMENT | {"NBHELPERS_ROOT": str(root)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=root, **pipes, **options)


# --- names and phases ---


def test_cells_and_phases_of_smoke():
    first, second, third, fourth, fifth, sixth = (list(phase) for phase in cells.phases(open_small()))
    assert first == ["finetune-0", "finetune-1"] and second == ["score-0", "score-1"]
    assert third[:3] == ["scan-0-0.5-2", "control-0", "control-1"]
    assert third[3:] == [f"prune-{seed}-{p}" for seed in (0, 1) for p in (*scoring.SCORES, "sparsegpt")]
    students = [f"student-0-{variant}-1" for variant in ("distilled", "labels_only", "distilled_random")]
    assert fourth == students + [f"recover-{seed}-{c}" for seed in (0, 1) for c in scoring.SCORES]
    ways = [f"otherwise-{seed}-{way}" for seed in (0, 1) for way in ("gradual", "taught")]
    assert fifth == [*ways, "compress-0-1", "structured-0-0.5", "open-test"]
    assert sixth[:2] == ["judge-0-dense", "judge-1-dense"]
    assert sixth[2:] == [f"judge-{seed}-{c}" for seed in (0, 1) for c in scoring.SCORES]


def test_cells_of_some_notebooks_leave_the_test_reviews_alone():
    run = open_small()
    assert [list(phase) for phase in cells.phases(run, ["01"])] == [["finetune-0", "finetune-1"]]
    assert cells.phases(run, []) == []
    names = [name for phase in cells.phases(run, ["01", "02", "03", "04", "05"]) for name in phase]
    assert "open-test" not in names and not [name for name in names if name.startswith("judge")]
    others = [name for phase in cells.phases(run, ["06"]) for name in phase]
    assert sorted(names + others) == sorted(name for phase in cells.phases(run) for name in phase)


# --- what cells leave ---


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """All cells in this process, backwards in each phase: the workspace, and which cells asked for which new artefact.

    The second part is, phase by phase, {(seed, artefact): number of cells}.
    """
    root = tmp_path_factory.mktemp("one")
    asked, cached = set(), Run.cached

    def logged(run, name, *arguments, **options):
        asked.add((run.seed, name))
        return cached(run, name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(root))
        patch.setattr(Run, "cached", logged)
        run, counts = open_small(), []
        for phase in cells.phases(run):
            there = {(one.seed, name) for one in inputs.runs_of(run) for name in artifacts(one)}
            counts.append(Counter())
            for cell in reversed(phase.values()):
                asked.clear()
                cell()
                counts[-1].update(asked - there)
    return root, counts


def test_no_two_cells_of_a_phase_make_the_same_artefact(one_process):
    for counts in one_process[1]:
        assert set(counts.values()) <= {1}, counts.most_common(3)


def found_by_notebooks(run: Run) -> None:
    """What the notebooks call, heavy computations only."""
    for one in inputs.runs_of(run):
        fine_tuning.finetune_model(one)
        scoring.score_weights(one, scoring.MAIN)
    pruning.pruned_curves(run)
    for what in ("control", *scoring.SCORES):
        pruning.scan_recovery_rates(run, what)
    pruning.recover_all(run)
    pruning.recovered_curves(run)
    for way in ("gradual", "taught"):
        for one in inputs.runs_of(run):
            name = pruning.recover_otherwise(one, way, pruning.best_criterion(run), run.profile.main_sparsity)
            predictions.answers_right(one, name, "validation")
    conversion.compact_model(run, run.profile.structured_sparsities[0])
    students.distil_all(run)
    comparison.open_test_part(run)
    pruning.recovered_curves(run, "test")
    comparison.answers_of_all(run, list(comparison.LINES))


def bits(path: Path) -> dict[str, bytes]:
    """Every tensor of a file as bytes; the file's own bytes also hold its metadata, which come in any order."""
    return {name: tensor.flatten().numpy().tobytes() for name, tensor in load_file(path).items()}


def tensors_of(run: Run) -> dict[tuple[int, str, str], dict[str, bytes]]:
    """Every weight and tensor of a run: {(seed, artefact, file): tensors}, of all seeds."""
    return {
        (one.seed, name, path.name): bits(path)
        for one in inputs.runs_of(run)
        for name in artifacts(one)
        for path in one.folder(name).glob("*.safetensors")
    }


def test_the_notebooks_find_everything(one_process, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(one_process[0]))
    run = open_small()
    before = {(one.seed, name): r["created"] for one in inputs.runs_of(run) for name, r in artifacts(one).items()}
    found_by_notebooks(run)
    after = {(one.seed, name): r["created"] for one in inputs.runs_of(run) for name, r in artifacts(one).items()}
    assert after == before


def test_a_grid_of_two_processes_leaves_the_same_bits(one_process, workspace, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = open_small()
    grid.run_grid(run, jobs=2)
    out, err = capfd.readouterr()
    names = [name for phase in cells.phases(run) for name in phase]
    assert sorted(line.split()[2] for line in out.splitlines()) == sorted(names) and err == ""
    found = tensors_of(run)
    monkeypatch.setenv("NBHELPERS_ROOT", str(one_process[0]))
    expected = tensors_of(run)
    assert found.keys() == expected.keys()
    # A compressed model's layers take the engine that was faster when it was made: what they add up differs in digits.
    timed = {key for key in found if key[1].startswith("logits_compressed")}
    assert [key for key in found if found[key] != expected[key] and key not in timed] == []
    for key in timed:
        answers, others = (np.frombuffer(tensors[key]["logits"], np.float32) for tensors in (found, expected))
        np.testing.assert_allclose(answers, others, rtol=1e-4, atol=1e-5)
    names = {(seed, name) for seed, name, _ in found}
    assert {(1, "recovered_merged_90"), (0, "student_distilled_1"), (1, "logits_fine_tuned_test")} <= names
    assert all(found.values())


# --- the command line ---


def test_commands_of_the_list_run_and_the_next_finds_what_the_last_left(workspace, capsys):
    grid.main(["--profile", "smoke", *SET, "--set", "data_revision=a b", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# phase 1: in any order",
        *(f"# phase {n}: in any order, after phase {n - 1}" for n in range(2, 7)),
    ]
    cells = [name for phase in cells.phases(open_small()) for name in phase]
    commands = [line for line in lines if not line.startswith("#")]
    assert [shlex.split(line)[-1] for line in commands] == cells
    assert list(workspace.iterdir()) == []
    environment = ENVIRONMENT | {"NBHELPERS_ROOT": str(workspace)}
    for name in ("finetune-1", "score-1"):
        line = commands[cells.index(name)]
        done = subprocess.run(line, shell=True, env=environment, cwd=workspace, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith(f"{name} ")
    made = artifacts(open_run(get_profile("smoke"), 1))
    assert {"fine_tuned", *(f"scores_{c}" for c in criteria.CRITERIA), "logits_fine_tuned_train"} <= made.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cell", "recover-0-nonsense"], "no cell 'recover-0-nonsense': there are finetune-0, finetune-1"),
        (["--cell", "recover-7-magnitude"], "no cell 'recover-7-magnitude'"),
        (["--profile", "nonsense"], "no profile 'nonsense'"),
        (["--set", "data=no/such/file"], "does not exist"),
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


def test_jobs_is_a_number_above_0_and_nothing_is_forced(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        grid.main(["--jobs", "0"])
    assert "--jobs is 0" in capsys.readouterr().err
    monkeypatch.setenv("NBHELPERS_FORCE", "1")
    with pytest.raises(SystemExit):
        grid.main(["--cell", "finetune-0"])
    assert "NBHELPERS_FORCE is set" in capsys.readouterr().err


# --- what goes wrong in a process ---


def test_the_cell_that_failed_is_named_and_more_jobs_than_cells_are_fine(workspace):
    run = open_run(get_profile("smoke", **SETTINGS | {"seeds": "1"}))
    with pytest.raises(grid.GridError, match=r"cell score-0: WorkspaceError: fine_tuned is missing"):
        grid.run_grid(run, jobs=3, notebooks=["02"])
    assert multiprocessing.active_children() == []


def wait_for(what, seconds=120):
    """The first true result of ``what``, or a failure."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("how", ["ctrl-c", "killed", "a worker killed"])
def test_an_end_in_the_middle_leaves_no_process_and_a_usable_workspace(workspace, how):
    process = call(root=workspace, start_new_session=True)
    family = []
    try:
        wait_for(lambda: list(workspace.rglob("*.partial")) or process.poll() is not None)
        family = psutil.Process(process.pid).children(recursive=True)
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        elif how == "killed":
            process.kill()
        else:
            max(family, key=lambda child: child.memory_info().rss).kill()
        err = process.communicate(timeout=60)[1]
        wait_for(lambda: not [child for child in family if child.is_running() and child.status() != "zombie"], 20)
    finally:
        for child in family:
            if child.is_running():
                child.kill()
        process.kill()
    expected = {
        "ctrl-c": (130, "error: interrupted"),
        "killed": (-9, ""),
        "a worker killed": (1, "error: a process of"),
    }
    assert (process.returncode, err[: len(expected[how][1])]) == expected[how], err
    # Of a grid that could not tidy up itself, Python may say so.
    assert len(err.splitlines()) <= 1 or how == "killed"
    for one in inputs.runs_of(open_small()):
        for name in artifacts(one):
            one.folder(name)  # checks the sums
    fine_tuning.finetune_model(open_small())
    assert not list((workspace / ".artifacts" / "smoke" / "seed-0").glob("*.partial"))


def test_a_workspace_that_cannot_be_written_ends_a_cell_with_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"error: \[Errno 20\] Not a directory"):
        grid.main(["--profile", "smoke", "--cell", "finetune-0"])
