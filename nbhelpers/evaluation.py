"""Accuracy and F1 with intervals, and paired tests: the one place where statistics are computed."""

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from nbhelpers.data import IMDbDataset, evaluation_batches

RESAMPLES = 2000


@torch.inference_mode()
def predict_logits(model: nn.Module, rows: list[list[int]], batch_size: int = 32) -> np.ndarray:
    """Logits [n, classes] of token id lists, float32, in the order given.

    Computed from short to long, so that hardly any padding is; no mask is passed, since padding stands on the right
    and attention looks to the left.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    model.eval()
    logits = None
    for indices, ids in evaluation_batches(rows, batch_size, model.config.pad_token_id):
        out = model(input_ids=ids.to(device)).logits.float().cpu().numpy()
        if logits is None:
            logits = np.empty((len(rows), out.shape[1]), dtype=np.float32)
        logits[indices] = out
    if logits is None:
        raise ValueError("there are no reviews to predict")
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    return logits


def evaluate_accuracy(model: nn.Module, data: IMDbDataset, batch_size: int = 32) -> float:
    """Share of reviews whose label the model gets right."""
    return float(accuracy_score(data.labels, predict_logits(model, data.input_ids, batch_size).argmax(-1)))


def wilson_interval(correct: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share, from a bool array (Wilson, 1927)."""
    interval = stats.binomtest(int(np.sum(correct)), len(correct)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def f1_interval(labels: np.ndarray, predicted: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the F1 of class 1, resampling reviews."""
    rows = np.random.default_rng(seed).integers(len(labels), size=(RESAMPLES, len(labels)))
    hit = ((labels == 1) & (predicted == 1))[rows].sum(1)
    wrong = (labels != predicted)[rows].sum(1)
    f1 = 2 * hit / np.maximum(2 * hit + wrong, 1)
    low, high = np.percentile(f1, [2.5, 97.5])
    return float(low), float(high)


def evaluate_model(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy (Wilson interval) and F1 of the positive class (bootstrap interval), and n."""
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
    """Exact two-sided p-value that two models err equally often on the same reviews (McNemar, 1947).

    Only the reviews that one of them gets right count: a binomial test with p = 1/2 on those.
    """
    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(~correct_a & correct_b))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Accuracy of a minus accuracy of b on the same reviews: difference, low, high, p_value, n.

    95 % percentile bootstrap over reviews; the p-value is McNemar's.
    """
    change = correct_a.astype(float) - correct_b.astype(float)
    rows = np.random.default_rng(seed).integers(len(change), size=(RESAMPLES, len(change)))
    low, high = np.percentile(change[rows].mean(1), [2.5, 97.5])
    p_value = mcnemar(correct_a, correct_b)
    return {
        "difference": float(change.mean()),
        "low": float(low),
        "high": float(high),
        "p_value": p_value,
        "n": len(change),
    }


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = p.argsort()
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return adjusted.tolist()


def significance_table(correct: dict[str, np.ndarray], against: str) -> pd.DataFrame:
    """Each model against one of them on the same reviews, p-values adjusted by Holm's method.

    correct: {model: bool array [n]}. Columns: comparison, metric, difference, low, high, p_value, p_adjusted, n, seeds.
    """
    rows = [
        {"comparison": f"{name} - {against}", "metric": "accuracy", **paired_difference(c, correct[against])}
        for name, c in correct.items()
        if name != against
    ]
    table = pd.DataFrame(rows)
    table.insert(6, "p_adjusted", holm(table["p_value"]))
    return table.assign(seeds=1)
