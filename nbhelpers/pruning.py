"""Scores, masks, recovery and conversion of a run's model: what notebooks 02 to 04 compute, each an artefact."""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria, masks, processes
from nbhelpers.checkpoints import checkpoints_of
from nbhelpers.evaluation import predict_logits, wilson_interval
from nbhelpers.experiments import (
    TRAIN_FIELDS,
    answers_right,
    dataset,
    judging,
    load_statistics,
    model_name,
    on_device,
    pick,
    reviews_fingerprint,
    runs_of,
    save_statistics,
    save_trained,
    teacher_data_and_loss,
    validation_accuracy,
    validator,
)
from nbhelpers.models import has_structures, load_config, load_dense, prunable_weights, stored_in_out, structures
from nbhelpers.profiles import Profile
from nbhelpers.progress import track
from nbhelpers.sparse import convert_to_sparse, save_sparse
from nbhelpers.statistics import calibrate
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import Run, maker_of, save_tensors

RECOVERY_FIELDS = (*TRAIN_FIELDS, "batch_size", "recovery_steps", "prefix_share")
GRADUAL_SHARE = 0.7  # of the recovery steps, those over which gradual pruning reaches its sparsity
MAIN = (*criteria.CRITERIA, "merged")
SCORES = (*MAIN, *criteria.COMPARATORS)
# What removes weights: by a score, or as SparseGPT does it, which also changes the weights that stay.
PRUNERS = (*SCORES, "sparsegpt")
SPARSEGPT_REVIEWS = 128
ROW = ("seed", "criterion", "sparsity", "accuracy", "revived")  # what is said of a recovered model
RATES = "rates.json"  # beside the model of the best learning rate
ZEROS = "zeros.json"  # beside a recovered model: what was counted in its weights


# --- 02: statistics and scores ---


def calibration_rows(run: Run, count: int) -> tuple[list[list[int]], list[int]]:
    """Some training reviews, evenly spaced so that both classes are among them: token ids and labels."""
    data = dataset(run, "train")
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    return [data.input_ids[i] for i in chosen], data.labels[chosen].tolist()


def calibrate_model(run: Run) -> None:
    """Artefact ``calibration``: what a pass over some training reviews shows of the fine-tuned model."""

    def build(folder):
        rows = calibration_rows(run, run.profile.calibration_reviews)
        save_statistics(folder, calibrate(on_device(run, "fine_tuned"), *rows))

    run.cached("calibration", pick(run.profile, "calibration_reviews"), build, ("fine_tuned",), made_by="02")


def statistics_of(run: Run) -> tuple[dict, dict]:
    """The fine-tuned prunable weights, and the statistics that the criteria and the comparators take."""
    weights = {n: w.detach() for n, w in prunable_weights(run.load_model("fine_tuned")).items()}
    pretrained = {n: w.detach() for n, w in prunable_weights(run.load_model("pretrained")).items()}
    calibrate_model(run)
    observed = load_statistics(run, "fine_tuned") | load_statistics(run, "calibration")
    return weights, {"pretrained": pretrained} | observed


def build_scores(run: Run, names: tuple[str, ...] = tuple(criteria.CRITERIA)) -> None:
    """Artefacts ``scores_<name>``, one after the other, so that no two need be in memory at once.

    names: of criteria and comparators, and ``merged``, the rank at which the three criteria agree.
    """
    registry = criteria.CRITERIA | criteria.COMPARATORS
    calibrate_model(run)
    # Read once, and only if a score has to be computed.
    observed = functools.cache(lambda: statistics_of(run))
    for name in names:
        if name == "merged":
            build_scores(run)
            inputs = tuple(f"scores_{criterion}" for criterion in criteria.CRITERIA)
        else:
            inputs = ("pretrained", "fine_tuned", "calibration")

        def build(folder, name=name):
            merge = name == "merged"
            tensors = criteria.merge_scores(score_weights(run), "all") if merge else registry[name](*observed())
            save_tensors(folder, tensors)

        run.cached(f"scores_{name}", {"criterion": name}, build, inputs, made_by="02")


def score_weights(run: Run, names: tuple[str, ...] = tuple(criteria.CRITERIA)) -> dict[str, dict[str, torch.Tensor]]:
    """The scores of ``build_scores``: {name: {parameter name: score}}."""
    build_scores(run, names)
    return {name: run.load_tensors(f"scores_{name}") for name in names}


def scores_of(run: Run, name: str) -> dict[str, torch.Tensor]:
    """The scores of one criterion or comparator, or of ``merged``."""
    return score_weights(run, (name,))[name]


