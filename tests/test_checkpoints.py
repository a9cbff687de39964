"""A training that was interrupted anywhere ends as one that never was; a checkpoint that is not whole is passed by."""

import copy
import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_training import toy_data

from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.masks import GradualKeeper, MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import fine_tuning
from nbhelpers.training import Recipe, train
from nbhelpers.training.checkpoints import Checkpoints
from nbhelpers.training.observers import FirstOrderMovement, FlaggedSets, GradientMagnitude
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone")

# 40 reviews in batches of 8 are five steps an epoch.
RECIPE = Recipe(1e-2, 8, epochs=3, precision="no", prefix_share=0.5)


class PowerCut(BaseException):
    """Ends a training in the middle, as no part of the product does."""


class Interrupter:
    """Observer: raises in the backward pass of one step."""

    def __init__(self, step):
        self.steps, self.at = 0, step

    def after_backward(self):
        self.steps += 1
        if self.steps == self.at:
            raise PowerCut

    def state(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state(self, tensors):
        self.steps = int(tensors["steps"])


def training(folder=None, stop_at=0, keeper="gradual", recipe=RECIPE, seconds=0.0):
    """Everything that a training leaves: weights, history, observed statistics, sets, masks."""
    model, data = tiny_model(dropout=0.1), toy_data()
    gradients, movement = GradientMagnitude(model), FirstOrderMovement(model)
    flagged = FlaggedSets(gradients, 0.5)
    scores = {name: weight.detach().abs().clone() for name, weight in prunable_weights(model).items()}
    keepers = {"gradual": lambda: GradualKeeper(model, lambda: scores, 0.5, 9, every=2), "none": lambda: None}
    keepers["masks"] = lambda: MaskKeeper(model, select(scores, 0.5))
    kept = keepers[keeper]()
    history = train(
        model,
        data,
        recipe,
        seed=1,
        observers=(flagged, gradients, movement, Interrupter(stop_at)),
        mask_keeper=kept,
        validate=lambda m: evaluate_accuracy(m, data),
        checkpoints=Checkpoints(folder, "this training", seconds) if folder else None,
    )
    plain = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in history]
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"gradients.{k}": v for k, v in gradients.mean().items()}
    tensors |= {f"movement.{k}": v for k, v in movement.mean().items()}
    tensors |= {f"flagged.{k}": v for k, v in flagged.tensors().items()}
    tensors |= {f"masks.{k}": v for k, v in (kept.masks if kept else {}).items()}
    return copy.deepcopy(tensors), plain


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name


# The first step; the middle of an epoch; its last step; the first of the next; the last of all.
@pytest.mark.parametrize("stop_at", [2, 3, 5, 6, 10, 11, 15])
@pytest.mark.parametrize("keeper", ["gradual", "masks", "none"])
def test_a_training_that_goes_on_ends_bit_for_bit_like_one_that_was_never_interrupted(
    tmp_path, stop_at, keeper, capsys
):
    unbroken = training(keeper=keeper)
    with pytest.raises(PowerCut):
        training(tmp_path, stop_at, keeper)
    assert_same(training(tmp_path, keeper=keeper), unbroken)
    assert f"going on at step {stop_at - 1}" in capsys.readouterr().out


def test_it_may_be_interrupted_again_and_again(tmp_path):
    unbroken = training()
    for stop_at in (3, 4, 9, 14):
        with pytest.raises(PowerCut):
            training(tmp_path, stop_at)
    assert_same(training(tmp_path), unbroken)


def test_steps_that_end_within_an_epoch_are_not_exceeded(tmp_path):
    recipe = Recipe(1e-2, 8, steps=7, precision="no")
    unbroken = training(recipe=recipe)
    with pytest.raises(PowerCut):
        training(tmp_path, 7, recipe=recipe)
    again = training(tmp_path, recipe=recipe)
    assert_same(again, unbroken)
    assert [entry["steps"] for entry in again[1]] == [5, 7]
    # What is finished is found finished: not a step is made.
    assert_same(training(tmp_path, stop_at=1, recipe=recipe), unbroken)


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    with pytest.raises(PowerCut):
        training(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_without_time_for_one_no_checkpoint_is_written(tmp_path):
    training(tmp_path, seconds=3600)
    assert list(tmp_path.iterdir()) == []


def truncate(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-20] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def break_record(folder):
    (folder / "state.json").write_text('{"about": "this tr')


def empty_record(folder):
    (folder / "state.json").write_text("{}")


def lose_tensors(folder):
    (folder / "state.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, break_record, empty_record, lose_tensors])
def test_a_damaged_checkpoint_is_passed_by_and_an_older_whole_one_taken(tmp_path, damage, capsys):
    unbroken = training()
    with pytest.raises(PowerCut):
        training(tmp_path, 4)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "older")
    with pytest.raises(PowerCut):
        training(tmp_path, 8)
    (tmp_path / "older").rename(tmp_path / "step-00000003")
    damage(tmp_path / "step-00000007")
    capsys.readouterr()
    assert_same(training(tmp_path), unbroken)
    printed = capsys.readouterr().out
    assert "step-00000007 is damaged" in printed and "going on at step 3" in printed


def test_a_checkpoint_of_something_else_is_passed_by(tmp_path, capsys):
    with pytest.raises(PowerCut):
        training(tmp_path, 4)
    record = json.loads((tmp_path / "step-00000003" / "state.json").read_text())
    (tmp_path / "step-00000003" / "state.json").write_text(json.dumps(record | {"about": "other settings"}))
    assert_same(training(tmp_path), training())
    assert "of other settings, code or processes: it is passed by" in capsys.readouterr().out


def cut_the_power(model):
    raise PowerCut


def weights_of(run):
    folder = run.folder("fine_tuned")
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_an_artefact_goes_on_where_its_training_stopped_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_CHECKPOINT_SECONDS", "0")
    run, found = open_run(get_profile("smoke", precision="no", seeds=1), 0), []
    for name in ("unbroken", "broken"):
        monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path / name))
        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(PowerCut):
                # Six steps, of which the last is not saved before it has been judged.
                patch.setattr(experiments, "validator", lambda run: cut_the_power)
                fine_tuning.finetune_model(run)
            checkpoint = run.artifacts / "fine_tuned.checkpoint" / "training"
            assert [path.name for path in checkpoint.iterdir()] == ["step-00000005"]
        fine_tuning.finetune_model(run)
        found.append(weights_of(run))
    assert "going on at step 5" in capsys.readouterr().out
    assert sorted(path.name for path in run.artifacts.iterdir()) == ["fine_tuned", "pretrained"]
    assert found[0].keys() == found[1].keys() == {"model.safetensors", "tensors.safetensors", "flagged.safetensors"}
    for name, tensors in found[0].items():
        assert all(torch.equal(tensor, found[1][name][key]) for key, tensor in tensors.items()), name
