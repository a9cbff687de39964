"""Notebook 03: recovery by further training, what each part of its recipe gains, and how many steps it takes."""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from nbhelpers import criteria, masks, selection
from nbhelpers.evaluation import over_seeds
from nbhelpers.models import has_structures, load_config, prunable_weights, structures
from nbhelpers.profiles import DEFAULT_SCORES, Profile
from nbhelpers.study.artefacts import model_name, on_device, save_trained
from nbhelpers.study.choices import best_score, decide, recovery_rate
from nbhelpers.study.inputs import TRAIN_FIELDS, dataset, pick, reviews_of, runs_of
from nbhelpers.study.predictions import answers_right, right_over_seeds, validation_accuracy, validator
from nbhelpers.study.pruning import curve_row
from nbhelpers.study.scoring import build_scores, scores_of
from nbhelpers.study.teacher import teacher_data_and_loss
from nbhelpers.training import recipe_for, train
from nbhelpers.training.observers import RunningGradient
from nbhelpers.workspace import Run, maker_of

RECOVERY_FIELDS = (*TRAIN_FIELDS, "batch_size", "prefix_share")
ALPHA, TEMPERATURE = 0.33, 2.0  # of the loss with which models recover
FIRST_CUT = 0.65  # what gradual pruning removes at once
GRADUAL_SHARE = 0.6  # of the steps, those over which it reaches its sparsity
MASK_UPDATES = 16  # at most, from the first cut to the sparsity
SCAN_SHARE = 6  # a learning rate is tried for one sixth of the steps
SCANNED = "taylor"  # the score whose recovery sets the learning rate of all
CONTROL = "fine_tuned_extra"  # the dense model after as many steps of the same training
ROW = ("model", "seed", "criterion", "sparsity", "steps", "accuracy", "revived")  # of a recovered model
RATES = "rates.json"
ZEROS = "zeros.json"  # beside a recovered model: what was counted in its weights


Tensors = dict[str, torch.Tensor]


# --- the recipe ---


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained further: for how many steps, and with which parts of the recipe.

    teacher: learn from the dense model's logits at every token as well as from the labels; rescored: prune step by
    step, each time by scores of the model as it is by then, instead of all at once; hidden: learn from the dense
    model's hidden states as well.
    """

    steps: int
    teacher: bool = True
    rescored: bool = True
    hidden: bool = False


# The recipe, part by part: what each has beside the part before.
PARTS = {
    "labels": {"teacher": False, "rescored": False},
    "taught": {"rescored": False},
    "rescored": {},
    "hidden": {"hidden": True},
}


def recovery_for(run: Run, stage: str, steps: int) -> Recovery:
    """Return how the models of a stage recover: a key of ``PARTS``, or any other, which has the profile's recipe.

    Whole heads and neurons are always pruned step by step: their scores are means, which few batches give well enough.
    """
    part = {"structured": "rescored"}.get(stage, stage if stage in PARTS else run.profile.recipe)
    return Recovery(steps or full_steps(run), **PARTS[part])


def full_steps(run: Run) -> int:
    """Return the optimizer steps of a recovery: the profile's ``recovery_epochs``."""
    batches = math.ceil(len(reviews_of(run.profile, run.seed)["train"]) / run.profile.batch_size)
    return max(2, round(run.profile.recovery_epochs * batches))


def chooser(model, pattern: str):
    """Return a function(scores, sparsity) -> masks: of single "weights", of "structures" or of "blocks" of four.

    Of single weights and blocks, each matrix keeps a share near the average (``selection.select_within_bounds``).
    """
    if pattern == "structures":
        found = structures(model)
        return lambda scores, sparsity: masks.select_structures(scores, found, sparsity)
    if pattern == "blocks":
        bounds = selection.select_within_bounds
        return lambda scores, sparsity: masks.select_blocks(scores, model, sparsity, choose=bounds)
    return selection.select_within_bounds


def rescorer(model, criterion: str, start: Tensors, observed: RunningGradient, pretrained: Tensors):
    """Return a function() -> scores of a model as it is now, with its gradients; before the first step, ``start``.

    pretrained: the weights before fine-tuning, for criteria that take them.
    """
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}

    def scores():
        if not observed.gradients:
            return start
        seen = dict.fromkeys(("mean_abs_gradient", "calibration_gradient"), observed.gradients)
        return criteria.score(criterion, weights, {"pretrained": pretrained} | seen)

    return scores


