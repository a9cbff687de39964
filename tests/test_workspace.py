"""Artefacts that are built once, whole and checked; results, tables and figures that come back as they were written."""

import hashlib
import json
import math
import re
import time

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers import workspace as workspace_module
from nbhelpers.profiles import get_profile
from nbhelpers.system import machine
from nbhelpers.workspace import WorkspaceError, maker_of, open_run, save_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.fixture
def run(workspace):
    return open_run(get_profile("smoke"), seed=3)


def build(target):
    save_tensors(target.folder, TENSORS)


def counted(calls):
    def build(target):
        calls.append(target)
        save_tensors(target.folder, TENSORS)

    return build


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if p.name.endswith((".partial", ".old", ".checkpoint"))]


def test_places_follow_profile_and_seed(run, workspace):
    assert run.artifacts == workspace / ".artifacts" / "smoke" / "seed-3"
    assert run.reports == workspace / "reports" / "smoke-seed-3"
    assert open_run(get_profile("smoke")).reports == workspace / "reports" / "smoke"
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True])
def test_a_seed_is_a_whole_number(workspace, seed):
    with pytest.raises(WorkspaceError, match="seed"):
        open_run(get_profile("smoke"), seed)


# --- artefacts ---


def test_an_artefact_is_built_once_and_records_what_made_it(run):
    calls = []
    for _ in range(2):
        folder = run.cached("scores_magnitude", {"x": 1}, counted(calls), made_by="02")
    assert len(calls) == 1
    loaded = run.load_tensors("scores_magnitude")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    record = json.loads((folder / "artifact.json").read_text())
    assert (record["settings"], record["seed"], record["made_by"]) == ({"x": 1}, 3, "02")
    assert record["versions"]["torch"] == torch.__version__
    content = (folder / "tensors.safetensors").read_bytes()
    assert record["files"] == {"tensors.safetensors": hashlib.sha256(content).hexdigest()}


def test_other_settings_other_inputs_or_other_code_rebuild(run, monkeypatch):
    calls = []

    def masks(x):
        run.cached("masks", {"x": x}, counted(calls), inputs=("fine_tuned",))

    run.cached("fine_tuned", {"x": 1}, build)
    masks(1)
    masks(2)
    run.cached("fine_tuned", {"x": 2}, build)
    masks(2)
    assert len(calls) == 3
    monkeypatch.setattr(workspace_module, "code_fingerprint", lambda *modules: f"another version of {modules}")
    run.cached("fine_tuned", {"x": 2}, build)
    masks(2)
    assert len(calls) == 4


def test_forced_are_artefacts_from_before_a_moment(run, monkeypatch):
    calls = []

    def ask(name):
        run.cached(name, {}, counted(calls))
        return len(calls)

    ask("early"), ask("late")
    created = run.artifact("late")["created"]
    for name, shift in (("early", -10), ("late", 10)):
        moment = time.time() + shift
        path = run.artifacts / name / "artifact.json"
        written = pd.Timestamp(moment, unit="s", tz="UTC").isoformat()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": written}))
    monkeypatch.setenv("NBHELPERS_FORCE", f"{time.time():.3f}")
    assert ask("late") == 2, "made after the moment: found"
    assert ask("early") == 3 and ask("early") == 3, "made before it: built once more, and then found, in any process"
    assert run.artifact("early")["created"] > created
    monkeypatch.setenv("NBHELPERS_FORCE", "1")
    with pytest.raises(WorkspaceError, match="NBHELPERS_FORCE must be seconds since the epoch"):
        ask("early")


def test_checkpoints_of_a_build_survive_a_failure_and_go_with_success(run):
    seen = []

    def interrupted(target):
        checkpoints = target.checkpoints("rate-1")
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        seen.append(sorted(path.name for path in checkpoints.folder.iterdir()))
        (checkpoints.folder / "half").touch()
        save_tensors(target.folder, TENSORS)
        if len(seen) == 1:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run.cached("fine_tuned", {}, interrupted)
    assert run.models() == [] and leftovers(run.artifacts) == ["fine_tuned.checkpoint"]
    with pytest.raises(WorkspaceError, match="notebook 01"):
        run.load_tensors("fine_tuned")
    run.cached("fine_tuned", {}, interrupted)
    assert seen == [[], ["half"]] and leftovers(run.artifacts) == []


def test_a_build_that_fails_leaves_the_old_artefact(run):
    run.cached("fine_tuned", {"x": 1}, build)

    def fails(target):
        save_tensors(target.folder, {"a": torch.zeros(1)})
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run.cached("fine_tuned", {"x": 2}, fails)
    assert torch.equal(run.load_tensors("fine_tuned")["a"], TENSORS["a"])
    assert run.artifact("fine_tuned")["settings"] == {"x": 1}
    assert leftovers(run.artifacts) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_on_load_and_named(run, damage):
    path = run.cached("scores_gradient", {}, build) / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-4] if damage == "truncate" else content)
    if damage == "remove":
        path.unlink()
    with pytest.raises(WorkspaceError, match=r"tensors\.safetensors is missing or damaged: run notebook 02 again"):
        run.load_tensors("scores_gradient")


