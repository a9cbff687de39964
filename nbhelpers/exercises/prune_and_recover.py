"""Checks of notebook 03's exercises."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.criteria import merge_scores
from nbhelpers.exercises.checking import (
    INVERTED,
    SHARE,
    SIGNED,
    Hint,
    Tensors,
    by_name,
    call,
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
from nbhelpers.masks import MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.selection import select
from nbhelpers.training.observers import calibrate


@check
def check_mask(answer, weights: torch.Tensor, sparsity: float):
    """Check the mask that drops the share of a matrix with the smallest magnitudes: True = kept."""
    kept, score = mask(answer, weights.shape), weights.abs()
    target, dropped = round(sparsity * score.numel()), int((~kept).sum())
    if dropped == target and drops_lowest(kept, score):
        return "multiplied with the weights this is the pruned matrix; the mask itself needs one bit per weight."
    if dropped == score.numel() - target and drops_lowest(~kept, score):
        raise Hint(INVERTED)
    if dropped != target:
        raise Hint(f"the mask drops too {'many' if dropped > target else 'few'} weights for this sparsity")
    if drops_lowest(~kept, score):
        raise Hint("the largest weights are dropped: sort the other way")
    if drops_lowest(kept, weights):
        raise Hint("sorted with their signs: by magnitude, a weight far below zero is large")
    if len(set((~kept).sum(1).tolist())) == 1 and all(map(drops_lowest, kept, score)):
        raise Hint("every row loses the same number: use one threshold for the whole matrix")
    raise Hint("the number of dropped weights is right, but some that are kept are smaller than some that are dropped")


@check
def check_halfway(answer, share: float):
    """Check at which share of its steps a cubic schedule has reached this share of its final sparsity."""
    left = (1 - share) ** (1 / 3)
    mistakes = {
        "that would be a linear schedule": share,
        "that is the share of the steps that is still to come": left,
        "that is a schedule that starts slowly: this one is fast at first": share ** (1 / 3),
        "that is the sparsity after this share of the steps: turn it round": 1 - (1 - share) ** 3,
    }
    compare(answer, SHARE, 1 - left, mistakes, "Solve for t what the function cubic_sparsity computes.")
    return "most weights go early, while many are useless and much training is still to come."


@check
def check_against_control(answer, recovered: float, control: float, dense: float):
    """Check how many points a recovered model is above its fair baseline, the dense model with the same steps."""
    points = 100 * (recovered - control)
    mistakes = {
        "that is against the dense model without the extra steps, not the fair baseline": 100 * (recovered - dense),
        "the sign is wrong: above the baseline is positive": -points,
        "that is what the extra steps did to the dense model": 100 * (control - dense),
        "that is the accuracy: the answer is the difference to a baseline": 100 * recovered,
    }
    # A share is a hundredth of the points, which the tolerance of 0.06 points could not tell from none.
    if abs(points) > 1 and near(number(answer, "a number of points"), points / 100):
        raise Hint("that is a share: a point is a hundredth of it")
    advice = "Which of the models had as many steps as the recovered one, and no weight removed?"
    compare(answer, "a number of points", points, mistakes, advice, 0.06)
    return "against the dense model without extra steps, recovery would get the credit for training alone."


@check
def check_merges_overlap(answer, scores: dict[str, Tensors], sparsity: float):
    """Check the share of the weights dropped by the merge "all" that the merge "mean_rank" drops as well."""

    def dropped_by(agreement: str) -> torch.Tensor:
        return torch.cat([~m.flatten() for m in select(merge_scores(scores, agreement), sparsity).values()])

    a, b = dropped_by("all"), dropped_by("mean_rank")
    both, dropped, neither = int((a & b).sum()), int(a.sum()), int((~a & ~b).sum())
    mistakes = {
        "that is the overlap of the kept weights, not of the dropped ones": neither / max(1, len(a) - dropped),
        "that divides by the weights that either drops (Jaccard): divide by those of one": both / int((a | b).sum()),
        "that is a share of all weights: divide by the number of dropped ones": both / len(a),
        "the weights that both keep are counted as well": (both + neither) / len(a),
        "that is the share that the other does not drop": 1 - both / dropped,
    }
    advice = "Make the masks of both merges at this sparsity, and count what both drop."
    compare(answer, SHARE, both / dropped, mistakes, advice)
    return "at a high sparsity any two merges share most of what they drop; accuracy tells them apart."


def mean_gradient(model: nn.Module, rows: list[list[int]], labels: list[int]) -> Tensors:
    """Return |gradient of the mean loss| of a batch, in which the signs of single reviews cancel."""
    model.zero_grad()
    for ids, label in zip(rows, labels, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits
        (nn.functional.cross_entropy(logits, torch.tensor([label])) / len(rows)).backward()
    found = {name: weight.grad.abs() for name, weight in prunable_weights(model).items()}
    model.zero_grad()
    return found


@check
def check_taylor(answer, model: nn.Module, rows: list[list[int]], labels: list[int]):
    """Check Taylor scores from some reviews: |w| times the mean over reviews of |dL/dw|, {parameter name: tensor}."""
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    found, statistics = by_name(answer, weights, tensor, "tensor"), calibrate(model, rows, labels)
    gradient, squared = statistics["calibration_gradient"], statistics["squared_gradient"]
    right = {n: w.abs() * gradient[n] for n, w in weights.items()}
    mistakes = {
        "that is the sum over the reviews: divide by their number": lambda: {
            n: len(rows) * s for n, s in right.items()
        },
        "that is the gradient alone: |w| is missing": gradient,
        SIGNED: lambda: {n: w * gradient[n] for n, w in weights.items()},
        "that is Fisher, of second order: Taylor has no square": lambda: {
            n: w.square() * squared[n] / 2 for n, w in weights.items()
        },
        "the gradients of reviews have cancelled: take |gradient| of each review first, then the mean": lambda: {
            n: weights[n].abs() * g for n, g in mean_gradient(model, rows, labels).items()
        },
    }
    advice = "these are other reviews or another score: use the rows and labels given, review by review"
    match(found, right, mistakes, advice, equal)
    return "a handful of reviews is enough for a score; pruning with it shows what more of them would add."


def smallest_model() -> GPT2ForSequenceClassification:
    """Return a GPT-2 of a few random weights; torch's random generator stays as it was."""
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4, "vocab_size": 4, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        return GPT2ForSequenceClassification(GPT2Config(**sizes))


