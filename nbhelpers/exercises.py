"""The checks of the exercises: whether an answer is right and, where it is not, in which direction to look.

A check takes a student's answer and then what the right one is computed from, so that it holds for every profile,
model and data. It prints one line ("Not answered yet", "Not yet: ..." or "Right: ...") and returns whether the answer
is right. It raises nothing on an answer of the wrong type or shape, and never prints the right one.

    python -m nbhelpers.exercises 02_ada.ipynb 02_ben.ipynb      # of executed notebooks, how many answers are right
"""

import functools
import itertools
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.criteria import merge_scores
from nbhelpers.masks import MaskKeeper, select, select_structures
from nbhelpers.models import LABEL_NAMES, Structures, blocks, predict_logits, prunable_weights
from nbhelpers.sparse import SparseLinear
from nbhelpers.statistics import calibrate

Tensors = dict[str, torch.Tensor]
UNANSWERED = "Not answered yet"
SHARE = "a share between 0 and 1"
# Hints that several checks have.
INVERTED = "dropped and kept are the wrong way round: True is kept"
SIGNED = "the sign of the weight is still there: take |w|"


class Hint(Exception):
    """What is not right about an answer, in words that do not give the right one away."""


def check(judge: Callable) -> Callable:
    """A check out of a function that judges an answer: it returns an insight where the answer is right, else ``Hint``.

    The check prints one line and returns a bool; an answer of ``...`` is not judged.
    """

    @functools.wraps(judge)
    def checked(answer, *context, **named) -> bool:
        if answer is ...:
            print(UNANSWERED)
            return False
        try:
            insight = judge(answer, *context, **named)
        except Hint as hint:
            print(f"Not yet: {hint}")
            return False
        print(f"Right: {insight}")
        return True

    return checked


# --- answers of each kind ---


def kind(answer) -> str:
    """What an answer is, for a sentence that has said what it should be."""
    shape = getattr(answer, "shape", None)
    shaped = f" and shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"this is of type {type(answer).__name__}{shaped}"


def number(answer, wanted: str) -> float:
    """An answer as a number: one of Python's, or of NumPy or torch with a single element. Raises ``Hint``."""
    if isinstance(answer, torch.Tensor | np.ndarray | np.generic) and math.prod(answer.shape) == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, numbers.Real):
        raise Hint(f"a number is wanted ({wanted}): {kind(answer)}")
    try:
        value = float(answer)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Hint(f"a finite number is wanted ({wanted})")
    return value


def items_of(answer, wanted: str) -> list:
    """An answer as a list of what is in it. Raises ``Hint``."""
    if isinstance(answer, str | Mapping) or not isinstance(answer, Iterable):
        raise Hint(f"{wanted} is wanted: {kind(answer)}")
    try:
        return list(answer)
    except TypeError:  # an array or a tensor without a dimension
        raise Hint(f"{wanted} is wanted: {kind(answer)}") from None


def numbers_of(answer, wanted: str, count: int | None = None) -> list[float]:
    """An answer as a list of numbers, so many where ``count`` is given. Raises ``Hint``."""
    found = [number(item, f"each item of {wanted}") for item in items_of(answer, wanted)]
    if count not in (None, len(found)):
        raise Hint(f"{wanted} is wanted, {count} numbers: this has {len(found)}")
    return found


def tensor(answer, shape: tuple[int, ...], wanted: str) -> torch.Tensor:
    """An answer as a tensor of this shape, on the CPU. Raises ``Hint``."""
    try:
        found = torch.as_tensor(answer).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Hint(f"{wanted} of shape {tuple(shape)} is wanted: {kind(answer)}") from None
    if found.shape != tuple(shape):
        raise Hint(f"{wanted} of shape {tuple(shape)} is wanted: {kind(found)}")
    return found if found.layout == torch.strided else found.to_dense()


def mask(answer, shape: tuple[int, ...], wanted: str = "a mask") -> torch.Tensor:
    """An answer as a bool tensor; zeros and ones will do. Raises ``Hint``."""
    found = tensor(answer, shape, wanted)
    if not ((found == 0) | (found == 1)).all():
        raise Hint("a mask holds True for kept and False for dropped, not the weights themselves")
    return found.bool()


def by_name(answer, like: Mapping[str, torch.Tensor], convert: Callable, wanted: str) -> Tensors:
    """An answer as a dict with the names and shapes of ``like``. Raises ``Hint``."""
    if not isinstance(answer, Mapping):
        raise Hint(f"a dict is wanted, {{parameter name: {wanted}}}: {kind(answer)}")
    if set(answer) != set(like):
        example = next(iter(like))
        raise Hint(f"the dict needs the names of the {len(like)} matrices, {example} for one, and no others")
    return {name: convert(answer[name], values.shape, f"a {wanted} for {name}") for name, values in like.items()}


def call(function: Callable, *arguments):
    """What a student's function returns. Raises ``Hint`` where it fails."""
    try:
        return function(*arguments)
    except Exception as error:  # what a student has written may raise anything: that is what is judged here
        raise Hint(f"it raises a {type(error).__name__}: call it yourself to see where") from error


# --- right, or wrong in a way that is known ---


