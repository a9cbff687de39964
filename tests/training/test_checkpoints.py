"""A training that was interrupted anywhere ends as one that never was; a checkpoint that is not whole is not used."""

import copy
import functools
import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_loop import assert_same_weights, magnitudes, toy_data, weights_of

from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.masks import GradualKeeper, MaskKeeper
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import fine_tuning
from nbhelpers.training import Recipe, train
from nbhelpers.training.checkpoints import Checkpoints, load_optimizer_tensors, optimizer_tensors
from nbhelpers.training.observers import FirstOrderMovement, FlaggedSets, GradientMagnitude
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone", "at_every_step")

# 40 reviews in batches of 8 are five steps per epoch.
RECIPE = Recipe(1e-2, 8, epochs=3, precision="no", prefix_share=0.5)
SHORT = Recipe(1e-2, 8, steps=7, precision="no")


@pytest.fixture
def at_every_step(monkeypatch):
    monkeypatch.setenv("NBHELPERS_CHECKPOINT_SECONDS", "0")


class PowerCut(BaseException):
    """Ends a training in the middle, as no part of the product does."""


class Interrupter:
    """Observer: raises in the backward pass of one step."""

    def __init__(self, step):
        self.steps, self.stop_at = 0, step

    def after_backward(self):
        self.steps += 1
        if self.steps == self.stop_at:
            raise PowerCut

    def state(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state(self, tensors):
        self.steps = int(tensors["steps"])


def run_training(folder=None, stop_at=0, keeper="gradual", recipe=RECIPE):
    """Return all results of a training: weights, observed statistics, sets and masks; and the history."""
    model, data = tiny_model(dropout=0.1), toy_data()
    gradients, movement = GradientMagnitude(model), FirstOrderMovement(model)
    flagged, scores = FlaggedSets(gradients, 0.5), copy.deepcopy(magnitudes(model))
    keepers = {"gradual": lambda: GradualKeeper(model, lambda: scores, 0.5, 9, every=2), "none": lambda: None}
    keepers["masks"] = lambda: MaskKeeper(model, select(scores, 0.5))
    mask_keeper = keepers[keeper]()
    history = train(
        model,
        data,
        recipe,
        seed=1,
        observers=(flagged, gradients, movement, Interrupter(stop_at)),
        mask_keeper=mask_keeper,
        validate=lambda m: evaluate_accuracy(m, data),
        checkpoints=Checkpoints(folder, "this training") if folder else None,
    )
    history = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in history]
    results = {"model": model.state_dict(), "gradients": gradients.mean(), "movement": movement.mean()}
    results |= {"flagged": flagged.tensors(), "masks": mask_keeper.masks if mask_keeper else {}}
    return copy.deepcopy({f"{kind}.{n}": v for kind, tensors in results.items() for n, v in tensors.items()}), history


unbroken = functools.cache(run_training)  # for the same arguments, without a folder


def interrupt(folder, stop_at, **options):
    with pytest.raises(PowerCut):
        run_training(folder, stop_at, **options)


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert_same_weights(found[0], expected[0])


# In the middle of an epoch, in its last step, in the first of the next, in the last of all.
@pytest.mark.parametrize(
    ("keeper", "stop_at"), [*(("gradual", step) for step in (2, 3, 5, 6, 11, 15)), ("masks", 8), ("none", 8)]
)
def test_a_training_that_continues_ends_bit_for_bit_like_one_that_was_never_interrupted(
    tmp_path, stop_at, keeper, capsys
):
    interrupt(tmp_path, stop_at, keeper=keeper)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{stop_at - 1:08}"], "only the newest is kept"
    assert_same(run_training(tmp_path, keeper=keeper), unbroken(keeper=keeper))
    assert f"continuing at step {stop_at - 1}" in capsys.readouterr().out


