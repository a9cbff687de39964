"""Checks of notebook 05's exercises."""

import math
import re

import numpy as np
import torch
from torch import nn

from nbhelpers.exercises.checking import (
    SHARE,
    Hint,
    Tensors,
    call,
    check,
    compare,
    found_type,
    items_of,
    match,
    number,
    numbers_of,
)
from nbhelpers.models import blocks


@check
def check_softened(answer, logits: tuple[float, float], t: float):
    """Check P(positive) of two logits (negative, positive) at a temperature."""

    def positive(scale: float) -> float:
        return 1 / (1 + math.exp((logits[0] - logits[1]) * scale))

    mistakes = {
        "that is at T = 1": positive(1.0),
        "that multiplies by T: the probabilities become sharper, not softer": positive(t),
        "that is the probability of the other class": 1 - positive(1 / t),
        "T divides the logits, not the probabilities, which have to sum to one": positive(1.0) / t,
        "that is the logit divided by T: take the softmax of both": logits[1] / t,
        "that leaves out the other logit: a softmax takes both": 1 / (1 + math.exp(-logits[1] / t)),
    }
    compare(answer, SHARE, positive(1 / t), mistakes, "Divide both logits by T, then take the softmax of the two.")
    return "a temperature moves the probabilities towards each other and never changes which class leads."


@check
def check_lost_reviews(answer, teacher_right: np.ndarray, student_right: np.ndarray):
    """Check the row numbers of the reviews that the teacher gets right and the student wrong, in any order."""
    expected = "a flat list or array of row numbers"
    items = items_of(answer, expected)
    if len(items) == len(teacher_right) and all(isinstance(item, bool | np.bool_) for item in items):
        raise Hint("that is True or False per review: np.flatnonzero turns it into row numbers")
    rows = {number(item, f"each item of {expected}") for item in items}
    mistakes = {
        "these are the reviews that the student gets right and the teacher wrong": ~teacher_right & student_right,
        "these are all errors of the student: some are the teacher's as well": ~student_right,
        "these are the reviews that both get wrong": ~teacher_right & ~student_right,
        "these go either way: exactly one of the two is right": teacher_right != student_right,
        "these are the reviews that both get right": teacher_right & student_right,
    }
    advice = "other reviews are among them, or some are missing: combine the two arrays review by review"
    match(rows, teacher_right & ~student_right, mistakes, advice, lambda a, b: a == set(np.flatnonzero(b).tolist()))
    return "two models of about the same accuracy need not get the same reviews right."


@check
def check_soft_loss(answer, teacher_logits: torch.Tensor, student_logits: torch.Tensor, t: float):
    """Check the soft part of the distillation loss: T^2 times the mean over a batch of KL(teacher || student)."""
    teacher, student = ((logits.double() / t).softmax(-1) for logits in (teacher_logits, student_logits))

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p * (p.log() - q.log())).sum(-1).mean())

    mean, (reviews, classes) = divergence(teacher, student), teacher.shape
    cross_entropy = -float((teacher * student.log()).sum(-1).mean())
    mistakes = {
        "T squared is missing: without it the soft term fades as T grows": mean,
        "the factor is T squared, not T": t * mean,
        "that divides by the classes as well: it is kl_div's default mean, not batchmean": t**2 * mean / classes,
        "that is the sum over the reviews: divide by their number": t**2 * mean * reviews,
        "that is KL(student || teacher): the other way round": t**2 * divergence(student, teacher),
        "that is in bits, with the logarithm to base 2: use the natural one": t**2 * mean / math.log(2),
        "that is the cross-entropy: the teacher's own entropy is still in it": t**2 * cross_entropy,
        "the sign is wrong: a divergence is never negative": -(t**2) * mean,
    }
    advice = "Soften both, take the KL divergence of each review, then the mean, then T squared."
    compare(answer, "a loss", t**2 * mean, mistakes, advice)
    return "with kl_div this takes log-probabilities, reduction='batchmean' and T squared, the three traps."


def outside_blocks(model: nn.Module) -> Tensors:
    """Return the tensors of a model's state outside its blocks, by name."""
    return {name: t.cpu() for name, t in model.state_dict().items() if not re.search(r"\.(?:h|layers)\.\d+\.", name)}


