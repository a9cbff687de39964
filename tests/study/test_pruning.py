"""Pruning and recovery of a finished study, against the same done by hand."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers import criteria
from nbhelpers.evaluation import predict_logits, wilson_interval
from nbhelpers.masks import MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import artefacts, choices, inputs, predictions, pruning, scoring
from nbhelpers.training import Recipe, train
from nbhelpers.training.observers import calibrate
from nbhelpers.workspace import Run, open_run

pytestmark = pytest.mark.usefixtures("alone")

MAIN = ("magnitude", "movement", "gradient", "merged")
COMPARATORS = tuple(criteria.COMPARATORS)


def zeroed(model, scores: dict, sparsity: float):
    """A copy of a model without its weights of lowest score, by one sort of all scores."""
    model = copy.deepcopy(model)
    flat = np.concatenate([scores[name].numpy().ravel() for name in prunable_weights(model)])
    kept = np.ones(len(flat), bool)
    kept[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = False
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            here, kept = kept[: weight.numel()], kept[weight.numel() :]
            weight[torch.from_numpy(~here).view(weight.shape)] = 0.0
    return model


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in prunable_weights(model).items()}


def assert_same_weights(one, other) -> None:
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# --- right after pruning ---


@pytest.mark.parametrize("pruner", ["merged", "wanda"])
def test_pruned_logits_are_those_of_the_fine_tuned_model_without_its_lowest_scores(study, pruner):
    run = study.run
    found = pruning.pruned_logits(run, pruner)
    assert found.shape == (2, 16, 2)
    rows = inputs.dataset(run, "validation").input_ids
    for logits, sparsity in zip(found, run.profile.sparsities, strict=True):
        model = zeroed(run.load_model("fine_tuned"), scoring.scores_of(run, pruner), sparsity)
        np.testing.assert_array_equal(logits, predict_logits(model, rows))


def test_pruned_curves_have_a_row_per_pruner_sparsity_and_seed(study):
    curves = pruning.pruned_curves(study.run)
    index = [(seed, p, s) for seed in (0, 1) for p in (*MAIN, *COMPARATORS, "sparsegpt") for s in (0.5, 0.9)]
    assert list(curves[["seed", "criterion", "sparsity"]].itertuples(index=False, name=None)) == index
    assert set(curves["stage"]) == {"pruned"} and set(curves["split"]) == {"validation"}
    for one in inputs.runs_of(study.run):
        labels = np.array(inputs.reviews_of(one.profile, one.seed)["validation"]["label"])
        rows = curves[(curves["seed"] == one.seed) & (curves["criterion"] == "movement")]
        for logits, row in zip(pruning.pruned_logits(one, "movement"), rows.itertuples(), strict=True):
            correct = logits.argmax(1) == labels
            assert row.accuracy == correct.mean()
            assert (row.accuracy_low, row.accuracy_high) == wilson_interval(correct)


def test_sparsegpt_prunes_every_matrix_to_the_sparsity_and_moves_the_weights_that_stay(study):
    run = study.run
    dense = run.load_model("fine_tuned")
    rows = scoring.calibration_rows(run, 128)
    assert len(rows[0]) == 48, "all training reviews, where there are no more"
    hessians = calibrate(run.load_model("fine_tuned"), *rows, hessians=True)["hessian"]
    logits, validation = pruning.pruned_logits(run, "sparsegpt"), inputs.dataset(run, "validation")
    for i, (sparsity, model) in enumerate(zip((0.5, 0.9), pruning.sparsegpt_models(run), strict=True)):
        for name, weight in prunable_weights(model).items():
            assert int((weight == 0).sum()) == round(sparsity * weight.numel()), name
            before = prunable_weights(dense)[name].detach()
            # GPT-2 stores [in, out].
            expected = criteria.sparsegpt(before.T.contiguous(), hessians[name], sparsity).T
            # The same factorisation of a matrix that lies otherwise in memory: float32 rounding.
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
            kept = weight != 0
            assert not torch.equal(weight[kept], before[kept])
        others = {name: value for name, value in model.state_dict().items() if name not in prunable_weights(model)}
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in others.items())
        np.testing.assert_array_equal(logits[i], predict_logits(model, validation.input_ids))


def test_sparsegpt_takes_a_matrix_that_is_stored_out_in_as_it_is(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=20, pad_token_id=0, num_labels=2)).eval()
    rows = [torch.randint(1, 20, (6,)).tolist() for _ in range(5)], [0, 1, 0, 1, 0]
    monkeypatch.setattr(pruning, "calibration_rows", lambda run, count: rows)
    run = SimpleNamespace(
        profile=get_profile("smoke"), load_model=lambda _: copy.deepcopy(model), artifact=lambda _: {"kind": "dense"}
    )
    hessians = calibrate(model, *rows, hessians=True)["hessian"]
    pruned = list(pruning.sparsegpt_models(run))[1]
    for name, weight in prunable_weights(pruned).items():
        expected = criteria.sparsegpt(prunable_weights(model)[name].detach(), hessians[name], 0.9)
        torch.testing.assert_close(weight.detach(), expected)


def test_the_best_comparator_is_the_best_on_average_over_seeds_and_sparsities(workspace, monkeypatch):
    rows = [("random", 0.9, 0.6), ("taylor", 0.8, 0.8), ("fisher", 0.5, 0.99), ("wanda", 0.7, 0.8)]
    table = pd.DataFrame([(c, seed, a) for c, *each in rows for seed, a in enumerate(each)])
    table.columns = ["criterion", "seed", "accuracy"]
    monkeypatch.setattr(pruning, "pruned_curves", lambda run, pruners: table[table["criterion"].isin(pruners)])
    run = open_run(get_profile("smoke"))
    assert pruning.choose_comparator(run) == choices.best_comparator(run) == "taylor"


# --- recovery ---


def recovered_by_hand(run: Run, rate: float, scores: dict | None = None, sparsity: float = 0.9):
    """The fine-tuned model pruned, or not, and trained for three steps of eight reviews."""
    model = run.load_model("fine_tuned")
    keeper = MaskKeeper(model, select(scores, sparsity)) if scores else None
    recipe = Recipe(
        rate, 8, steps=3, weight_decay=0.01, warmup_share=0.1, max_grad_norm=1.0, precision="no", prefix_share=0.5
    )
    train(model, inputs.dataset(run, "train"), recipe, seed=run.seed, mask_keeper=keeper)
    return model


@pytest.mark.parametrize(("seed", "name"), [(0, "control"), (1, "merged")])
def test_a_score_and_the_control_take_the_rate_that_was_best_for_them_on_validation(study, seed, name):
    run, rates = open_run(study.run.profile, seed), (1e-4, 1e-2)
    scan = pruning.scan_recovery_rates(run, name)
    asked = [(name, rate) for rate in rates]
    assert list(scan[["score", "learning_rate"]].itertuples(index=False, name=None)) == asked
    scores = None if name == "control" else scoring.scores_of(run, name)
    models = [recovered_by_hand(run, rate, scores) for rate in rates]
    accuracy = [predictions.validator(run)(model) for model in models]
    assert scan["accuracy"].tolist() == accuracy
    best = accuracy.index(max(accuracy))
    assert choices.recovery_rate(run, name) == rates[best]
    artefact = "fine_tuned_extra" if name == "control" else f"recovered_{name}_90"
    assert_same_weights(run.load_model(artefact), models[best])
    assert not torch.equal(models[0].score.weight, models[1].score.weight)


def test_other_sparsities_are_recovered_with_the_rate_of_the_main_one(study):
    run = study.run
    model = recovered_by_hand(run, choices.recovery_rate(run, "movement"), scoring.scores_of(run, "movement"), 0.5)
    assert_same_weights(run.load_model("recovered_movement_50"), model)


def test_contenders_are_recovered_everywhere_and_other_comparators_where_the_profile_asks():
    def expected(everywhere, some):
        contenders = (*MAIN, "fisher")
        others = [c for c in COMPARATORS if c != "fisher"]
        return sorted([(c, s) for s in everywhere for c in contenders] + [(c, s) for s in some for c in others])

    for everywhere, some in (((0.5, 0.9), (0.9,)), ((0.9,), (0.5,)), ((0.9,), ())):
        profile = get_profile("smoke", recovery_sparsities=everywhere, comparator_sparsities=some)
        assert sorted(pruning.recoveries(profile, "fisher")) == expected(everywhere, some)


def test_recovered_models_have_exactly_the_zeros_of_their_masks(study):
    for seed, criterion, sparsity in ((0, "gradient", 0.5), (1, "merged", 0.9), (0, "movement", 0.9)):
        one = open_run(study.run.profile, seed)
        row = pruning.recover_model(one, criterion, sparsity)
        found = zeros_of(one.load_model(artefacts.model_name("recovered", criterion, sparsity)))
        by_hand = zeros_of(zeroed(one.load_model("fine_tuned"), scoring.scores_of(one, criterion), sparsity))
        assert all(torch.equal(zeros, by_hand[name]) for name, zeros in found.items())
        total, zeros = (sum(f(z) for z in found.values()) for f in (torch.numel, lambda z: int(z.sum())))
        assert zeros == round(sparsity * total)
        assert row["sparsity"] == pytest.approx(zeros / total) and row["revived"] == 0
        name = artefacts.model_name("recovered", criterion, sparsity)
        assert (row["seed"], row["criterion"]) == (seed, criterion)
        assert row["accuracy"] == predictions.validation_accuracy(one, name)


def test_taught_recovery_keeps_the_masks_and_gradual_pruning_scores_again(study):
    run = study.run
    scores = scoring.scores_of(run, "merged")
    masks, first = select(scores, 0.9), select(scores, pruning.FIRST_CUT)
    ways = [pruning.recover_otherwise(run, way, "merged", 0.9) for way in ("gradual", "taught")]
    assert ways == ["gradual_merged_90", "taught_merged_90"]
    models = [run.load_model(name) for name in ("recovered_merged_90", *ways)]
    plain, gradual, taught = ({n: w != 0 for n, w in prunable_weights(model).items()} for model in models)
    assert all(torch.equal(plain[name], mask) and torch.equal(taught[name], mask) for name, mask in masks.items())
    assert not all(torch.equal(gradual[name], mask) for name, mask in masks.items()), "the scores have changed"
    assert all((~gradual[name] | mask).all() for name, mask in first.items()), "the first cut is by the given scores"
    assert sum(int(kept.sum()) for kept in gradual.values()) == sum(int(mask.sum()) for mask in masks.values())
    heads = [model.score.weight for model in models]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert {artefacts.read_history(run, name)["steps"].max() for name in ways} == {3}


def test_recovered_curves_are_of_all_seeds(study):
    curves = pruning.recovered_curves(study.run, "test")
    asked = [(seed, *pair) for seed in (0, 1) for pair in pruning.recoveries(study.run.profile, study.comparator)]
    assert list(curves[["seed", "criterion", "sparsity"]].itertuples(index=False, name=None)) == asked
    assert set(curves["stage"]) == {"recovered"} and set(curves["split"]) == {"test"}
    for row in curves[curves["criterion"] == "gradient"].itertuples():
        one = open_run(study.run.profile, row.seed)
        reviews = inputs.reviews_of(one.profile, row.seed)["test"]
        name = artefacts.model_name("recovered", "gradient", row.sparsity)
        right = (one.predict(name, reviews["text"][:]) > 0.5) == np.array(reviews["label"])
        assert row.accuracy == right.mean()


def test_the_best_score_is_that_of_the_mean_over_seeds_on_validation(study, workspace, monkeypatch):
    other = study.comparator
    by_seed = {"magnitude": (0.9, 0.5), "movement": (0.7, 0.8), "gradient": (0.6, 0.85), "merged": (0.7, 0.7)}
    by_seed[other] = (0.74, 0.74)
    known = {(seed, f"recovered_{c}_90"): a for c, each in by_seed.items() for seed, a in enumerate(each)}
    monkeypatch.setattr(pruning, "validation_accuracy", lambda run, name: known[run.seed, name])
    monkeypatch.setattr(pruning, "best_comparator", lambda run: other)
    monkeypatch.setenv("NBHELPERS_ROOT", str(workspace))
    assert pruning.choose_score(study.run) == choices.best_score(study.run) == "movement"
    known |= {(seed, f"recovered_{other}_90"): 0.76 for seed in (0, 1)}
    assert pruning.choose_score(study.run) == choices.best_score(study.run) == other, "a better comparator is taken"
