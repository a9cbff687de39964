"""A sparse matrix in eight bits: blocks of four weights of one output, which one instruction multiplies and adds up.

Processors that multiply bytes take four of them at a time: in each of sixteen lanes, four activations times four
weights, summed in 32 bits. So the unit that is stored or left out is a block of four neighbouring inputs of one output.
A model pruned in such blocks (``masks.select_blocks``) leaves out as many blocks as weights. One that is pruned in
single weights leaves out only the blocks that have no weight left: 66 % of them where 90 % of the weights are gone.

The rest is as in ``kernels``: a tile of tokens is packed as [in / 4, tile], four bytes at each place, and the sums of a
row stay in registers until it is finished.
"""

import functools
import math

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from nbhelpers.sparse import int8
from nbhelpers.sparse.formats import BLOCK, mask_to_csr, row_numbers
from nbhelpers.sparse.kernels import (
    INT,
    LANES,
    VECTOR,
    data_of,
    gelu,
    next_ticket,
    njit_fast,
    splat,
    sum_row,
    transpose,
    vector_at,
)
from nbhelpers.sparse.threads import run_workers

VECTORS = 2  # vectors per row of a tile: 32 tokens, the fastest or next to it for all shapes measured
KINDS = ("avx512vnni", "avxvnni", "avx2")  # what a processor multiplies bytes with, the best first


@functools.cache
def byte_instructions() -> str | None:
    """Return the best of ``KINDS`` that this processor has, or None for another processor."""
    features = binding.get_host_cpu_features()
    return next((name for name in KINDS if features.get(name)), None)


def is_available() -> bool:
    """Return whether the engine runs here; with AVX2 alone, activations must have seven bits."""
    kind = byte_instructions()
    return kind is not None and int8.is_available() and (kind != "avx2" or int8.activation_levels() == 63)


def halves(builder, vector):
    """Return the lower and the upper half of a vector's lanes."""
    count = vector.type.count // 2
    index = ir.VectorType(ir.IntType(32), count)
    parts = (list(range(count)), list(range(count, 2 * count)))
    return [builder.shuffle_vector(vector, vector, ir.Constant(index, part)) for part in parts]


def add_byte_products(builder, total, x, weight, kind: str):
    """Emit total + the sum of four products of bytes in each lane; x is unsigned, weight signed."""
    if kind != "avx512vnni":
        pairs = zip(*(halves(builder, vector) for vector in (total, x, weight)), strict=True)
        low, high = (add_in_half(builder, *parts, kind) for parts in pairs)
        index = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES)))
        return builder.shuffle_vector(low, high, index)
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, total, x, weight)


def add_in_half(builder, total, x, weight, kind: str):
    """Emit the same for eight lanes."""
    if kind == "avxvnni":
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", total.type, total, x, weight)
    pairs, eight = (ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (16, 8))
    x, weight = builder.bitcast(x, eight), builder.bitcast(weight, eight)
    sums = call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, x, weight)
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, sums, ir.Constant(pairs, [1] * 16)))