def near(value: float, target: float, tolerance: float | None = None) -> bool:
    """Whether two numbers are the same to three significant digits, or within a tolerance."""
    if tolerance is None:
        tolerance = 0.505 * 10.0 ** (math.floor(math.log10(abs(target))) - 2) if target else 5e-4
    return abs(value - target) <= tolerance


def compare(answer, wanted: str, right: float, mistakes: dict, look: str, tolerance: float | None = None) -> None:
    """Raise ``Hint`` unless an answer is the right number.

    mistakes: {what a known mistake is: the number that one gets by it, several ones, or a function for it}; look: where
    to look after any other answer.
    """
    value = number(answer, wanted)
    if near(value, right, tolerance):
        return
    for hint, wrong in mistakes.items():
        wrong = wrong() if callable(wrong) else wrong
        if any(near(value, one, tolerance) for one in (wrong if isinstance(wrong, tuple) else (wrong,))):
            raise Hint(hint)
    if wanted == SHARE and not 0 <= value <= 1:
        raise Hint("a share lies between 0 and 1; a percentage is a hundred times as much")
    raise Hint(f"too {'large' if value > right else 'small'}. {look}")


def equal(a: Tensors, b: Tensors) -> bool:
    """Whether two dicts hold the same numbers but for rounding, which may upset one in a hundred that is near zero."""
    alike = sum(int(((a[n].double() - b[n].double()).abs() <= 0.01 * b[n].double().abs()).sum()) for n in b)
    return alike >= 0.99 * sum(tensor.numel() for tensor in b.values())


def match(found, right, mistakes: dict, look: str, same: Callable) -> None:
    """``compare`` for anything else: same(a, b) says whether two answers are."""
    if same(found, right):
        return
    for hint, wrong in mistakes.items():
        if same(found, wrong() if callable(wrong) else wrong):
            raise Hint(hint)
    raise Hint(look)


def drops_lowest(kept: torch.Tensor, score: torch.Tensor) -> bool:
    """Whether no score that a mask drops is above one that it keeps."""
    return not kept.any() or bool(kept.all()) or bool(score[~kept].max() <= score[kept].min())


# --- 01 ---


@check
def check_parameters_left(answer, total: int, prunable: int, sparsity: float):
    """The share of all parameters that is left when a share of the block weights is gone."""
    left = total - sparsity * prunable
    mistakes = {
        "that is the share that is gone; asked is what is left": 1 - left / total,
        "that is what is left of the block weights; all other parameters stay, and count": 1 - sparsity,
        "the parameters that are never pruned are left as well": (1 - sparsity) * prunable / total,
        "that is a number of parameters: divide it by the number of all": left,
    }
    compare(answer, SHARE, left / total, mistakes, "How many parameters go, and how many are there before?")
    return "a sparsity counts block weights only, so the whole model gives up less than it sounds like."


@check
def check_fooling_review(answer, predict: Callable[[list[str]], np.ndarray]):
    """A review of two sentences that the model gets wrong; predict(texts) -> P(positive)."""
    pair = isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(part, str) for part in answer)
    if not pair or answer[1] not in LABEL_NAMES.values():
        raise Hint('a pair of texts is wanted: the review, and "negative" or "positive"')
    text, label = answer
    if len(re.findall(r"\w[.!?]+(?:\s|$)", text)) < 2 or len(text.split()) < 6:
        raise Hint("two sentences are wanted, of some words each and with a full stop at their ends")
    if (float(predict([text])[0]) > 0.5) == (label == "positive"):
        advice = "Use strong words of one kind in a review that means the other, and let one short turn decide"
        raise Hint(f"the model says the same as you. {advice}")
    return "the model adds up cues, and a verdict that hangs on one turn of phrase gets lost among them."