def make_keeper(run: Run, model, criterion: str, sparsity: float, pattern: str, recovery: Recovery):
    """Return what keeps a model pruned during its recovery, and the observers that it needs."""
    choose = chooser(model, pattern)
    if not recovery.rescored:
        return masks.MaskKeeper(model, choose(scores_of(run, criterion), sparsity)), ()
    observed = RunningGradient(model)
    before = {name: weight.detach() for name, weight in prunable_weights(on_device(run, "pretrained")).items()}
    scores = rescorer(model, criterion, scores_of(run, criterion), observed, before)
    return gradual_keeper(model, scores, sparsity, recovery.steps, min(FIRST_CUT, sparsity), choose), (observed,)


def gradual_keeper(model, scores, sparsity: float, steps: int, first: float, choose) -> masks.GradualKeeper:
    """Return a keeper that reaches a sparsity over ``GRADUAL_SHARE`` of so many optimizer steps."""
    pruning = min(math.ceil(GRADUAL_SHARE * steps), steps - 1)
    every = max(1, math.ceil(pruning / MASK_UPDATES))
    return masks.GradualKeeper(model, scores, sparsity, pruning, every=every, first=first, choose=choose)


def train_further(run: Run, model, recovery: Recovery, rate: float, description: str, **options) -> list[dict]:
    """Train a model in place as a recovery asks, without a choice among epochs: the last one counts.

    Returns the history; options: those of ``train``.
    """
    recipe = dataclasses.replace(recipe_for(run.profile, "recover"), learning_rate=rate, steps=recovery.steps)
    data = dataset(run, "train")
    if recovery.teacher:
        data, options["loss_function"] = teacher_data_and_loss(run, ALPHA, TEMPERATURE, recovery.hidden)
    return train(model, data, recipe, seed=run.seed, description=description, **options)


def count_zeros(model, dropped: Tensors) -> dict:
    """Return the sparsity of a model, and how many of the weights that masks drop are not zero in it."""
    kept = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    keeper = masks.MaskKeeper(model, dropped, apply=False)
    return {"sparsity": masks.sparsity_of(kept), "revived": keeper.revived()}


def recover_in_place(run: Run, criterion: str, sparsity: float, pattern: str, recovery: Recovery, rate: float, target):
    """Return the fine-tuned model after pruning and recovery, its history, and its ``count_zeros``."""
    model = on_device(run, "fine_tuned")
    keeper, observers = make_keeper(run, model, criterion, sparsity, pattern, recovery)
    title = f"recovering {criterion} at {sparsity:.0%}, {recovery.steps} steps, learning rate {rate:g}"
    options = {"mask_keeper": keeper, "observers": observers, "checkpoints": target.checkpoints(f"rate-{rate:g}")}
    history = train_further(run, model, recovery, rate, title, **options)
    if recovery.rescored:
        keeper.finish()
    counted = count_zeros(model, keeper.masks)
    if counted["revived"]:
        raise RuntimeError(f"{counted['revived']} weights pruned by {criterion} revived during recovery")
    return model, history, counted


def control_in_place(run: Run, recovery: Recovery, rate: float, target):
    """Return the fine-tuned model after the training of a recovery without pruning, and its history."""
    model = on_device(run, "fine_tuned")
    title = f"dense control, {recovery.steps} steps, learning rate {rate:g}"
    return model, train_further(run, model, recovery, rate, title, checkpoints=target.checkpoints(f"rate-{rate:g}"))


# --- the learning rate ---


