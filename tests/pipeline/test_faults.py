"""A disk that is full at every write in turn: each stage fails clearly, leaves nothing half done, and goes on."""

import builtins
import errno
import io
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import safetensors.torch
from conftest import STUDY, fresh_accelerate
from safetensors import SafetensorError

from nbhelpers.profiles import get_profile
from nbhelpers.study import conversion, fine_tuning, predictions, recovery, scoring
from nbhelpers.workspace import open_run


class FullDisk:
    """Lets the first attempt to write each file of a workspace fail, after half of it where that is easily done."""

    def __init__(self, root, patch):
        self.root, self.failed = root, []
        self.open, self.serialize = builtins.open, safetensors.torch.serialize_file
        patch.setattr(builtins, "open", self.opening)
        patch.setattr(io, "open", self.opening)
        patch.setattr(safetensors.torch, "serialize_file", self.serializing)

    def is_full(self, path) -> bool:
        # The process number in a folder's name is another one each time.
        name = re.sub(r"\.[^./]+-\d+\.partial", "", str(path))
        if not name.startswith(str(self.root)) or name in self.failed or name.endswith(".lock"):
            return False
        self.failed.append(name)
        return True

    def opening(self, file, mode="r", *arguments, **options):
        if (
            set(mode) & set("wxa+")
            and isinstance(file, str | bytes) | hasattr(file, "__fspath__")
            and self.is_full(file)
        ):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return self.open(file, mode, *arguments, **options)

    def serializing(self, tensors, filename, *arguments, **options):
        if not self.is_full(filename):
            return self.serialize(tensors, filename, *arguments, **options)
        self.serialize(tensors, filename, *arguments, **options)
        with self.open(filename, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
        raise SafetensorError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')


def stages(run):
    """One artefact, table, figure or record of each kind that the notebooks write."""
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    return [
        lambda: fine_tuning.finetune_model(run),
        lambda: scoring.scores_of(run, "gradient"),
        lambda: recovery.scan_rates(run, "pruned"),
        lambda: recovery.recover_model(run, "gradient", 0.5),
        lambda: conversion.sparsify(run, "gradient", 0.5),
        lambda: predictions.open_test(run, ["fine_tuned"]),
        lambda: predictions.split_logits(run, "fine_tuned", "test"),
        lambda: run.save_table("table", pd.DataFrame({"a": [1.0, 2.0]})),
        lambda: run.record("section", metric=1.0),
        lambda: run.save_figure("figure", figure),
    ]


def whole(run):
    """The checksums of all artefacts, after everything was found to be complete."""
    found = {}
    for folder in run.artifacts.glob("*"):
        assert not folder.name.endswith((".partial", ".old")), f"{folder.name} is left over"
        if folder.is_dir() and not folder.name.endswith(".checkpoint"):
            run.folder(folder.name)  # raises where a file is missing or has another checksum
            found[folder.name] = run.artifact(folder.name)["files"]
    predictions.read_studies()  # raises where the register is half written
    assert run.results() in ({}, {"section": {"metric": 1.0}, "run": run.results().get("run")})
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the stages leave on a disk that is full at each write in turn, and on one that never is."""
    found = {}
    for name in ("never full", "full"):
        root = tmp_path_factory.mktemp("faults")
        with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
            patch.setenv("NBHELPERS_ROOT", str(root))
            patch.setenv("NBHELPERS_CHECKPOINT_SECONDS", "0")
            run = open_run(get_profile("smoke", **STUDY | {"seeds": 1, "train_size": 16}), 0)
            disk, errors = FullDisk(root, patch) if name == "full" else None, []
            for stage in stages(run):
                while True:
                    before = whole(run)
                    try:
                        stage()
                        break
                    except (OSError, SafetensorError) as error:
                        errors.append(str(error))
                    after = whole(run)
                    assert before.items() <= after.items(), "nothing is lost"
            left = [path.name for path in run.artifacts.iterdir() if path.name.endswith(".checkpoint")]
            found[name] = {"files": whole(run), "errors": errors, "disk": disk, "left": left, "results": run.results()}
    return found


def test_every_write_has_failed_once_and_said_so(runs):
    disk, errors = runs["full"]["disk"], runs["full"]["errors"]
    assert len(errors) == len(disk.failed) > 30
    assert all("No space left on device" in error for error in errors)
    names = " ".join(disk.failed)
    for part in (
        "fine_tuned.checkpoint",
        "artifact.json",
        "model.safetensors",
        "config.json",
        "test_reviews.json",
        "figure.png",
        "table.csv",
    ):
        assert part in names, part


def test_afterwards_all_is_as_on_a_disk_that_is_never_full(runs):
    expected, found = (runs[name]["files"] for name in ("never full", "full"))
    assert runs["never full"]["errors"] == []
    assert expected.keys() == found.keys() and len(expected) >= 8
    for name, files in expected.items():
        # Histories hold seconds.
        same = [file for file in files if file.endswith(".safetensors")]
        assert {f: files[f] for f in same} == {f: found[name][f] for f in same}, name


def test_no_checkpoint_of_a_finished_training_is_left(runs):
    assert runs["full"]["left"] == runs["never full"]["left"] == []
