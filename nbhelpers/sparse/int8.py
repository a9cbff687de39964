"""Products in eight bits: int8 weights with a scale per output, activations rounded at run time with a scale per token.

    y[tokens, out] = scale_x[tokens] * scale_w[out] * (x8[tokens, in] @ W8[out, in].T) + bias[out]

This is symmetric dynamic quantization, per output channel and per token (Yao et al., ZeroQuant, 2022). With one scale
per batch instead, a review's logits would depend on the reviews beside it, and one token with large activations would
cost all others their precision. The product of whole numbers is oneDNN's, which PyTorch ships; rounding the activations
and scaling the sums are compiled here, so that each takes one pass over memory.
"""

import functools
import math

import numpy as np
import torch
from numba import carray, cfunc, types

from nbhelpers.sparse.formats import LEVELS
from nbhelpers.sparse.kernels import gelu, next_ticket, njit_fast
from nbhelpers.sparse.threads import run_workers

ROWS = 16  # tokens that a thread takes at a time
SIGN, INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # all bits but the sign; the bits of infinity


# --- two passes ---


@njit_fast
def quantize_row(x, numbers, levels, zero):
    """Write a row as whole numbers from -levels to levels, plus ``zero``, into uint8 and return its scale.

    A row with NaN or infinity gets the scale NaN: it must not come out as ordinary numbers.
    """
    bits, largest = x.view(np.int32), np.int32(0)
    for i in range(x.size):  # floats without their sign order like their bits, and a maximum of integers is fast
        largest = max(largest, np.int32(bits[i] & SIGN))
    if largest >= INFINITE:
        numbers[:] = np.uint8(zero)
        return np.float32(np.nan)
    top = np.float32(0)
    for i in range(x.size if largest > 0 else 0):
        if np.int32(bits[i] & SIGN) == largest:
            top = abs(x[i])
            break
    inverse = levels / top if top > 0 else np.float32(0)
    for i in range(x.size):
        numbers[i] = np.uint8(np.int32(np.rint(x[i] * inverse) + zero))
    return top / levels


@njit_fast
def scale_row(sums, scale, bias):
    """Set sums[:] = scale * sums + bias."""
    for i in range(sums.size):
        sums[i] = scale * sums[i] + bias[i]


@cfunc(types.void(types.CPointer(types.voidptr)), cache=True)
def quantize_worker(job):
    """Quantize rows until none is left."""
    sizes, counter = carray(job[0], 5, np.int64), carray(job[1], 1, np.int64)
    rows, width, padded = sizes[0], sizes[1], sizes[2]
    levels, zero = np.float32(sizes[3]), np.float32(sizes[4])
    x, numbers = carray(job[2], rows * width, np.float32), carray(job[3], rows * padded, np.uint8)
    scale = carray(job[4], rows, np.float32)
    while True:
        first = next_ticket(counter, 0) * ROWS
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            own = numbers[row * padded : row * padded + width]
            scale[row] = quantize_row(x[row * width : (row + 1) * width], own, levels, zero)


@cfunc(types.void(types.CPointer(types.voidptr)), cache=True)
def scale_worker(job):
    """Scale rows, add the bias and apply GELU where that is asked for, until none is left."""
    sizes, counter = carray(job[0], 3, np.int64), carray(job[1], 1, np.int64)
    rows, width, activate = sizes[0], sizes[1], sizes[2]
    sums, scale = carray(job[2], rows * width, np.float32), carray(job[3], rows, np.float32)
    bias = carray(job[4], width, np.float32)
    while True:
        first = next_ticket(counter, 0) * ROWS
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            own = sums[row * width : (row + 1) * width]
            scale_row(own, scale[row], bias)
            if activate:
                gelu(own)


def run_rows(worker, sizes: list[int], *tensors: torch.Tensor) -> None:
    """Run a worker over all rows on torch's threads; sizes: rows, width and the worker's own numbers."""
    workers = min(torch.get_num_threads(), math.ceil(sizes[0] / ROWS))
    run_workers(worker, np.array(sizes), np.zeros(1, np.int64), tensors, workers)


def quantize_tokens(x: torch.Tensor, padded: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [tokens, in] as (uint8 [tokens, padded], scale [tokens]): a value is (number - zero point) * scale.

    padded: the columns of the result, by default ``in``; what the further ones hold is undefined. Raises
    ``RuntimeError`` for tensors that are not on the CPU.
    """
    if x.device.type != "cpu":
        raise RuntimeError(f"eight-bit engines must have their tensors on the CPU (got {x.device.type})")
    levels, padded = activation_levels(), padded or x.shape[1]
    numbers, scale = torch.empty(len(x), padded, dtype=torch.uint8), x.new_empty(len(x))
    run_rows(quantize_worker, [*x.shape, padded, levels, levels + 1], x, numbers, scale)
    return numbers, scale


# --- the product ---


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Return int8 weights [out, in] in oneDNN's own layout."""
    return torch.ops.onednn.qlinear_prepack(numbers, None)


def products(x8: torch.Tensor, zero: int, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return scale[out] * ((x8 - zero) @ W8.T) in float32 from uint8 [tokens, in] and packed weights."""
    none = torch.zeros(len(scale), dtype=torch.int32)  # the weights are symmetric: their zero points are 0
    options = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(x8, 1.0, zero, packed, scale, none, *options)


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return the int8 weights [out, in] that ``pack`` packed: each is its product with a one."""
    identity = torch.eye(in_features).to(torch.uint8)
    return products(identity, 0, packed, torch.ones(packed.shape[1])).t().to(torch.int8).contiguous()


def is_available() -> bool:
    """Return whether PyTorch has the product of bytes here."""
    try:
        return activation_levels() > 0
    except RuntimeError:
        return False


@functools.cache
def activation_levels() -> int:
    """Return the largest whole number of an activation, on either side of zero: 127, or 63 where 127 would overflow.

    Processors without instructions for products of bytes add two of them in sixteen bits, which 255 * 127 * 2 exceeds
    and 127 * 127 * 2 does not. A product whose result is known shows which kind this processor is. Raises
    ``RuntimeError`` where PyTorch has no int8 product here.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError('the backend "int8" needs oneDNN, which this build of PyTorch does not have')
    weights, scale = pack(torch.full((16, 64), LEVELS, dtype=torch.int8)), torch.ones(16)
    for levels in (127, 63):
        largest = 2 * levels + 1
        sums = products(torch.full((16, 64), largest, dtype=torch.uint8), 0, weights, scale)
        if bool((sums == 64 * largest * LEVELS).all()):
            return levels
    raise RuntimeError('the backend "int8" needs exact products of bytes, which this build of PyTorch does not have')


def multiply(x: torch.Tensor, layer: tuple[torch.Tensor, ...], activate: bool = False) -> torch.Tensor:
    """Return the quantized product of x float32 [tokens, in] by a layer: [tokens, out].

    layer: (packed, scale [out], bias [out]); activate: whether GELU, in its tanh form, follows.
    """
    packed, scale, bias = layer
    x8, scale_x = quantize_tokens(x.contiguous())
    sums = products(x8, activation_levels() + 1, packed, scale)
    run_rows(scale_worker, [*sums.shape, int(activate)], sums, scale_x, bias)
    return sums
