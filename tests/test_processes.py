"""Several processes: what two of them compute together is what one computes alone."""

import json

import numpy as np
import pytest
import torch
from conftest import fresh_accelerate, in_two_processes
from safetensors.torch import load_file

from nbhelpers.pipeline import grid
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import cells
from nbhelpers.study.inputs import dataset
from nbhelpers.study.predictions import split_logits
from nbhelpers.study.scoring import SCORES
from nbhelpers.training import classification_loss, distributed, make_accelerator
from nbhelpers.training.loop import backward_in_parts, part_of
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone")

# Batches of 7, so that no number of processes and parts divides them; no dropout, whose draws are each process's own.
SETTINGS = {"dropout": 0.0, "precision": "no", "seeds": 1, "batch_size": 7, "accumulation": 2}
STAGES = """
import os
from nbhelpers import grid, processes
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run
run = open_run(get_profile("smoke", **%r), 0)
for stage in grid.STAGES.values():
    table = stage(run)
if processes.is_main():
    print("processes", processes.count())
    print(table.to_json(orient="records"))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The workspaces of all stages, computed by one process and by two, and the tables of the test answers."""
    roots = {number: tmp_path_factory.mktemp(f"by-{number}") for number in (1, 2)}
    script = roots[2] / "stages.py"
    script.write_text(STAGES % SETTINGS, encoding="utf-8")
    printed = in_two_processes([str(script)], NBHELPERS_ROOT=str(roots[2]), NBHELPERS_BATCH="1")
    assert "processes 2" in printed
    tables = {2: json.loads(printed.strip().splitlines()[-1])}
    run = open_run(get_profile("smoke", **SETTINGS), 0)
    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("NBHELPERS_ROOT", str(roots[1]))
        for stage in cells.STAGES.values():
            tables[1] = stage(run)
    tables[1] = json.loads(tables[1].to_json(orient="records"))
    return {number: root / ".artifacts" / "smoke" / "seed-0" for number, root in roots.items()}, tables


def tensors(both, artefact, file="tensors.safetensors"):
    return [load_file(both[0][number] / artefact / file) for number in (1, 2)]


@pytest.mark.parametrize("artefact", ["fine_tuned", "calibration"])
def test_statistics_are_those_of_the_global_batch(both, artefact):
    one, two = tensors(both, artefact)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-4 * one[name].abs().max(), name


@pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
def test_scores_give_the_same_masks(both, score):
    # Random scores are drawn from the bits of the weights, which differ in the last places.
    masks = [select(scores, 0.9) for scores in tensors(both, f"scores_{score}")]
    same = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
    assert same > 0.999 * sum(mask.numel() for mask in masks[0].values())


def test_answers_are_the_same_within_rounding(both):
    for artefact in ("logits_fine_tuned_train", "logits_recovered_gradient_90_test", "logits_student_distilled_1_test"):
        one, two = tensors(both, artefact)
        torch.testing.assert_close(one["logits"], two["logits"], rtol=1e-3, atol=1e-3)


def test_accuracies_of_all_models_are_the_same(both):
    one, two = ({row["model"]: row["accuracy"] for row in both[1][number]} for number in (1, 2))
    assert "recovered_merged_90" in one and "student_distilled_1" in one
    assert {m: a for m, a in one.items() if "random" not in m} == {m: a for m, a in two.items() if "random" not in m}


def test_the_same_artefacts_are_left_once_and_nothing_beside_them(both):
    folders = [sorted(path.name for path in both[0][number].iterdir()) for number in (1, 2)]
    assert folders[0] == folders[1]
    histories = [(both[0][number] / "fine_tuned" / "history.json").read_text() for number in (1, 2)]
    losses = [json.loads(history)[0]["losses"] for history in histories]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_what_two_processes_have_left_one_takes_as_its_own(both, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(both[0][2].parents[2]))
    run, before = open_run(get_profile("smoke", **SETTINGS), 0), (both[0][2] / "fine_tuned" / "artifact.json").stat()
    cells.STAGES["finetune"](run)
    assert (both[0][2] / "fine_tuned" / "artifact.json").stat() == before
    assert split_logits(run, "fine_tuned", "test").shape == (len(dataset(run, "test")), 2)


# --- parts of a batch ---


def toy_batch(model, reviews=5):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 4, 7, 2, 5][:reviews])
    ids = torch.randint(1, model.config.vocab_size, (reviews, 9), generator=generator)
    ids[torch.arange(9) >= lengths[:, None]] = 0
    return {"input_ids": ids, "lengths": lengths, "labels": torch.tensor([0, 1, 1, 0, 1][:reviews])}


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_parts_hold_every_review_once_and_their_shares_are_one(toy_model, parts):
    batch = toy_batch(toy_model)
    found = [part_of(batch, i, parts) for i in range(parts)]
    assert sum(share for _, share in found) == pytest.approx(1)
    rows = [tuple(row[row != 0].tolist()) for part, share in found if share for row in part["input_ids"]]
    assert sorted(rows) == sorted(tuple(row[row != 0].tolist()) for row in batch["input_ids"])
    assert all(part["input_ids"].shape[1] == part["lengths"].max() for part, _ in found)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 7])
@pytest.mark.parametrize("prefix_share", [0.0, 0.5])
def test_parts_add_up_to_the_gradient_of_the_whole_batch(toy_model, accumulation, prefix_share):
    model, batch = toy_model, toy_batch(toy_model)

    def loss_function(model, part):
        return classification_loss(model, part, prefix_share)

    loss = loss_function(model, batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = backward_in_parts(model, batch, loss_function, make_accelerator("no"), accumulation)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


# --- how they are started ---


def test_alone_a_process_is_the_main_one_of_one():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (1, 0, True)
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    distributed.barrier()


def test_a_launch_that_started_one_process_instead_of_several_is_refused(monkeypatch, capsys):
    # What accelerate launch --num_processes 2 leaves in the environment of a machine without GPUs.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("sys.argv", ["training", "finetune", "--profile", "smoke"])
    with pytest.raises(SystemExit, match=r"one process instead of several.*--multi_gpu.*torchrun"):
        grid.main_of_training()


KILLED = """
import os
from nbhelpers import checkpoints
from nbhelpers.experiments import finetune_model
from nbhelpers.profiles import get_profile
from nbhelpers.workspace import open_run

save = checkpoints.Checkpoints.save

def save_and_die(self, standing, *state):
    save(self, standing, *state)
    if standing.step == 4 and "DIE" in os.environ:
        os._exit(9)

checkpoints.Checkpoints.save = save_and_die
finetune_model(open_run(get_profile("smoke", **%r), 0))
"""


def test_two_processes_that_were_killed_go_on_to_the_same_weights(both, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED % SETTINGS, encoding="utf-8")
    places = {"NBHELPERS_ROOT": str(tmp_path), "NBHELPERS_BATCH": "1", "NBHELPERS_CHECKPOINT_SECONDS": "0"}
    in_two_processes([str(script)], ends_well=False, DIE="1", **places)
    assert "going on at step 4" in in_two_processes([str(script)], **places)
    folder = tmp_path / ".artifacts" / "smoke" / "seed-0" / "fine_tuned"
    for file in ("model.safetensors", "tensors.safetensors"):
        unbroken, resumed = load_file(both[0][2] / "fine_tuned" / file), load_file(folder / file)
        assert unbroken.keys() == resumed.keys()
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken), file