@check
def check_disagreements(answer, right_a: np.ndarray, right_b: np.ndarray):
    """How many reviews exactly one of two models gets right."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    mistakes = {
        "that is the net difference, in which a review won and a review lost cancel": abs(only_a - only_b),
        "that is one direction only: the second model alone may be right as well": only_a,
        "that is one direction only: the first model alone may be right as well": only_b,
        "these are the reviews that both get right": int((right_a & right_b).sum()),
        "these are the reviews that both get wrong": int((~right_a & ~right_b).sum()),
        "that is a share: asked is the number of reviews": (only_a + only_b) / len(right_a),
    }
    compare(answer, "a number of reviews", only_a + only_b, mistakes, "Compare the two arrays review by review.", 1e-3)
    return "a paired test looks at these reviews alone: where both say the same, neither is better."


def lost_words(words: list[str], found: list[str]) -> str:
    """What went wrong where a shuffled text does not have the words of the text."""
    if sorted("".join(words)) == sorted("".join(found)):
        return "the letters are shuffled, or words run into each other: keep each word whole"
    if len(words) == len(found) and set(found) <= set(words):
        return "some words come twice and others are missing: draw them without putting them back"
    return "the words are not those of the text: none may be lost, added or changed"


@check
def check_shuffled(answer, texts: list[str]):
    """A function that puts the words of a text into a random order."""
    if not callable(answer):
        raise Hint(f"a function is wanted, from a text to a text: {kind(answer)}")
    pairs = []
    for text in texts:
        shuffled = call(answer, text)
        if shuffled is None:
            raise Hint("the function returns nothing; random.shuffle, for one, works in place and returns None")
        if not isinstance(shuffled, str):
            raise Hint("the function has to return one text: join the words with spaces")
        words, found = text.split(), shuffled.split()
        if sorted(words) != sorted(found):
            raise Hint(lost_words(words, found))
        pairs.append((words, found))
    orders = {
        "the order is the old one": lambda words: words,
        "the alphabet is an order too, the same each time; a random one is wanted": sorted,
        "read backwards, neighbours are still neighbours; a random order is wanted": lambda words: words[::-1],
    }
    for hint, order in orders.items():
        if all(found == order(words) for words, found in pairs):
            raise Hint(hint)
    kept = [pair in set(itertools.pairwise(old)) for old, new in pairs for pair in itertools.pairwise(new)]
    if np.mean(kept or [0]) > 0.5:
        raise Hint("most words still stand beside their old neighbours: shuffle single words")
    return "what is left is a bag of words: what the model loses on these texts is what word order was worth to it."


@check
def check_heads_only(
    answer, model: nn.Module, rows: list[list[int]], labels: np.ndarray, max_tokens: int, head_share: float
):
    """The accuracy of a model that sees of each review the first ``max_tokens`` tokens; rows: all tokens of each."""

    def accuracy(cut: Callable) -> float:
        short = [row if len(row) <= max_tokens else cut(row) for row in rows]
        return float((predict_logits(model, short).argmax(1) == np.asarray(labels)).mean())

    head = round(max_tokens * head_share)
    right = accuracy(lambda row: row[:max_tokens])
    mistakes = {
        "that is the accuracy on the ends of the reviews": lambda: accuracy(lambda row: row[-max_tokens:]),
        "that is the accuracy on heads and tails together, as the model was trained": lambda: accuracy(
            lambda row: row[:head] + row[len(row) - (max_tokens - head) :]
        ),
        "that is the share of wrong answers": 1 - right,
    }
    look = "Cut each row to its first tokens, ask the model, and compare with the labels in the same order."
    # Padding depends on what is in a batch, and with it the last digits of a logit: one review may tip over.
    compare(answer, SHARE, right, mistakes, look, 1.01 / len(rows))
    return "beside the usual accuracy this says what the ends of long reviews are worth to this model."


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


# --- 03 ---


@check
def check_mask(answer, weights: torch.Tensor, sparsity: float):
    """The mask that drops the share of a matrix with the smallest magnitudes: True = kept."""
    kept, score = mask(answer, weights.shape), weights.abs()
    wanted, gone = round(sparsity * score.numel()), int((~kept).sum())
    if gone == wanted and drops_lowest(kept, score):
        return "multiplied with the weights this is the pruned matrix; the mask itself needs one bit a weight."
    if gone == score.numel() - wanted and drops_lowest(~kept, score):
        raise Hint(INVERTED)
    if gone != wanted:
        raise Hint(f"the mask drops too {'many' if gone > wanted else 'few'} weights for this sparsity")
    if drops_lowest(~kept, score):
        raise Hint("the largest weights are dropped: sorted the wrong way")
    if drops_lowest(kept, weights):
        raise Hint("sorted with their signs: by magnitude, a weight far below zero is a large one")
    if len(set((~kept).sum(1).tolist())) == 1 and all(map(drops_lowest, kept, score)):
        raise Hint("every row loses the same number: asked is one threshold for the whole matrix")
    raise Hint("the number of dropped weights is right, but some that are kept are smaller than some that are dropped")


@check
def check_halfway(answer, share: float):
    """At which share of its steps a cubic schedule has reached this share of its final sparsity."""
    left = (1 - share) ** (1 / 3)
    mistakes = {
        "that would be a linear schedule": share,
        "that is the share of the steps that is still to come": left,
        "that is a schedule that starts slowly: this one is fast at first": share ** (1 / 3),
        "that is the sparsity after this share of the steps: turn it round": 1 - (1 - share) ** 3,
    }
    compare(answer, SHARE, 1 - left, mistakes, "Solve for t what the function cubic_sparsity computes.")
    return "most weights go early, while there are many useless ones and much training is still to come."


@check
def check_against_control(answer, recovered: float, control: float, dense: float):
    """How many points of accuracy a recovered model is above its fair line, the dense model with the same steps."""
    points = 100 * (recovered - control)
    mistakes = {
        "that is against the dense model without the extra steps: not the fair line": 100 * (recovered - dense),
        "the sign is the other way round: above the line is positive": -points,
        "that is what the extra steps did to the dense model": 100 * (control - dense),
        "that is the accuracy: asked is the difference to a line": 100 * recovered,
    }
    # A share is a hundredth of it, which 0.06 points could not tell from none.
    if abs(points) > 1 and near(number(answer, "a number of points"), points / 100):
        raise Hint("that is a share: a point is a hundredth of it")
    look = "Which of the models had as many steps as the recovered one, and no weight removed?"
    compare(answer, "a number of points", points, mistakes, look, 0.06)
    return "against the dense model without extra steps, a recovery would be praised for what training alone does."


@check
def check_merges_overlap(answer, scores: dict[str, Tensors], sparsity: float):
    """Of the weights that the merge by "all" drops, the share that the merge by "mean_rank" drops as well."""

    def gone(agreement: str) -> torch.Tensor:
        return torch.cat([~m.flatten() for m in select(merge_scores(scores, agreement), sparsity).values()])

    a, b = gone("all"), gone("mean_rank")
    both, dropped, neither = int((a & b).sum()), int(a.sum()), int((~a & ~b).sum())
    mistakes = {
        "that is the overlap of the kept weights, not of the dropped ones": neither / max(1, len(a) - dropped),
        "that divides by the weights that either drops (Jaccard): divide by those of one": both / int((a | b).sum()),
        "that is a share of all weights: divide by the number of dropped ones": both / len(a),
        "the weights that both keep are counted as well": (both + neither) / len(a),
        "that is the share that the other does not drop": 1 - both / dropped,
    }
    look = "Make the masks of both merges at this sparsity, and count what both drop."
    compare(answer, SHARE, both / dropped, mistakes, look)
    return "at a high sparsity two merges share most of what they drop, as any two must; accuracy tells them apart."


def mean_gradient(model: nn.Module, rows: list[list[int]], labels: list[int]) -> Tensors:
    """|gradient of the mean loss|: what one backward pass over a batch gives, in which signs cancel."""
    model.zero_grad()
    for ids, label in zip(rows, labels, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits
        (nn.functional.cross_entropy(logits, torch.tensor([label])) / len(rows)).backward()
    found = {name: weight.grad.abs() for name, weight in prunable_weights(model).items()}
    model.zero_grad()
    return found


@check
def check_taylor(answer, model: nn.Module, rows: list[list[int]], labels: list[int]):
    """Taylor scores from some reviews: |w| times the mean over reviews of |dL/dw|, {parameter name: tensor}."""
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    found, seen = by_name(answer, weights, tensor, "tensor"), calibrate(model, rows, labels)
    gradient, squared = seen["calibration_gradient"], seen["squared_gradient"]
    right = {n: w.abs() * gradient[n] for n, w in weights.items()}
    mistakes = {
        "that is the sum over the reviews: divide by their number": lambda: {
            n: len(rows) * s for n, s in right.items()
        },
        "that is the gradient alone: |w| is missing": gradient,
        SIGNED: lambda: {n: w * gradient[n] for n, w in weights.items()},
        "that is Fisher, of second order: there is no square in Taylor": lambda: {
            n: w.square() * squared[n] / 2 for n, w in weights.items()
        },
        "gradients of reviews have cancelled: take |gradient| of each review first, then the mean": lambda: {
            n: weights[n].abs() * g for n, g in mean_gradient(model, rows, labels).items()
        },
    }
    look = "these are other reviews or another score: use the rows and labels given, review by review"
    match(found, right, mistakes, look, equal)
    return "a handful of reviews is enough for a score; pruning with it shows what more of them would add."


def smallest_model() -> GPT2ForSequenceClassification:
    """A GPT-2 of a few random weights, made without touching the random numbers of others."""
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4, "vocab_size": 4, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        return GPT2ForSequenceClassification(GPT2Config(**sizes))


@check
@torch.no_grad()
def check_keeper(answer):
    """A ``MaskKeeper`` that lets the gradients of dropped weights through and still keeps these weights at zero."""
    if not (isinstance(answer, type) and issubclass(answer, MaskKeeper)):
        raise Hint("a class is wanted that inherits from masks.MaskKeeper (the class itself, not an object of it)")
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
    return "no weight revives, yet gradients that can change nothing count in the norm by which all are clipped."


# --- 04 ---


@check
def check_break_even(answer, value_bytes: int, index_bytes: int):
    """The sparsity from which on CSR needs fewer bytes than the dense matrix, row starts aside."""
    density = value_bytes / (value_bytes + index_bytes)
    mistakes = {
        "that is the share of weights that are kept; sparsity is the share that is gone": density,
        "that is with 32-bit indices": 1 - value_bytes / (value_bytes + 4),
        "that counts the indices alone: the values are stored as well": 1 - value_bytes / index_bytes,
    }
    look = "Each kept weight costs a value and an index; each weight of the dense matrix a value."
    compare(answer, SHARE, 1 - density, mistakes, look)
    return "an index larger than its value makes CSR a layout for computing rather than for saving bytes."


def compressed_rows(matrix: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """(starts, columns, values) of a matrix in CSR, as plain lists."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = [0, *torch.bincount(rows, minlength=len(matrix)).cumsum(0).tolist()]
    return starts, columns.tolist(), matrix[rows, columns].tolist()


