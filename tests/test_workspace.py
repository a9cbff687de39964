import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers.profiles import get_profile
from nbhelpers.system import machine
from nbhelpers.system.files import replace_folder, write_text
from nbhelpers.workspace import WorkspaceError, maker_of, open_run, save_tensors

PROJECT = Path(__file__).parent.parent
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.fixture
def run(workspace):
    return open_run(get_profile("smoke"), seed=3)


def build_counted(calls):
    def build(folder):
        calls.append(folder)
        save_tensors(folder, TENSORS)

    return build


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if p.name.endswith((".partial", ".old"))]


def test_places_follow_profile_and_seed(run, workspace):
    assert run.artifacts == workspace / ".artifacts" / "smoke" / "seed-3"
    assert run.reports == workspace / "reports" / "smoke-seed-3"
    assert open_run(get_profile("smoke")).reports == workspace / "reports" / "smoke"
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True, None])
def test_a_seed_is_a_whole_number(workspace, seed):
    with pytest.raises(WorkspaceError, match="seed"):
        open_run(get_profile("smoke"), seed)


def test_an_artefact_is_built_once_and_gives_back_what_was_saved(run):
    calls = []
    for _ in range(2):
        run.cached("scores_magnitude", {"x": 1}, build_counted(calls))
    assert len(calls) == 1
    loaded = run.load_tensors("scores_magnitude")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_the_record_says_what_made_an_artefact_and_its_sums_are_right(run):
    folder = run.cached("scores_magnitude", {"x": 1}, build_counted([]), made_by="02")
    record = json.loads((folder / "artifact.json").read_text())
    assert (record["settings"], record["seed"], record["made_by"]) == ({"x": 1}, 3, "02")
    assert record["versions"]["torch"] == torch.__version__
    content = (folder / "tensors.safetensors").read_bytes()
    assert record["files"] == {"tensors.safetensors": hashlib.sha256(content).hexdigest()}


def test_the_effort_is_that_of_the_artefacts_of_all_seeds(workspace):
    run = open_run(get_profile("smoke", seeds=2), 3)
    for seed, seconds, device in ((3, 90.0, "A card"), (4, 45.0, "A chip, 2 threads"), (5, 1000.0, "A card")):
        folder = open_run(run.profile, seed).cached("scores_magnitude", {}, build_counted([]))
        record = json.loads((folder / "artifact.json").read_text())
        made = {"seconds": seconds, "versions": {"device": device, "torch": "2.13.0"}}
        (folder / "artifact.json").write_text(json.dumps(record | made))
    run.record_effort()
    effort = {"process_minutes": 2.25, "cores": machine.cores()}
    assert run.results()["effort"] == effort | {
        "device_minutes": {"A card (torch 2.13.0)": 1.5, "A chip (torch 2.13.0)": 0.75}
    }


def test_other_settings_or_other_inputs_rebuild(run):
    calls = []
    run.cached("fine_tuned", {"x": 1}, build_counted([]))
    run.cached("masks", {"x": 1}, build_counted(calls), inputs=("fine_tuned",))
    run.cached("masks", {"x": 2}, build_counted(calls), inputs=("fine_tuned",))
    run.cached("fine_tuned", {"x": 2}, build_counted([]))
    run.cached("masks", {"x": 2}, build_counted(calls), inputs=("fine_tuned",))
    assert len(calls) == 3


def test_force_rebuilds(run, monkeypatch):
    calls = []
    run.cached("fine_tuned", {"x": 1}, build_counted(calls))
    monkeypatch.setenv("NBHELPERS_FORCE", "1")
    monkeypatch.setattr(workspace_module, "BUILT_HERE", set())  # as in a new process
    run.cached("fine_tuned", {"x": 1}, build_counted(calls))
    assert len(calls) == 2


def test_a_build_that_fails_leaves_the_old_artefact(run):
    run.cached("fine_tuned", {"x": 1}, build_counted([]))

    def fails(folder):
        save_tensors(folder, {"a": torch.zeros(1)})
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run.cached("fine_tuned", {"x": 2}, fails)
    assert torch.equal(run.load_tensors("fine_tuned")["a"], TENSORS["a"])
    assert run.artifact("fine_tuned")["settings"] == {"x": 1}
    assert leftovers(run.artifacts) == []


