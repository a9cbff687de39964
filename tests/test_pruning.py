"""Scores, pruning, recovery and conversion of a finished study, against the same done by hand."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers import criteria
from nbhelpers.evaluation import evaluate_accuracy, predict_logits, wilson_interval
from nbhelpers.masks import MaskKeeper, select_structures
from nbhelpers.models import load_dense, prunable_weights, structures
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import artefacts, conversion, inputs, predictions, pruning, scoring
from nbhelpers.training import Recipe, train
from nbhelpers.training.observers import calibrate
from nbhelpers.workspace import Run, WorkspaceError, open_run

pytestmark = pytest.mark.usefixtures("alone")

MAIN = ("magnitude", "movement", "gradient", "merged")
COMPARATORS = ("random", "taylor", "fisher", "movement_first_order", "wanda")


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


# --- scores ---


def test_scores_are_the_criteria_of_the_weights_on_disk(study):
    run, scores = study.run, scoring.score_weights(study.run)
    after, before = (prunable_weights(load_dense(run.folder(name))) for name in ("fine_tuned", "pretrained"))
    gradients = artefacts.load_statistics(run, "fine_tuned")["mean_abs_gradient"]
    assert list(scores) == ["magnitude", "movement", "gradient"]
    for name, weight in after.items():
        assert torch.equal(scores["magnitude"][name], weight.abs())
        assert torch.equal(scores["movement"][name], (weight - before[name]).abs())
        assert torch.equal(scores["gradient"][name], gradients[name])


def test_the_merge_is_the_worst_rank_of_the_three_criteria(study):
    three = scoring.score_weights(study.run)
    merged = scoring.scores_of(study.run, "merged")
    ranks = []
    for scores in three.values():
        flat = np.concatenate([score.numpy().ravel() for score in scores.values()])
        places = np.empty(len(flat))
        places[np.argsort(flat, kind="stable")] = np.arange(len(flat)) / len(flat)
        ranks.append(places)
    found = np.concatenate([score.numpy().ravel() for score in merged.values()])
    np.testing.assert_array_equal(found, np.max(ranks, axis=0))
    expected = criteria.merge_scores(three, "all")
    assert all(torch.equal(score, expected[name]) for name, score in merged.items())


def test_comparators_are_computed_from_the_calibration_of_the_fine_tuned_model(study):
    run, scores = study.run, scoring.score_weights(study.run, COMPARATORS)
    data, model = inputs.dataset(run, "train"), run.load_model("fine_tuned")
    chosen = np.linspace(0, len(data) - 1, 8).round().astype(int)
    expected = calibrate(model, [data.input_ids[i] for i in chosen], data.labels[chosen].tolist())
    assert set(data.labels[chosen]) == {0, 1}
    for name, weight in prunable_weights(model).items():
        taylor = weight.detach().abs() * expected["calibration_gradient"][name]
        torch.testing.assert_close(scores["taylor"][name], taylor, rtol=1e-4, atol=1e-9)
    assert list(scores) == list(COMPARATORS)


def test_scores_without_a_fine_tuned_model_say_which_notebook_to_run(workspace):
    with pytest.raises(WorkspaceError, match=r"fine_tuned is missing .* run notebook 01"):
        scoring.score_weights(open_run(get_profile("smoke"), 0))


# --- right after pruning ---


@pytest.mark.parametrize("criterion", ["magnitude", "merged", "wanda"])
def test_pruned_logits_are_those_of_the_fine_tuned_model_without_its_lowest_scores(study, criterion):
    run = study.run
    found = pruning.pruned_logits(run, criterion)
    assert found.shape == (2, 16, 2)
    rows = inputs.dataset(run, "validation").input_ids
    for logits, sparsity in zip(found, run.profile.sparsities, strict=True):
        model = zeroed(run.load_model("fine_tuned"), scoring.scores_of(run, criterion), sparsity)
        np.testing.assert_array_equal(logits, predict_logits(model, rows))


def test_pruned_curves_have_a_row_a_pruner_sparsity_and_seed(study):
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


def test_the_main_sparsity_is_judged_right_after_pruning_also_where_the_profile_does_not_list_it():
    assert pruning.pruned_sparsities(get_profile("smoke")) == (0.5, 0.9)
    assert pruning.pruned_sparsities(get_profile("smoke", sparsities="0.7,0.5")) == (0.7, 0.5, 0.9)


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
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
            kept = weight != 0
            assert not torch.equal(weight[kept], before[kept])
        others = {name: value for name, value in model.state_dict().items() if name not in prunable_weights(model)}
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in others.items())
        np.testing.assert_array_equal(logits[i], predict_logits(model, validation.input_ids))


def test_sparsegpt_takes_a_matrix_that_is_stored_the_other_way_round_as_it_is(monkeypatch):
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


@pytest.mark.parametrize(("seed", "what"), [(0, "control"), (1, "merged"), (1, "wanda")])
def test_every_score_and_the_control_take_the_rate_that_was_best_for_them_on_validation(study, seed, what):
    run, rates = open_run(study.run.profile, seed), (1e-4, 1e-2)
    scan = pruning.scan_recovery_rates(run, what)
    asked = [(what, rate) for rate in rates]
    assert list(scan[["what", "learning_rate"]].itertuples(index=False, name=None)) == asked
    scores = None if what == "control" else scoring.scores_of(run, what)
    models = [recovered_by_hand(run, rate, scores) for rate in rates]
    accuracy = [evaluate_accuracy(model, inputs.dataset(run, "validation")) for model in models]
    assert scan["accuracy"].tolist() == accuracy
    best = accuracy.index(max(accuracy))
    assert pruning.recovery_rate(run, what) == rates[best]
    name = "fine_tuned_extra" if what == "control" else f"recovered_{what}_90"
    assert_same_weights(run.load_model(name), models[best])
    assert not torch.equal(models[0].score.weight, models[1].score.weight)


def test_the_rate_is_the_first_of_the_best(study, monkeypatch):
    tables = {"merged": [0.6, 0.7, 0.7], "control": [0.9, 0.8, 0.95]}

    def scan(run, what):
        return pd.DataFrame({"what": what, "learning_rate": [1e-4, 1e-3, 1e-2], "accuracy": tables[what]})

    monkeypatch.setattr(pruning, "scan_recovery_rates", scan)
    assert pruning.recovery_rate(study.run, "merged") == 1e-3
    assert pruning.recovery_rate(study.run, "control") == 1e-2


def test_other_sparsities_are_recovered_with_the_rate_of_the_main_one(study):
    run = study.run
    model = recovered_by_hand(run, pruning.recovery_rate(run, "movement"), scoring.scores_of(run, "movement"), 0.5)
    assert_same_weights(run.load_model("recovered_movement_50"), model)


def test_the_criteria_and_the_best_comparator_are_recovered_everywhere_and_the_others_where_asked(study):
    curves = pruning.pruned_curves(study.run)
    mean = {c: curves.loc[curves["criterion"] == c, "accuracy"].mean() for c in COMPARATORS}
    best = pruning.best_comparator(study.run)
    assert mean[best] == max(mean.values())
    others = [c for c in COMPARATORS if c != best]

    def expected(everywhere, some):
        return sorted([(c, s) for s in everywhere for c in (*MAIN, best)] + [(c, s) for s in some for c in others])

    assert sorted(pruning.recoveries(study.run)) == expected((0.5, 0.9), (0.9,))
    # Which comparator is best was settled right after pruning, for any choice of what is recovered.
    changed = dataclasses.replace(study.run.profile, recovery_sparsities=(0.9,), comparator_sparsities=(0.5,))
    assert sorted(pruning.recoveries(open_run(changed, 0))) == expected((0.9,), (0.5,))


def test_the_best_comparator_is_the_best_on_average_over_seeds_and_sparsities(monkeypatch):
    rows = [("random", 0.9, 0.6), ("taylor", 0.8, 0.8), ("fisher", 0.5, 0.99), ("wanda", 0.7, 0.8)]
    table = pd.DataFrame([(c, seed, a) for c, *each in rows for seed, a in enumerate(each)])
    table.columns = ["criterion", "seed", "accuracy"]
    monkeypatch.setattr(pruning, "pruned_curves", lambda run, pruners: table[table["criterion"].isin(pruners)])
    assert pruning.best_comparator(None) == "taylor"


def test_recovered_models_have_exactly_the_zeros_of_their_masks(study):
    recovered = study.recovered
    chosen = pruning.recoveries(study.run)
    asked = [(seed, *one) for seed in (0, 1) for one in chosen]
    assert list(zip(recovered["seed"], recovered["criterion"], strict=True)) == [one[:2] for one in asked]
    for row, (seed, criterion, sparsity) in zip(recovered.itertuples(), asked, strict=True):
        one = open_run(study.run.profile, seed)
        model = one.load_model(artefacts.model_name("recovered", criterion, sparsity))
        by_hand = zeros_of(zeroed(one.load_model("fine_tuned"), scoring.scores_of(one, criterion), sparsity))
        found = zeros_of(model)
        assert all(torch.equal(zeros, by_hand[name]) for name, zeros in found.items())
        total, zeros = (sum(f(z) for z in found.values()) for f in (torch.numel, lambda z: int(z.sum())))
        assert zeros == round(sparsity * total)
        assert row.sparsity == pytest.approx(zeros / total)
        assert row.accuracy == evaluate_accuracy(model, inputs.dataset(one, "validation"))
        assert row.revived == 0


def test_the_dense_control_had_the_same_extra_steps_as_every_recovery(study):
    recovered = [artefacts.model_name("recovered", c, s) for c, s in pruning.recoveries(study.run)]
    for one in inputs.runs_of(study.run):
        names = ["fine_tuned_extra", *recovered]
        assert {artefacts.read_history(one, name)["steps"].iloc[-1] for name in names} == {3}


def test_the_other_ways_to_recover_end_at_the_same_masks_with_other_weights(study):
    run = study.run
    masks = select(scoring.scores_of(run, "merged"), 0.9)
    ways = [pruning.recover_otherwise(run, way, "merged", 0.9) for way in ("gradual", "taught")]
    assert ways == ["gradual_merged_90", "taught_merged_90"]
    models = [run.load_model(name) for name in ("recovered_merged_90", *ways)]
    for model in models:
        assert all(torch.equal(weight != 0, masks[name]) for name, weight in prunable_weights(model).items())
    heads = [model.score.weight for model in models]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert {artefacts.read_history(run, name)["steps"].max() for name in ways} == {3}


def test_recovered_curves_are_of_all_seeds(study):
    curves = pruning.recovered_curves(study.run, "test")
    asked = [(seed, *one) for seed in (0, 1) for one in pruning.recoveries(study.run)]
    assert list(curves[["seed", "criterion", "sparsity"]].itertuples(index=False, name=None)) == asked
    assert set(curves["stage"]) == {"recovered"} and set(curves["split"]) == {"test"}
    for row in curves[curves["criterion"] == "gradient"].itertuples():
        one = open_run(study.run.profile, row.seed)
        reviews = inputs.reviews_of(one.profile, row.seed)["test"]
        name = artefacts.model_name("recovered", "gradient", row.sparsity)
        right = (one.predict(name, reviews["text"][:]) > 0.5) == np.array(reviews["label"])
        assert row.accuracy == right.mean()


def test_the_best_criterion_is_that_of_the_mean_over_seeds_on_validation(study, monkeypatch):
    labels = np.array(inputs.reviews_of(study.run.profile, 0)["validation"]["label"])
    texts = inputs.reviews_of(study.run.profile, 0)["validation"]["text"][:]
    mean, other = {}, pruning.best_comparator(study.run)
    for criterion in (*MAIN, other):
        answers = [one.predict(f"recovered_{criterion}_90", texts) > 0.5 for one in inputs.runs_of(study.run)]
        mean[criterion] = (np.stack(answers) == labels).mean()
    assert mean[pruning.best_criterion(study.run)] == max(mean.values())
    by_seed = {"magnitude": (0.9, 0.5), "movement": (0.7, 0.8), "gradient": (0.6, 0.85), "merged": (0.7, 0.7)}
    by_seed[other] = (0.74, 0.74)
    known = {(seed, f"recovered_{c}_90"): a for c, each in by_seed.items() for seed, a in enumerate(each)}
    monkeypatch.setattr(pruning, "validation_accuracy", lambda run, name: known[run.seed, name])
    assert pruning.best_criterion(study.run) == "movement"
    expected = select(scoring.scores_of(study.run, "movement"), 0.7)
    assert all(torch.equal(expected[name], mask) for name, mask in conversion.masks_of(study.run, 0.7).items())
    known |= {(seed, f"recovered_{other}_90"): 0.76 for seed in (0, 1)}
    assert pruning.best_criterion(study.run) == other, "a comparator that is better is taken"


def test_there_is_no_best_criterion_before_all_are_recovered(workspace):
    with pytest.raises(WorkspaceError, match="run notebook 03"):
        pruning.best_criterion(open_run(get_profile("smoke"), 0))


# --- conversion ---


def test_converted_are_the_sparsities_of_recovery_from_80_percent_on_and_the_main_one():
    assert conversion.converted_sparsities(get_profile("thorough")) == (0.8, 0.9, 0.95)
    low = get_profile("smoke", recovery_sparsities="0.5,0.6,0.8", main_sparsity="0.6")
    assert conversion.converted_sparsities(low) == (0.6, 0.8)


def test_the_sparse_model_computes_what_the_recovered_one_does(study):
    names = (f"{stage}_{study.best}_90" for stage in ("sparse", "recovered"))
    sparse, dense = (predictions.split_logits(study.run, name, "test") for name in names)
    # float32 sums of at most 128 terms in another order, through two blocks.
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


def test_a_compact_model_says_what_the_structured_one_says(study):
    run = study.run
    names = [f"{stage}_{study.best}_50" for stage in ("structured", "compact")]
    masked, small = (run.load_model(name) for name in names)
    scores = scoring.scores_of(run, study.best)
    masks = select_structures(scores, structures(run.load_model("fine_tuned")), 0.5)
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in prunable_weights(masked).items())
    logits = [predictions.split_logits(run, name, "validation") for name in names]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    assert sum(small.config.kept_neurons) < 2 * 4 * masked.config.n_embd
