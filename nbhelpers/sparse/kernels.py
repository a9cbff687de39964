"""The engine: a sparse weight matrix times dense activations, on torch's own threads, without a C compiler.

    y[tokens, out] = x[tokens, in] @ W.T + bias        W[out, in] in CSR: values, columns, starts

Why it is faster than a dense product as soon as somewhat more than half of the weights are zero:

1. A tile of 16 to 64 tokens is *packed* as [in, tile]. One weight then multiplies a whole contiguous row of the tile.
2. The sums of a row of W stay in vector registers until the row is finished (``sparse_row``). Per weight the processor
   reads one column number, one value, and the tile's row from the cache.
3. Packing and unpacking are transpositions of 16x16 blocks inside registers (``transpose_block``), so that callers
   pass and get ordinary [tokens, features] tensors.
4. The two layers of a transformer's MLP run in one call: the inner activation stays in the packed layout.
5. The threads are those of torch: a second pool would compete with torch's, which spins for a while after a product.

Numba has no vector type, so (2) and (3) are written in LLVM's terms, as a C programmer would use vector extensions.
"""

import functools
import math
import warnings

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from nbhelpers.sparse.threads import l2_bytes, run_workers, torch_threads

LANES = 16  # floats in a vector: one AVX-512 register, two of AVX2 or four of NEON; LLVM splits it
CHAINS = 4  # independent sums at a time, since an addition takes about four cycles
VECTORS = (1, 2, 4)  # vectors per row of a tile: tiles of 16, 32 and 64 tokens


# --- the product ---

FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
# The order of a row's sums is ours; a product and its sum may be one instruction.
njit_fast = functools.partial(njit, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})


def data_of(context, builder, kind, array):
    """Return the pointer to an array's first element."""
    return context.make_array(kind)(context, builder, array).data


def vector_at(builder, pointer, offset, kind=VECTOR):
    """Return the pointer to the vector that starts ``offset`` numbers after ``pointer``."""
    return builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())


