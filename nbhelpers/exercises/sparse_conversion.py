"""Checks of notebook 04's exercises."""

import itertools

import torch
from torch import nn

from nbhelpers.exercises.checking import (
    INVERTED,
    SHARE,
    Hint,
    Tensors,
    by_name,
    call,
    check,
    compare,
    found_type,
    mask,
    match,
    numbers_of,
)
from nbhelpers.masks import select_structures
from nbhelpers.models import Structures
from nbhelpers.selection import select
from nbhelpers.sparse import SparseLinear


@check
def check_break_even(answer, value_bytes: int, index_bytes: int):
    """Check the sparsity above which CSR needs fewer bytes than the dense matrix, without the row starts."""
    density = value_bytes / (value_bytes + index_bytes)
    mistakes = {
        "that is the share of weights that are kept; sparsity is the share that is gone": density,
        "that is with 32-bit indices": 1 - value_bytes / (value_bytes + 4),
        "that counts the indices alone: the values are stored as well": 1 - value_bytes / index_bytes,
    }
    advice = "Each kept weight costs a value and an index, each weight of the dense matrix a value."
    compare(answer, SHARE, 1 - density, mistakes, advice)
    return "with an index larger than its value, CSR is a layout for computing rather than for saving bytes."


def compressed_rows(matrix: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """Return (starts, columns, values) of a matrix in CSR, as plain lists."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = [0, *torch.bincount(rows, minlength=len(matrix)).cumsum(0).tolist()]
    return starts, columns.tolist(), matrix[rows, columns].tolist()


@check
def check_csr(answer, matrix: torch.Tensor):
    """Check a matrix in CSR: the lists (starts, columns, values)."""
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        raise Hint(f"the answer must be three lists of numbers, (starts, columns, values); {found_type(answer)}")
    found = tuple(numbers_of(numbers, "a list of numbers") for numbers in answer)
    starts, columns, values = right = compressed_rows(matrix)
    if found == right:
        return "an empty row costs only a repeated start, and a product reads the values in order."
    if sorted(found) == sorted(right):
        raise Hint("the three are right, in another order: starts, columns, values")
    if found == compressed_rows(matrix.t()):
        raise Hint("that is column by column (CSC): go row by row")
    if len(found[2]) != len(values):
        raise Hint("the third list has the values that are not zero, each once")
    if found[2] != values:
        raise Hint("the values are not in the order of the rows, from left to right")
    if found[1] != columns:
        raise Hint("the second list has the column of each value, counted from 0")
    if found[0] == matrix.nonzero()[:, 0].tolist():
        raise Hint("one row number per value is COO: CSR only stores where each row begins")
    if found[0] == [end - start for start, end in itertools.pairwise(starts)]:
        raise Hint("these are the numbers of values in each row: add them up, from 0")
    if found[0] in (starts[:-1], starts[1:]):
        raise Hint("there is one start more than rows: the first is 0 and the last the number of values")
    raise Hint("the first list has the position of each row's first value, also for an empty row")


@check
def check_speedup(answer, share: float, factor: float):
    """Check how many times as fast a model gets when a share of its time gets ``factor`` times as fast (Amdahl)."""
    rest = 1 - share + share / factor
    mistakes = {
        "that would be right if the model did nothing else": factor,
        "a share of a speed-up is not a speed-up: compute how much time is left": share * factor,
        "speeds cannot be averaged, times can: how long does each part take now?": 1 - share + share * factor,
        "that is the time that is left: how many times does it fit into the old one?": rest,
        "that is the limit, with products that take no time at all": 1 / (1 - share),
    }
    advice = "Call the old time 1. The products take their share of it, divided by the factor; the rest stays."
    compare(answer, "how many times as fast", 1 / rest, mistakes, advice)
    return "attention, LayerNorm and Python soon take most of the time, however fast the products: Amdahl's law."


@check
def check_bitmap_bytes(answer, layers: list[tuple[int, int]]):
    """Check the bytes of matrices as bitmap and float32 values; layers: (weights, weights left) of each matrix."""
    weights, left = (sum(column) for column in zip(*layers, strict=True))
    bitmap = sum(-(-size // 8) for size, _ in layers)
    right = bitmap + 4 * left
    mistakes = {
        "that stores the values that are gone": bitmap + 4 * (weights - left),
        "that takes a byte for each bit: eight weights share one": weights + 4 * left,
        "that is the values alone: without the bitmap their positions are unknown": 4 * left,
        "that is the bitmap alone: the values that are left are stored as well": bitmap,
        "a float32 value takes more than one byte": bitmap + left,
        "that is CSR with 32-bit indices": 8 * left,
        "that is the dense matrices": 4 * weights,
        "that is in megabytes: the answer is in bytes": right / 1e6,
        "that is in bits": 8 * right,
    }
    compare(answer, "bytes", right, mistakes, "One bit for every weight, and four bytes for each one that is left.")
    return "the bitmap takes one bit per weight at any sparsity, so the file cannot become smaller than that."


@check
def check_backend(answer, masked: nn.Module, backend: str):
    """Check the sparse model of a masked one, all of whose sparse layers run on one engine."""
    if not isinstance(answer, nn.Module):
        raise Hint(f"the answer must be a model, as convert_to_sparse makes it; {found_type(answer)}")
    engines = {module.backend for module in answer.modules() if isinstance(module, SparseLinear)}
    if not engines:
        raise Hint("there is no sparse layer in this model: it is a dense one")
    if engines != {backend}:
        raise Hint(f"layers of this model run on {', '.join(sorted(engines - {backend}))}: pass the engine's name")
    ids = torch.arange(3)[None]
    with torch.inference_mode():
        found, right = (call(lambda model: model(input_ids=ids).logits, model) for model in (answer, masked))
    if found.shape != right.shape or not torch.allclose(found, right, rtol=1e-3, atol=1e-3):
        raise Hint("its logits are not those of the masked model: convert that one")
    return "zeros and logits are the same on another engine, so any difference in time comes from the engine."


@check
def check_head_masks(answer, scores: Tensors, structures: list[Structures], sparsity: float):
    """Check masks of ``select_structures`` that drop whole heads and no neuron: {parameter name: mask}, True = kept."""
    found = by_name(answer, scores, mask, "mask")
    heads = [structure for structure in structures if structure.name.endswith("attn")]
    neurons = [structure for structure in structures if structure not in heads]
    right = select_structures(scores, heads, sparsity)
    mistakes = {
        INVERTED: {name: ~kept for name, kept in right.items()},
        "these are the neurons alone: drop the heads": lambda: select_structures(scores, neurons, sparsity),
        "heads and neurons are both among them": lambda: select_structures(scores, structures, sparsity),
        "single weights are dropped: a head goes with all of its weights or stays": lambda: select(scores, sparsity),
    }
    touched = any(not found[name].all() for structure in neurons for name, *_ in structure.parts)
    advice = "a matrix of an MLP has lost weights" if touched else "these are other heads: is the sparsity the same?"
    match(found, right, mistakes, advice, lambda a, b: all(torch.equal(a[name], b[name]) for name in scores))
    return "heads are few and large, so a sparsity is met only roughly, and one head of each block always stays."
