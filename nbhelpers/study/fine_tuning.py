"""Notebook 01: the pretrained model and the fine-tuned one."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from nbhelpers.models import create_model, save_dense, source_fingerprint
from nbhelpers.study.artefacts import on_device, read_history, save_statistics, save_trained
from nbhelpers.study.inputs import DATA_FIELDS, FINETUNE_FIELDS, MODEL_FIELDS, dataset, pick, reviews_fingerprint
from nbhelpers.study.predictions import validator
from nbhelpers.training import recipe_for, train
from nbhelpers.training.observers import FirstOrderMovement, FlaggedSets, GradientMagnitude
from nbhelpers.training.timing import fastest_threads, with_threads
from nbhelpers.workspace import Build, Run

FLAGGED = "flagged.safetensors"  # beside the fine-tuned weights: what each criterion flagged along the way


def save_pretrained_model(run: Run) -> Path:
    """Artefact ``pretrained``: the model before fine-tuning, its head still random."""

    def build(target):
        save_dense(create_model(run.profile, run.seed), target.folder)

    settings = pick(run.profile, *MODEL_FIELDS, seed=run.seed, weights=source_fingerprint(run.profile))
    return run.cached("pretrained", settings, build, kind="dense", made_by="01")


def finetuning_settings(run: Run) -> dict:
    """Return what a fine-tuned model depends on beside its first weights."""
    reviews = {"reviews": reviews_fingerprint(run, "train"), "chosen": reviews_fingerprint(run, "validation")}
    return pick(run.profile, *DATA_FIELDS, *FINETUNE_FIELDS, seed=run.seed) | reviews


def fine_tune(run: Run, model, target: Build, description: str, observers: tuple = ()) -> list[dict]:
    """Train a model by the profile's recipe and write it into the artefact being built; return the history.

    Of one seed, with as many threads as are measured to be fastest; several seeds are trained beside each other.
    """
    data, recipe = dataset(run, "train"), recipe_for(run.profile, "finetune")
    length = round(np.mean([len(row) for row in data.input_ids]))
    threads = fastest_threads(model, recipe, length) if run.profile.seeds == 1 else torch.get_num_threads()
    with with_threads(threads):
        history = train(
            model,
            data,
            recipe,
            seed=run.seed,
            observers=observers,
            validate=validator(run),
            checkpoints=target.checkpoints(),
            description=description,
        )
    history = [entry | {"threads": threads} for entry in history]
    save_trained(model, history, target.folder)
    return history


def finetune_model(run: Run) -> pd.DataFrame:
    """Artefact ``fine_tuned``: the model after fine-tuning, with what was observed of every prunable weight.

    Returns the learning curve. Makes ``pretrained`` first.
    """
    save_pretrained_model(run)

    def build(target):
        model = on_device(run, "pretrained")
        observed = {"mean_abs_gradient": GradientMagnitude(model), "first_order_movement": FirstOrderMovement(model)}
        flagged = FlaggedSets(observed["mean_abs_gradient"], run.profile.main_sparsity)
        fine_tune(run, model, target, "fine-tuning", (flagged, *observed.values()))
        save_statistics(target.folder, {key: observer.mean() for key, observer in observed.items()})
        save_file(flagged.tensors(), target.folder / FLAGGED)

    settings = finetuning_settings(run) | pick(run.profile, "main_sparsity")
    run.cached("fine_tuned", settings, build, ("pretrained",), kind="dense", made_by="01")
    return read_history(run, "fine_tuned")


def flagged_along_the_way(run: Run) -> dict[str, torch.Tensor]:
    """Return what each criterion flagged along fine-tuning, at the main sparsity (``FlaggedSets.tensors``)."""
    return load_file(run.folder("fine_tuned") / FLAGGED)
