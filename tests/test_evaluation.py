"""Metrics, intervals and tests against formulas, brute force and worked examples."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest, norm
from sklearn.metrics import accuracy_score, f1_score
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers import evaluation
from nbhelpers.data import IMDbDataset
from nbhelpers.evaluation import (
    evaluate_accuracy,
    evaluate_model,
    f1_interval,
    holm,
    mcnemar,
    paired_difference,
    predict_logits,
    significance_table,
    wilson_interval,
)


def tiny_model() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 20}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2, initializer_range=0.3))


@pytest.fixture
def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, length).tolist() for length in rng.permutation(np.arange(1, 24))]


# --- prediction ---


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_logits_come_in_the_order_of_the_reviews_whatever_the_batches(rows, batch_size):
    model = tiny_model().train()
    found = predict_logits(model, rows, batch_size)
    assert found.shape == (23, 2)
    assert found.dtype == np.float32
    assert not model.training, "dropout must be off"
    with torch.inference_mode():
        alone = np.concatenate([model(input_ids=torch.tensor([row])).logits.numpy() for row in rows])
    # float32 products of width 8 to 32 in another order: a few 1e-7.
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.ptp(alone[:, 0]) > 0.1, "rows that are all alike would show no order"


def test_no_reviews_and_logits_that_are_not_finite_are_errors(rows):
    model = tiny_model()
    with pytest.raises(ValueError, match="there are no reviews to predict"):
        predict_logits(model, [])
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        predict_logits(model, rows)


def test_accuracy_is_the_share_of_right_answers(rows):
    data = IMDbDataset.__new__(IMDbDataset)
    data.input_ids, data.labels = rows, np.arange(len(rows)) % 2
    model = tiny_model()
    right = [logits.argmax() == label for logits, label in zip(predict_logits(model, rows), data.labels, strict=True)]
    assert evaluate_accuracy(model, data) == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


# --- intervals ---


@pytest.mark.parametrize(("right", "total"), [(0, 10), (1, 10), (45, 50), (50, 50), (940, 1000)])
def test_the_wilson_interval_is_its_closed_formula(right, total):
    z, p = norm.ppf(0.975), right / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    low, high = wilson_interval(np.arange(total) < right)
    assert (low, high) == pytest.approx((max(0.0, centre - half), min(1.0, centre + half)), abs=1e-12)


def test_the_wilson_interval_of_wilsons_own_kind_of_example():
    # 15 of 20: 0.5313 to 0.8881, as tabulated for the score interval without continuity correction.
    assert wilson_interval(np.arange(20) < 15) == pytest.approx((0.5313, 0.8881), abs=5e-5)


def noisy_predictions(count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, count)
    return labels, np.where(rng.random(count) < 0.8, labels, 1 - labels)


def test_the_f1_interval_is_that_of_a_bootstrap_loop():
    labels, predicted = noisy_predictions()
    rng, found = np.random.default_rng(3), []
    for _ in range(evaluation.RESAMPLES):
        chosen = rng.integers(150, size=150)
        y, p = labels[chosen], predicted[chosen]
        precision, recall = (y[p == 1] == 1).mean(), (p[y == 1] == 1).mean()
        found.append(2 * precision * recall / (precision + recall))
    expected = np.quantile(found, 0.025), np.quantile(found, 0.975)
    assert f1_interval(labels, predicted, seed=3) == pytest.approx(expected, abs=1e-12)
    low, high = expected
    assert low < f1_score(labels, predicted) < high
    # A normal approximation of 150 reviews at 80 % is about +-0.065: the interval has a sensible width.
    assert 0.08 < high - low < 0.2


def test_the_f1_interval_of_no_positives_is_zero():
    assert f1_interval(np.zeros(20, int), np.zeros(20, int)) == (0.0, 0.0)


@pytest.mark.parametrize("case", ["noisy", "perfect", "never positive", "always positive"])
def test_evaluate_model_agrees_with_scikit_learn(case):
    labels, predicted = noisy_predictions()
    predicted = {
        "noisy": predicted,
        "perfect": labels,
        "never positive": np.zeros_like(labels),
        "always positive": np.ones_like(labels),
    }[case]
    logits = np.stack([-predicted, predicted], 1) + 5.0
    found = evaluate_model(logits, labels)
    assert list(found) == ["accuracy", "accuracy_low", "accuracy_high", "f1", "f1_low", "f1_high", "n"]
    assert found["n"] == 150
    assert found["accuracy"] == accuracy_score(labels, predicted)
    assert found["f1"] == f1_score(labels, predicted, zero_division=0.0)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(labels == predicted)
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["f1_low"] <= found["f1"] <= found["f1_high"]
    assert all(math.isfinite(value) for value in found.values())


# --- paired tests ---


def pair(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    order = np.random.default_rng(0).permutation(len(a))
    return a[order], b[order]


def test_mcnemar_worked_out_by_hand():
    # Twelve discordant reviews, 10 to 2: 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 2 * 79 / 4096.
    assert mcnemar(*pair(80, 10, 2, 8)) == pytest.approx(158 / 4096)
    # 5 to 0: 2 / 2^5.
    assert mcnemar(*pair(3, 5, 0, 1)) == pytest.approx(1 / 16)
    assert mcnemar(*pair(50, 4, 4, 2)) == 1.0
    assert mcnemar(*pair(50, 0, 0, 2)) == 1.0


def test_mcnemar_of_a_textbook_table():
    # The prime minister's approval ratings in Agresti (Categorical Data Analysis, table 10.1): 150 against 86 changed
    # their mind. His statistic z^2 = 17.36 has p = 3.1e-5; the exact one is near it.
    p_value = mcnemar(*pair(794, 150, 86, 570))
    assert p_value == pytest.approx(binomtest(86, 236, 0.5).pvalue, rel=1e-12)
    assert 2e-5 < p_value < 6e-5


def test_mcnemar_is_symmetric_and_ignores_reviews_on_which_the_models_agree():
    a, b = pair(20, 9, 3, 5)
    assert mcnemar(a, b) == mcnemar(b, a) == mcnemar(*pair(2000, 9, 3, 500))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 7), (40, 12)])
def test_a_paired_difference_has_the_sign_of_a_minus_b_and_a_bootstrap_interval(only_a, only_b):
    a, b = pair(60, only_a, only_b, 10)
    found = paired_difference(a, b, seed=2)
    assert list(found) == ["difference", "low", "high", "p_value", "n"]
    assert found["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found["n"] == len(a)
    assert found["p_value"] == mcnemar(a, b)
    rng = np.random.default_rng(2)
    means = [np.mean(a[chosen]) - np.mean(b[chosen]) for chosen in rng.integers(len(a), size=(2000, len(a)))]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    back = paired_difference(b, a, seed=2)
    assert (back["difference"], back["low"], back["high"]) == pytest.approx(
        (-found["difference"], -found["high"], -found["low"]), abs=1e-12
    )


# --- many tests ---


def test_holm_worked_out_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_holm_rejects_what_the_step_down_rule_rejects():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = (rng.random(6) ** 3).tolist()
        rejected = set()
        for step, i in enumerate(np.argsort(p_values)):
            if p_values[i] > 0.05 / (6 - step):
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_the_significance_table_has_the_columns_of_the_contract_and_a_row_a_comparison():
    rng = np.random.default_rng(0)
    correct = {name: rng.random(200) < share for name, share in (("dense", 0.9), ("pruned", 0.7), ("student", 0.85))}
    table = significance_table(correct, against="dense")
    assert list(table.columns) == [
        "comparison",
        "metric",
        "difference",
        "low",
        "high",
        "p_value",
        "p_adjusted",
        "n",
        "seeds",
    ]
    assert table["comparison"].tolist() == ["pruned - dense", "student - dense"]
    assert table["metric"].tolist() == ["accuracy"] * 2
    assert table["n"].tolist() == [200, 200]
    assert table["seeds"].tolist() == [1, 1]
    assert table["p_adjusted"].tolist() == holm(table["p_value"].tolist())
    assert (table["p_adjusted"] >= table["p_value"]).all()
    first = table.iloc[0]
    assert first["difference"] == pytest.approx(correct["pruned"].mean() - correct["dense"].mean())
    assert first["low"] < first["difference"] < first["high"] < 0
    pd.testing.assert_frame_equal(table, significance_table(correct, against="dense"))