def scan_rates(run: Run, name: str) -> pd.DataFrame:
    """Artefact ``rates_<name>``: short trainings with each learning rate; decides ``choice_rate_<name>``.

    name: "pruned", for which ``SCANNED`` is recovered at the main sparsity, or "control", the dense model, which may
    also go on with the rate of its fine-tuning. Each is trained for a sixth of a recovery. Returns one row per rate:
    name, learning_rate, steps, accuracy (validation).
    """
    rates = run.profile.recovery_learning_rates
    rates = tuple(sorted({run.profile.learning_rate, *rates})) if name == "control" else rates
    short = recovery_for(run, "rates", max(2, full_steps(run) // SCAN_SHARE))

    def build(target):
        rows, validate = [], validator(run)
        for rate in rates:
            if name == "control":
                model, _ = control_in_place(run, short, rate, target)
            else:
                model, *_ = recover_in_place(run, SCANNED, run.profile.main_sparsity, "weights", short, rate, target)
            rows.append({"name": name, "learning_rate": rate, "steps": short.steps, "accuracy": validate(model)})
        (target.folder / RATES).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    build_scores(run, (SCANNED,))
    settings = pick(run.profile, *RECOVERY_FIELDS, "main_sparsity", rates=rates, seed=run.seed)
    inputs = ("pretrained", "fine_tuned", f"scores_{SCANNED}")
    run.cached(f"rates_{name}", settings | dataclasses.asdict(short), build, inputs, made_by="03")
    table = pd.DataFrame(json.loads((run.folder(f"rates_{name}") / RATES).read_text(encoding="utf-8")))
    decide(run, f"rate_{name}", table, made_by="03")
    return table


# --- recovered models and their control ---


def recover_model(
    run: Run, criterion: str, sparsity: float, stage: str = "recovered", pattern: str = "weights", steps: int = 0
) -> dict:
    """Artefact ``<stage>_<criterion>_<percent>``: pruned, and trained further with its zeros held.

    stage: see ``recovery_for``; pattern: see ``chooser``; steps: another number than that of the profile, in which the
    name then ends. Returns a dict: model, seed, criterion, sparsity (reached), steps, accuracy (validation), and how
    many pruned weights revived (0). Raises ``WorkspaceError`` where no learning rate has been decided
    (``scan_rates``).
    """
    recovery = recovery_for(run, stage, steps)
    name = with_steps(model_name(stage, criterion, sparsity), steps)
    rate = recovery_rate(run, "pruned")

    def build(target):
        model, history, counted = recover_in_place(run, criterion, sparsity, pattern, recovery, rate, target)
        save_trained(model, history, target.folder)
        (target.folder / ZEROS).write_text(json.dumps(counted), encoding="utf-8")

    build_scores(run, (criterion,))
    settings = pick(run.profile, *RECOVERY_FIELDS, sparsity=sparsity, pattern=pattern, rate=rate, seed=run.seed)
    inputs = ("pretrained", "fine_tuned", f"scores_{criterion}")
    run.cached(name, settings | dataclasses.asdict(recovery), build, inputs, kind="dense", made_by=maker_of(name))
    counted = json.loads((run.folder(name) / ZEROS).read_text(encoding="utf-8"))
    accuracy = validation_accuracy(run, name)
    values = (name, run.seed, criterion, counted["sparsity"], recovery.steps, accuracy, counted["revived"])
    return dict(zip(ROW, values, strict=True))


def with_steps(name: str, steps: int) -> str:
    """Return the name of a model that was trained for another number of steps than the profile's, or 0."""
    return f"{name}_steps_{steps}" if steps else name


def train_control(run: Run, steps: int = 0) -> float:
    """Artefact ``fine_tuned_extra``: the dense model with steps, data order and loss of every recovery.

    Returns its validation accuracy; steps: see ``recover_model``.
    """
    recovery = recovery_for(run, CONTROL, steps)
    rate, name = recovery_rate(run, "control"), with_steps(CONTROL, steps)

    def build(target):
        save_trained(*control_in_place(run, recovery, rate, target), target.folder)

    settings = pick(run.profile, *RECOVERY_FIELDS, rate=rate, seed=run.seed) | dataclasses.asdict(recovery)
    run.cached(name, settings, build, ("fine_tuned",), kind="dense", made_by="03")
    return validation_accuracy(run, name)


# --- all recoveries of a run ---


def recoveries(profile: Profile) -> list[tuple[str, float]]:
    """Return which (score, sparsity) are recovered: ``DEFAULT_SCORES`` everywhere, others at the main sparsity."""
    return [
        (score, sparsity)
        for sparsity in profile.recovery_sparsities
        for score in profile.scores
        if score in DEFAULT_SCORES or sparsity == profile.main_sparsity
    ]


def recovered_names(run: Run) -> dict[tuple[str, float], str]:
    """Return the names of the recovered models by (score, sparsity)."""
    return {pair: model_name("recovered", *pair) for pair in recoveries(run.profile)}


def recover_all(run: Run) -> pd.DataFrame:
    """Make the dense control and every recovery of a profile, of all seeds, and decide the best score.

    By that score, of the first seed, whole heads and neurons are taken out as well. Returns one row per model that a
    score of ``recoveries`` has pruned, see ``recover_model``.
    """
    rows = []
    for seed_run in runs_of(run):
        for name in ("pruned", "control"):
            scan_rates(seed_run, name)
        train_control(seed_run)
        rows += [recover_model(seed_run, *pair) for pair in recoveries(run.profile)]
    best = choose_score(run)
    for sparsity in structured_sparsities(run):
        recover_model(run, best, sparsity, "structured", "structures")
    return pd.DataFrame(rows)


def recovered_curves(run: Run, split: str = "validation") -> pd.DataFrame:
    """Return the accuracy of every recovered model on a split: one row per criterion, sparsity and seed."""
    rows = []
    for seed_run in runs_of(run):
        for (criterion, sparsity), name in recovered_names(run).items():
            right = answers_right(seed_run, name, split)
            rows.append(curve_row(seed_run, criterion, sparsity, "recovered", split, right))
    return pd.DataFrame(rows)


def choose_score(run: Run) -> str:
    """Decide ``choice_score``: the best on validation after recovery at the main sparsity, on average over seeds."""
    rows = []
    for criterion in run.profile.scores:
        name = model_name("recovered", criterion, run.profile.main_sparsity)
        accuracy = np.mean([validation_accuracy(seed_run, name) for seed_run in runs_of(run)])
        rows.append({"criterion": criterion, "accuracy": accuracy})
    return decide(run, "score", pd.DataFrame(rows), made_by="03")["criterion"]


def structured_sparsities(run: Run) -> tuple[float, ...]:
    """Return the sparsities at which whole heads and neurons are taken out: the profile's, or none without a GPT-2."""
    return run.profile.structured_sparsities if has_structures(load_config(run.folder("fine_tuned"))) else ()


# --- what each part of the recipe gains, and how many steps it takes ---


def recover_in_parts(run: Run) -> dict[str, str]:
    """Recover the best score at the main sparsity with each of ``PARTS``, of all seeds; returns the names by part."""
    pair, names = (best_score(run), run.profile.main_sparsity), {}
    stages = {part: "recovered" if part == run.profile.recipe else part for part in PARTS}
    for seed_run in runs_of(run):
        names |= {part: recover_model(seed_run, *pair, stage)["model"] for part, stage in stages.items()}
    return names


ARMS = ("best", "merged", "structured", "control")


def budget_arms(run: Run) -> dict[str, tuple]:
    """Return what ``recover_model`` takes for the models of the budget curve, by names of ``ARMS``; no "control".

    The best score and the merge (where that is another one) at the main sparsity, and the best score for whole heads
    and neurons at the highest of the profile's sparsities, where they can be taken out.
    """
    main, best = run.profile.main_sparsity, best_score(run)
    arms = {"best": (best, main)} | ({"merged": ("merged", main)} if best != "merged" else {})
    if structured_sparsities(run):
        arms["structured"] = (best, structured_sparsities(run)[-1], "structured", "structures")
    return arms


def extend_arm(run: Run, seed_run: Run, arm: str, steps: int) -> str | None:
    """Make a seed's model of the budget curve with so many steps, 0 for the profile's.

    Which one, was decided in ``run``. Returns its name, None without it.
    """
    if arm == "control":
        train_control(seed_run, steps)
        return with_steps(CONTROL, steps)
    chosen = budget_arms(run).get(arm)
    return recover_model(seed_run, *chosen, steps=steps)["model"] if chosen else None


def budget_lengths(run: Run) -> list[int]:
    """Return the steps of the budget curve, with 0 for the profile's number."""
    return [steps for steps in run.profile.budget_steps if steps != full_steps(run)] + [0]


def budget_seeds(run: Run, steps: int) -> list[Run]:
    """Return the seeds that train for a number of steps: all, or the first alone where a recovery has fewer steps."""
    return runs_of(run) if steps <= full_steps(run) else [run]


def budget_curve(run: Run) -> pd.DataFrame:
    """Return validation accuracy against the steps of recovery, one row per model and number of steps.

    Columns: model, steps, and those of ``over_seeds``. The dense control is among the models.
    """
    rows = []
    for arm in ARMS:
        for steps in budget_lengths(run):
            for seed_run in budget_seeds(run, steps):
                name = extend_arm(run, seed_run, arm, steps)
            if name:
                found = over_seeds(right_over_seeds(run, name, "validation", len(budget_seeds(run, steps))))
                rows.append({"model": name.split("_steps_")[0], "steps": steps or full_steps(run)} | found)
    return pd.DataFrame(rows).sort_values(["model", "steps"], ignore_index=True)
