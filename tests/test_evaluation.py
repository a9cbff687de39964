"""Predictions, intervals and tests against scikit-learn, scipy and counts by hand."""

import itertools
import statistics
import time

import numpy as np
import pytest
import torch
from conftest import assert_percentiles, literal_means, tiny_model
from scipy.special import softmax
from scipy.stats import binomtest, bootstrap, norm, wilcoxon
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, f1_score

from nbhelpers.data import IMDbDataset
from nbhelpers.evaluation import (
    against,
    calibration_error,
    evaluate_accuracy,
    evaluate_model,
    f1_interval,
    holm,
    is_significant,
    mcnemar,
    over_seeds,
    paired_difference,
    predict_logits,
    predict_token_logits,
    reliability,
    sign_flip_test,
    significance_table,
    wilson_interval,
)

# --- predictions ---


def test_reliability_and_calibration_error_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 2)) * 2
    labels = (rng.random(500) < softmax(1.5 * logits, axis=1)[:, 1]).astype(int)
    table = reliability(logits, labels, bins=10)
    confidence, right = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    # Confidence lies between 0.5 and 1: the upper ten of twenty bins.
    accuracy, mean = calibration_curve(right, confidence, n_bins=20)
    np.testing.assert_allclose(table[["confidence", "accuracy"]].to_numpy(), np.stack([mean, accuracy], 1), rtol=1e-12)
    assert table["n"].sum() == 500
    by_hand = sum(n * abs(a - c) for a, c, n in zip(accuracy, mean, table["n"], strict=True)) / 500
    assert calibration_error(table) == pytest.approx(by_hand)
    certain = reliability(np.array([[50.0, -50.0], [-50.0, 50.0]]), np.array([0, 0]))
    assert certain[["confidence", "accuracy", "n"]].to_numpy().tolist() == [[1.0, 0.5, 2]]


@pytest.fixture
def token_rows():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, length).tolist() for length in rng.permutation(np.arange(1, 17))]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_logits_come_in_the_order_of_the_reviews_for_every_batch_size(token_rows, batch_size):
    model = tiny_model(dropout=0.5).train()
    found = predict_logits(model, token_rows, batch_size)
    assert (found.shape, found.dtype, model.training) == ((16, 2), np.float32, False)
    with torch.inference_mode():
        alone = np.concatenate([model(input_ids=torch.tensor([row])).logits.numpy() for row in token_rows])
    # float32 products of width 8 to 32 in another order: a few 1e-7.
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.ptp(alone[:, 0]) > 0.01, "rows that are all alike would show no order"


def test_the_logits_of_a_token_are_those_of_the_review_up_to_it(token_rows):
    model = tiny_model()
    found = predict_token_logits(model, token_rows, batch_size=4)
    assert found.dtype == torch.float16 and len(found) == sum(map(len, token_rows))
    with torch.inference_mode():
        for row, logits in zip(token_rows, found.split([len(row) for row in token_rows]), strict=True):
            cuts = [model(input_ids=torch.tensor([row[:k]])).logits[0] for k in range(1, len(row) + 1)]
            # float16 has 11 binary digits.
            torch.testing.assert_close(logits.float(), torch.stack(cuts), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_models_are_evaluated_in_the_precision_that_is_asked_for(token_rows, precision, dtype):
    model, seen = tiny_model(), []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    found = predict_logits(model, token_rows, precision=precision)
    assert set(seen) == {dtype} and found.dtype == np.float32
    exact = predict_logits(model, token_rows)
    # bfloat16 keeps 8 binary digits.
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())
    assert np.array_equal(found, exact) == (precision == "no")


def test_no_reviews_and_logits_that_are_not_finite_are_errors(token_rows):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`rows` must have at least one review \(got none\)"):
        predict_logits(model, [])
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        predict_logits(model, token_rows)


def test_accuracy_is_that_of_scikit_learn(token_rows):
    data = IMDbDataset.__new__(IMDbDataset)
    data.input_ids, data.labels = token_rows, np.arange(16) % 2
    predicted = predict_logits(tiny_model(), token_rows).argmax(1)
    assert evaluate_accuracy(tiny_model(), data) == accuracy_score(data.labels, predicted)


# --- intervals ---


@pytest.mark.parametrize(("right", "total"), [(0, 10), (1, 10), (45, 50), (50, 50), (940, 1000)])
def test_wilsons_limits_are_the_shares_that_the_score_test_just_accepts(right, total):
    # n (share - p)^2 = z^2 p (1 - p), as a polynomial in p.
    square, share = norm.ppf(0.975) ** 2, right / total
    limits = np.sort(np.roots([total + square, -2 * right - square, right * share]).real)
    assert wilson_interval(np.arange(total) < right) == pytest.approx(limits, abs=1e-9)