def test_a_first_build_that_fails_leaves_no_artefact(run):
    def fails(folder):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        run.cached("fine_tuned", {}, fails)
    with pytest.raises(WorkspaceError, match="notebook 01"):
        run.load_tensors("fine_tuned")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_found_on_load_and_named(run, damage):
    path = run.cached("scores_gradient", {}, build_counted([])) / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes({"truncate": content[:-4], "empty": b""}.get(damage, content))
    if damage == "remove":
        path.unlink()
    with pytest.raises(WorkspaceError, match=r"tensors\.safetensors is missing or damaged: run notebook 02 again"):
        run.load_tensors("scores_gradient")


def test_a_damaged_record_is_named(run):
    folder = run.cached("fine_tuned", {}, build_counted([]))
    (folder / "artifact.json").write_text('{"name": ')
    with pytest.raises(WorkspaceError, match=r"artifact\.json is damaged: run notebook 01"):
        run.load_tensors("fine_tuned")


@pytest.mark.parametrize("other", ["scores_gradient of seed 3", "scores_magnitude of seed 4"])
def test_an_artefact_in_the_place_of_another_is_named(run, other):
    name, seed = other.split(" of seed ")
    source = open_run(run.profile, int(seed)).cached(name, {}, build_counted([]))
    run.artifacts.mkdir(parents=True, exist_ok=True)
    source.rename(run.artifacts / "scores_magnitude")
    with pytest.raises(WorkspaceError, match=rf"is that of {name}, profile smoke, seed {seed}: run notebook 02 again"):
        run.load_tensors("scores_magnitude")


def test_a_record_cannot_point_out_of_its_artefact(run, workspace):
    folder = run.cached("scores_magnitude", {}, build_counted([]))
    secret = workspace / "secret.txt"
    secret.write_text("x")
    record = json.loads((folder / "artifact.json").read_text())
    record["files"]["../../../../secret.txt"] = hashlib.sha256(b"x").hexdigest()
    (folder / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(WorkspaceError, match=r"secret\.txt is missing or damaged"):
        run.folder("scores_magnitude")


def test_what_is_no_model_is_not_loaded_as_one(run):
    run.cached("scores_magnitude", {}, build_counted([]))
    assert run.models() == []
    with pytest.raises(WorkspaceError, match="not a model"):
        run.load_model("scores_magnitude")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("pretrained", "01"),
        ("fine_tuned", "01"),
        ("scores_movement", "02"),
        ("fine_tuned_extra", "03"),
        ("recovered_merged_90", "03"),
        ("sparse_magnitude_90", "04"),
        ("student_distilled_2", "05"),
    ],
)
def test_who_makes_what(name, number):
    assert maker_of(name) == number


def test_metrics_add_up_and_stand_beside_versions_and_seed(run):
    run.record("fine_tuning", accuracy=np.float32(0.5), reviews=np.int64(7))
    run.record("fine_tuning", f1=0.25)
    run.record("captions", a="b")
    results = json.loads((run.reports / "results.json").read_text())
    assert results["fine_tuning"] == {"accuracy": 0.5, "reviews": 7, "f1": 0.25}
    assert results["run"]["seed"] == 3
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\S.* with \S.*, \d+ threads|.*NVIDIA.*", results["run"]["versions"]["device"])
    assert results == run.results()


def test_what_was_timed_is_kept_apart_and_read_as_one(run):
    row = {"model": "sparse", "accuracy": 0.5, "speedup": 2.25, "latency_ms": 31.5}
    run.record("sparse", best_model_speedup=3.5, file_ratio=0.5, structured=row, unstructured_rival=row)
    run.record("fine_tuning", minutes=1.5)
    written = json.loads((run.reports / "results.json").read_text())
    assert written["sparse"] == {"file_ratio": 0.5, "structured": {"model": "sparse", "accuracy": 0.5}}
    timed = {"best_model_speedup": 3.5, "structured": {"speedup": 2.25, "latency_ms": 31.5}, "unstructured_rival": row}
    assert written["timings"] == {"sparse": timed, "fine_tuning": {"minutes": 1.5}}
    results = run.results()
    assert "timings" not in results and results["fine_tuning"] == {"minutes": 1.5}
    both = {"best_model_speedup": 3.5, "file_ratio": 0.5, "structured": row, "unstructured_rival": row}
    assert results["sparse"] == both
    run.record("sparse", file_ratio=0.25)
    assert run.results()["sparse"] == both | {"file_ratio": 0.25}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_metric_that_is_no_number_is_refused_and_nothing_changes(run, value):
    run.record("fine_tuning", accuracy=0.5)
    before = (run.reports / "results.json").read_text()
    with pytest.raises(FloatingPointError, match=r"fine_tuning\.f1"):
        run.record("fine_tuning", f1=value)
    assert (run.reports / "results.json").read_text() == before


