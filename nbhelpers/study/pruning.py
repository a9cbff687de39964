"""Notebook 03: accuracy right after pruning."""

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria, masks, selection
from nbhelpers.evaluation import wilson_interval
from nbhelpers.models import prunable_weights, stored_in_out
from nbhelpers.profiles import Profile
from nbhelpers.study.artefacts import on_device
from nbhelpers.study.inputs import dataset, pick, reviews_fingerprint, runs_of
from nbhelpers.study.scoring import build_scores, calibrate_model, calibration_rows, scores_of
from nbhelpers.system.progress import track
from nbhelpers.training import distributed
from nbhelpers.training.observers import calibrate
from nbhelpers.workspace import Run, save_tensors

SPARSEGPT_REVIEWS = 128


def pruners(profile: Profile) -> tuple[str, ...]:
    """Return what removes weights in a profile: its scores, and its comparators, which may include SparseGPT."""
    return tuple(dict.fromkeys((*profile.scores, *profile.comparators)))


def pruned_masks(run: Run, criterion: str, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks of single weights by a criterion's scores at a sparsity."""
    return selection.select(scores_of(run, criterion), sparsity)


def prune_model(run: Run, kept: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return the fine-tuned model with masks applied."""
    return masks.apply_masks(run.load_model("fine_tuned"), kept)


def pruned_sparsities(profile: Profile) -> tuple[float, ...]:
    """Return the sparsities at which models are evaluated right after pruning: the profile's and the main one."""
    return tuple(dict.fromkeys((*profile.sparsities, profile.main_sparsity)))


@torch.no_grad()
def sparsegpt_models(run: Run):
    """Yield the fine-tuned model pruned by SparseGPT, each matrix by itself, at all ``pruned_sparsities``."""
    rows = calibration_rows(run, SPARSEGPT_REVIEWS)
    with torch.enable_grad():
        hessians = calibrate(on_device(run, "fine_tuned"), *rows, hessians=True)["hessian"]
    for sparsity in pruned_sparsities(run.profile):
        model = on_device(run, "fine_tuned")
        for name, weight in prunable_weights(model).items():
            turned = stored_in_out(model, name)  # it takes [out, in]
            pruned = criteria.sparsegpt(weight.t() if turned else weight, hessians[name], sparsity)
            weight.copy_(pruned.t() if turned else pruned)
        yield model


def pruned_logits(run: Run, pruner: str) -> np.ndarray:
    """Artefact ``pruned_<pruner>``: validation logits [sparsities, n, 2] at all ``pruned_sparsities``."""
    sparsities = pruned_sparsities(run.profile)

    def build(target):
        if pruner == "sparsegpt":
            models = sparsegpt_models(run)
        else:
            scores = scores_of(run, pruner)
            pruned = (prune_model(run, selection.select(scores, sparsity)) for sparsity in sparsities)
            models = (model.to(distributed.device()) for model in pruned)
        rows = dataset(run, "validation").input_ids
        save_tensors(target.folder, {"logits": torch.from_numpy(np.stack([run.judge(m, rows) for m in models]))})

    inputs = ("fine_tuned", "calibration") if pruner == "sparsegpt" else ("fine_tuned", f"scores_{pruner}")
    calibrate_model(run) if pruner == "sparsegpt" else build_scores(run, (pruner,))
    reviews = reviews_fingerprint(run, "validation")
    settings = pick(run.profile, "max_tokens", "precision", sparsities=sparsities, reviews=reviews)
    run.cached(f"pruned_{pruner}", settings, build, inputs, made_by="03")
    return run.load_tensors(f"pruned_{pruner}")["logits"].numpy()


def curve_row(run: Run, criterion: str, sparsity: float, stage: str, split: str, correct: np.ndarray) -> dict:
    """Return a row of ``tables/curves.csv``: one model of one seed, its accuracy with Wilson's interval."""
    low, high = wilson_interval(correct)
    row = {"criterion": criterion, "sparsity": sparsity, "stage": stage, "seed": run.seed, "split": split}
    return row | {"accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}


def pruned_curves(run: Run) -> pd.DataFrame:
    """Return validation accuracy right after pruning: one row per pruner, sparsity and seed."""
    rows = []
    for seed_run in runs_of(run):
        labels = dataset(seed_run, "validation").labels
        for pruner in track(pruners(run.profile), "evaluating right after pruning"):
            right = pruned_logits(seed_run, pruner).argmax(-1) == labels
            rows += [
                curve_row(seed_run, pruner, sparsity, "pruned", "validation", correct)
                for sparsity, correct in zip(pruned_sparsities(run.profile), right, strict=True)
            ]
    return pd.DataFrame(rows)