def splat(builder, number):
    """Return a vector with the same number in every lane."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def sum_row(builder, vectors, arrays, bounds, start, add, add_product):
    """Emit the sum of values[k] * packed[columns[k], :] over first <= k < last, and return it as ``vectors`` vectors.

    arrays: pointers to values, columns and packed; bounds: first and last; start: the vector that each sum starts with;
    add(a, b) and add_product(total, x, weight) emit one instruction on vectors.
    """
    (value, column, source), (first, last) = arrays, bounds

    def loop(k, sums, step):
        """Take ``step`` weights per pass while as many are left, each into its own share of the sums."""
        entry = builder.block
        test, body, done = (builder.append_basic_block(name) for name in ("test", "body", "done"))
        builder.branch(test)
        builder.position_at_end(test)
        position, totals = builder.phi(INT), [builder.phi(start.type) for _ in sums]
        for phi, initial in zip([position, *totals], [k, *sums], strict=True):
            phi.add_incoming(initial, entry)
        after = builder.add(position, ir.Constant(INT, step))
        builder.cbranch(builder.icmp_signed("<=", after, last), body, done)

        builder.position_at_end(body)
        for i in range(step):
            index = builder.add(position, ir.Constant(INT, i))
            weight = splat(builder, builder.load(builder.gep(value, [index])))
            row = builder.sext(builder.load(builder.gep(column, [index])), INT)
            row = builder.mul(row, ir.Constant(INT, vectors * LANES))
            for j in range(vectors):
                place = vector_at(builder, source, builder.add(row, ir.Constant(INT, j * LANES)), start.type)
                total = totals[i * vectors + j]
                total.add_incoming(add_product(total, builder.load(place, align=4), weight), body)
        position.add_incoming(after, body)
        builder.branch(test)
        builder.position_at_end(done)
        return position, totals

    # With a narrow tile, several weights are processed at a time; one sum would wait for its own additions.
    chains = CHAINS // vectors
    zero = ir.Constant(start.type, [0] * LANES)
    k, sums = loop(first, [start] * vectors + [zero] * (vectors * (chains - 1)), chains)
    for chain in range(1, chains):
        for j in range(vectors):
            sums[j] = add(sums[j], sums[chain * vectors + j])
    return loop(k, sums[:vectors], 1)[1] if chains > 1 else sums


@intrinsic
def sparse_row(typing, width, values, columns, begin, end, bias, packed, result):
    """Set result[:] = bias + sum of values[k] * packed[columns[k], :] for begin <= k < end, summed in registers.

    width is a tuple whose length is the number of vectors per row of ``packed``, which the compiler has to know.
    """
    signature = types.void(width, values, columns, begin, end, bias, packed, result)

    def generate(context, builder, signature, arguments):
        kinds = signature.args
        value, column, source, target = (data_of(context, builder, kinds[i], arguments[i]) for i in (1, 2, 6, 7))
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        sums = sum_row(
            builder,
            kinds[0].count,
            (value, column, source),
            arguments[3:5],
            splat(builder, arguments[5]),
            builder.fadd,
            lambda total, x, weight: builder.call(fma, [weight, x, total]),
        )
        for j, total in enumerate(sums):
            builder.store(total, vector_at(builder, target, ir.Constant(INT, j * LANES)), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def transpose_block(typing, source, source_at, source_row, target, target_at, target_row):
    """Write the 16x16 block that starts at source_at, its rows source_row floats apart, transposed to target_at."""
    signature = types.void(source, source_at, source_row, target, target_at, target_row)

    def generate(context, builder, signature, arguments):
        kinds = signature.args
        from_data, to_data = (data_of(context, builder, kinds[i], arguments[i]) for i in (0, 3))

        def row_at(pointer, start, row, i):
            return vector_at(builder, pointer, builder.add(start, builder.mul(row, ir.Constant(INT, i))))

        rows = [builder.load(row_at(from_data, *arguments[1:3], i), align=4) for i in range(LANES)]
        # Swap the off-diagonal quarters of the block, then of each quarter, down to single numbers.
        for step in (8, 4, 2, 1):
            upper = [j if not j & step else LANES + j - step for j in range(LANES)]
            lower = [j + step if not j & step else LANES + j for j in range(LANES)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), m) for m in (upper, lower)]
            for i in range(LANES):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (builder.shuffle_vector(a, b, mask) for mask in masks)
        for i, row in enumerate(rows):
            builder.store(row, row_at(to_data, *arguments[4:6], i), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def next_ticket(typing, counters, i):
    """Return counters[i]++, so that no two threads get the same number."""
    signature = types.int64(counters, i)

    def generate(context, builder, signature, arguments):
        pointer = builder.gep(data_of(context, builder, signature.args[0], arguments[0]), [arguments[1]])
        return builder.atomic_rmw("add", pointer, ir.Constant(INT, 1), "monotonic")

    return signature, generate


@njit_fast
def transpose(source, source_at, source_row, target, target_at, target_row, rows, columns):
    """Transpose a matrix between flat arrays: 16x16 blocks in registers, the remaining numbers one by one."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            read, write = source_at + i * source_row + j, target_at + j * target_row + i
            if i + LANES <= rows and j + LANES <= columns:
                transpose_block(source, read, source_row, target, write, target_row)
            else:
                for row in range(min(LANES, rows - i)):
                    for column in range(min(LANES, columns - j)):
                        target[write + column * target_row + row] = source[read + row * source_row + column]


