"""Notebook 02: statistics of the fine-tuned model, and one score per weight for each criterion."""

import functools

import numpy as np
import torch

from nbhelpers import criteria
from nbhelpers.models import prunable_weights
from nbhelpers.study.artefacts import load_statistics, on_device, save_statistics
from nbhelpers.study.inputs import dataset, pick
from nbhelpers.training.observers import calibrate
from nbhelpers.workspace import Run, save_tensors

MAIN = (*criteria.CRITERIA, "merged")  # the three criteria and their merge


def calibration_rows(run: Run, count: int) -> tuple[list[list[int]], list[int]]:
    """Return some training reviews, evenly spaced so that both classes are among them: token ids and labels."""
    data = dataset(run, "train")
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    return [data.input_ids[i] for i in chosen], data.labels[chosen].tolist()


def calibrate_model(run: Run) -> None:
    """Artefact ``calibration``: what a pass over some training reviews shows of the fine-tuned model."""

    def build(target):
        rows = calibration_rows(run, run.profile.calibration_reviews)
        save_statistics(target.folder, calibrate(on_device(run, "fine_tuned"), *rows))

    run.cached("calibration", pick(run.profile, "calibration_reviews"), build, ("fine_tuned",), made_by="02")


def statistics_of(run: Run) -> tuple[dict, dict]:
    """Return the fine-tuned prunable weights, and the statistics that the criteria and the comparators take."""
    weights = {n: w.detach() for n, w in prunable_weights(run.load_model("fine_tuned")).items()}
    pretrained = {n: w.detach() for n, w in prunable_weights(run.load_model("pretrained")).items()}
    calibrate_model(run)
    observed = load_statistics(run, "fine_tuned") | load_statistics(run, "calibration")
    return weights, {"pretrained": pretrained} | observed


def build_scores(run: Run, names: tuple[str, ...] = tuple(criteria.CRITERIA)) -> None:
    """Artefacts ``scores_<name>``, of ``criteria.score``, one after the other, so that no two need be in memory."""
    calibrate_model(run)
    # Read once, and only if a score has to be computed.
    observed = functools.cache(lambda: statistics_of(run))
    for name in names:

        def build(target, name=name):
            save_tensors(target.folder, criteria.score(name, *observed()))

        inputs = ("pretrained", "fine_tuned", "calibration")
        run.cached(f"scores_{name}", {"criterion": name}, build, inputs, made_by="02")


def score_weights(run: Run, names: tuple[str, ...] = tuple(criteria.CRITERIA)) -> dict[str, dict[str, torch.Tensor]]:
    """Return the scores of ``build_scores``: {name: {parameter name: score}}."""
    build_scores(run, names)
    return {name: run.load_tensors(f"scores_{name}") for name in names}


def scores_of(run: Run, name: str) -> dict[str, torch.Tensor]:
    """Return the scores of one criterion, comparator or merge."""
    return score_weights(run, (name,))[name]