@check
@torch.no_grad()
def check_keeper(answer):
    """Check a ``MaskKeeper`` that lets gradients of dropped weights through and still keeps these weights at zero."""
    if not (isinstance(answer, type) and issubclass(answer, MaskKeeper)):
        raise Hint("the answer must be a class that inherits from masks.MaskKeeper (the class itself, not an object)")
    model = smallest_model()
    weights = prunable_weights(model)
    kept = {name: torch.arange(weight.numel()).view(weight.shape) % 2 == 0 for name, weight in weights.items()}
    keeper = call(answer, model, kept)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    call(keeper.mask_gradients)
    if any(weight.grad is None or (weight.grad[kept[name]] != 1).any() for name, weight in weights.items()):
        raise Hint("the gradients of kept weights have changed")
    if any((weight.grad[~kept[name]] != 1).any() for name, weight in weights.items()):
        raise Hint("the gradients of dropped weights are still changed: override the method that does it")
    for weight in weights.values():
        weight.add_(1.0)  # a step of the optimizer
    call(keeper.apply)
    if any((weight[~kept[name]] != 0).any() for name, weight in weights.items()):
        raise Hint("after a step the dropped weights are not zero any more: leave apply as it is")
    return "no weight revives, but gradients that change nothing count in the norm by which all are clipped."