@njit_fast
def gelu(x):
    """Apply GELU (tanh form) in place: x * (1 + tanh(u)) / 2, tanh as Eigen's ratio of polynomials."""
    limit = np.float32(7.90531)  # tanh is 1 in float32 from here on
    for i in range(x.size):
        v = x[i]
        u = np.float32(0.7978845608) * (v + np.float32(0.044715) * v * v * v)
        u = min(max(u, -limit), limit)
        s = u * u
        p = np.float32(-2.76076847742355e-16) * s + np.float32(2.00018790482477e-13)
        p = p * s + np.float32(-8.60467152213735e-11)
        p = p * s + np.float32(5.12229709037114e-08)
        p = p * s + np.float32(1.48572235717979e-05)
        p = p * s + np.float32(6.37261928875436e-04)
        p = p * s + np.float32(4.89352455891786e-03)
        q = np.float32(1.19825839466702e-06) * s + np.float32(1.18534705686654e-04)
        q = q * s + np.float32(2.26843463243900e-03)
        q = q * s + np.float32(4.89352518554385e-03)
        tanh = u * p / q if u > -limit else np.float32(-1)
        x[i] = np.float32(0.5) * v * (np.float32(1) + tanh)


@njit_fast
def multiply_rows(width, matrix, first, last, packed, result):
    """Compute rows first to last of W @ packed + bias; packed: [in, tile], result: [last - first, tile], both flat."""
    values, columns, starts, bias = matrix
    for i in range(last - first):
        begin, end = np.int64(starts[first + i]), np.int64(starts[first + i + 1])
        sparse_row(width, values, columns, begin, end, bias[first + i], packed, result[i * len(width) * LANES :])


@njit_fast
def multiply_tiles(width, sizes, counters, scratch, x, y, matrix, inner):
    """Take tiles of tokens until none is left: pack, multiply (first by the inner layer, with GELU), unpack."""
    tokens, n_in, hidden, n_out = sizes
    tile = len(width) * LANES
    memory = scratch[next_ticket(counters, 1) * (n_in + hidden + LANES) * tile :]
    packed, middle, block = memory, memory[n_in * tile :], memory[(n_in + hidden) * tile :]
    while True:
        token = next_ticket(counters, 0) * tile
        if token >= tokens:
            return
        taken = min(tile, tokens - token)
        transpose(x, token * n_in, n_in, packed, 0, tile, taken, n_in)
        if hidden > 0:
            multiply_rows(width, inner, 0, hidden, packed, middle)
            gelu(middle[: hidden * tile])
        source = middle if hidden > 0 else packed
        for row in range(0, n_out, LANES):
            rows = min(LANES, n_out - row)
            multiply_rows(width, matrix, row, row + rows, source, block)
            transpose(block, 0, tile, y, token * n_out + row, n_out, rows, taken)


@njit(parallel=True, cache=True, fastmath=True)
def sum_often(x, times, threads):
    """Read x ``times`` times on each thread; the sums are returned, so that the compiler cannot drop the reads."""
    sums = np.zeros(threads, np.float32)
    for thread in prange(threads):
        for _ in range(times):
            total = np.float32(0)
            for i in range(x.size):
                total += x[i]
            sums[thread] += total
    return sums


# --- the threads ---


@njit_fast
def matrix_at(job, i, rows):
    """Return the arrays (values, columns, starts, bias) of a matrix from four addresses of a job."""
    starts = carray(job[i + 2], rows + 1, np.int32)
    size = starts[rows]
    return (
        carray(job[i], size, np.float32),
        carray(job[i + 1], size, np.int32),
        starts,
        carray(job[i + 3], rows, np.float32),
    )


def make_worker(vectors):
    """Return the function that each thread runs, for tiles of ``vectors``; its job is a list of addresses."""
    width = (0,) * vectors

    @cfunc(types.void(types.CPointer(types.voidptr)), cache=True)
    def worker(job):
        sizes = carray(job[0], 5, np.int64)
        tokens, n_in, hidden, n_out, scratch = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
        multiply_tiles(
            width,
            (tokens, n_in, hidden, n_out),
            carray(job[1], 2, np.int64),
            carray(job[2], scratch, np.float32),
            carray(job[3], tokens * n_in, np.float32),
            carray(job[4], tokens * n_out, np.float32),
            matrix_at(job, 5, n_out),
            matrix_at(job, 9, hidden),
        )

    return worker