def noisy_predictions(count=150):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, count)
    return labels, np.where(rng.random(count) < 0.8, labels, 1 - labels)


def test_the_f1_interval_is_the_percentile_bootstrap_of_scipy():
    labels, predicted = noisy_predictions()

    def f1(rows, axis):
        y, p = labels[rows], predicted[rows]
        hits = ((y == 1) & (p == 1)).sum(axis)
        return 2 * hits / (2 * hits + (y != p).sum(axis))

    rows = (np.arange(150),)
    reference = bootstrap(rows, f1, n_resamples=50_000, batch=5000, method="percentile", rng=0)
    assert_percentiles(f1_interval(labels, predicted, seed=3), reference.bootstrap_distribution)
    assert f1_interval(labels, predicted, seed=3) == f1_interval(labels, predicted, seed=3)


@pytest.mark.parametrize("case", ["noisy", "perfect", "never positive", "always positive"])
def test_evaluate_model_agrees_with_scikit_learn(case):
    labels, predicted = noisy_predictions()
    predicted = {"perfect": labels, "never positive": 0 * labels, "always positive": 0 * labels + 1}.get(
        case, predicted
    )
    found = evaluate_model(np.stack([-predicted, predicted], 1) + 5.0, labels)
    assert list(found) == ["accuracy", "accuracy_low", "accuracy_high", "f1", "f1_low", "f1_high", "n"]
    assert (found["n"], found["accuracy"]) == (150, accuracy_score(labels, predicted))
    assert found["f1"] == f1_score(labels, predicted, zero_division=0.0)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(labels == predicted)
    assert found["f1_low"] <= found["f1"] <= found["f1_high"]
    if case == "never positive":
        assert found["f1_high"] == 0


# --- paired tests ---


def pair(both, only_a, only_b, neither):
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


def test_mcnemar_and_the_sign_flip_test_of_one_seed_are_the_binomial_test_on_discordant_reviews():
    # Twelve discordant reviews, 10 to 2: 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 2 * 79 / 4096.
    assert mcnemar(*pair(80, 10, 2, 8)) == pytest.approx(158 / 4096)
    for counts in itertools.product([0, 20], [0, 1, 7, 40], [0, 4, 12], [3]):
        a, b = pair(*counts)
        discordant = counts[1] + counts[2]
        expected = binomtest(counts[1], discordant, 0.5).pvalue if discordant else 1.0
        assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(expected, rel=1e-9)
        assert sign_flip_test(a.astype(int) - b.astype(int)) == pytest.approx(expected, rel=1e-9)


def test_the_sign_flip_test_is_the_share_of_all_flips_that_are_as_far_out():
    rng = np.random.default_rng(0)
    assert sign_flip_test(np.array([], int)) == 1.0
    for n in (1, 2, 5, 9):
        signs = np.array(list(itertools.product((-1, 1), repeat=n)))
        for _ in range(20):
            sums = rng.integers(-3, 4, n)
            totals = signs @ sums
            # Equal, not nearly: shares of 2^n are exact in binary.
            assert sign_flip_test(sums) == (np.abs(totals) >= abs(sums.sum())).mean(), sums


def test_the_sign_flip_test_of_signed_ranks_is_wilcoxons():
    rng = np.random.default_rng(0)
    for n in (3, 10, 45):
        ranks = rng.permutation(np.arange(1, n + 1)) * rng.choice([-1, 1], n)
        assert sign_flip_test(ranks) == pytest.approx(wilcoxon(ranks, method="exact").pvalue, rel=1e-9)


def test_the_sign_flip_test_of_a_whole_test_part_is_quick_and_near_its_normal_approximation():
    sums = np.random.default_rng(0).choice([-3, -2, -1, 0, 1, 2, 3], 2500, p=[0.01, 0.02, 0.05, 0.8, 0.07, 0.03, 0.02])
    started = time.process_time()
    p_value = sign_flip_test(sums)
    # It takes hundredths of a second; all 2^500 flips would never end.
    assert time.process_time() - started < 5
    z = (abs(sums.sum()) - 0.5) / np.sqrt((sums**2).sum())
    assert p_value == pytest.approx(2 * norm.sf(z), rel=0.05)


