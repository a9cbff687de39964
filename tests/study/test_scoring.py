"""Scores of a finished study, against the same done by hand."""

import numpy as np
import pytest
import torch

from nbhelpers import criteria
from nbhelpers.models import load_dense, prunable_weights
from nbhelpers.study import artefacts, inputs, scoring
from nbhelpers.training.observers import calibrate

pytestmark = pytest.mark.usefixtures("alone")


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
    three, merged = scoring.score_weights(study.run), scoring.scores_of(study.run, "merged")
    ranks = []
    for scores in three.values():
        flat = np.concatenate([score.numpy().ravel() for score in scores.values()])
        places = np.empty(len(flat))
        places[np.argsort(flat, kind="stable")] = np.arange(len(flat)) / len(flat)
        ranks.append(places)
    found = np.concatenate([score.numpy().ravel() for score in merged.values()])
    np.testing.assert_array_equal(found, np.max(ranks, axis=0))


def test_comparators_are_computed_from_a_calibration_on_both_classes(study):
    run, scores = study.run, scoring.score_weights(study.run, tuple(criteria.COMPARATORS))
    data, model = inputs.dataset(run, "train"), run.load_model("fine_tuned")
    chosen = np.linspace(0, len(data) - 1, 8).round().astype(int)
    expected = calibrate(model, [data.input_ids[i] for i in chosen], data.labels[chosen].tolist())
    assert set(data.labels[chosen]) == {0, 1}
    for name, weight in prunable_weights(model).items():
        taylor = weight.detach().abs() * expected["calibration_gradient"][name]
        # The same computation, in which threads may add in another order: float32 rounding.
        torch.testing.assert_close(scores["taylor"][name], taylor, rtol=1e-4, atol=1e-9)
    assert list(scores) == list(criteria.COMPARATORS)
