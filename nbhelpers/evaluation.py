"""Accuracy and F1 with intervals, and paired tests: the one place where statistics are computed."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from nbhelpers.data import IMDbDataset, evaluation_batches
from nbhelpers.models import device_of
from nbhelpers.system.progress import progress, track
from nbhelpers.training import distributed
from nbhelpers.training.loop import token_logits
from nbhelpers.training.precision import faster_in_bfloat16


@torch.inference_mode()
def visit_batches(model: nn.Module, rows: list[list[int]], batch_size: int, precision: str, store: Callable) -> None:
    """Call store(indices, input_ids) for this process's batches of token id lists, in "bf16" or float32 ("no").

    Batches run from short to long reviews, so that little padding is computed. No mask is needed, since padding is on
    the right and attention looks to the left. Raises ``ValueError`` for no rows.
    """
    if not rows:
        raise ValueError("`rows` must have at least one review (got none)")
    device = device_of(model)
    model.eval()
    low = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    # The bar counts tokens, since later batches are longer.
    with low, faster_in_bfloat16(model, precision), progress(sum(map(len, rows)), "evaluating reviews") as bar:
        for number, (indices, ids) in enumerate(evaluation_batches(rows, batch_size, model.config.pad_token_id)):
            if number % distributed.world_size() == distributed.rank():
                store(indices, ids.to(device))
            bar.update(sum(len(rows[i]) for i in indices))


def gathered(logits: torch.Tensor) -> torch.Tensor:
    """Return logits that the processes computed in parts. Raises ``FloatingPointError`` where one is not finite."""
    logits = distributed.all_reduce(logits)
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return logits


def predict_logits(model: nn.Module, rows: list[list[int]], batch_size: int = 32, precision: str = "no") -> np.ndarray:
    """Return logits [n, classes] of token id lists, float32, in their order; computed in "bf16" or float32 ("no").

    Of several processes each computes a part of the batches, and all get all logits. Raises ``ValueError`` for no rows,
    ``FloatingPointError`` for logits that are not finite.
    """
    logits = torch.zeros(len(rows), model.config.num_labels)

    def store(indices, ids):
        logits[indices] = model(input_ids=ids).logits.float().cpu()

    visit_batches(model, rows, batch_size, precision, store)
    return gathered(logits).numpy()


def predict_token_logits(
    model: nn.Module, rows: list[list[int]], batch_size: int = 32, precision: str = "no"
) -> torch.Tensor:
    """Return the logits of every token of all reviews, one after the other: float16 [tokens, classes].

    Each is the classification of the review up to that token; see ``predict_logits`` for the rest.
    """
    ends = np.cumsum([len(row) for row in rows])
    logits = torch.zeros(int(ends[-1]) if rows else 0, model.config.num_labels)

    def store(indices, ids):
        for i, of_review in zip(indices, token_logits(model, {"input_ids": ids}).cpu(), strict=True):
            logits[ends[i] - len(rows[i]) : ends[i]] = of_review[: len(rows[i])]

    visit_batches(model, rows, batch_size, precision, store)
    return gathered(logits).half()


RESAMPLES = 2000  # of each bootstrap


def evaluate_accuracy(model: nn.Module, data: IMDbDataset, batch_size: int = 32, precision: str = "no") -> float:
    """Return the share of reviews that a model classifies correctly; batch_size, precision: see ``predict_logits``."""
    return float(accuracy_score(data.labels, predict_logits(model, data.input_ids, batch_size, precision).argmax(-1)))


def wilson_interval(correct: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the share of True in a bool array (Wilson, 1927)."""
    interval = stats.binomtest(int(np.sum(correct)), len(correct)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Return how often predictions of a confidence are right: one row per bin of confidence, without the empty ones.

    logits: [n, 2]. A prediction's confidence is its probability, 0.5 to 1, cut into bins of equal width. Columns:
    confidence (mean), accuracy, n.
    """
    confidence, right = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    bin_of = np.minimum((bins * (2 * confidence - 1)).astype(int), bins - 1)
    table = pd.DataFrame({"bin": bin_of, "confidence": confidence, "accuracy": right, "n": 1})
    return table.groupby("bin").agg({"confidence": "mean", "accuracy": "mean", "n": "sum"}).reset_index(drop=True)


def calibration_error(table: pd.DataFrame) -> float:
    """Return the expected calibration error: the mean of |accuracy - confidence| over all predictions.

    table: of ``reliability``. See Guo et al. (2017).
    """
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))


def f1_interval(labels: np.ndarray, predicted: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the F1 of class 1, resampling reviews."""
    hit, wrong = (labels == 1) & (predicted == 1), labels != predicted
    # F1 depends on these two counts alone, which a resample of the reviews draws from a multinomial distribution.
    kinds = np.array([hit.sum(), wrong.sum(), len(labels) - hit.sum() - wrong.sum()])
    hits, errors, _ = np.random.default_rng(seed).multinomial(len(labels), kinds / len(labels), size=RESAMPLES).T
    low, high = np.percentile(2 * hits / np.maximum(2 * hits + errors, 1), [2.5, 97.5])
    return float(low), float(high)


def evaluate_model(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy (Wilson interval) and F1 of the positive class (bootstrap interval), and n."""
    predicted = logits.argmax(-1)
    low, high = wilson_interval(predicted == labels)
    f1_low, f1_high = f1_interval(labels, predicted)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "accuracy_low": low,
        "accuracy_high": high,
        "f1": float(f1_score(labels, predicted, zero_division=0.0)),
        "f1_low": f1_low,
        "f1_high": f1_high,
        "n": len(labels),
    }


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Return the exact two-sided p-value that two models err equally often on the same reviews (McNemar, 1947).

    It is a binomial test with p = 1/2 on the reviews that only one of them classifies correctly.
    """
    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(~correct_a & correct_b))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flip_test(sums: np.ndarray) -> float:
    """Return the exact two-sided p-value that paired differences are equally likely of either sign (Fisher, 1935).

    sums: whole numbers [n], per review the number of seeds with which model a is right minus that of model b. Under the
    null hypothesis each has either sign with probability 1/2; the distribution of their total is computed, not sampled.
    With one seed this is McNemar's exact test.
    """
    sizes = np.abs(np.asarray(sums, dtype=int))
    total = abs(int(np.sum(sums)))
    probabilities, reach = np.ones(1), 0
    for size in sizes[sizes > 0]:
        # The probability of the total i - reach is at index i.
        grown = np.zeros(2 * (reach + size) + 1)
        grown[: len(probabilities)] += probabilities / 2
        grown[2 * size :] += probabilities / 2
        probabilities, reach = grown, reach + size
    totals = np.arange(-reach, reach + 1)
    return min(1.0, float(probabilities[np.abs(totals) >= total].sum()))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of whole numbers [seeds, n], over reviews and seeds."""
    # Reviews with the same values over seeds are alike: a resample is a multinomial draw of how many of each kind.
    kinds, counts = np.unique(values, axis=1, return_counts=True)
    rng, (seeds, n) = np.random.default_rng(seed), values.shape
    means = rng.multinomial(n, counts / n, size=RESAMPLES) @ kinds.T / n  # [resamples, seeds]
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds))
    low, high = np.percentile(np.take_along_axis(means, drawn, axis=1).mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return accuracy of a minus accuracy of b on the same reviews: difference, low, high, p_value, n, seeds, spread.

    Arrays [n], or [seeds, n] where models were trained from several seeds, over which the mean is taken. 95 %
    percentile bootstrap over reviews and over seeds; the p-value is that of ``sign_flip_test`` on the reviews; spread
    is the standard deviation over seeds, 0 for one.
    """
    a, b = np.atleast_2d(correct_a), np.atleast_2d(correct_b)
    seeds = min(len(a), len(b))
    change = a[:seeds].astype(int) - b[:seeds].astype(int)
    low, high = bootstrap_interval(change, seed)
    return {
        "difference": float(change.mean()),
        "low": low,
        "high": high,
        "p_value": sign_flip_test(change.sum(0)),
        "n": change.shape[1],
        "seeds": seeds,
        "spread": float(change.mean(1).std(ddof=1)) if seeds > 1 else 0.0,
    }


def over_seeds(correct: np.ndarray) -> dict[str, float]:
    """Return the mean accuracy over seeds of a bool array [n] or [seeds, n], with its 95 % interval.

    Keys: accuracy, accuracy_low, accuracy_high (``bootstrap_interval`` over reviews and seeds; with one seed, Wilson's
    over reviews), lowest_seed, highest_seed (accuracies of single seeds), seeds.
    """
    correct = np.atleast_2d(correct)
    each = correct.mean(1)
    low, high = wilson_interval(correct[0]) if len(correct) == 1 else bootstrap_interval(correct.astype(int))
    found = {"accuracy": float(each.mean()), "accuracy_low": low, "accuracy_high": high}
    return found | {"lowest_seed": float(each.min()), "highest_seed": float(each.max()), "seeds": len(correct)}


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = p.argsort()
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return adjusted.tolist()


def is_significant(found: dict) -> bool:
    """Return whether a paired difference is statistically significant at 5 %.

    The adjusted p-value, which is about reviews, and the interval, which is about reviews and seeds, must agree.
    """
    return bool(found["p_adjusted"] < 0.05 and (found["low"] > 0 or found["high"] < 0))


def significance_table(correct: dict[str, np.ndarray], pairs: list[tuple[str, str]], family: str) -> pd.DataFrame:
    """Return a table of paired comparisons on the same reviews, with p-values adjusted by Holm's method.

    correct: {model: bool array [n] or [seeds, n]}; pairs: (model, model it is compared with), on the seeds of both;
    family: what these pairs have in common, for whose number the p-values are adjusted. Columns: comparison, family,
    metric, difference, low, high, p_value, p_adjusted, n, seeds, spread (over seeds), significant.
    """
    about = {"family": family, "metric": "accuracy"}
    rows = [
        {"comparison": f"{a} - {b}"} | about | paired_difference(correct[a], correct[b])
        for a, b in track(pairs, "comparing models in pairs")
    ]
    table = pd.DataFrame(rows)
    table.insert(7, "p_adjusted", holm(table["p_value"]))
    return table.assign(significant=[is_significant(row) for row in table.to_dict("records")])


def against(correct: dict[str, np.ndarray], baseline: str) -> list[tuple[str, str]]:
    """Return the pairs of every other model with the baseline, for ``significance_table``."""
    return [(name, baseline) for name in correct if name != baseline]
