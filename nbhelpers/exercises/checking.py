"""What all checks share: answers of each kind, and whether one is right or wrong in a way that is known."""

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

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
