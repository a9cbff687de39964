"""Shared by all checks: reading answers of each kind, and comparing them with the right one and known mistakes."""

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
UNANSWERED = "Not answered yet"
SHARE = "a share between 0 and 1"
# Hints that several checks give.
INVERTED = "dropped and kept are swapped: True means kept"
SIGNED = "the weight still has its sign: take |w|"


class Hint(Exception):
    """Raised for a wrong answer, with a message that does not give the right one away."""


def check(examine: Callable) -> Callable:
    """Make a check of a function that returns an insight for a right answer and raises ``Hint`` for a wrong one.

    The check prints one line and returns a bool; an answer of ``...`` is not examined.
    """

    @functools.wraps(examine)
    def checked(answer, *context, **named) -> bool:
        if answer is ...:
            print(UNANSWERED)
            return False
        try:
            insight = examine(answer, *context, **named)
        except Hint as hint:
            print(f"Not yet: {hint}")
            return False
        print(f"Right: {insight}")
        return True

    return checked


# --- answers of each kind ---


def found_type(answer) -> str:
    """Return the type and shape of an answer, for a message that says what was expected."""
    shape = getattr(answer, "shape", None)
    shaped = f" and shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"got type {type(answer).__name__}{shaped}"


def number(answer, expected: str) -> float:
    """Convert an answer to a number, also from NumPy or torch with a single element. Raises ``Hint``."""
    if isinstance(answer, torch.Tensor | np.ndarray | np.generic) and math.prod(answer.shape) == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, numbers.Real):
        raise Hint(f"the answer must be a number ({expected}); {found_type(answer)}")
    try:
        value = float(answer)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Hint(f"the answer must be a finite number ({expected})")
    return value


def items_of(answer, expected: str) -> list:
    """Convert an answer to a list of its items. Raises ``Hint``."""
    if isinstance(answer, str | Mapping) or not isinstance(answer, Iterable):
        raise Hint(f"the answer must be {expected}; {found_type(answer)}")
    try:
        return list(answer)
    except TypeError:  # an array or a tensor without a dimension
        raise Hint(f"the answer must be {expected}; {found_type(answer)}") from None


def numbers_of(answer, expected: str, count: int | None = None) -> list[float]:
    """Convert an answer to a list of numbers, ``count`` of them where it is given. Raises ``Hint``."""
    found = [number(item, f"each item of {expected}") for item in items_of(answer, expected)]
    if count not in (None, len(found)):
        raise Hint(f"the answer must be {expected} with {count} numbers; got {len(found)}")
    return found


def tensor(answer, shape: tuple[int, ...], expected: str) -> torch.Tensor:
    """Convert an answer to a tensor of this shape, on the CPU. Raises ``Hint``."""
    try:
        found = torch.as_tensor(answer).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Hint(f"the answer must be {expected} of shape {tuple(shape)}; {found_type(answer)}") from None
    if found.shape != tuple(shape):
        raise Hint(f"the answer must be {expected} of shape {tuple(shape)}; {found_type(found)}")
    return found if found.layout == torch.strided else found.to_dense()


def mask(answer, shape: tuple[int, ...], expected: str = "a mask") -> torch.Tensor:
    """Convert an answer, of bools or of zeros and ones, to a bool tensor. Raises ``Hint``."""
    found = tensor(answer, shape, expected)
    if not ((found == 0) | (found == 1)).all():
        raise Hint("a mask holds True for kept and False for dropped, not the weights themselves")
    return found.bool()


def by_name(answer, like: Mapping[str, torch.Tensor], convert: Callable, expected: str) -> Tensors:
    """Convert an answer to a dict with the names and shapes of ``like``. Raises ``Hint``."""
    if not isinstance(answer, Mapping):
        raise Hint(f"the answer must be a dict {{parameter name: {expected}}}; {found_type(answer)}")
    if set(answer) != set(like):
        example = next(iter(like))
        raise Hint(f"the keys of the dict must be the names of the {len(like)} matrices, for example {example}")
    return {name: convert(answer[name], values.shape, f"a {expected} for {name}") for name, values in like.items()}


def call(function: Callable, *arguments):
    """Return the result of a student's function. Raises ``Hint`` where it fails."""
    try:
        return function(*arguments)
    except Exception as error:  # a student's function may raise anything
        raise Hint(f"it raises {type(error).__name__}: call it yourself to see where") from error


# --- the right answer, known mistakes ---


def near(value: float, target: float, tolerance: float | None = None) -> bool:
    """Return whether two numbers are the same to three significant digits, or within a tolerance."""
    if tolerance is None:
        tolerance = 0.505 * 10.0 ** (math.floor(math.log10(abs(target))) - 2) if target else 5e-4
    return abs(value - target) <= tolerance


def compare(answer, expected: str, right: float, mistakes: dict, advice: str, tolerance: float | None = None) -> None:
    """Raise ``Hint`` unless an answer is the right number.

    mistakes: {hint: the number that a known mistake gives, a tuple of them, or a function that returns it}; advice: the
    hint for any other number.
    """
    value = number(answer, expected)
    if near(value, right, tolerance):
        return
    for hint, wrong in mistakes.items():
        wrong = wrong() if callable(wrong) else wrong
        if any(near(value, candidate, tolerance) for candidate in (wrong if isinstance(wrong, tuple) else (wrong,))):
            raise Hint(hint)
    if expected == SHARE and not 0 <= value <= 1:
        raise Hint("a share lies between 0 and 1; a percentage is a hundred times as much")
    raise Hint(f"too {'large' if value > right else 'small'}. {advice}")


def equal(a: Tensors, b: Tensors) -> bool:
    """Return whether two dicts hold the same numbers up to rounding, which may change one in a hundred near zero."""
    alike = sum(int(((a[n].double() - b[n].double()).abs() <= 0.01 * b[n].double().abs()).sum()) for n in b)
    return alike >= 0.99 * sum(tensor.numel() for tensor in b.values())


def match(found, right, mistakes: dict, advice: str, same: Callable) -> None:
    """Raise ``Hint`` unless an answer is the right one by same(a, b); the rest is as in ``compare``."""
    if same(found, right):
        return
    for hint, wrong in mistakes.items():
        if same(found, wrong() if callable(wrong) else wrong):
            raise Hint(hint)
    raise Hint(advice)


def drops_lowest(kept: torch.Tensor, score: torch.Tensor) -> bool:
    """Return whether no score that a mask drops is above one that it keeps."""
    return not kept.any() or bool(kept.all()) or bool(score[~kept].max() <= score[kept].min())