def test_tables_come_back_and_a_missing_one_is_named(run):
    table = pd.DataFrame({"model": ["a", "b"], "accuracy": [0.5, 1 / 3]})
    assert run.save_table("comparison", table) is table
    pd.testing.assert_frame_equal(run.load_table("comparison"), table)
    with pytest.raises(WorkspaceError, match=r"curves\.csv is missing"):
        run.load_table("curves")


@pytest.mark.parametrize("damage", [lambda text: text[:-3], lambda text: text.replace("0.5", "0.6"), lambda text: ""])
def test_a_table_that_is_not_what_was_written_is_named(run, damage):
    run.save_table("other", pd.DataFrame({"b": [1]}))
    run.save_table("curves", pd.DataFrame({"a": [0.5, 0.25]}))
    path = run.reports / "tables" / "curves.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(WorkspaceError, match=r"curves\.csv is damaged or was changed: run the notebook that writes it"):
        run.load_table("curves")
    assert len(run.load_table("other")) == 1
    run.save_table("curves", pd.DataFrame({"a": [0.75]}))
    assert run.load_table("curves")["a"].tolist() == [0.75]


def test_figures_are_written_whole(run):
    run.save_figure("01_x", matplotlib.figure.Figure(figsize=(2, 2)))
    content = (run.reports / "figures" / "01_x.png").read_bytes()
    assert content.startswith(b"\x89PNG") and b"IEND" in content[-12:]
    assert leftovers(run.reports) == []


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new\ud800")
    assert path.read_text() == "old"


def test_leftovers_of_a_killed_build_do_not_get_in_and_those_of_a_running_one_stay(tmp_path):
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    here = platform.node()
    for owner in (f"{here}-{dead}", f"{here}-{os.getpid()}", f"{here}-{os.getppid()}", f"{here}-b-{dead}"):
        (tmp_path / f"x.{owner}.partial").mkdir()
        (tmp_path / f"x.{owner}.partial" / "half").write_text("half")
    (tmp_path / f"x_2.{here}-{dead}.partial").mkdir()
    with replace_folder(tmp_path / "x") as folder:
        (folder / "whole").write_text("whole")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole"]
    # Another process that runs, another machine, another artefact.
    others = [f"x.{here}-{os.getppid()}.partial", f"x.{here}-b-{dead}.partial", f"x_2.{here}-{dead}.partial"]
    assert sorted(leftovers(tmp_path)) == sorted(others)


BUILDER = """
import pathlib, sys, time
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run

who, barrier = sys.argv[1], pathlib.Path(sys.argv[2])

def build(folder):
    for part in range(20):
        (folder / f"part-{part}").write_text(f"{who} {turn}")
    (folder / who).touch()

run = open_run(get_profile("smoke"), 3)
(barrier / who).touch()
while len(list(barrier.iterdir())) < 2:
    time.sleep(0.001)
for turn in range(60):
    run.cached("fine_tuned", {"who": who, "turn": turn}, build)
"""


def test_two_processes_that_build_the_same_artefact_end_well_and_the_last_one_stays(run, tmp_path_factory):
    barrier = tmp_path_factory.mktemp("barrier")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", BUILDER]
    builders = [subprocess.Popen([*command, who, barrier], env=environment, stderr=subprocess.PIPE) for who in "ab"]
    errors = [builder.communicate()[1].decode() for builder in builders]
    assert errors == ["", ""] and [builder.returncode for builder in builders] == [0, 0]
    folder = run.folder("fine_tuned")  # checks the sums
    settings = run.artifact("fine_tuned")["settings"]
    assert settings["turn"] == 59
    names = {path.name for path in folder.iterdir()}
    assert names == {settings["who"], "artifact.json", *(f"part-{part}" for part in range(20))}
    assert {(folder / f"part-{part}").read_text() for part in range(20)} == {f"{settings['who']} 59"}
    assert [path.name for path in run.artifacts.iterdir()] == ["fine_tuned"]
