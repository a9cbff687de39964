"""Checks of notebook 02's exercises."""

import numpy as np
import torch

from nbhelpers.exercises.checking import (
    INVERTED,
    SHARE,
    SIGNED,
    Hint,
    Tensors,
    by_name,
    check,
    compare,
    drops_lowest,
    equal,
    mask,
    match,
    near,
    number,
    tensor,
)


@check
def check_least_overlap(answer, sparsity: float):
    """Check the least overlap of two flagged sets of this size: the share of one set that must be in the other."""
    both = max(0.0, 2 * sparsity - 1)
    mistakes = {
        "that is a share of all weights: an overlap is a share of what one criterion flags": both,
        "that is the overlap of independent criteria; two that avoid each other share less": sparsity,
        "that is the share of weights that are kept": 1 - sparsity,
        "two sets that each hold more than half of all weights cannot miss each other": 0,
    }
    advice = "Let the second criterion flag all that the first one keeps: how many must it still flag?"
    compare(answer, SHARE, both / sparsity, mistakes, advice)
    return "at high sparsity any two criteria overlap a lot, so an overlap must be compared with its chance level."


@check
def check_majority_by_chance(answer, quantile: float):
    """Check the share of weights that at least two of three independent criteria flag, each this share."""
    q = quantile
    mistakes = {
        "that is all three: two of them are enough": q**3,
        "that is two given ones, whatever the third flags: any two count": q**2,
        "that is exactly two: all three is a majority as well": 3 * q**2 * (1 - q),
        "that is at least one": 1 - (1 - q) ** 3,
        "that counts the weights that all three flag three times": 3 * q**2,
        "that is one criterion alone": q,
    }
    advice = "Add the ways in which two flag a weight and one does not to the way in which all three do."
    compare(answer, SHARE, q**3 + 3 * q**2 * (1 - q), mistakes, advice)
    return "the curve of the votes has to be read from this level, not from zero."


@check
def check_threshold(answer, scores: Tensors, share: float):
    """Check the score under which this share of all weights lies."""
    value, matrices = number(answer, "a score"), [score.flatten() for score in scores.values()]
    flat = torch.cat(matrices)
    target, allowed = round(share * len(flat)), max(1, len(flat) // 1000)
    below, upto = int((flat < value).sum()), int((flat <= value).sum())
    if below - allowed <= target <= upto + allowed:
        return "with one threshold for the whole model, the matrices lose unequal shares."
    if below - allowed <= len(flat) - target <= upto + allowed:
        raise Hint("the share to keep lies under it, not the share to drop: look at the other end")
    each = [float(matrix.kthvalue(max(1, round(share * len(matrix)))).values) for matrix in matrices]
    top, mean = flat.max().item(), flat.mean().item()
    mistakes = {
        "that is an average of one threshold per matrix: put all scores together first": (
            np.mean(each),
            np.median(each),
        ),
        "a quantile counts weights; that comes from the mean or the largest score": (mean, share * mean, share * top),
        "that is the share itself: the answer is the score at which it is reached": (share,),
    }
    for hint, wrong in mistakes.items():
        if any(near(value, float(candidate)) for candidate in wrong):
            raise Hint(hint)
    raise Hint(f"too {'large: more' if below > target else 'small: fewer'} weights lie under it than the share allows")


@check
def check_product(answer, weights: Tensors, statistics: dict[str, Tensors]):
    """Check the scores |w| * mean |gradient| over fine-tuning: {parameter name: tensor}."""
    found, gradient = by_name(answer, weights, tensor, "tensor"), statistics["mean_abs_gradient"]
    before, calibration = statistics["pretrained"], statistics["calibration_gradient"]
    right = {n: w.abs() * gradient[n] for n, w in weights.items()}
    # Functions: of a large model, all of these at once would need a lot of memory.
    mistakes = {
        SIGNED: lambda: {n: w * gradient[n] for n, w in weights.items()},
        "these are the gradients of the calibration pass (Taylor): use those of fine-tuning": lambda: {
            n: w.abs() * calibration[n] for n, w in weights.items()
        },
        "these are the weights before fine-tuning": lambda: {n: w.abs() * gradient[n] for n, w in before.items()},
        "that is the square of it": lambda: {n: score.square() for n, score in right.items()},
        "that is the sum of the two, not the product": lambda: {n: w.abs() + gradient[n] for n, w in weights.items()},
        "that is the magnitude alone": lambda: {n: w.abs() for n, w in weights.items()},
        "that is the gradient alone": gradient,
    }
    advice = "each score is |w| times the mean absolute gradient of the same weight, element by element"
    match(found, right, mistakes, advice, equal)
    return "that is Taylor's idea: the change of the loss, to first order, when the weight is removed."


@check
def check_layer_masks(answer, scores: Tensors, sparsity: float):
    """Check masks that drop the same share of every matrix, its lowest scores: {parameter name: mask}, True = kept."""
    kept = by_name(answer, scores, mask, "mask")
    sizes = np.array([score.numel() for score in scores.values()])
    dropped = np.array([int((~kept[name]).sum()) for name in scores])
    if (np.abs(dropped - sparsity * sizes) > 1).any():
        if (np.abs(dropped - (1 - sparsity) * sizes) <= 1).all():
            raise Hint(INVERTED)
        if abs(dropped.sum() - sparsity * sizes.sum()) <= len(sizes):
            raise Hint("the share is right over all matrices, not in each: not one threshold for all, one per matrix")
        raise Hint(f"too {'many' if dropped.sum() > sparsity * sizes.sum() else 'few'} weights are dropped")
    if all(drops_lowest(~kept[name], score) for name, score in scores.items()):
        raise Hint("the highest scores are dropped: a low score marks a weight that can go")
    if not all(drops_lowest(kept[name], score) for name, score in scores.items()):
        raise Hint("the number of dropped weights is right, but they are not those with the lowest scores")
    return "now every matrix loses the same share, and the criterion only chooses within it."
