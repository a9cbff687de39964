"""Notebook 03: accuracy right after pruning, and recovery by further training."""

import dataclasses
import functools
import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria, masks, selection
from nbhelpers.evaluation import predict_logits, wilson_interval
from nbhelpers.models import load_dense, prunable_weights, stored_in_out
from nbhelpers.profiles import Profile
from nbhelpers.study.artefacts import model_name, on_device, save_trained
from nbhelpers.study.choices import best_comparator, decide, recovery_rate
from nbhelpers.study.inputs import TRAIN_FIELDS, dataset, pick, reviews_fingerprint, runs_of
from nbhelpers.study.predictions import (
    answers_right,
    validation_accuracy,
    validator,
)
from nbhelpers.study.scoring import MAIN, SCORES, build_scores, calibrate_model, calibration_rows, scores_of
from nbhelpers.study.teacher import teacher_data_and_loss
from nbhelpers.system.progress import track
from nbhelpers.training import distributed, recipe_for, train
from nbhelpers.training.observers import RunningTaylor, calibrate
from nbhelpers.workspace import Build, Run, maker_of, save_tensors

RECOVERY_FIELDS = (*TRAIN_FIELDS, "batch_size", "recovery_steps", "prefix_share")
GRADUAL_SHARE = 0.6  # of the recovery steps, those over which gradual pruning reaches its sparsity
FIRST_CUT = 0.65  # what gradual pruning removes at once
MASK_UPDATES = 30  # from there to its sparsity
# What removes weights: by a score, or as SparseGPT does it, which also changes the weights that stay.
PRUNERS = (*SCORES, "sparsegpt")
SPARSEGPT_REVIEWS = 128
ROW = ("seed", "criterion", "sparsity", "accuracy", "revived")  # what is said of a recovered model
RATES = "rates.json"  # beside the model of the best learning rate
ZEROS = "zeros.json"  # beside a recovered model: what was counted in its weights


# --- right after pruning ---


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
        rows, options = dataset(run, "validation").input_ids, run.inference_options()
        save_tensors(
            target.folder, {"logits": torch.from_numpy(np.stack([predict_logits(m, rows, **options) for m in models]))}
        )

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


def pruned_curves(run: Run, pruners: tuple[str, ...] = PRUNERS) -> pd.DataFrame:
    """Return validation accuracy right after pruning: one row per pruner, sparsity and seed."""
    rows = []
    for seed_run in runs_of(run):
        labels = dataset(seed_run, "validation").labels
        for pruner in track(pruners, "evaluating right after pruning"):
            right = pruned_logits(seed_run, pruner).argmax(-1) == labels
            rows += [
                curve_row(seed_run, pruner, sparsity, "pruned", "validation", correct)
                for sparsity, correct in zip(pruned_sparsities(run.profile), right, strict=True)
            ]
    return pd.DataFrame(rows)


def choose_comparator(run: Run) -> str:
    """Decide ``choice_comparator``: the best right after pruning, on average over sparsities and seeds."""
    curves = pruned_curves(run, tuple(criteria.COMPARATORS))
    means = curves.groupby("criterion", as_index=False)["accuracy"].mean()
    return decide(run, "comparator", means, made_by="03")["criterion"]


# --- recovery ---


def train_further(
    run: Run, model, description: str, rate: float, checkpoints, keeper=None, data=None, loss=None, observers=()
) -> list[dict]:
    """Train by a profile's recovery steps, without a choice among epochs: the last one counts. Return the history."""
    recipe = dataclasses.replace(recipe_for(run.profile, "recover"), learning_rate=rate)
    options = {"seed": run.seed, "mask_keeper": keeper, "loss_function": loss, "description": description}
    return train(model, data or dataset(run, "train"), recipe, checkpoints=checkpoints, observers=observers, **options)


def recover_in_place(
    run: Run, name: str, sparsity: float, rate: float, chosen: dict | None, target: Build
) -> tuple[torch.nn.Module, list[dict]]:
    """Return the fine-tuned model pruned with some masks, or with none, and trained further; and its history.

    name: the score that chose the masks, or "control"; target: the artefact that is being built.
    """
    model = on_device(run, "fine_tuned")
    keeper = masks.MaskKeeper(model, chosen) if chosen is not None else None
    title = f"recovering {name} at {sparsity:.0%}" if keeper else "dense control"
    checkpoints = target.checkpoints(f"rate-{rate:g}")
    history = train_further(run, model, f"{title}, learning rate {rate:g}", rate, checkpoints, keeper)
    if keeper and keeper.revived():
        raise RuntimeError(f"{keeper.revived()} weights pruned by {name} revived during recovery")
    return model, history


