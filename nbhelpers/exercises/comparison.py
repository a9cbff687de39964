"""Checks of notebook 06's exercises."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from nbhelpers.exercises.checking import Hint, check, compare, items_of, match, near, numbers_of


@check
def check_overlapping(answer, table: pd.DataFrame, reference: str):
    """Check the names of the models whose interval overlaps that of a reference, with a paired p-value below 0.05."""
    names = items_of(answer, "a list of model names")
    if not all(isinstance(name, str) and name in set(table["model"]) for name in names):
        raise Hint('the answer must be a list of names from the column "model" of the table')
    if reference in names:
        raise Hint("the model that all others are compared with must not be among them")
    line = table[table["model"] == reference].iloc[0]
    others = table[table["model"] != reference].set_index("model")
    overlap = (others["accuracy_low"] <= line["accuracy_high"]) & (others["accuracy_high"] >= line["accuracy_low"])
    clear = others["p_value"] < 0.05
    mistakes = {
        "these have a small p-value, but not all of their intervals overlap": clear,
        "their intervals overlap, but their p-values are not below 0.05": overlap & ~clear,
        "their intervals overlap, but not all of their p-values are below 0.05": overlap,
        "their intervals do not overlap: look for those that do": ~overlap,
    }
    advice = "some models are missing or too many: both conditions must hold, for each model against the reference"
    match(set(names), overlap & clear, mistakes, advice, lambda a, b: a == set(others.index[b]))
    return "an interval is about one model by itself; the paired test uses only the reviews on which two models differ."


@check
def check_bits(answer, nats_per_token: float, bytes_per_token: float):
    """Check the bits per byte of a language model, from its loss in nats per token."""
    nats, size = nats_per_token, bytes_per_token
    mistakes = {
        "that is in nats, with the natural logarithm: a bit is a logarithm to base 2": nats / size,
        "the logarithm of 2 is on the wrong side of the fraction": nats * math.log(2) / size,
        "that is per token, for each token: a token is several bytes": nats / math.log(2),
        "a byte is less than a token: it needs fewer bits": nats / math.log(2) * size,
        "that is the logarithm to base 10": nats / math.log(10) / size,
        "that is the perplexity of a token": math.exp(nats),
    }
    compare(answer, "bits per byte", nats / math.log(2) / size, mistakes, "Nats into bits, then tokens into bytes.")
    return "per byte, models with different tokenizers can be compared; per token they cannot."


@check
def check_mcnemar(answer, only_a: int, only_b: int, both: int, neither: int):
    """Check the exact two-sided p-value of McNemar's test from the four counts of two models on the same reviews."""
    decided, total, gap = only_a + only_b, only_a + only_b + both + neither, abs(only_a - only_b)
    right, alone = stats.binomtest(only_a, decided).pvalue, stats.binom.pmf(only_a, decided, 0.5)
    counts = [[both + only_a, neither + only_b], [both + only_b, neither + only_a]]
    unpaired = (
        stats.chi2_contingency(counts, correction=False).pvalue,
        stats.chi2_contingency(counts).pvalue,
        stats.fisher_exact(counts).pvalue,
    )
    rough = (stats.chi2.sf(gap**2 / decided, 1), stats.chi2.sf(max(0, gap - 1) ** 2 / decided, 1))
    mistakes = {
        "that is one-sided: an uneven split the other way counts as well": right / 2,
        "that is this split alone: more uneven ones count as well": alone,
        "these are the two splits of this size: more uneven ones count as well": 2 * alone,
        "the reviews on which both agree are not throws of the coin": stats.binomtest(only_a, total).pvalue,
        "that is an unpaired test, as if the reviews were different ones: only disagreements count": unpaired,
        "that is the approximation by chi squared: with so few disagreements take the exact test": rough,
    }
    advice = "A fair coin, thrown once for each disagreement: how likely is a split at least as uneven, either way?"
    compare(answer, "a p-value", right, mistakes, advice)
    return "however many reviews both get right, the power of a paired test depends on the disagreements alone."