def test_it_may_be_interrupted_again_and_again(tmp_path):
    for stop_at in (3, 4, 9, 14):
        interrupt(tmp_path, stop_at)
    assert_same(run_training(tmp_path), unbroken(keeper="gradual"))


def test_steps_that_end_within_an_epoch_are_not_exceeded(tmp_path):
    interrupt(tmp_path, 7, recipe=SHORT)
    again = run_training(tmp_path, recipe=SHORT)
    assert_same(again, unbroken(recipe=SHORT))
    assert [entry["steps"] for entry in again[1]] == [5, 7]
    # A finished training is found finished: no step is made.
    assert_same(run_training(tmp_path, stop_at=1, recipe=SHORT), unbroken(recipe=SHORT))


def test_before_the_time_has_come_no_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_CHECKPOINT_SECONDS", "3600")
    run_training(tmp_path, recipe=SHORT)
    assert list(tmp_path.iterdir()) == []


def truncate(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-20] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def break_record(folder):
    (folder / "state.json").write_text('{"key": "this tr')


def empty_record(folder):
    (folder / "state.json").write_text("{}")


def lose_tensors(folder):
    (folder / "state.safetensors").unlink()


def other_key(folder):
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(record | {"key": "other settings"}))


def test_a_checkpoint_that_cannot_be_used_is_skipped_and_an_older_whole_one_taken(tmp_path, capsys):
    interrupt(tmp_path / "first", 4, recipe=SHORT)
    interrupt(tmp_path / "second", 6, recipe=SHORT)
    for damage in (truncate, flip, break_record, empty_record, lose_tensors, other_key):
        folder = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "first", folder)
        shutil.copytree(tmp_path / "second", folder, dirs_exist_ok=True)
        damage(folder / "step-00000005")
        capsys.readouterr()
        assert_same(run_training(folder, recipe=SHORT), unbroken(recipe=SHORT))
        printed = capsys.readouterr().out
        reason = "other settings, code or number of processes" if damage is other_key else "it is damaged"
        assert "step-00000005: it " in printed and reason in printed and "continuing at step 3" in printed


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_an_optimizer_restored_from_safetensors_goes_on_identically(kind, tmp_path):
    def build(weights=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=False)
        if weights:
            model.load_state_dict(weights)
        return model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, weight_decay=0.1)

    def take_steps(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    take_steps(model, optimizer, range(3))
    save_file(optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    second, restored = build(weights_of(model))
    load_optimizer_tensors(restored, load_file(tmp_path / "optimizer.safetensors"))
    forgetful, fresh = build(weights_of(model))
    for pair in ((model, optimizer), (second, restored), (forgetful, fresh)):
        take_steps(*pair, range(3, 6))
    assert torch.equal(second.weight, model.weight)
    assert not torch.equal(forgetful.weight, model.weight), "the state matters"


def cut_the_power(model):
    raise PowerCut


def test_an_artefact_continues_where_its_training_stopped_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    run, found = open_run(get_profile("smoke", precision="no", seeds=1), 0), []
    for name in ("unbroken", "broken"):
        monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path / name))
        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(PowerCut):
                # Six steps, of which the last is not saved before it has been validated.
                patch.setattr(fine_tuning, "validator", lambda run: cut_the_power)
                fine_tuning.finetune_model(run)
            checkpoint = run.artifacts / "fine_tuned.checkpoint" / "training"
            assert [path.name for path in checkpoint.iterdir()] == ["step-00000005"]
        fine_tuning.finetune_model(run)
        found.append({path.name: load_file(path) for path in run.folder("fine_tuned").glob("*.safetensors")})
    assert "continuing at step 5" in capsys.readouterr().out
    assert sorted(path.name for path in run.artifacts.iterdir()) == ["fine_tuned", "pretrained"]
    assert found[0].keys() == found[1].keys() == {"model.safetensors", "tensors.safetensors", "flagged.safetensors"}
    for name, tensors in found[0].items():
        assert_same_weights(tensors, found[1][name])
