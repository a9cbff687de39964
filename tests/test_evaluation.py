"""Metrics, intervals and tests against formulas, brute force and worked examples."""

import itertools
import math
import statistics
import time

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from sklearn.metrics import accuracy_score, f1_score
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers import evaluation
from nbhelpers.data import IMDbDataset
from nbhelpers.evaluation import (
    against,
    evaluate_accuracy,
    evaluate_model,
    f1_interval,
    holm,
    mcnemar,
    over_seeds,
    paired_difference,
    predict_logits,
    sign_flip_test,
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


# --- accuracy ---


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


# --- over seeds ---


def test_with_one_seed_the_sign_flip_test_is_mcnemars():
    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = rng.random((2, rng.integers(1, 60))) < rng.random((2, 1))
        sums = a.astype(int) - b.astype(int)
        ahead, behind = int((sums > 0).sum()), int((sums < 0).sum())
        expected = binomtest(ahead, ahead + behind, 0.5).pvalue if ahead + behind else 1.0
        assert sign_flip_test(sums) == pytest.approx(expected, rel=1e-9)
        assert sign_flip_test(sums) == pytest.approx(mcnemar(a, b), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_sign_flip_test_counts_all_assignments_of_signs(n):
    rng = np.random.default_rng(n)
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    for _ in range(20):
        sums = rng.integers(-3, 4, n)
        totals = signs @ np.abs(sums)
        expected = (np.abs(totals) >= abs(sums.sum())).mean()
        assert sign_flip_test(sums) == pytest.approx(expected, abs=1e-12), sums


def test_the_sign_flip_test_worked_out_by_hand():
    # Totals of +-2 +-1: 3, 1, -1, -3, each with probability 1/4.
    assert sign_flip_test(np.array([2, 1, 0])) == 0.5
    assert sign_flip_test(np.array([2, -1])) == 1.0
    # Six reviews with all three seeds on one side: 2 / 2^6.
    assert sign_flip_test(np.full(6, -3)) == pytest.approx(1 / 32)


def test_the_sign_flip_test_is_symmetric_and_says_nothing_where_nothing_differs():
    sums = np.random.default_rng(1).integers(-3, 4, 200)
    p_value = sign_flip_test(sums)
    assert sign_flip_test(-sums) == p_value
    assert sign_flip_test(np.concatenate([sums, np.zeros(1000, int)])) == p_value
    assert sign_flip_test(sums[::-1]) == pytest.approx(p_value)
    assert sign_flip_test(np.zeros(50, int)) == sign_flip_test(np.array([], int)) == 1.0


def test_the_sign_flip_test_of_a_whole_test_part_is_quick_and_near_its_normal_approximation():
    sums = np.random.default_rng(0).choice([-3, -2, -1, 0, 1, 2, 3], 2500, p=[0.01, 0.02, 0.05, 0.8, 0.07, 0.03, 0.02])
    started = time.process_time()
    p_value = sign_flip_test(sums)
    assert time.process_time() - started < 2
    z = (abs(sums.sum()) - 0.5) / np.sqrt((sums**2).sum())
    assert p_value == pytest.approx(2 * norm.sf(z), rel=0.05)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 7), (40, 12)])