def call(builder, name: str, result, *arguments):
    """Emit a call of an instruction by its name in LLVM."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def block_row(typing, width, kind, values, columns, begin, end, start, scale, packed, result):
    """Set result[:] = scale * (start + sum of the products of block k and packed[columns[k], :]).

    width and kind are tuples whose lengths say how many vectors a row of ``packed`` has and which of ``KINDS`` runs:
    the compiler has to know both.
    """
    signature = types.void(width, kind, values, columns, begin, end, start, scale, packed, result)

    def generate(context, builder, signature, arguments):
        kinds, instructions = signature.args, KINDS[signature.args[1].count - 1]
        value, column, source, target = (data_of(context, builder, kinds[i], arguments[i]) for i in (2, 3, 8, 9))
        sums = sum_row(
            builder,
            kinds[0].count,
            (value, column, source),
            arguments[4:6],
            splat(builder, arguments[6]),
            builder.add,
            lambda total, x, weight: add_byte_products(builder, total, x, weight, instructions),
        )
        scale = splat(builder, arguments[7])
        for j, total in enumerate(sums):
            scaled = builder.fmul(builder.sitofp(total, VECTOR), scale)
            builder.store(scaled, vector_at(builder, target, ir.Constant(INT, j * LANES)), align=4)
        return context.get_dummy_value()

    return signature, generate


@njit_fast
def multiply_tile(width, kind, sizes, memory, x, scale_x, y, matrix, token):
    """Multiply a tile of tokens that starts at ``token``, scale the sums, add the bias and apply GELU."""
    tokens, words, n_out, activate = sizes
    values, columns, starts, begins, scale, bias = matrix
    tile = len(width) * LANES
    packed, block, taken = memory, memory[words * tile :], min(tile, tokens - token)
    # Four bytes travel as one float: they are moved, never computed with.
    transpose(x, token * words, words, packed, 0, tile, taken, words)
    for row in range(0, n_out, LANES):
        rows = min(LANES, n_out - row)
        for i in range(row, row + rows):
            begin, end, result = np.int64(starts[i]), np.int64(starts[i + 1]), block[(i - row) * tile :]
            block_row(width, kind, values, columns, begin, end, begins[i], scale[i], packed, result)
        transpose(block, 0, tile, y, token * n_out + row, n_out, rows, taken)
    for i in range(token, token + taken):
        own = y[i * n_out : (i + 1) * n_out]
        int8.scale_row(own, scale_x[i], bias)
        if activate:
            gelu(own)


@functools.cache
def worker(instructions: str):
    """Return the function that each thread runs (compiled on first use, then cached on disk)."""
    width, kind = (0,) * VECTORS, (0,) * (KINDS.index(instructions) + 1)

    @cfunc(types.void(types.CPointer(types.voidptr)), cache=True)
    def run(job):
        sizes, counters = carray(job[0], 6, np.int64), carray(job[1], 2, np.int64)
        tokens, words, n_out, activate, scratch, blocks = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
        tile = len(width) * LANES
        memory = carray(job[2], scratch, np.float32)[next_ticket(counters, 1) * (words + LANES) * tile :]
        x, scale_x = carray(job[3], tokens * words, np.float32), carray(job[4], tokens, np.float32)
        y = carray(job[5], tokens * n_out, np.float32)
        matrix = (
            carray(job[6], blocks, np.int32),
            carray(job[7], blocks, np.int32),
            carray(job[8], n_out + 1, np.int32),
            carray(job[9], n_out, np.int32),
            carray(job[10], n_out, np.float32),
            carray(job[11], n_out, np.float32),
        )
        while True:
            token = next_ticket(counters, 0) * tile
            if token >= tokens:
                return
            multiply_tile(width, kind, (tokens, words, n_out, activate), memory, x, scale_x, y, matrix, token)

    return run


def to_blocks(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (values, columns, starts, begins) of int8 numbers [out, in]: CSR of the blocks that are not zero.

    values: int32 [blocks], four numbers each; columns: int32 [blocks], in blocks; starts: int32 [out + 1]; begins:
    int32 [out], what a row's sum starts from, since activations are stored with their zero point added.
    """
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % BLOCK)).view(len(numbers), -1, BLOCK)
    used = (blocks != 0).any(2)
    values, columns, starts = mask_to_csr(used, blocks[used].contiguous().view(torch.int32).flatten())
    begins = -(int8.activation_levels() + 1) * numbers.sum(1, dtype=torch.int32)
    return values, columns, starts, begins.to(torch.int32)


def from_blocks(values: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return the int8 numbers [out, in] that ``to_blocks`` took apart."""
    blocks = torch.zeros(len(starts) - 1, math.ceil(in_features / BLOCK), BLOCK, dtype=torch.int8)
    blocks[row_numbers(starts), columns] = values.view(torch.int8).view(-1, BLOCK)
    return blocks.flatten(1)[:, :in_features].contiguous()


def multiply(x: torch.Tensor, layer: tuple[torch.Tensor, ...], activate: bool = False) -> torch.Tensor:
    """Return the quantized product of x float32 [tokens, in] by a layer: [tokens, out].

    layer: (values, columns, starts, begins) of ``to_blocks``, scale [out] and bias [out]; activate: whether GELU, in
    its tanh form, follows.
    """
    words, n_out = math.ceil(x.shape[1] / BLOCK), len(layer[-1])
    y = x.new_empty(len(x), n_out)
    if not len(x):
        return y
    x8, scale_x = int8.quantize_tokens(x.contiguous(), words * BLOCK)
    tile = VECTORS * LANES
    workers = min(torch.get_num_threads(), math.ceil(len(x) / tile))
    scratch = x.new_empty(workers * (words + LANES) * tile)
    sizes = np.array([len(x), words, n_out, int(activate), len(scratch), len(layer[0])])
    run_workers(worker(byte_instructions()), sizes, np.zeros(2, np.int64), (scratch, x8, scale_x, y, *layer), workers)
    return y
