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
    kind,
    mask,
    match,
    numbers_of,
)
from nbhelpers.masks import select_structures
from nbhelpers.models import Structures
from nbhelpers.selection import select
from nbhelpers.sparse import SparseLinear

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