@check
def check_csr(answer, matrix: torch.Tensor):
    """A matrix in CSR: the lists (starts, columns, values)."""
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        raise Hint(f"three lists of numbers are wanted, (starts, columns, values): {kind(answer)}")
    found = tuple(numbers_of(part, "a list of numbers") for part in answer)
    starts, columns, values = right = compressed_rows(matrix)
    if found == right:
        return "an empty row costs nothing but a repeated start, and a product walks through the values in order."
    if sorted(found) == sorted(right):
        raise Hint("the three are right, in another order: starts, columns, values")
    if found == compressed_rows(matrix.t()):
        raise Hint("that is column by column (CSC): take the rows one after the other")
    if len(found[2]) != len(values):
        raise Hint("the values are those that are not zero, each once")
    if found[2] != values:
        raise Hint("the values are not in the order of the rows, from left to right")
    if found[1] != columns:
        raise Hint("the second list has the column of each value, counted from 0")
    if found[0] == matrix.nonzero()[:, 0].tolist():
        raise Hint("one row number a value is COO: CSR says only where each row begins")
    if found[0] == [end - start for start, end in itertools.pairwise(starts)]:
        raise Hint("these are the numbers of values in each row: add them up, from 0")
    if found[0] in (starts[:-1], starts[1:]):
        raise Hint("there is one start more than rows: it begins with 0 and ends with the number of values")
    raise Hint("the first list says at which value each row begins, an empty row too")