# --- 03: right after pruning ---


def prune_model(run: Run, masks_: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The fine-tuned model with the masks applied."""
    return masks.apply_masks(run.load_model("fine_tuned"), masks_)


def pruned_sparsities(profile: Profile) -> tuple[float, ...]:
    """The sparsities at which models are judged right after pruning: those of the profile, and the main one."""
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

    def build(folder):
        if pruner == "sparsegpt":
            models = sparsegpt_models(run)
        else:
            scores = scores_of(run, pruner)
            pruned = (prune_model(run, masks.select(scores, sparsity)) for sparsity in sparsities)
            models = (model.to(processes.device()) for model in pruned)
        rows, how = dataset(run, "validation").input_ids, judging(run)
        save_tensors(folder, {"logits": torch.from_numpy(np.stack([predict_logits(m, rows, **how) for m in models]))})

    inputs = ("fine_tuned", "calibration") if pruner == "sparsegpt" else ("fine_tuned", f"scores_{pruner}")
    calibrate_model(run) if pruner == "sparsegpt" else build_scores(run, (pruner,))
    reviews = reviews_fingerprint(run, "validation")
    settings = pick(run.profile, "max_tokens", "precision", sparsities=sparsities, reviews=reviews)
    run.cached(f"pruned_{pruner}", settings, build, inputs, made_by="03")
    return run.load_tensors(f"pruned_{pruner}")["logits"].numpy()


def curve_row(run: Run, criterion: str, sparsity: float, stage: str, split: str, correct: np.ndarray) -> dict:
    """A row of ``tables/curves.csv``: one model of one seed, its accuracy with Wilson's interval."""
    low, high = wilson_interval(correct)
    where = {"criterion": criterion, "sparsity": sparsity, "stage": stage, "seed": run.seed, "split": split}
    return where | {"accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}


def pruned_curves(run: Run, pruners: tuple[str, ...] = PRUNERS) -> pd.DataFrame:
    """Validation accuracy right after pruning: a row a pruner, sparsity and seed."""
    rows = []
    for one in runs_of(run):
        labels = dataset(one, "validation").labels
        for pruner in track(pruners, "judging right after pruning"):
            right = pruned_logits(one, pruner).argmax(-1) == labels
            rows += [
                curve_row(one, pruner, sparsity, "pruned", "validation", correct)
                for sparsity, correct in zip(pruned_sparsities(run.profile), right, strict=True)
            ]
    return pd.DataFrame(rows)


# --- 03: recovery ---


def train_on(run: Run, model, description: str, rate: float, checkpoints, keeper=None, data=None, loss=None):
    """A profile's recovery steps, without a choice among epochs: the last one counts. Returns the history."""
    recipe = dataclasses.replace(recipe_for(run.profile, "recover"), learning_rate=rate)
    options = {"seed": run.seed, "mask_keeper": keeper, "loss_function": loss, "description": description}
    return train(model, data or dataset(run, "train"), recipe, checkpoints=checkpoints, **options)


def recover_in_place(run: Run, what: str, sparsity: float, rate: float, chosen: dict | None, folder: Path) -> tuple:
    """The fine-tuned model pruned with some masks and trained on, or without any; and its history.

    folder: of the artefact that is being built.
    """
    model = on_device(run, "fine_tuned")
    keeper = masks.MaskKeeper(model, chosen) if chosen is not None else None
    title = f"recovering {what} at {sparsity:.0%}" if keeper else "dense control"
    checkpoints = checkpoints_of(folder, f"rate-{rate:g}")
    history = train_on(run, model, f"{title}, learning rate {rate:g}", rate, checkpoints, keeper)
    if keeper and keeper.revived():
        raise RuntimeError(f"{keeper.revived()} weights pruned by {what} revived during recovery")
    return model, history


def scan_recovery_rates(run: Run, what: str) -> pd.DataFrame:
    """Artefact ``rates_<what>``: a score's pruning at the main sparsity, or "control", with each learning rate.

    Each score and the dense control get the rate that suits them best on validation: with one for all, the one whom
    it was chosen for would win. Returns a row a rate: what, learning_rate, accuracy; the best model is kept.
    """
    dense, main = what == "control", run.profile.main_sparsity

    def build(folder):
        chosen, rows = None if dense else masks.select(scores_of(run, what), main), []
        for rate in run.profile.recovery_learning_rates:
            model, history = recover_in_place(run, what, main, rate, chosen, folder)
            rows.append({"what": what, "learning_rate": rate, "accuracy": validator(run)(model)})
            if rows[-1]["accuracy"] > max((row["accuracy"] for row in rows[:-1]), default=-1):
                save_trained(model, history, folder)
        (folder / RATES).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    if not dense:
        build_scores(run, (what,))
    settings = pick(run.profile, *RECOVERY_FIELDS, "recovery_learning_rates", "main_sparsity", seed=run.seed)
    inputs = ("fine_tuned",) if dense else ("fine_tuned", f"scores_{what}")
    run.cached(f"rates_{what}", settings, build, inputs, made_by="03")
    return pd.DataFrame(json.loads((run.folder(f"rates_{what}") / RATES).read_text(encoding="utf-8")))


def recovery_rate(run: Run, what: str) -> float:
    """The learning rate with which a score's pruning, or "control", was best on validation; the first of equals."""
    table = scan_recovery_rates(run, what)
    return float(table.loc[table["accuracy"].idxmax(), "learning_rate"])


def copy_best(run: Run, what: str, folder: Path) -> None:
    """The model that the scan of learning rates kept."""
    for path in run.folder(f"rates_{what}").iterdir():
        if path.name not in (RATES, "artifact.json"):
            shutil.copy(path, folder)


def count_zeros(model, chosen: dict[str, torch.Tensor]) -> dict:
    """The sparsity of a model, and how many of the weights that masks drop are not zero in it."""
    zeros = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    keeper = masks.MaskKeeper(model, chosen, apply=False)
    return {"sparsity": masks.sparsity_of(zeros), "revived": keeper.revived()}


def recover_model(run: Run, criterion: str, sparsity: float, chosen: dict | None = None, stage: str = "recovered"):
    """Artefact ``<stage>_<criterion>_<percent>``: pruned, then trained on with its masks held.

    chosen: other masks than those of the criterion's scores. Returns a dict: seed, criterion, sparsity (reached),
    accuracy (validation), and how many pruned weights revived (0).
    """
    name, rate = model_name(stage, criterion, sparsity), recovery_rate(run, criterion)
    scanned = chosen is None and sparsity == run.profile.main_sparsity
    chosen = masks.select(scores_of(run, criterion), sparsity) if chosen is None else chosen

    def build(folder):
        if scanned:
            copy_best(run, criterion, folder)
        else:
            save_trained(*recover_in_place(run, criterion, sparsity, rate, chosen, folder), folder)
        (folder / ZEROS).write_text(json.dumps(count_zeros(load_dense(folder), chosen)), encoding="utf-8")

    bits = b"".join(np.packbits(mask.numpy()).tobytes() for mask in chosen.values())
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
    settings = pick(run.profile, *RECOVERY_FIELDS, rate=recovery_rate(run, "control"), seed=run.seed)
    build = functools.partial(copy_best, run, "control")
    run.cached("fine_tuned_extra", settings, build, ("rates_control",), kind="dense", made_by="03")
    return validation_accuracy(run, "fine_tuned_extra")


def recover_otherwise(run: Run, way: str, criterion: str, sparsity: float) -> str:
    """Artefact ``gradual_<criterion>_<percent>`` or ``taught_...``, with the steps and data order of every recovery.

    "gradual" reaches the sparsity step by step over the first 70 % of the steps; "taught" starts from the pruned model
    and learns from the labels and the dense model's logits in equal parts (T = 2). Returns the artefact's name.
    """
    name, rate = model_name(way, criterion, sparsity), recovery_rate(run, criterion)
    score = scores_of(run, criterion)

    def build(folder):
        model, what = on_device(run, "fine_tuned"), f"recovering {criterion} at {sparsity:.0%}, {way}"
        checkpoints = checkpoints_of(folder)
        if way == "taught":
            keeper = masks.MaskKeeper(model, masks.select(score, sparsity))
            history = train_on(run, model, what, rate, checkpoints, keeper, *teacher_data_and_loss(run, 0.5, 2.0))
        else:
            steps = round(GRADUAL_SHARE * run.profile.recovery_steps)
            keeper = masks.GradualKeeper(model, lambda: score, sparsity, steps)
            history = train_on(run, model, what, rate, checkpoints, keeper)
            keeper.finish()
        save_trained(model, history, folder)

    settings = pick(run.profile, *RECOVERY_FIELDS, sparsity=sparsity, rate=rate, seed=run.seed)
    run.cached(name, settings, build, ("fine_tuned", f"scores_{criterion}"), kind="dense", made_by="03")
    return name


def best_comparator(run: Run) -> str:
    """The comparator with the best validation accuracy right after pruning, over all seeds and sparsities."""
    curves = pruned_curves(run, tuple(criteria.COMPARATORS))
    return curves.groupby("criterion")["accuracy"].mean().idxmax()


def contenders(run: Run) -> tuple[str, ...]:
    """The scores that are recovered at every sparsity: the three criteria, their merge and the best comparator."""
    return (*MAIN, best_comparator(run))


def recoveries(run: Run) -> list[tuple[str, float]]:
    """Which (score, sparsity) are recovered: contenders everywhere, the other comparators where they are asked for."""
    best = contenders(run)
    everywhere = [(c, s) for s in run.profile.recovery_sparsities for c in best]
    others = [c for c in criteria.COMPARATORS if c not in best]
    return everywhere + [(c, s) for s in run.profile.comparator_sparsities for c in others]


def recover_all(run: Run) -> pd.DataFrame:
    """Every recovery of a profile and the dense controls, of all seeds: a row a model, see ``recover_model``."""
    chosen, rows = recoveries(run), []
    for one in runs_of(run):
        train_control(one)
        rows += [recover_model(one, criterion, sparsity) for criterion, sparsity in chosen]
    return pd.DataFrame(rows)


def recovered_curves(run: Run, split: str = "validation") -> pd.DataFrame:
    """Accuracy of every recovered model on a split: a row a criterion, sparsity and seed."""
    return pd.DataFrame(
        [
            curve_row(one, c, s, "recovered", split, answers_right(one, model_name("recovered", c, s), split))
            for one in runs_of(run)
            for c, s in recoveries(run)
        ]
    )


def best_criterion(run: Run) -> str:
    """The best on validation after recovery at the main sparsity, over all seeds.

    Of the three criteria, their merge and the best comparator. Raises ``WorkspaceError`` before all are recovered.
    """
    main = run.profile.main_sparsity

    def accuracy(score: str) -> float:
        name = model_name("recovered", score, main)
        return np.mean([validation_accuracy(one, name) for one in runs_of(run)])

    found = {score: accuracy(score) for score in MAIN}
    other = best_comparator(run)
    found[other] = accuracy(other)
    return max(found, key=found.get)


# --- 04: sparse conversion ---


def converted_sparsities(profile: Profile) -> tuple[float, ...]:
    """The sparsities at which notebook 04 converts: those of recovery from 80 % on, and the main one."""
    return tuple(s for s in profile.recovery_sparsities if s >= 0.8 or s == profile.main_sparsity)


def masks_of(run: Run, sparsity: float) -> dict[str, torch.Tensor]:
    """The best criterion's masks at a sparsity."""
    return masks.select(scores_of(run, best_criterion(run)), sparsity)


def sparsify(
    run: Run, criterion: str, sparsity: float, stage: str = "sparse", source: str = "recovered", backend: str = "auto"
) -> Path:
    """Artefact ``<stage>_<criterion>_<percent>``: the model of the stage ``source``, converted to sparse execution."""
    dense = model_name(source, criterion, sparsity)

    def build(folder):
        save_sparse(convert_to_sparse(run.load_model(dense), backend), folder)

    settings = {"criterion": criterion, "sparsity": sparsity, "backend": backend}
    return run.cached(model_name(stage, criterion, sparsity), settings, build, (dense,), kind="sparse", made_by="04")


def structured_sparsities(run: Run) -> tuple[float, ...]:
    """The sparsities at which whole heads and neurons are taken out: the profile's, or none of another model's."""
    return run.profile.structured_sparsities if has_structures(load_config(run.folder("fine_tuned"))) else ()


def structured_masks(run: Run, sparsity: float) -> dict[str, torch.Tensor]:
    """The masks of whole heads and neurons by the best criterion's scores, nearest to a sparsity."""
    scores = scores_of(run, best_criterion(run))
    return masks.select_structures(scores, structures(run.load_model("fine_tuned")), sparsity)


def compact_model(run: Run, sparsity: float) -> dict:
    """Artefacts ``structured_<criterion>_<percent>``, recovered, and ``compact_...``, the same with shrunken matrices.

    Returns the row of ``recover_model``, with the compact model's name as ``model``.
    """
    criterion = best_criterion(run)
    row = recover_model(run, criterion, sparsity, structured_masks(run, sparsity), "structured")
    sparsify(run, criterion, sparsity, "compact", "structured", "dense")
    return {"model": model_name("compact", criterion, sparsity), **row}
