"""Accuracy right after pruning in a finished study, against the same done by hand."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers import criteria
from nbhelpers.evaluation import predict_logits, wilson_interval
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.study import inputs, pruning, scoring
from nbhelpers.training.observers import calibrate

pytestmark = pytest.mark.usefixtures("alone")


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


@pytest.mark.parametrize("pruner", ["merged", "wanda"])
def test_pruned_logits_are_those_of_the_fine_tuned_model_without_its_lowest_scores(study, pruner):
    run = study.run
    found = pruning.pruned_logits(run, pruner)
    assert found.shape == (2, 16, 2)
    rows = inputs.dataset(run, "validation").input_ids
    for logits, sparsity in zip(found, run.profile.sparsities, strict=True):
        model = zeroed(run.load_model("fine_tuned"), scoring.scores_of(run, pruner), sparsity)
        np.testing.assert_allclose(logits, predict_logits(model, rows), atol=1e-5)


def test_pruned_curves_have_a_row_per_pruner_sparsity_and_seed(study):
    curves = pruning.pruned_curves(study.run)
    pruners = ("magnitude", "movement", "gradient", "merged", "taylor", "wanda", "sparsegpt")
    index = [(seed, pruner, share) for seed in (0, 1) for pruner in pruners for share in (0.5, 0.9)]
    assert list(curves[["seed", "criterion", "sparsity"]].itertuples(index=False, name=None)) == index
    assert set(curves["stage"]) == {"pruned"} and set(curves["split"]) == {"validation"}
    for one in inputs.runs_of(study.run):
        labels = np.array(inputs.reviews_of(one.profile, one.seed)["validation"]["label"])
        rows = curves[(curves["seed"] == one.seed) & (curves["criterion"] == "movement")]
        for logits, row in zip(pruning.pruned_logits(one, "movement"), rows.itertuples(), strict=True):
            correct = logits.argmax(1) == labels
            assert row.accuracy == correct.mean()
            assert (row.accuracy_low, row.accuracy_high) == wilson_interval(correct)


def test_a_score_that_is_a_comparator_as_well_is_evaluated_once():
    profile = get_profile("smoke", comparators=("random", "taylor", "sparsegpt"))
    assert pruning.pruners(profile) == (*profile.scores, "random", "sparsegpt")


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
        np.testing.assert_allclose(logits[i], predict_logits(model, validation.input_ids), atol=1e-5)


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
