"""Run by ``test_distributed`` in two processes: all that several processes do together, into the folder of argument 1.

The test calls the same functions in one process. Its tensors, losses and tables are what the two are compared by.
"""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from test_loop import toy_data

from nbhelpers.profiles import get_profile
from nbhelpers.study import cells
from nbhelpers.study.fine_tuning import finetune_model
from nbhelpers.tools import pretrain
from nbhelpers.training import Recipe, distributed, train
from nbhelpers.training.checkpoints import Checkpoints
from nbhelpers.training.observers import GradientMagnitude, calibrate
from nbhelpers.workspace import open_run

# Batches of 7, so that no number of processes and micro-batches divides them; no dropout, whose random numbers are each
# process's own; float32.
SETTINGS = {"dropout": 0.0, "precision": "no", "seeds": 1, "batch_size": 7, "accumulation": 2}
TEXTS = [f"Review {i}: {adjective} plot, {adjective} cast." for i in range(3) for adjective in ("good", "bad", "dull")]


class PowerCut(BaseException):
    """Ends a training in the middle, as no part of the product does."""


def one_step() -> dict[str, torch.Tensor]:
    """Return the loss and the size of the gradient of one training step, and the statistics of a calibration pass."""
    model, data = tiny_model(), toy_data(7)
    observer = GradientMagnitude(model)
    history = train(model, data, Recipe(1e-3, 7, steps=1, precision="no", accumulation=2), observers=(observer,))
    statistics = calibrate(tiny_model(), data.input_ids, data.labels.tolist(), hessians=True)
    statistics |= {"gradient": observer.mean(), "training": {"loss": torch.tensor(history[0]["loss"])}}
    return {f"{kind}/{name}": value for kind, tensors in statistics.items() for name, value in tensors.items()}


def pretraining(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Pre-train for ten steps; return the loss of this process's windows at each, and the first step's gradient."""
    losses, gradients = [], []
    loss_of, average = pretrain.language_model_loss, pretrain.average_gradients

    def recorded_loss(*arguments):
        loss = loss_of(*arguments)
        losses.append(loss.item())
        return loss

    def recorded_average(model, accelerator):
        average(model, accelerator)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    folder.mkdir(exist_ok=True)
    distributed.barrier()
    (folder / f"texts{distributed.rank()}.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    words = f"--texts {folder}/texts{distributed.rank()}.txt --work {folder}/work --out {folder}/out --tokens 640"
    words += " --width 64 --layers 1 --vocabulary 300 --batch 2 --dropout 0"
    labelled = pd.DataFrame({"text": [f"Labelled review {i}." for i in range(200)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CONTEXT", 32)
        patch.setattr(pretrain, "mixed_precision", lambda: "no")
        patch.setattr(pretrain, "bits_per_byte", lambda *_: 1.0)
        patch.setattr(pretrain, "read_movie_reviews", lambda: labelled)
        patch.setattr(pretrain, "language_model_loss", recorded_loss)
        patch.setattr(pretrain, "average_gradients", recorded_average)
        pretrain.pretrain(pretrain.make_parser().parse_args(words.split()))
    return losses, gradients[0]


def fine_tune_interrupted(run) -> None:
    """Fine-tune with a checkpoint at every step, break off after the fourth, and continue."""
    save = Checkpoints.save

    def save_and_fail(self, state, *stored):
        save(self, state, *stored)
        if state.step == 4:
            distributed.barrier()  # until the main process has written the checkpoint
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_CHECKPOINT_SECONDS", "0")
        patch.setattr(Checkpoints, "save", save_and_fail)
        with pytest.raises(PowerCut):
            finetune_model(run)
    finetune_model(run)


def main(folder: Path) -> None:
    """Do all of it; the main process prints what it found."""
    tensors = one_step()
    losses, gradient = pretraining(folder / "pretrain")
    tensors |= {f"pretrain/{name}": value for name, value in gradient.items()}
    run = open_run(get_profile("smoke", **SETTINGS), 0)
    os.environ["NBHELPERS_ROOT"] = str(folder / "interrupted")
    fine_tune_interrupted(run)
    os.environ["NBHELPERS_ROOT"] = str(folder / "stages")
    for stage in cells.STAGES.values():
        table = stage(run)
    losses = distributed.all_gather(losses)
    if distributed.is_main_process():
        save_file(
            tensors | {f"pretrain/{name}": value for name, value in gradient.items()}, folder / "found.safetensors"
        )
        print(json.dumps({"processes": distributed.world_size(), "losses": losses, "models": list(table["model"])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
