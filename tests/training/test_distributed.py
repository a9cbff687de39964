"""Several processes: what two of them compute together is what one computes alone; and how they are started."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
from conftest import PROJECT, in_two_processes
from safetensors.torch import load_file

from nbhelpers.evaluation import predict_logits
from nbhelpers.pipeline import grid
from nbhelpers.profiles import get_profile
from nbhelpers.study import cells, fine_tuning
from nbhelpers.study.inputs import dataset
from nbhelpers.training import distributed
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone")
RUN = open_run(get_profile("smoke", **two_processes.SETTINGS), 0)

# Two processes sum what one process sums in another order. In float32 a sum of n terms changes by at most n * 2^-24 of
# its terms' sizes; the longest here have 300 terms (the vocabulary), and about a dozen follow each other between a loss
# and a gradient: 12 * 300 * 2^-24 = 2e-4 of a tensor's largest value. Half a batch, or a sum in place of a mean, would
# change them by half. Trained weights are not compared: Adam and Muon amplify the rounding of tiny gradients.
ROUNDING = 2e-4


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= ROUNDING * value.abs().max(), name


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder that two processes have filled, the tensors that they found, and what they printed."""
    folder, here = tmp_path_factory.mktemp("by-two"), Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, PROJECT)))
    printed = in_two_processes([two_processes.__file__, str(folder)], PYTHONPATH=path)
    return folder, load_file(folder / "found.safetensors"), printed


def test_one_step_and_a_calibration_pass_of_two_processes_are_those_of_the_global_batch(shared):
    found = {name: value for name, value in shared[1].items() if not name.startswith("pretrain/")}
    assert_near(found, two_processes.one_step())


def test_pretraining_in_two_processes_has_the_gradient_of_the_global_batch_and_nearly_the_same_losses(shared, tmp_path):
    losses, gradient = two_processes.pretraining(tmp_path / "alone")
    assert_near({name.removeprefix("pretrain/"): v for name, v in shared[1].items() if "pretrain/" in name}, gradient)
    both = np.mean(json.loads(shared[2].splitlines()[-1])["losses"], axis=0)
    assert len(both) == 10 and losses[-1] < losses[0] - 0.5
    # Muon orthogonalises in bfloat16: a difference in the last of its 8 bits may change an update by 0.4 %, ten of them
    # by 4 % of what ten steps have gained.
    np.testing.assert_allclose(both, losses, rtol=0, atol=0.04 * (losses[0] - losses[-1]))


def test_two_processes_that_were_interrupted_end_with_the_weights_of_two_that_were_not(shared):
    folder, _, printed = shared
    assert printed.count("continuing at step 4") == 1, "printed once"
    for file in ("model.safetensors", "tensors.safetensors", "flagged.safetensors"):
        paths = [folder / kind / ".artifacts/smoke/seed-0/fine_tuned" / file for kind in ("interrupted", "stages")]
        resumed, unbroken = map(load_file, paths)
        assert unbroken.keys() == resumed.keys()
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken), file


def test_what_two_processes_have_left_is_whole_and_one_process_takes_it_as_its_own(shared, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(shared[0] / "stages"))
    printed = json.loads(shared[2].splitlines()[-1])
    names = ("fine_tuned", "recovered_merged_90", "student_distilled_1")
    assert printed["processes"] == 2 and set(names) <= set(printed["models"])
    assert not [path for path in RUN.artifacts.iterdir() if "." in path.name], "no checkpoints, no partial folders"
    monkeypatch.setattr(fine_tuning, "train", lambda *_, **__: pytest.fail("trained again"))
    cells.STAGES["finetune"](RUN)
    rows = dataset(RUN, "test").input_ids
    for name in names:
        alone = torch.from_numpy(predict_logits(RUN.load_model(name), rows, **RUN.inference_options()))
        assert_near({"logits": RUN.load_tensors(f"logits_{name}_test")["logits"]}, {"logits": alone})


# --- how they are started ---


def test_alone_a_process_is_the_main_one_of_one():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (1, 0, True)
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert distributed.broadcast({"a": 1}) == {"a": 1} and distributed.all_gather("b") == ["b"]
    distributed.barrier()


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *words])
    grid.main_of_training()


def test_a_launch_that_started_one_process_instead_of_several_is_refused(monkeypatch):
    # The environment that accelerate launch --num_processes 2 makes on a machine without GPUs.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit, match=r"one process instead of several.*--multi_gpu.*torchrun"):
        command(monkeypatch, "finetune", "--profile", "smoke")


def test_the_command_leaves_the_artefact_that_the_notebook_finds(workspace, monkeypatch, capsys):
    command(monkeypatch, "finetune", "--profile", "smoke", "--set", "precision=no", "--set", "seeds=1")
    assert "accuracy" in capsys.readouterr().out
    monkeypatch.setattr(fine_tuning, "train", lambda *_, **__: pytest.fail("trained again"))
    fine_tuning.finetune_model(open_run(get_profile("smoke", precision="no", seeds=1), 0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "nonsense"], "nonsense"),
        (["--profile", "smoke", "--set", "model=/no/such/folder"], "/no/such/folder"),
        (["--profile", "smoke", "--seed", "-1"], "seed"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(workspace, monkeypatch, words, message):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "finetune", *words)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not list(workspace.rglob("*"))