@check
def check_speedup(answer, share: float, factor: float):
    """How many times as fast a model gets when a share of its time is taken ``factor`` times as fast (Amdahl)."""
    rest = 1 - share + share / factor
    mistakes = {
        "that would be so if the model did nothing else": factor,
        "a share of a speed-up is none: ask how much time is left": share * factor,
        "speeds cannot be averaged, times can: how long does each part take now?": 1 - share + share * factor,
        "that is the time that is left: how many times does it fit into the old one?": rest,
        "that is the limit, with products that take no time at all": 1 / (1 - share),
    }
    look = "Call the old time 1. The products take their share of it, divided by the factor; the rest stays."
    compare(answer, "how many times as fast", 1 / rest, mistakes, look)
    return "what is no product (attention, LayerNorm, Python) soon decides, however fast the kernel: Amdahl's law."


@check
def check_bitmap_bytes(answer, layers: list[tuple[int, int]]):
    """Bytes of matrices as bitmap and float32 values; layers: (weights, weights that are left) of each matrix."""
    weights, left = (sum(column) for column in zip(*layers, strict=True))
    bitmap = sum(-(-size // 8) for size, _ in layers)
    right = bitmap + 4 * left
    mistakes = {
        "that stores the values that are gone": bitmap + 4 * (weights - left),
        "that takes a byte for each bit: eight weights share one": weights + 4 * left,
        "that is the values alone: without the bitmap nobody knows where they belong": 4 * left,
        "that is the bitmap alone: the values that are left are stored as well": bitmap,
        "a float32 value takes more than one byte": bitmap + left,
        "that is CSR with 32-bit indices": 8 * left,
        "that is the dense matrices": 4 * weights,
        "that is in megabytes: asked are bytes": right / 1e6,
        "that is in bits": 8 * right,
    }
    compare(answer, "bytes", right, mistakes, "One bit for every weight, and four bytes for each one that is left.")
    return "the bitmap's bit a weight stays however sparse the model is, so there is a floor under the file."


@check
def check_backend(answer, masked: nn.Module, backend: str):
    """The sparse model of a masked one, all of whose sparse layers run on one engine."""
    if not isinstance(answer, nn.Module):
        raise Hint(f"a model is wanted, as convert_to_sparse makes it: {kind(answer)}")
    engines = {module.backend for module in answer.modules() if isinstance(module, SparseLinear)}
    if not engines:
        raise Hint("there is no sparse layer in this model: it is a dense one")
    if engines != {backend}:
        raise Hint(f"layers of this model run on {', '.join(sorted(engines - {backend}))}: name the engine")
    ids = torch.arange(3)[None]
    with torch.inference_mode():
        found, right = (call(lambda model: model(input_ids=ids).logits, model) for model in (answer, masked))
    if found.shape != right.shape or not torch.allclose(found, right, rtol=1e-3, atol=1e-3):
        raise Hint("its logits are not those of the masked model: convert that one")
    return "the same zeros and the same logits on another engine: what differs in time is the engine's doing alone."


@check
def check_head_masks(answer, scores: Tensors, structures: list[Structures], sparsity: float):
    """Masks that drop whole heads and no neuron, by ``select_structures``: {parameter name: mask}, True = kept."""
    found = by_name(answer, scores, mask, "mask")
    heads = [structure for structure in structures if structure.name.endswith("attn")]
    neurons = [structure for structure in structures if structure not in heads]
    right = select_structures(scores, heads, sparsity)
    mistakes = {
        INVERTED: {name: ~kept for name, kept in right.items()},
        "these are the neurons alone: asked are the heads": lambda: select_structures(scores, neurons, sparsity),
        "heads and neurons are both among them": lambda: select_structures(scores, structures, sparsity),
        "single weights are gone: a head goes with all of its weights or stays": lambda: select(scores, sparsity),
    }
    touched = any(not found[name].all() for structure in neurons for name, *_ in structure.parts)
    look = "a matrix of an MLP has lost weights" if touched else "these are other heads: is it the same sparsity?"
    match(found, right, mistakes, look, lambda a, b: all(torch.equal(a[name], b[name]) for name in scores))
    return "heads are few and large, so a sparsity is met only roughly, and never beyond all heads but one a block."


# --- 05 ---


@check
def check_softened(answer, logits: tuple[float, float], t: float):
    """P(positive) of two logits (negative, positive) at a temperature."""

    def positive(scale: float) -> float:
        return 1 / (1 + math.exp((logits[0] - logits[1]) * scale))

    mistakes = {
        "that is at T = 1": positive(1.0),
        "that multiplies by T: the probabilities have become sharper, not softer": positive(t),
        "that is the probability of the other class": 1 - positive(1 / t),
        "the logits are divided by T, not the probabilities: these have to sum to one": positive(1.0) / t,
        "that is the logit, divided by T: its softmax is still to be taken": logits[1] / t,
        "that leaves out the other logit: a softmax takes both": 1 / (1 + math.exp(-logits[1] / t)),
    }
    compare(answer, SHARE, positive(1 / t), mistakes, "Divide both logits by T, then take the softmax of the two.")
    return "a temperature moves all probabilities towards even and never changes which class leads."


@check
def check_lost_reviews(answer, teacher_right: np.ndarray, student_right: np.ndarray):
    """The reviews that the teacher gets right and the student wrong: their row numbers, in any order."""
    wanted = "a flat list or array of row numbers"
    items = items_of(answer, wanted)
    if len(items) == len(teacher_right) and all(isinstance(item, bool | np.bool_) for item in items):
        raise Hint("that is a True or False a review: np.flatnonzero turns it into row numbers")
    rows = {number(item, f"each item of {wanted}") for item in items}
    mistakes = {
        "these are the reviews that the student gets right and the teacher wrong": ~teacher_right & student_right,
        "these are all errors of the student: some are the teacher's as well": ~student_right,
        "these are the reviews that both get wrong": ~teacher_right & ~student_right,
        "these go either way: one of the two is right, whichever": teacher_right != student_right,
        "these are the reviews that both get right": teacher_right & student_right,
    }
    look = "other reviews are among them, or some are missing: combine the two arrays review by review"
    match(rows, teacher_right & ~student_right, mistakes, look, lambda a, b: a == set(np.flatnonzero(b).tolist()))
    return "two models of about the same accuracy need not be right about the same reviews."


@check
def check_soft_loss(answer, teacher_logits: torch.Tensor, student_logits: torch.Tensor, t: float):
    """The soft part of the distillation loss on a batch: T^2 times the mean over reviews of KL(teacher || student)."""
    teacher, student = ((logits.double() / t).softmax(-1) for logits in (teacher_logits, student_logits))

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p * (p.log() - q.log())).sum(-1).mean())

    mean, (reviews, classes) = divergence(teacher, student), teacher.shape
    cross_entropy = -float((teacher * student.log()).sum(-1).mean())
    mistakes = {
        "T squared is missing: without it the soft term fades as T grows": mean,
        "the factor is T squared, not T": t * mean,
        "that divides by the classes as well: kl_div's default mean, not batchmean": t**2 * mean / classes,
        "that is the sum over the reviews: divide by their number": t**2 * mean * reviews,
        "that is KL(student || teacher): the other way round": t**2 * divergence(student, teacher),
        "that is in bits, with the logarithm to base 2: asked is the natural one": t**2 * mean / math.log(2),
        "that is the cross-entropy: the teacher's own entropy is still in it": t**2 * cross_entropy,
        "the sign is the other way round: a divergence is never negative": -(t**2) * mean,
    }
    look = "Soften both, take the KL divergence of each review, then the mean, then T squared."
    compare(answer, "a loss", t**2 * mean, mistakes, look)
    return "with kl_div that takes log-probabilities, reduction='batchmean' and T squared: the three traps."


