"""Checks of notebook 01's exercises."""

import itertools
import re
from collections.abc import Callable

import numpy as np
from torch import nn

from nbhelpers.evaluation import predict_logits
from nbhelpers.exercises.checking import SHARE, Hint, call, check, compare, found_type
from nbhelpers.models import LABEL_NAMES


@check
def check_parameters_left(answer, total: int, prunable: int, sparsity: float):
    """Check the share of all parameters that is left when a share of the block weights is removed."""
    left = total - sparsity * prunable
    mistakes = {
        "that is the share that is gone: the answer is the share that is left": 1 - left / total,
        "that is the share of the block weights that is left; all other parameters stay, and count": 1 - sparsity,
        "the parameters that are never pruned are left as well": (1 - sparsity) * prunable / total,
        "that is a number of parameters: divide it by the number of all": left,
    }
    compare(answer, SHARE, left / total, mistakes, "How many parameters go, and how many are there before?")
    return "a sparsity counts block weights only, so the whole model loses a smaller share."


@check
def check_fooling_review(answer, predict: Callable[[list[str]], np.ndarray]):
    """Check a review of two sentences that the model gets wrong; predict(texts) -> P(positive)."""
    pair = isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(text, str) for text in answer)
    if not pair or answer[1] not in LABEL_NAMES.values():
        raise Hint('the answer must be a pair of texts: the review, and "negative" or "positive"')
    text, label = answer
    if len(re.findall(r"\w[.!?]+(?:\s|$)", text)) < 2 or len(text.split()) < 6:
        raise Hint("the review must be two sentences, of some words each and with a full stop at their ends")
    if (float(predict([text])[0]) > 0.5) == (label == "positive"):
        advice = "Use strong words of one class in a review of the other, and let one short phrase decide"
        raise Hint(f"the model predicts the same as you. {advice}")
    return "the model adds up cues, and an opinion that depends on one short phrase gets lost among them."


@check
def check_disagreements(answer, right_a: np.ndarray, right_b: np.ndarray):
    """Check how many reviews exactly one of two models gets right."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    mistakes = {
        "that is the net difference, in which a review won and a review lost cancel": abs(only_a - only_b),
        "that is one direction only: the second model alone may be right as well": only_a,
        "that is one direction only: the first model alone may be right as well": only_b,
        "these are the reviews that both get right": int((right_a & right_b).sum()),
        "these are the reviews that both get wrong": int((~right_a & ~right_b).sum()),
        "that is a share: the answer is a number of reviews": (only_a + only_b) / len(right_a),
    }
    compare(answer, "a number of reviews", only_a + only_b, mistakes, "Compare the two arrays review by review.", 1e-3)
    return "a paired test looks at these reviews alone: where both models agree, neither is better."


def lost_words(words: list[str], found: list[str]) -> str:
    """Return a hint for a shuffled text that does not have the words of the text."""
    if sorted("".join(words)) == sorted("".join(found)):
        return "the letters are shuffled, or words run into each other: keep each word whole"
    if len(words) == len(found) and set(found) <= set(words):
        return "some words come twice and others are missing: draw them without replacement"
    return "the words are not those of the text: none may be lost, added or changed"


@check
def check_shuffled(answer, texts: list[str]):
    """Check a function that puts the words of a text into a random order."""
    if not callable(answer):
        raise Hint(f"the answer must be a function from a text to a text; {found_type(answer)}")
    pairs = []
    for text in texts:
        shuffled = call(answer, text)
        if shuffled is None:
            raise Hint("the function returns nothing; random.shuffle, for example, works in place and returns None")
        if not isinstance(shuffled, str):
            raise Hint("the function must return one text: join the words with spaces")
        words, found = text.split(), shuffled.split()
        if sorted(words) != sorted(found):
            raise Hint(lost_words(words, found))
        pairs.append((words, found))
    orders = {
        "the order is the old one": lambda words: words,
        "the words are in the order of the alphabet: use a random order": sorted,
        "the words are backwards and neighbours still neighbours: use a random order": lambda words: words[::-1],
    }
    for hint, order in orders.items():
        if all(found == order(words) for words, found in pairs):
            raise Hint(hint)
    kept = [pair in set(itertools.pairwise(old)) for old, new in pairs for pair in itertools.pairwise(new)]
    if np.mean(kept or [0]) > 0.5:
        raise Hint("most words are still beside their old neighbours: shuffle single words")
    return "a bag of words is left: the accuracy that the model loses on these texts came from word order."


@check
def check_heads_only(
    answer, model: nn.Module, rows: list[list[int]], labels: np.ndarray, max_tokens: int, head_share: float
):
    """Check a model's accuracy on the first ``max_tokens`` tokens of each review; rows: all tokens of each."""

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
    advice = "Cut each row to its first tokens, predict, and compare with the labels in the same order."
    # Padding depends on the batch, and the last digits of a logit on padding: one review may change sides.
    compare(answer, SHARE, right, mistakes, advice, 1.01 / len(rows))
    return "the difference to the usual accuracy is what this model gains from the ends of long reviews."