def test_a_paired_difference_has_the_sign_of_a_minus_b_and_a_bootstrap_interval(only_a, only_b):
    a, b = pair(60, only_a, only_b, 10)
    found = paired_difference(a, b, seed=2)
    assert list(found) == ["difference", "low", "high", "p_value", "n", "seeds", "spread"]
    assert found["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert (found["n"], found["seeds"], found["spread"]) == (len(a), 1, 0.0)
    assert found["p_value"] == pytest.approx(mcnemar(a, b))
    rng = np.random.default_rng(2)
    means = [np.mean(a[chosen]) - np.mean(b[chosen]) for chosen in rng.integers(len(a), size=(2000, len(a)))]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    back = paired_difference(b, a, seed=2)
    assert (back["difference"], back["low"], back["high"]) == pytest.approx(
        (-found["difference"], -found["high"], -found["low"]), abs=1e-12
    )
    assert paired_difference(a[None], b[None], seed=2) == found, "one seed with or without its axis"


def test_a_paired_difference_over_seeds_resamples_reviews_and_seeds():
    rng = np.random.default_rng(5)
    a, b = rng.random((3, 80)) < 0.8, rng.random((3, 80)) < 0.7
    found = paired_difference(a, b, seed=4)
    by_seed = [one.mean() - other.mean() for one, other in zip(a, b, strict=True)]
    assert found["difference"] == pytest.approx(sum(by_seed) / 3)
    assert found["spread"] == pytest.approx(statistics.stdev(by_seed))
    assert (found["n"], found["seeds"]) == (80, 3)
    assert found["low"] < found["difference"] < found["high"]
    ahead = [sum(int(a[s, i]) - int(b[s, i]) for s in range(3)) for i in range(80)]
    assert found["p_value"] == sign_flip_test(np.array(ahead))
    rng, means = np.random.default_rng(4), []
    reviews, seeds = rng.integers(80, size=(2000, 80)), rng.integers(3, size=(3, 2000))
    for i in range(2000):
        means.append(np.mean([a[s, reviews[i]].mean() - b[s, reviews[i]].mean() for s in seeds[:, i]]))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_seeds_that_disagree_widen_the_interval():
    a = np.repeat([[True], [True], [False]], 400, axis=1)
    b = np.repeat([[False], [True], [True]], 400, axis=1)
    found = paired_difference(a, b)
    assert (found["difference"], found["spread"]) == (0, 1)
    # Each of three draws is +1, 0 or -1: all three alike, and so a mean of 1, happens in one of 27.
    assert (found["low"], found["high"]) == (-1, 1)


def test_of_two_models_the_seeds_that_both_have_are_compared():
    rng = np.random.default_rng(0)
    three, two, one = rng.random((3, 50)) < 0.8, rng.random((2, 50)) < 0.8, rng.random(50) < 0.8
    assert paired_difference(three, two) == paired_difference(three[:2], two)
    assert paired_difference(three, one) == paired_difference(three[0], one)
    assert paired_difference(one, two)["seeds"] == 1


def test_accuracy_over_seeds_is_their_mean_between_the_lowest_and_the_highest():
    correct = np.arange(40) < np.array([[20], [30], [22]])
    found = over_seeds(correct)
    assert found == pytest.approx({"accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.75, "seeds": 3})
    low, high = binomtest(20, 40).proportion_ci(method="wilson")
    one = {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high, "seeds": 1}
    assert over_seeds(correct[0]) == over_seeds(correct[:1]) == pytest.approx(one)


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


COLUMNS = "comparison metric difference low high p_value p_adjusted n seeds spread"


def test_the_significance_table_has_the_columns_of_the_contract_and_a_row_a_pair():
    rng = np.random.default_rng(0)
    correct = {name: rng.random(200) < share for name, share in (("dense", 0.9), ("pruned", 0.7), ("student", 0.85))}
    table = significance_table(correct, [("pruned", "dense"), ("student", "pruned"), ("dense", "student")])
    assert list(table.columns) == COLUMNS.split()
    assert table["comparison"].tolist() == ["pruned - dense", "student - pruned", "dense - student"]
    assert table["metric"].tolist() == ["accuracy"] * 3
    assert table["n"].tolist() == [200] * 3
    assert table["seeds"].tolist() == [1] * 3
    assert table["spread"].tolist() == [0.0] * 3
    assert table["p_adjusted"].tolist() == holm(table["p_value"].tolist())
    assert (table["p_adjusted"] >= table["p_value"]).all()
    first = table.iloc[0]
    assert first["difference"] == pytest.approx(correct["pruned"].mean() - correct["dense"].mean())
    assert first["low"] < first["difference"] < first["high"] < 0
    only, other = (int((correct[a] & ~correct[b]).sum()) for a, b in (("pruned", "dense"), ("dense", "pruned")))
    assert first["p_value"] == pytest.approx(binomtest(only, only + other).pvalue)
    by_itself = significance_table(correct, [("pruned", "dense")])
    assert by_itself["p_adjusted"].tolist() == by_itself["p_value"].tolist() == [first["p_value"]]


def test_models_of_one_seed_and_of_several_stand_in_one_significance_table():
    rng = np.random.default_rng(0)
    correct = {"dense": rng.random((3, 60)) < 0.9, "pruned": rng.random((3, 60)) < 0.7, "student": rng.random(60) < 0.8}
    table = significance_table(correct, against(correct, "dense")).set_index("comparison")
    assert table["seeds"].to_dict() == {"pruned - dense": 3, "student - dense": 1}
    assert table.loc["pruned - dense", "difference"] == pytest.approx(
        correct["pruned"].mean() - correct["dense"].mean()
    )
    assert table.loc["student - dense", "difference"] == pytest.approx(
        correct["student"].mean() - correct["dense"][0].mean()
    )


def test_against_pairs_every_other_model_with_the_line():
    correct = {name: np.ones(3, bool) for name in ("a", "line", "b")}
    assert against(correct, "line") == [("a", "line"), ("b", "line")]