@check
def check_holm(answer, p_values: list[float]):
    """Check p-values adjusted by Holm's method, in the order in which they were given."""
    p = np.asarray(p_values, dtype=float)
    found, rank = numbers_of(answer, "a list of adjusted p-values", len(p)), p.argsort().argsort()
    scaled = p * (len(p) - rank)
    stepped = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1.0)
    right = stepped[rank]
    mistakes = {
        "these are sorted: return them in the order of the p-values given": stepped,
        "a larger p-value must not become smaller than the one before it": scaled,
        "that is Bonferroni's: only the smallest is multiplied by the number of all": (p * len(p)).clip(max=1.0),
        "that is Benjamini and Hochberg's, which controls another kind of error": stats.false_discovery_control(p),
        "the factors are the wrong way round: the smallest p-value gets the largest factor": p * (1 + rank),
        "these are the p-values as they came, not adjusted": p,
    }
    wrong = [i for i in range(len(p)) if not near(found[i], right[i])]
    advice = f"look at number {wrong[0] + 1}: how many are at least as large, and is the order kept?" if wrong else ""
    match(found, right, mistakes, advice, lambda a, b: all(map(near, a, b)))
    return "Holm guards against one false alarm among all comparisons, as Bonferroni does, and loses less power."


@check
def check_reviews_needed(answer, disagree: float, difference: float, power: float, level: float):
    """Check how many reviews a paired test needs for this power, where two models disagree on this share of them."""
    alpha, one_sided, beta = stats.norm.ppf([1 - level / 2, 1 - level, power])
    unit = disagree / difference**2
    needed = (alpha + beta) ** 2 * unit
    mistakes = {
        "the power is missing: half of such studies would find nothing": alpha**2 * unit,
        "that is one-sided: either model may be the better one": (one_sided + beta) ** 2 * unit,
        "the difference is a share, not a number of points": needed / 1e4,
        "the difference must be squared": needed * difference,
        "the share of disagreements is missing: only they count": needed / disagree,
        "the sum of the two quantiles must be squared": (alpha + beta) * unit,
        "that is the number of disagreements: how many reviews does it take to see so many?": needed * disagree,
    }
    advice = "The variance of the mean difference is about the share of disagreements divided by the number of reviews."
    compare(answer, "a number of reviews", needed, mistakes, advice)
    return "half the difference takes four times the reviews, so small leads are not called wins here."


@check
def check_bootstrap(answer, right_a: np.ndarray, right_b: np.ndarray):
    """Check the 95 % bootstrap interval of accuracy a minus accuracy b on the same reviews: (low, high)."""
    found = np.array(numbers_of(answer, "a pair (low, high)", 2))
    rng, n, times = np.random.default_rng(0), len(right_a), 20_000
    # Reviews are of three kinds, so a resample is one draw of how many of each kind are in it.
    shares = [np.mean(right_a & ~right_b), np.mean(~right_a & right_b), np.mean(right_a == right_b)]
    won, lost, _ = rng.multinomial(n, shares, size=times).T / n
    apart = (rng.binomial(n, right_a.mean(), times) - rng.binomial(n, right_b.mean(), times)) / n
    right = np.percentile(won - lost, [2.5, 97.5])
    # The chance in 2,000 resamples and one step between possible values are allowed; an interval of 90 % is not.
    tolerance = max(0.04 * (right[1] - right[0]) + 0.5 / n, 1.01 / n)
    mistakes = {
        "that is the second model minus the first": -right[::-1],
        "the models were resampled apart: draw reviews, and take both models' results on each": np.percentile(
            apart, [2.5, 97.5]
        ),
        "that is an interval of 90 %: five percent are outside at each end": np.percentile(won - lost, [5, 95]),
        "high comes first there: the order is low, then high": right[::-1],
        "that is in points: use shares, without the factor 100": 100 * right,
    }
    wide = "too wide" if found[1] - found[0] > right[1] - right[0] else "too narrow"
    advice = f"the interval is {wide} or in the wrong place: draw as many reviews as there are, with replacement"
    # The tolerance grows with what is compared: an interval in points is a hundred times as wide.
    scale = 100 if np.abs(found).max() > 1 else 1
    match(found, right, mistakes, advice, lambda a, b: bool((np.abs(a - b) <= scale * tolerance).all()))
    return "both results on each review are drawn together, so what the models share cancels and the interval narrows."