def outside_blocks(model: nn.Module) -> Tensors:
    """What of a model's state is in none of its blocks, by name."""
    return {name: t.cpu() for name, t in model.state_dict().items() if not re.search(r"\.(?:h|layers)\.\d+\.", name)}


def same_state(a: Tensors, b: Tensors) -> bool:
    """Whether two states are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


@check
def check_eight_bits(answer, row: list[float]):
    """The whole numbers from -127 to 127 that stand for a row in eight bits."""
    found, values = numbers_of(answer, "a list of whole numbers", len(row)), np.asarray(row)
    if any(value != round(value) for value in found):
        raise Hint("these are not whole: eight bits hold whole numbers only")

    def rounded(scale: float) -> np.ndarray:
        return (values / scale).round()

    largest, right = np.abs(values).max(), rounded(np.abs(values).max() / 127)
    mistakes = {
        "the largest takes 127, not 128: there are as many steps on either side of zero": rounded(largest / 128),
        "the largest takes 127, not 255: half of the numbers are negative": rounded(largest / 255),
        "cut off, not rounded: the nearest whole number is wanted": np.trunc((values * 127 / largest).round(6)),
        "the signs are lost": np.abs(right),
    }
    look = "look at the scale first: the number of the largest size is 127 or -127, and the others are in proportion"
    match(found, right, mistakes, look, lambda a, b: a == b.tolist())
    return "no number is further off than half a scale, and a row takes a quarter of its bytes."


@check
def check_first_blocks(answer, teacher: nn.Module, layers: int):
    """A student that has copied the first blocks of its teacher, and all that is not a block."""
    if not isinstance(answer, nn.Module):
        raise Hint(f"a model is wanted, as create_student makes it: {kind(answer)}")
    try:
        mine, theirs = list(blocks(answer)), list(blocks(teacher))
    except AttributeError:
        raise Hint("this module has no blocks: a model of the teacher's kind is wanted") from None
    if len(mine) != layers:
        raise Hint(f"it has {'more' if len(mine) > layers else 'fewer'} blocks than the student should have")
    states = [block.state_dict() for block in theirs]
    order = [next((i for i, state in enumerate(states) if same_state(one.state_dict(), state)), None) for one in mine]
    if None in order:
        raise Hint("some blocks are none of the teacher's: still random, or trained on already")
    if order != list(range(layers)):
        last = order == list(range(len(theirs) - layers, len(theirs)))
        raise Hint(
            f"these are {'the last' if last else 'blocks of the teacher, but not its first'} ones, in their order"
        )
    if not same_state(outside_blocks(answer), outside_blocks(teacher)):
        raise Hint("the blocks are right; embeddings, the last LayerNorm or the head are not the teacher's")
    return "now the same steps of training say whether it matters which blocks a student starts from."


@check
def check_hidden_loss(answer):
    """A function(student [b, n, d], teacher [b, n, d], lengths [b]): the mean squared difference at real tokens."""
    if not callable(answer):
        raise Hint(f"a function is wanted, of student, teacher and lengths: {kind(answer)}")
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([6, 3, 1])
    student, teacher = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    real, squares = torch.arange(6) < lengths[:, None], (student - teacher).square()
    mine = student.clone().requires_grad_()
    found = call(answer, mine, teacher.clone(), lengths.clone())
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise Hint(f"the function has to return one number as a tensor: {kind(found)}")
    each = torch.stack([part[:length].mean() for part, length in zip(squares, lengths, strict=True)])
    mistakes = {
        "padding counts as well: leave the places behind the end of each review out": squares.mean(),
        "padding is zero now but still divides: divide by the real tokens": (squares * real[..., None]).mean(),
        "that is a sum: divide by the number of values": squares[real].sum(),
        "features are summed there: the mean is over tokens and features": squares[real].sum(-1).mean(),
        "every review counts alike there: asked is that every token does": each.mean(),
        "that is the absolute difference: square it": (student - teacher).abs()[real].mean(),
        "the root is too much: asked is the mean of the squares": squares[real].mean().sqrt(),
        "that is the last token of each review alone": squares[torch.arange(3), lengths - 1].mean(),
    }
    look = "Square the differences, pick the real tokens (position < length), and take the mean."
    compare(found.detach(), "a loss", float(squares[real].mean()), {h: float(w) for h, w in mistakes.items()}, look)
    if not found.requires_grad:
        raise Hint("the value is right, but no gradient reaches the student: detach the teacher only")
    return "the student is now told how its teacher sees each token, not only what it concludes."


# --- 06 ---


@check
def check_overlapping(answer, table: pd.DataFrame, reference: str):
    """The models whose interval overlaps that of a reference and whose paired p-value is below 0.05: their names."""
    names = items_of(answer, "a list of model names")
    if not all(isinstance(name, str) and name in set(table["model"]) for name in names):
        raise Hint('a list of names is wanted, as they stand in the column "model" of the table')
    if reference in names:
        raise Hint("the model that all others are compared with is among them")
    line = table[table["model"] == reference].iloc[0]
    others = table[table["model"] != reference].set_index("model")
    overlap = (others["accuracy_low"] <= line["accuracy_high"]) & (others["accuracy_high"] >= line["accuracy_low"])
    clear = others["p_value"] < 0.05
    mistakes = {
        "these have a small p-value, but not all of their intervals overlap": clear,
        "their intervals overlap, but their p-values are not below 0.05": overlap & ~clear,
        "their intervals overlap, but not all of their p-values are below 0.05": overlap,
        "their intervals do not overlap: asked is where they do": ~overlap,
    }
    look = "some models are missing or too many: both conditions have to hold, for each model against the reference"
    match(set(names), overlap & clear, mistakes, look, lambda a, b: a == set(others.index[b]))
    return "an interval is about one model by itself; the paired test asks only where two models part ways."


@check
def check_bits(answer, nats_per_token: float, bytes_per_token: float):
    """Bits a byte of a language model, from its loss in nats a token."""
    nats, size = nats_per_token, bytes_per_token
    mistakes = {
        "that is in nats, with the natural logarithm: a bit is a logarithm to base 2": nats / size,
        "the logarithm of 2 is on the wrong side of the fraction": nats * math.log(2) / size,
        "that is for each token: a token is several bytes": nats / math.log(2),
        "a byte is less than a token: it needs fewer bits": nats / math.log(2) * size,
        "that is the logarithm to base 10": nats / math.log(10) / size,
        "that is the perplexity of a token": math.exp(nats),
    }
    compare(answer, "bits a byte", nats / math.log(2) / size, mistakes, "Nats into bits, then tokens into bytes.")
    return "counted by the byte, models with other tokenizers can be compared; by the token they cannot."


@check
def check_mcnemar(answer, only_a: int, only_b: int, both: int, neither: int):
    """The exact two-sided p-value of McNemar's test from the four counts of two models on the same reviews."""
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
        "that is one-sided: an uneven split the other way would have counted as well": right / 2,
        "that is this split alone: more uneven ones count as well": alone,
        "these are the two splits of this size: more uneven ones count as well": 2 * alone,
        "the reviews on which both agree are no throws of the coin": stats.binomtest(only_a, total).pvalue,
        "that is an unpaired test, as if they had read different reviews: only disagreements count": unpaired,
        "that is the approximation by chi squared: with so few disagreements take the exact test": rough,
    }
    look = "A fair coin, thrown once for each disagreement: how likely is a split at least as uneven, either way?"
    compare(answer, "a p-value", right, mistakes, look)
    return "however many reviews both get right, a paired test is as strong as the disagreements are many."


