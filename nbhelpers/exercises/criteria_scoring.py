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

# --- 02 ---


@check
def check_least_overlap(answer, sparsity: float):
    """The least overlap of two flagged sets of this size: the share of one set that must be in the other."""
    both = max(0.0, 2 * sparsity - 1)
    mistakes = {
        "that is a share of all weights: an overlap is a share of what one criterion flags": both,
        "that is the overlap of independent criteria; two that avoid each other share less": sparsity,
        "that is the share of weights that are kept": 1 - sparsity,
        "two sets that hold more than half of all weights each cannot miss each other": 0,
    }
    look = "Let the second criterion flag all that the first one keeps: how many does it still have to take?"
    compare(answer, SHARE, both / sparsity, mistakes, look)
    return "at high sparsity any two criteria overlap a lot, so an overlap is read beside its chance level."


@check
def check_majority_by_chance(answer, quantile: float):
    """The share of weights that at least two of three independent criteria flag, each this share."""
    q = quantile
    mistakes = {
        "that is all three: two of them are enough": q**3,
        "that is two given ones, whatever the third says: any two will do": q**2,
        "that is exactly two: all three is a majority as well": 3 * q**2 * (1 - q),
        "that is at least one": 1 - (1 - q) ** 3,
        "that counts the weights that all three flag three times": 3 * q**2,
        "that is one criterion alone": q,
    }
    look = "Add the ways in which two flag a weight and one does not to the way in which all three do."
    compare(answer, SHARE, q**3 + 3 * q**2 * (1 - q), mistakes, look)
    return "the curve of the votes has to be read from this level, not from zero."


@check
def check_threshold(answer, scores: Tensors, share: float):
    """The score under which this share of all weights lies."""
    value, parts = number(answer, "a score"), [score.flatten() for score in scores.values()]
    flat = torch.cat(parts)
    wanted, allowed = round(share * len(flat)), max(1, len(flat) // 1000)
    below, upto = int((flat < value).sum()), int((flat <= value).sum())
    if below - allowed <= wanted <= upto + allowed:
        return "one threshold for the whole model, so the matrices pay unequally."
    if below - allowed <= len(flat) - wanted <= upto + allowed:
        raise Hint("under it lies the share to be kept, not the share to go: it is at the other end")
    each = [float(part.kthvalue(max(1, round(share * len(part)))).values) for part in parts]
    top, mean = flat.max().item(), flat.mean().item()
    mistakes = {
        "that is the middle of one threshold a matrix: put all scores together first": (np.mean(each), np.median(each)),
        "a quantile counts weights; that is made of the mean or the largest score": (mean, share * mean, share * top),
        "that is the share itself: asked is the score at which it is reached": (share,),
    }
    for hint, wrong in mistakes.items():
        if any(near(value, float(one)) for one in wrong):
            raise Hint(hint)
    raise Hint(f"too {'large: more' if below > wanted else 'small: fewer'} weights lie under it than asked for")


@check
def check_product(answer, weights: Tensors, statistics: dict[str, Tensors]):
    """The scores |w| * mean |gradient| over fine-tuning: {parameter name: tensor}."""
    found, gradient = by_name(answer, weights, tensor, "tensor"), statistics["mean_abs_gradient"]
    before, calibration = statistics["pretrained"], statistics["calibration_gradient"]
    right = {n: w.abs() * gradient[n] for n, w in weights.items()}
    # Functions: of a large model, all of these at once would need a lot of memory.
    mistakes = {
        SIGNED: lambda: {n: w * gradient[n] for n, w in weights.items()},
        "these are the gradients of the calibration pass (Taylor); asked are those of fine-tuning": lambda: {
            n: w.abs() * calibration[n] for n, w in weights.items()
        },
        "these are the weights before fine-tuning": lambda: {n: w.abs() * gradient[n] for n, w in before.items()},
        "that is the square of it": lambda: {n: score.square() for n, score in right.items()},
        "that is the sum of the two, not the product": lambda: {n: w.abs() + gradient[n] for n, w in weights.items()},
        "that is the magnitude alone": lambda: {n: w.abs() for n, w in weights.items()},
        "that is the gradient alone": gradient,
    }
    look = "each score is |w| times the mean absolute gradient of the same weight, element by element"
    match(found, right, mistakes, look, equal)
    return "that is Taylor's idea: what the loss changes by, at first order, when the weight goes."


@check
def check_layer_masks(answer, scores: Tensors, sparsity: float):
    """Masks that drop the same share of every matrix, its lowest scores: {parameter name: mask}, True = kept."""
    kept = by_name(answer, scores, mask, "mask")
    sizes = np.array([score.numel() for score in scores.values()])
    gone = np.array([int((~kept[name]).sum()) for name in scores])
    if (np.abs(gone - sparsity * sizes) > 1).any():
        if (np.abs(gone - (1 - sparsity) * sizes) <= 1).all():
            raise Hint(INVERTED)
        if abs(gone.sum() - sparsity * sizes.sum()) <= len(sizes):
            raise Hint("the share is right over all matrices, not in each: one threshold a matrix, not one for all")
        raise Hint(f"too {'many' if gone.sum() > sparsity * sizes.sum() else 'few'} weights are dropped")
    if all(drops_lowest(~kept[name], score) for name, score in scores.items()):
        raise Hint("the highest scores are dropped: a low score says that a weight can go")
    if not all(drops_lowest(kept[name], score) for name, score in scores.items()):
        raise Hint("the number of dropped weights is right, but they are not those with the lowest scores")
    return "now every matrix pays the same, and the criterion only chooses within it."