def scan_recovery_rates(run: Run, name: str) -> pd.DataFrame:
    """Artefact ``rates_<name>``: a score's pruning at the main sparsity, or "control", with each learning rate.

    Each score and the dense control get the rate that suits them best on validation, decided as
    ``choice_rate_<name>``: a shared rate would favour the score that it was tuned for. Returns one row per rate: score,
    learning_rate, accuracy; the best model is kept.
    """
    dense, main = name == "control", run.profile.main_sparsity

    def build(target):
        chosen, rows = None if dense else pruned_masks(run, name, main), []
        for rate in run.profile.recovery_learning_rates:
            model, history = recover_in_place(run, name, main, rate, chosen, target)
            rows.append({"score": name, "learning_rate": rate, "accuracy": validator(run)(model)})
            if rows[-1]["accuracy"] > max((row["accuracy"] for row in rows[:-1]), default=-1):
                save_trained(model, history, target.folder)
        (target.folder / RATES).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    if not dense:
        build_scores(run, (name,))
    settings = pick(run.profile, *RECOVERY_FIELDS, "recovery_learning_rates", "main_sparsity", seed=run.seed)
    inputs = ("fine_tuned",) if dense else ("fine_tuned", f"scores_{name}")
    run.cached(f"rates_{name}", settings, build, inputs, made_by="03")
    table = pd.DataFrame(json.loads((run.folder(f"rates_{name}") / RATES).read_text(encoding="utf-8")))
    decide(run, f"rate_{name}", table, made_by="03")
    return table


def copy_best(run: Run, name: str, target: Build) -> None:
    """Copy the model that the scan of learning rates kept."""
    for path in run.folder(f"rates_{name}").iterdir():
        if path.name not in (RATES, "artifact.json"):
            shutil.copy(path, target.folder)


def count_zeros(model, chosen: dict[str, torch.Tensor]) -> dict:
    """Return the sparsity of a model, and how many of the weights that masks drop are not zero in it."""
    kept = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    keeper = masks.MaskKeeper(model, chosen, apply=False)
    return {"sparsity": masks.sparsity_of(kept), "revived": keeper.revived()}


def recover_model(
    run: Run, criterion: str, sparsity: float, chosen: dict | None = None, stage: str = "recovered"
) -> dict:
    """Artefact ``<stage>_<criterion>_<percent>``: pruned, then trained further with its masks held.

    chosen: other masks than those of the criterion's scores. Returns a dict: seed, criterion, sparsity (reached),
    accuracy (validation), and how many pruned weights revived (0). Raises ``WorkspaceError`` where the criterion's
    learning rate has not been decided (``scan_recovery_rates``).
    """
    name, rate = model_name(stage, criterion, sparsity), recovery_rate(run, criterion)
    scanned = chosen is None and sparsity == run.profile.main_sparsity
    chosen = pruned_masks(run, criterion, sparsity) if chosen is None else chosen

    def build(target):
        if scanned:
            copy_best(run, criterion, target)
        else:
            save_trained(*recover_in_place(run, criterion, sparsity, rate, chosen, target), target.folder)
        counted = count_zeros(load_dense(target.folder), chosen)
        (target.folder / ZEROS).write_text(json.dumps(counted), encoding="utf-8")

    bits = masks.pack(chosen).numpy().tobytes()
    settings = pick(run.profile, *RECOVERY_FIELDS, masks=hashlib.sha256(bits).hexdigest(), rate=rate, seed=run.seed)
    inputs = (f"rates_{criterion}",) if scanned else ("fine_tuned", f"scores_{criterion}")
    run.cached(name, settings, build, inputs, kind="dense", made_by=maker_of(name))
    counted = json.loads((run.folder(name) / ZEROS).read_text(encoding="utf-8"))
    values = (run.seed, criterion, counted["sparsity"], validation_accuracy(run, name), counted["revived"])
    return dict(zip(ROW, values, strict=True))


def train_control(run: Run) -> float:
    """Artefact ``fine_tuned_extra``: the dense model with the same extra steps as every recovery, the fair control.

    Returns its validation accuracy.
    """
    scan_recovery_rates(run, "control")
    settings = pick(run.profile, *RECOVERY_FIELDS, rate=recovery_rate(run, "control"), seed=run.seed)
    build = functools.partial(copy_best, run, "control")
    run.cached("fine_tuned_extra", settings, build, ("rates_control",), kind="dense", made_by="03")
    return validation_accuracy(run, "fine_tuned_extra")