@pytest.mark.parametrize("counts", [(60, 3, 7, 10), (60, 40, 12, 10)])
def test_a_paired_difference_of_one_seed_has_the_percentile_bootstrap_of_scipy(counts):
    a, b = pair(*counts)
    found = paired_difference(a, b)
    assert list(found) == ["difference", "low", "high", "p_value", "n", "seeds", "spread"]
    assert found["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert (found["n"], found["seeds"], found["spread"]) == (len(a), 1, 0.0)
    assert found["p_value"] == pytest.approx(mcnemar(a, b))
    change = (a.astype(float) - b,)
    reference = bootstrap(change, np.mean, n_resamples=50_000, batch=5000, method="percentile", rng=0)
    assert_percentiles((found["low"], found["high"]), reference.bootstrap_distribution)
    assert paired_difference(a[None], b[None]) == found, "one seed with or without its axis"
    same = paired_difference(a, a)
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)


def test_a_paired_difference_over_seeds_resamples_reviews_and_seeds():
    rng = np.random.default_rng(5)
    a, b = rng.random((3, 80)) < np.array([[0.9], [0.8], [0.75]]), rng.random((3, 80)) < 0.7
    found = paired_difference(a, b)
    by_seed = (a.mean(1) - b.mean(1)).tolist()
    assert found["difference"] == pytest.approx(sum(by_seed) / 3)
    assert found["spread"] == pytest.approx(statistics.stdev(by_seed))
    assert (found["n"], found["seeds"]) == (80, 3)
    assert found["p_value"] == sign_flip_test((a.astype(int) - b).sum(0))
    assert_percentiles((found["low"], found["high"]), literal_means(a.astype(int) - b))
    # Of two models that differ in seeds, the seeds of both are compared.
    assert paired_difference(a, b[:2]) == paired_difference(a[:2], b[:2])
    assert paired_difference(a, b[0]) == paired_difference(a[0], b[0])


def test_seeds_that_disagree_widen_the_interval():
    a = np.repeat([[True], [True], [False]], 400, axis=1)
    b = np.repeat([[False], [True], [True]], 400, axis=1)
    found = paired_difference(a, b)
    # Each of three draws is +1, 0 or -1: all three alike, and so a mean of 1, happens in one of 27.
    assert (found["difference"], found["spread"], found["low"], found["high"]) == (0, 1, -1, 1)


def test_accuracy_over_seeds_has_a_bootstrap_interval_over_reviews_and_seeds_beside_its_range():
    correct = np.arange(40) < np.array([[20], [30], [22]])
    found = over_seeds(correct)
    interval = found.pop("accuracy_low"), found.pop("accuracy_high")
    assert found == pytest.approx({"accuracy": 0.6, "lowest_seed": 0.5, "highest_seed": 0.75, "seeds": 3})
    assert_percentiles(interval, literal_means(correct))
    low, high = wilson_interval(correct[0])
    single = {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high, "seeds": 1}
    single |= {"lowest_seed": 0.5, "highest_seed": 0.5}
    assert over_seeds(correct[0]) == over_seeds(correct[:1]) == pytest.approx(single)


# --- many tests ---


def test_holm_is_the_closure_of_bonferroni():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and the last may not be below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for size in (0, 1, 4, 6):
        p_values = (rng.random(size) ** 3).tolist()
        # An adjusted p-value is the largest that Bonferroni gives any set of hypotheses that has this one.
        sets = [chosen for k in range(size) for chosen in itertools.combinations(range(size), k + 1)]
        corrected = {chosen: min(1.0, len(chosen) * min(p_values[j] for j in chosen)) for chosen in sets}
        expected = [max(corrected[chosen] for chosen in sets if i in chosen) for i in range(size)]
        assert holm(p_values) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("p_adjusted", "low", "high", "expected"),
    [(0.049, 0.01, 0.03, True), (0.049, -0.03, -0.01, True), (0.05, 0.01, 0.03, False), (0.01, -0.01, 0.03, False)],
)
def test_a_difference_is_significant_where_the_p_value_and_the_interval_agree(p_adjusted, low, high, expected):
    assert is_significant({"p_adjusted": p_adjusted, "low": low, "high": high}) is expected


def test_the_significance_table_has_a_row_per_pair_and_adjusted_p_values():
    rng = np.random.default_rng(0)
    correct = {"dense": rng.random((3, 60)) < 0.9, "pruned": rng.random((3, 60)) < 0.7, "student": rng.random(60) < 0.8}
    pairs = against(correct, "dense")
    assert pairs == [("pruned", "dense"), ("student", "dense")]
    table = significance_table(correct, pairs, "all against dense")
    columns = "comparison family metric difference low high p_value p_adjusted n seeds spread significant"
    assert " ".join(table) == columns and set(table["family"]) == {"all against dense"}
    assert table["comparison"].tolist() == ["pruned - dense", "student - dense"]
    assert table["p_adjusted"].tolist() == holm(table["p_value"].tolist())
    for (a, b), row in zip(pairs, table.to_dict("records"), strict=True):
        expected = paired_difference(correct[a], correct[b])
        assert {name: row[name] for name in expected} == expected
