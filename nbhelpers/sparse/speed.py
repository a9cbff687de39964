"""The engines compared on one matrix, and the limits of the machine."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from nbhelpers.measurement import compare_speed
from nbhelpers.sparse import kernels
from nbhelpers.sparse.engines import dense, int8_engines
from nbhelpers.sparse.formats import BLOCK, random_matrix, to_mask, to_weight
from nbhelpers.sparse.threads import l2_bytes
from nbhelpers.system.progress import track

IN_BLOCKS = f"int8_blocks, 1x{BLOCK}"  # the engine on a matrix that is pruned in its blocks
COMPARED_ENGINES = ("dense", "int8", "numba", "int8_blocks", IN_BLOCKS, "torch_csr", "scipy")
SPARSITIES = (0.5, 0.6, 0.8, 0.9, 0.95)
TOKENS = (128, 2048)


# --- one matrix ---


def sparse_engines(matrix: tuple[torch.Tensor, ...], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the same product by each engine: x [tokens, in] times a matrix of ``random_matrix``, [tokens, out]."""
    n_in, n_out = x.shape[1], len(matrix[3])
    weight, bias = to_weight(matrix, n_in), matrix[3]
    values, columns, starts, _ = (tensor.numpy() for tensor in matrix)
    scipy_matrix = csr_array((values, columns, starts), shape=(n_out, n_in))
    return {
        "dense": lambda: dense(x, (weight, bias)),
        "numba": lambda: kernels.multiply(x, matrix),
        "torch_csr": lambda: kernels.torch_csr(x, matrix),
        "scipy": lambda: np.ascontiguousarray((scipy_matrix @ x.numpy().T).T) + bias.numpy(),
    } | int8_engines(x, weight, bias)


def engine_in_blocks(matrix: tuple[torch.Tensor, ...], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the product of "int8_blocks" with a matrix that is pruned in blocks, where this engine runs."""
    engines = int8_engines(x, to_weight(matrix, x.shape[1]), matrix[3])
    return {IN_BLOCKS: engines["int8_blocks"]} if "int8_blocks" in engines else {}


def stored_bytes(engine: str, matrix: tuple[torch.Tensor, ...], n_in: int) -> int:
    """Return the bytes of the weights and indices that an engine reads."""
    mask = to_mask(matrix, n_in)
    if engine.startswith("int8_blocks"):
        return 2 * BLOCK * int(F.pad(mask, (0, -n_in % BLOCK)).view(-1, BLOCK).any(1).sum())
    return {"dense": 4 * mask.numel(), "int8": mask.numel()}.get(engine, 8 * len(matrix[0]))


def compare_engines(
    shapes, sparsities=SPARSITIES, tokens=TOKENS, repeats: int = 9, engines=COMPARED_ENGINES
) -> pd.DataFrame:
    """Return milliseconds of each engine, its speed-up over the dense product, and its rate of useful work.

    shapes: pairs (in, out); engines: names, "dense" first; those that this machine does not have are left out. All
    multiply by one matrix of single weights, except ``IN_BLOCKS``. Columns: in, out, tokens, sparsity, name, median_ms,
    low_ms, high_ms, speedup, speedup_low, speedup_high; gflops: 10^9 operations per second on weights that are not zero
    (not counting those on zeros); intensity: such operations per byte that has to be moved at least once.
    """
    tables = []
    for (n_in, n_out), n, sparsity in track(list(itertools.product(shapes, tokens, sparsities)), "comparing engines"):
        matrix, in_blocks = (random_matrix(n_out, n_in, 1 - sparsity, block=block) for block in (1, BLOCK))
        x = torch.randn(n, n_in)
        functions = sparse_engines(matrix, x) | engine_in_blocks(in_blocks, x)
        table = compare_speed({engine: functions[engine] for engine in engines if engine in functions}, repeats)
        table.attrs.clear()
        matrices = {name: in_blocks if name == IN_BLOCKS else matrix for name in table["name"]}
        weights = np.array([len(own[0]) for own in matrices.values()])
        stored = np.array([stored_bytes(name, own, n_in) for name, own in matrices.items()])
        table["gflops"] = 2 * weights * n / table["median_ms"] / 1e6
        table["intensity"] = 2 * weights * n / (stored + 4 * n * (n_in + n_out))
        case = {"in": n_in, "out": n_out, "tokens": n, "sparsity": sparsity}
        tables.append(pd.concat([pd.DataFrame([case] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def break_even(table: pd.DataFrame) -> pd.DataFrame:
    """Return the sparsity at which each sparse engine becomes as fast as a dense product, per shape and tokens.

    table: from ``compare_engines``. The ratio of the speeds is interpolated linearly between measured sparsities.
    Columns: in, out, tokens, engine, against ("dense" or "int8"), sparsity (NaN where the engine is slower at all).
    """
    rows = []
    for case, part in table.groupby(["in", "out", "tokens"]):
        speeds = part.pivot(index="sparsity", columns="name", values="speedup").sort_index()
        rivals = [name for name in ("dense", "int8") if name in speeds]
        engines = [name for name in ("numba", "int8_blocks", IN_BLOCKS) if name in speeds]
        for engine, against in itertools.product(engines, rivals):
            x, y = speeds.index.to_numpy(), (speeds[engine] / speeds[against]).to_numpy()
            faster = np.flatnonzero(y >= 1)
            even = np.nan
            if len(faster):
                i = faster[0]
                even = x[0] if i == 0 else np.interp(1, y[i - 1 : i + 1], x[i - 1 : i + 1])
            rows.append((*case, engine, against, even))
    return pd.DataFrame(rows, columns=["in", "out", "tokens", "engine", "against", "sparsity"])


# --- the machine ---


def best_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Return the shortest time of a call, after a first one that is not counted: a limit is the best case."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def machine_limits() -> dict[str, float]:
    """Return the measured limits of this machine with torch's threads.

    dense_gflops: 10^9 operations per second of a large float32 product; int8_gops: the same of int8, where PyTorch has
    that here; memory_gbs: 10^9 bytes per second of a copy too large for any cache (bytes read and written); cache_gbs:
    the same of reads from the second-level cache, all threads together.
    """
    x, weight = torch.randn(2048, 1024), torch.randn(2048, 1024)
    product = best_seconds(lambda: x @ weight.t())
    large = torch.zeros(64 * 2**20)
    target = torch.zeros_like(large)
    copy = best_seconds(lambda: target.copy_(large), 7)
    operations = 2 * 2048 * 2048 * 1024 / 1e9
    limits = {"dense_gflops": operations / product, "memory_gbs": 2 * 4 * large.numel() / copy / 1e9}
    engine = int8_engines(x, weight, torch.zeros(2048)).get("int8")
    if engine:
        limits["int8_gops"] = operations / best_seconds(engine)
    return limits | {"cache_gbs": cache_bandwidth() / 1e9}


def cache_bandwidth(times: int = 200) -> float:
    """Return the bytes per second that all of torch's threads together read from their second-level caches."""
    x, threads = np.ones(l2_bytes() // 8, np.float32), torch.get_num_threads()
    kernels.numba.set_num_threads(min(threads, kernels.numba.config.NUMBA_NUM_THREADS))
    seconds = best_seconds(lambda: kernels.sum_often(x, times, threads))
    torch.set_num_threads(threads)  # numba and torch may share OpenMP, and so this number
    return threads * times * x.nbytes / seconds