def test_a_damaged_record_is_named(run):
    folder = run.cached("fine_tuned", {}, build)
    (folder / "artifact.json").write_text('{"name": ')
    with pytest.raises(WorkspaceError, match=r"artifact\.json is damaged: run notebook 01"):
        run.load_tensors("fine_tuned")


@pytest.mark.parametrize("other", ["scores_gradient of seed 3", "scores_magnitude of seed 4"])
def test_an_artefact_in_the_place_of_another_is_named(run, other):
    name, seed = other.split(" of seed ")
    source = open_run(run.profile, int(seed)).cached(name, {}, build)
    run.artifacts.mkdir(parents=True, exist_ok=True)
    source.rename(run.artifacts / "scores_magnitude")
    with pytest.raises(WorkspaceError, match=rf"is that of {name}, profile smoke, seed {seed}: run notebook 02 again"):
        run.load_tensors("scores_magnitude")


def test_a_record_cannot_point_out_of_its_artefact(run, workspace):
    folder = run.cached("scores_magnitude", {}, build)
    secret = workspace / "secret.txt"
    secret.write_text("x")
    record = json.loads((folder / "artifact.json").read_text())
    record["files"]["../../../../secret.txt"] = hashlib.sha256(b"x").hexdigest()
    (folder / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(WorkspaceError, match=r"secret\.txt is missing or damaged"):
        run.folder("scores_magnitude")


def test_data_are_not_loaded_as_a_model(run):
    run.cached("scores_magnitude", {}, build)
    assert run.models() == []
    with pytest.raises(WorkspaceError, match="not a model"):
        run.load_model("scores_magnitude")


@pytest.mark.parametrize(
    ("number", "names"),
    [
        ("01", "pretrained fine_tuned choice_tfidf"),
        ("02", "scores_movement calibration"),
        (
            "03",
            "fine_tuned_extra_steps_9 recovered_merged_90 structured_merged_50 hidden_merged_90 choice_score "
            "choice_rate_control",
        ),
        ("04", "sparse_magnitude_90 compact_merged_50"),
        ("05", "student_distilled_2 compressed_1 choice_distillation choice_compressed"),
    ],
)
def test_the_notebook_that_makes_an_artefact(number, names):
    assert {maker_of(name) for name in names.split()} == {number}


# --- reports ---


def test_metrics_add_up_beside_versions_and_seed(run):
    run.record("fine_tuning", accuracy=np.float32(0.5), reviews=np.int64(7))
    run.record("fine_tuning", f1=0.25)
    results = json.loads((run.reports / "results.json").read_text())
    assert results["fine_tuning"] == {"accuracy": 0.5, "reviews": 7, "f1": 0.25}
    assert results["run"]["seed"] == 3
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\S.* with \S.*, \d+ threads|.*NVIDIA.*", results["run"]["versions"]["device"])
    assert results == run.results()


def test_timings_are_kept_apart_and_read_together(run):
    row = {"model": "sparse", "accuracy": 0.5, "speedup": 2.25, "latency_ms": 31.5}
    run.record("sparse", best_model_speedup=3.5, file_ratio=0.5, structured=row, unstructured_rival=row)
    written = json.loads((run.reports / "results.json").read_text())
    assert written["sparse"] == {"file_ratio": 0.5, "structured": {"model": "sparse", "accuracy": 0.5}}
    timed = {"best_model_speedup": 3.5, "structured": {"speedup": 2.25, "latency_ms": 31.5}, "unstructured_rival": row}
    assert written["timings"] == {"sparse": timed}
    both = {"best_model_speedup": 3.5, "file_ratio": 0.5, "structured": row, "unstructured_rival": row}
    assert run.results()["sparse"] == both
    run.record("sparse", file_ratio=0.25)
    assert run.results()["sparse"] == both | {"file_ratio": 0.25}


def test_the_effort_is_that_of_the_artefacts_of_all_seeds(workspace):
    run = open_run(get_profile("smoke", seeds=2), 3)
    for seed, seconds, device in ((3, 90.0, "A card"), (4, 45.0, "A chip, 2 threads"), (5, 1000.0, "A card")):
        folder = open_run(run.profile, seed).cached("scores_magnitude", {}, build)
        record = json.loads((folder / "artifact.json").read_text())
        made = {"seconds": seconds, "versions": {"device": device, "torch": "2.13.0"}}
        (folder / "artifact.json").write_text(json.dumps(record | made))
    run.record_effort()
    effort = {"process_minutes": 2.25, "cores": machine.cores()}
    assert run.results()["effort"] == effort | {
        "device_minutes": {"A card (torch 2.13.0)": 1.5, "A chip (torch 2.13.0)": 0.75}
    }


@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float32("nan")])
def test_a_metric_that_is_not_finite_is_refused_and_nothing_changes(run, value):
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
def test_a_changed_table_is_named(run, damage):
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
