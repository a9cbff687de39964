"""Checks of notebook 01's exercises."""

import itertools
import re
from collections.abc import Callable

import numpy as np
from torch import nn

from nbhelpers.evaluation import predict_logits
from nbhelpers.exercises.checking import SHARE, Hint, call, check, compare, kind
from nbhelpers.models import LABEL_NAMES

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