@check
def check_holm(answer, p_values: list[float]):
    """p-values adjusted by Holm's method, in the order in which they were given."""
    p = np.asarray(p_values, dtype=float)
    found, rank = numbers_of(answer, "a list of adjusted p-values", len(p)), p.argsort().argsort()
    scaled = p * (len(p) - rank)
    stepped = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1.0)
    right = stepped[rank]
    mistakes = {
        "these are sorted: give them back in the order in which the p-values came": stepped,
        "a larger p-value may not end up smaller than the one before it": scaled,
        "that is Bonferroni's: only the smallest is multiplied by the number of all": (p * len(p)).clip(max=1.0),
        "that is Benjamini and Hochberg's, which controls another kind of error": stats.false_discovery_control(p),
        "the factors are the wrong way round: the smallest gets the largest": p * (1 + rank),
        "these are the p-values as they came": p,
    }
    wrong = [i for i in range(len(p)) if not near(found[i], right[i])]
    look = f"look at number {wrong[0] + 1}: how many are at least as large, and is the order kept?" if wrong else ""
    match(found, right, mistakes, look, lambda a, b: all(map(near, a, b)))
    return "Holm guards against one false alarm among all comparisons, as Bonferroni does, and gives away less."


@check
def check_reviews_needed(answer, disagree: float, difference: float, power: float, level: float):
    """How many reviews a paired test needs for this power, where two models disagree on this share of them."""
    alpha, one_sided, beta = stats.norm.ppf([1 - level / 2, 1 - level, power])
    unit = disagree / difference**2
    needed = (alpha + beta) ** 2 * unit
    mistakes = {
        "the power is missing: half of such studies would see nothing": alpha**2 * unit,
        "that is one-sided: either model may be the better one": (one_sided + beta) ** 2 * unit,
        "the difference is a share, not a number of points": needed / 1e4,
        "the difference counts squared": needed * difference,
        "the share of disagreements is missing: only they decide": needed / disagree,
        "the sum of the two quantiles counts squared": (alpha + beta) * unit,
        "that is the number of disagreements: how many reviews does it take to see these?": needed * disagree,
    }
    look = "The variance of the mean difference is about the share of disagreements divided by the number of reviews."
    compare(answer, "a number of reviews", needed, mistakes, look)
    return "half the difference takes four times the reviews: that is why small leads are not called wins here."