@njit(parallel=True, cache=True)
def multiply_with_numba_threads(workers, width, sizes, counters, scratch, x, y, matrix, inner):
    """Run ``multiply_tiles`` on numba's threads, where torch's cannot be reached."""
    for _ in prange(workers):
        multiply_tiles(width, sizes, counters, scratch, x, y, matrix, inner)


@functools.cache
def worker(vectors: int):
    """Return the compiled worker for tiles of ``vectors`` (compiled on first use, then cached on disk)."""
    return make_worker(vectors)


def choose_vectors(tokens: int, features: int, threads: int) -> int:
    """Return the width of a tile in vectors: it has to fit the second-level cache, and threads should end together.

    The matrix is read once per tile, which costs as much as about 16 tokens: the wider the tiles, the fewer reads.
    """
    fitting = [v for v in VECTORS if 4 * features * v * LANES <= 0.7 * l2_bytes()] or VECTORS[:1]
    return min(reversed(fitting), key=lambda v: math.ceil(tokens / (v * LANES * threads)) * (v * LANES + 16))


@functools.cache
def nothing() -> tuple[torch.Tensor, ...]:
    """Return a matrix without rows, for the inner layer where there is none."""
    return torch.empty(0), torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.empty(0)


def multiply(x: torch.Tensor, matrix: tuple[torch.Tensor, ...], inner: tuple[torch.Tensor, ...] | None = None):
    """Return ``x @ W.T + bias``, or with an inner layer ``gelu(x @ V.T + c) @ W.T + bias``; GELU in its tanh form.

    x: [tokens, in] float32; matrix and inner: (values float32 [nnz], columns int32 [nnz], starts int32 [out + 1], bias
    float32 [out]) in CSR, column numbers below in. Returns [tokens, out]. Raises ``RuntimeError`` for tensors that are
    not on the CPU: the kernel reads their addresses.
    """
    devices = {tensor.device.type for tensor in (x, *matrix, *(inner or ()))}
    if devices != {"cpu"}:
        raise RuntimeError(
            f'the backend "numba" must have all tensors on the CPU (got {", ".join(sorted(devices))}): '
            "convert the model on the device on which it will run"
        )
    x, threads = x.contiguous(), torch.get_num_threads()
    hidden, n_out = (len(inner[3]) if inner else 0), len(matrix[3])
    tokens, n_in = x.shape
    y = x.new_empty(tokens, n_out)
    if not tokens:
        return y
    vectors = choose_vectors(tokens, n_in + hidden, threads)
    workers = min(threads, math.ceil(tokens / (vectors * LANES)))
    scratch = x.new_empty(workers * (n_in + hidden + LANES) * vectors * LANES)
    sizes, counters = np.array([tokens, n_in, hidden, n_out, len(scratch)]), np.zeros(2, np.int64)
    inner = inner or nothing()
    if torch_threads() is None:
        arrays = [t.numpy() for t in (scratch, x.view(-1), y.view(-1))]
        layers = [tuple(t.numpy() for t in layer) for layer in (matrix, inner)]
        numba.set_num_threads(min(workers, numba.config.NUMBA_NUM_THREADS))
        multiply_with_numba_threads(workers, (0,) * vectors, (tokens, n_in, hidden, n_out), counters, *arrays, *layers)
        torch.set_num_threads(threads)  # numba and torch may share OpenMP, and so this number
        return y
    run_workers(worker(vectors), sizes, counters, (scratch, x, y, *matrix, *inner), workers)
    return y


# --- the other engines ---


@functools.cache
def silence_torch_csr() -> None:
    """Suppress torch's one warning that its sparse matrices are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def torch_csr(x: torch.Tensor, matrix: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the same product by torch's own sparse matrices (cuSPARSE on a GPU)."""
    values, columns, starts, bias = matrix
    silence_torch_csr()
    weight = torch.sparse_csr_tensor(starts, columns, values, (len(bias), x.shape[-1]), check_invariants=False)
    return torch.addmm(bias[:, None], weight, x.t()).t().contiguous()
