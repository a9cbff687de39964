"""Recovery in a finished study, against the same done by hand."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from nbhelpers.distillation import taught_loss
from nbhelpers.masks import MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import artefacts, choices, fine_tuning, inputs, predictions, recovery, scoring, teacher
from nbhelpers.training import Recipe, train
from nbhelpers.workspace import Run, open_run

pytestmark = pytest.mark.usefixtures("alone")

SCORES = ("magnitude", "movement", "gradient", "merged", "taylor")


def kept_by_hand(scores: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """The best of each matrix, a quarter of an average share, then the best of all, at most four times that share."""
    total, others, kept = sum(score.numel() for score in scores.values()), [], {}
    left = total - round(sparsity * total)
    for name, score in scores.items():
        best_first = np.argsort(score.numpy().ravel(), kind="stable")[::-1]
        average = (1 - sparsity) * score.numel()
        least, most = math.ceil(average / 4), int(4 * average)
        kept[name] = np.zeros(score.numel(), bool)
        kept[name][best_first[:least]] = True
        left -= least
        others += [(score.flatten()[i].item(), name, i) for i in best_first[least:most]]
    for _, name, i in sorted(others, key=lambda one: -one[0])[:left]:
        kept[name][i] = True
    return {name: torch.from_numpy(mask).view(scores[name].shape) for name, mask in kept.items()}


def trained(run: Run, steps: int, rate: float, make_keeper=None, taught: bool = True):
    """The fine-tuned model after some steps of eight reviews, on its own logits or on the labels alone."""
    model, data, loss = run.load_model("fine_tuned"), copy.copy(inputs.dataset(run, "train")), None
    if taught:
        data.teacher_logits = teacher.teacher_logits(run)
        loss = lambda model, batch: taught_loss(model, batch, 0.33, 2.0, 0.5)  # noqa: E731
    recipe = Recipe(rate, 8, steps=steps, weight_decay=0.01, warmup_share=0.1, precision="no", prefix_share=0.5)
    keeper = make_keeper(model) if make_keeper else None
    train(model, data, recipe, seed=run.seed, loss_function=loss, mask_keeper=keeper)
    return model


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in prunable_weights(model).items()}


def assert_same_weights(one, other) -> None:
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# --- how long, and with which learning rate ---


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(0.5, 8, 3), (2.0, 8, 12), (1.0, 7, 7), (0.01, 8, 2)])
def test_a_recovery_takes_a_number_of_passes_over_the_training_reviews(epochs, batch, steps):
    profile = get_profile("smoke", recovery_epochs=epochs, batch_size=batch)
    assert recovery.full_steps(open_run(profile)) == steps, "48 reviews"


@pytest.mark.parametrize(("seed", "name"), [(0, "control"), (1, "control"), (0, "pruned")])
def test_each_learning_rate_is_tried_on_validation(study, seed, name):
    run, rates = open_run(study.run.profile, seed), [1e-4, 1e-2]
    scan = recovery.scan_rates(run, name)
    assert (scan["name"] == name).all() and scan["learning_rate"].tolist() == rates
    assert scan["steps"].tolist() == [2, 2], "at least two, where a sixth is less"
    best = scan["learning_rate"][scan["accuracy"].argmax()]
    assert choices.recovery_rate(run, name) == best
    if name == "control":
        models = [trained(run, 2, rate) for rate in rates]
        assert scan["accuracy"].tolist() == [predictions.validator(run)(model) for model in models]
        assert_same_weights(run.load_model("fine_tuned_extra"), trained(run, 3, best))
        assert not torch.equal(models[0].score.weight, models[1].score.weight)


def test_the_rate_that_is_best_after_a_sixth_of_the_steps_is_used_for_all(workspace, monkeypatch):
    rates, accuracy = (1e-4, 1e-3, 1e-2), {"control": [0.7, 0.6, 0.8, 0.8], "pruned": [0.5, 0.6, 0.7]}
    fields = {"recovery_epochs": 9.0, "recovery_learning_rates": rates, "train_size": 16, "precision": "no"}
    run = open_run(get_profile("smoke", **fields))
    fine_tuning.finetune_model(run)
    for name, values in accuracy.items():
        monkeypatch.setattr(recovery, "validator", lambda _, values=values: lambda model: values.pop(0))
        table = recovery.scan_rates(run, name)
        assert set(table["steps"]) == {3}
        own = {run.profile.learning_rate} if name == "control" else set()
        assert table["learning_rate"].tolist() == sorted({*own, *rates}), "the dense model may go on as it was tuned"
    assert (choices.recovery_rate(run, "control"), choices.recovery_rate(run, "pruned")) == (1e-3, 1e-2)
    assert recovery.recover_model(run, "magnitude", 0.5)["steps"] == 18
    recovery.train_control(run)
    rate = {name: run.artifact(name)["settings"]["rate"] for name in ("fine_tuned_extra", "recovered_magnitude_50")}
    assert rate == {"fine_tuned_extra": 1e-3, "recovered_magnitude_50": 1e-2}
    histories = [artefacts.read_history(run, name) for name in rate]
    assert [history["steps"].iloc[-1] for history in histories] == [18, 18]
    assert histories[0]["tokens"].tolist() == histories[1]["tokens"].tolist(), "the same data for both"


# --- the parts of the recipe ---


@pytest.mark.parametrize("part", ["labels", "taught"])
def test_pruned_at_once_it_is_the_model_of_these_masks_trained_further(study, part):
    run, scores = study.run, scoring.scores_of(study.run, "magnitude")
    masks, without_bounds = kept_by_hand(scores, 0.9), select(scores, 0.9)
    assert not all(torch.equal(mask, without_bounds[name]) for name, mask in masks.items()), "a matrix has too few"
    model = trained(run, 3, choices.recovery_rate(run, "pruned"), lambda m: MaskKeeper(m, masks), part == "taught")
    assert_same_weights(run.load_model(recovery.recover_model(run, "magnitude", 0.9, part)["model"]), model)
    assert all(torch.equal(zeros, ~masks[name]) for name, zeros in zeros_of(model).items())


def test_a_sparsity_below_the_first_cut_is_reached_at_once(study):
    run = open_run(study.run.profile, 1)
    masks = kept_by_hand(scoring.scores_of(run, "movement"), 0.5)
    model = trained(run, 3, choices.recovery_rate(run, "pruned"), lambda m: MaskKeeper(m, masks))
    assert_same_weights(run.load_model("recovered_movement_50"), model)


class GradualByHand(MaskKeeper):
    """Prunes to 65 % by given scores, then in two steps to 90 %, by |weight| times the running mean of |gradient|."""

    def __init__(self, model, scores):
        self.mean, self.left = None, []
        super().__init__(model, kept_by_hand(scores, 0.65))
        self.left = [0.9 - 0.25 / 8, 0.9]

    def mask_gradients(self):
        now = {name: weight.grad.abs() for name, weight in self.weights.items()}
        self.mean = {n: 0.9 * self.mean[n] + 0.1 * g for n, g in now.items()} if self.mean else now
        super().mask_gradients()

    def apply(self):
        if self.left:
            scores = {name: weight.detach().abs() * self.mean[name] for name, weight in self.weights.items()}
            scores = {name: score.masked_fill(~self.masks[name], -1.0) for name, score in scores.items()}
            self.masks = kept_by_hand(scores, self.left.pop(0))
        super().apply()


def test_gradual_pruning_takes_its_scores_anew_from_weights_and_gradients(study):
    run = open_run(study.run.profile, 1)
    scores, found = scoring.scores_of(run, "taylor"), zeros_of(run.load_model("recovered_taylor_90"))
    rate = choices.recovery_rate(run, "pruned")
    by_hand = zeros_of(trained(run, 3, rate, lambda model: GradualByHand(model, scores)))
    # The running mean is summed in another way: float32 may order two weights next to a limit otherwise.
    assert sum(int((zeros != by_hand[name]).sum()) for name, zeros in found.items()) <= 4
    at_once = kept_by_hand(scores, 0.9)
    assert sum(int((zeros == at_once[name]).sum()) for name, zeros in found.items()) > 40, "the scores have changed"


def test_all_parts_have_exactly_the_zeros_of_the_sparsity_and_the_same_steps(study):
    names = recovery.recover_in_parts(study.run)
    stages = {"labels": "labels", "taught": "taught", "rescored": "recovered", "hidden": "hidden"}
    assert names == {part: f"{stage}_{study.best}_90" for part, stage in stages.items()}
    for run in inputs.runs_of(study.run):
        models = {part: run.load_model(name) for part, name in names.items()}
        for model in models.values():
            zeros = zeros_of(model).values()
            assert sum(int(part.sum()) for part in zeros) == round(0.9 * sum(part.numel() for part in zeros))
        heads = {tuple(model.score.weight.flatten().tolist()) for model in models.values()}
        assert len(heads) == 4, "each part makes a difference"
        histories = [artefacts.read_history(run, name) for name in (*names.values(), "fine_tuned_extra")]
        assert {(history["steps"].iloc[-1], history["tokens"].iloc[-1]) for history in histories} == {
            (3, histories[0]["tokens"].iloc[-1])
        }


def test_the_row_of_a_recovered_model_says_what_is_in_its_file(study):
    for seed, criterion, sparsity in ((0, "gradient", 0.5), (1, "merged", 0.9)):
        run, name = open_run(study.run.profile, seed), f"recovered_{criterion}_{round(100 * sparsity)}"
        row = recovery.recover_model(run, criterion, sparsity)
        zeros = zeros_of(run.load_model(name)).values()
        count, total = sum(int(part.sum()) for part in zeros), sum(part.numel() for part in zeros)
        assert count == round(sparsity * total)
        expected = {"model": name, "seed": seed, "criterion": criterion, "sparsity": pytest.approx(count / total)}
        assert row == expected | {"steps": 3, "accuracy": predictions.validation_accuracy(run, name), "revived": 0}


# --- all recoveries of a run ---


def test_every_score_is_recovered_at_every_sparsity_and_seed(study):
    curves = recovery.recovered_curves(study.run, "test")
    asked = [(seed, score, sparsity) for seed in (0, 1) for sparsity in (0.5, 0.9) for score in SCORES]
    assert list(curves[["seed", "criterion", "sparsity"]].itertuples(index=False, name=None)) == asked
    assert set(curves["stage"]) == {"recovered"} and set(curves["split"]) == {"test"}
    for row in curves[curves["criterion"] == "gradient"].itertuples():
        one = open_run(study.run.profile, row.seed)
        reviews = inputs.reviews_of(one.profile, row.seed)["test"]
        name = artefacts.model_name("recovered", "gradient", row.sparsity)
        right = (one.predict(name, reviews["text"][:]) > 0.5) == np.array(reviews["label"])
        assert row.accuracy == right.mean()


def test_the_best_score_is_that_of_the_mean_over_seeds_on_validation(study, workspace, monkeypatch):
    by_seed = {"magnitude": (0.9, 0.5), "movement": (0.7, 0.8), "gradient": (0.6, 0.85), "merged": (0.7, 0.7)}
    by_seed |= {"taylor": (0.74, 0.74), "random": (0.76, 0.76)}
    known = {(seed, f"recovered_{c}_90"): a for c, each in by_seed.items() for seed, a in enumerate(each)}
    monkeypatch.setattr(recovery, "validation_accuracy", lambda run, name: known[run.seed, name])
    monkeypatch.setenv("NBHELPERS_ROOT", str(workspace))
    assert recovery.choose_score(study.run) == choices.best_score(study.run) == "movement"
    more = open_run(dataclasses.replace(study.run.profile, scores=(*SCORES, "random")))
    assert recovery.choose_score(more) == choices.best_score(more) == "random", "a score that the profile adds"


# --- how many steps ---


def test_the_budget_curve_has_every_model_after_every_number_of_steps(study):
    run = study.run
    names = [f"recovered_{score}_90" for score in dict.fromkeys((study.best, "merged"))]
    names = sorted([*names, f"structured_{study.best}_50", "fine_tuned_extra"])
    table = recovery.budget_curve(run)
    found = list(table[["model", "steps"]].itertuples(index=False, name=None))
    assert found == [(name, steps) for name in names for steps in (1, 3)]
    texts, labels = (inputs.reviews_of(run.profile, 0)["validation"][key][:] for key in ("text", "label"))
    for row in table.itertuples():
        name = row.model if row.steps == 3 else f"{row.model}_steps_{row.steps}"
        each = []
        for one in inputs.runs_of(run):
            each.append(np.mean((one.predict(name, texts) > 0.5) == np.array(labels)))
            assert artefacts.read_history(one, name)["steps"].iloc[-1] == row.steps
        assert row.accuracy == pytest.approx(np.mean(each))
        assert (row.lowest_seed, row.highest_seed, row.seeds) == (min(each), max(each), 2)


def test_a_merge_that_is_the_best_score_is_one_model_of_the_budget_curve(study, monkeypatch):
    monkeypatch.setattr(recovery, "best_score", lambda run: "merged")
    assert list(recovery.budget_arms(study.run)) == ["best", "structured"]
    assert recovery.extend_arm(study.run, study.run, "merged", 1) is None