@check
def check_bootstrap(answer, right_a: np.ndarray, right_b: np.ndarray):
    """The 95 % bootstrap interval of accuracy a minus accuracy b on the same reviews: (low, high)."""
    found = np.array(numbers_of(answer, "a pair (low, high)", 2))
    rng, n, times = np.random.default_rng(0), len(right_a), 20_000
    # Reviews are of three kinds, so a resample is one draw of how many of each kind are in it.
    shares = [np.mean(right_a & ~right_b), np.mean(~right_a & right_b), np.mean(right_a == right_b)]
    won, lost, _ = rng.multinomial(n, shares, size=times).T / n
    apart = (rng.binomial(n, right_a.mean(), times) - rng.binomial(n, right_b.mean(), times)) / n
    right = np.percentile(won - lost, [2.5, 97.5])
    # What 2,000 resamples leave to chance, and a step from one possible value to the next; an interval of 90 % is out.
    tolerance = max(0.04 * (right[1] - right[0]) + 0.5 / n, 1.01 / n)
    mistakes = {
        "that is the second model minus the first": -right[::-1],
        "the models were resampled apart: draw reviews, and take both answers to each": np.percentile(
            apart, [2.5, 97.5]
        ),
        "that is an interval of 90 %: five percent are outside at each end": np.percentile(won - lost, [5, 95]),
        "high comes first there: give low, then high": right[::-1],
        "that is in points: give shares, without the factor 100": 100 * right,
    }
    wide = "too wide" if found[1] - found[0] > right[1] - right[0] else "too narrow"
    look = f"the interval is {wide} or in the wrong place: draw as many reviews as there are, with replacement"
    # The tolerance grows with what is compared: an interval in points is a hundred times as wide.
    scale = 100 if np.abs(found).max() > 1 else 1
    match(found, right, mistakes, look, lambda a, b: bool((np.abs(a - b) <= scale * tolerance).all()))
    return "both answers to each review are drawn together: what the models share cancels, and the interval narrows."


# --- how many are right ---


def right_answers(path: Path) -> list[bool]:
    """Of each exercise of an executed notebook, in order, whether its check said "Right"."""
    cells = nbformat.read(path, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])]
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    return [bool(re.search(r"^Right: ", text, re.MULTILINE)) for text in said]


def main(paths: list[str]) -> None:
    """Print a line a notebook: how many answers are right, and which."""
    for path in paths:
        try:
            right = right_answers(Path(path))
        except (OSError, ValueError, nbformat.ValidationError) as error:
            print(f"{path}: cannot be read ({type(error).__name__})")
            continue
        which = ", ".join(str(number) for number, is_right in enumerate(right, 1) if is_right)
        print(f"{path}: {sum(right)} of {len(right)} right" + (f" ({which})" if which else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