def recover_otherwise(run: Run, method: str, criterion: str, sparsity: float) -> str:
    """Artefact ``gradual_<criterion>_<percent>`` or ``taught_...``, with the steps and data order of every recovery.

    "gradual" removes 65 % at once and reaches the sparsity step by step over the first 60 % of the steps, each time by
    the running mean of |w * g|; "taught" starts from the pruned model and learns from the labels and the dense model's
    logits at every token in equal parts (T = 2). Returns the artefact's name.
    """
    name, rate = model_name(method, criterion, sparsity), recovery_rate(run, criterion)
    score = scores_of(run, criterion)

    def build(target):
        model, title = on_device(run, "fine_tuned"), f"recovering {criterion} at {sparsity:.0%}, {method}"
        checkpoints = target.checkpoints()
        if method == "taught":
            keeper = masks.MaskKeeper(model, selection.select(score, sparsity))
            history = train_further(run, model, title, rate, checkpoints, keeper, *teacher_data_and_loss(run, 0.5, 2.0))
        else:
            steps = round(GRADUAL_SHARE * run.profile.recovery_steps)
            observer, first = RunningTaylor(model, score), min(FIRST_CUT, sparsity)
            options = {"every": max(1, steps // MASK_UPDATES), "first": first}
            keeper = masks.GradualKeeper(model, lambda: observer.scores, sparsity, steps, **options)
            history = train_further(run, model, title, rate, checkpoints, keeper, observers=(observer,))
            keeper.finish()
        save_trained(model, history, target.folder)

    settings = pick(run.profile, *RECOVERY_FIELDS, sparsity=sparsity, rate=rate, seed=run.seed)
    run.cached(name, settings, build, ("fine_tuned", f"scores_{criterion}"), kind="dense", made_by="03")
    return name


# --- all recoveries of a run ---


def contenders(comparator: str) -> tuple[str, ...]:
    """Return the scores that are recovered at every sparsity: three criteria, their merge, the best comparator."""
    return (*MAIN, comparator)


def recoveries(profile: Profile, comparator: str) -> list[tuple[str, float]]:
    """Return which (score, sparsity) are recovered: contenders everywhere, other comparators where the profile asks."""
    everywhere = [(c, s) for s in profile.recovery_sparsities for c in contenders(comparator)]
    others = [c for c in criteria.COMPARATORS if c != comparator]
    return everywhere + [(c, s) for s in profile.comparator_sparsities for c in others]


def recover_all(run: Run) -> pd.DataFrame:
    """Make every recovery of a profile and the dense controls, of all seeds, and decide the best score.

    Returns one row per model, see ``recover_model``. Decides the comparator first, where that has not been done.
    """
    pairs, rows = recoveries(run.profile, choose_comparator(run)), []
    for seed_run in runs_of(run):
        train_control(seed_run)
        for criterion in dict.fromkeys(criterion for criterion, _ in pairs):
            scan_recovery_rates(seed_run, criterion)
        rows += [recover_model(seed_run, criterion, sparsity) for criterion, sparsity in pairs]
    choose_score(run)
    return pd.DataFrame(rows)


def recovered_curves(run: Run, split: str = "validation") -> pd.DataFrame:
    """Return the accuracy of every recovered model on a split: one row per criterion, sparsity and seed."""
    rows = []
    for seed_run in runs_of(run):
        for criterion, sparsity in recoveries(run.profile, best_comparator(run)):
            right = answers_right(seed_run, model_name("recovered", criterion, sparsity), split)
            rows.append(curve_row(seed_run, criterion, sparsity, "recovered", split, right))
    return pd.DataFrame(rows)


def choose_score(run: Run) -> str:
    """Decide ``choice_score``: the best contender on validation after recovery at the main sparsity, over all seeds."""
    rows = []
    for criterion in contenders(best_comparator(run)):
        name = model_name("recovered", criterion, run.profile.main_sparsity)
        accuracy = np.mean([validation_accuracy(seed_run, name) for seed_run in runs_of(run)])
        rows.append({"criterion": criterion, "accuracy": accuracy})
    return decide(run, "score", pd.DataFrame(rows), made_by="03")["criterion"]