def same_state(a: Tensors, b: Tensors) -> bool:
    """Return whether two states are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


@check
def check_eight_bits(answer, row: list[float]):
    """Check the whole numbers from -127 to 127 that represent a row in eight bits."""
    found, values = numbers_of(answer, "a list of whole numbers", len(row)), np.asarray(row)
    if any(value != round(value) for value in found):
        raise Hint("the numbers must be whole: eight bits hold whole numbers only")

    def rounded(scale: float) -> np.ndarray:
        return (values / scale).round()

    largest, right = np.abs(values).max(), rounded(np.abs(values).max() / 127)
    mistakes = {
        "the largest becomes 127, not 128: there are as many steps on either side of zero": rounded(largest / 128),
        "the largest becomes 127, not 255: half of the numbers are negative": rounded(largest / 255),
        "the numbers are cut off: round to the nearest whole number": np.trunc((values * 127 / largest).round(6)),
        "the signs are lost": np.abs(right),
    }
    advice = "look at the scale first: the largest becomes 127 or -127, and the others are in proportion"
    match(found, right, mistakes, advice, lambda a, b: a == b.tolist())
    return "no number is off by more than half the scale, and a row takes a quarter of its bytes."


@check
def check_first_blocks(answer, teacher: nn.Module, layers: int):
    """Check a student that has copied the first blocks of its teacher, and everything outside the blocks."""
    if not isinstance(answer, nn.Module):
        raise Hint(f"the answer must be a model, as create_student makes it; {found_type(answer)}")
    try:
        student_blocks, teacher_blocks = list(blocks(answer)), list(blocks(teacher))
    except AttributeError:
        raise Hint("this module has no blocks: the answer must be a model of the teacher's kind") from None
    if len(student_blocks) != layers:
        raise Hint(f"it has {'more' if len(student_blocks) > layers else 'fewer'} blocks than the student should have")
    states = [block.state_dict() for block in teacher_blocks]
    copies = [block.state_dict() for block in student_blocks]
    order = [next((i for i, state in enumerate(states) if same_state(copy, state)), None) for copy in copies]
    if None in order:
        raise Hint("some blocks are none of the teacher's: they are random, or were trained further")
    if order != list(range(layers)):
        last = order == list(range(len(states) - layers, len(states)))
        raise Hint(f"these are {'the last' if last else 'blocks of the teacher, but not its first'} ones")
    if not same_state(outside_blocks(answer), outside_blocks(teacher)):
        raise Hint("the blocks are right; embeddings, the last LayerNorm or the head are not the teacher's")
    return "now the same steps of training show whether it matters which blocks a student starts from."


@check
def check_hidden_loss(answer):
    """Check a function(student [b, n, d], teacher [b, n, d], lengths [b]) -> mean squared difference at real tokens."""
    if not callable(answer):
        raise Hint(f"the answer must be a function of student, teacher and lengths; {found_type(answer)}")
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([6, 3, 1])
    student, teacher = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    real, squares = torch.arange(6) < lengths[:, None], (student - teacher).square()
    watched = student.clone().requires_grad_()
    found = call(answer, watched, teacher.clone(), lengths.clone())
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise Hint(f"the function must return a tensor with one number; {found_type(found)}")
    each = torch.stack([review[:length].mean() for review, length in zip(squares, lengths, strict=True)])
    mistakes = {
        "padding counts as well: leave out the positions after the end of each review": squares.mean(),
        "padding is zero now but still divides: divide by the real values": (squares * real[..., None]).mean(),
        "that is a sum: divide by the number of values": squares[real].sum(),
        "that is a sum over features: the mean is over tokens and features": squares[real].sum(-1).mean(),
        "every review has the same weight there: every token should": each.mean(),
        "that is the absolute difference: square it": (student - teacher).abs()[real].mean(),
        "that is the root of the mean of the squares: leave out the root": squares[real].mean().sqrt(),
        "that is the last token of each review only": squares[torch.arange(3), lengths - 1].mean(),
    }
    advice = "Square the differences, pick the real tokens (position < length), and take the mean."
    compare(found.detach(), "a loss", float(squares[real].mean()), {h: float(w) for h, w in mistakes.items()}, advice)
    if not found.requires_grad:
        raise Hint("the value is right, but no gradient reaches the student: detach the teacher only")
    return "the student now learns its teacher's hidden state of each token, not only its predictions."
