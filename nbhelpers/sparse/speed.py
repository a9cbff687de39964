"""The engines compared on one matrix, and the limits of the machine."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from nbhelpers.measurement import compare_speed
from nbhelpers.sparse import kernels
from nbhelpers.sparse.engines import dense, int8_engines
from nbhelpers.sparse.formats import random_matrix, to_weight
from nbhelpers.sparse.threads import l2_bytes
from nbhelpers.system.progress import track

COMPARED_ENGINES = ("dense", "int8", "numba", "int8_blocks", "torch_csr", "scipy")
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


def compare_engines(
    shapes, sparsities=SPARSITIES, tokens=TOKENS, repeats: int = 9, engines=COMPARED_ENGINES
) -> pd.DataFrame:
    """Return milliseconds of each engine, its speed-up over the dense product, and its rate of useful work.

    shapes: pairs (in, out); engines: names, "dense" first. Columns: in, out, tokens, sparsity, name, median_ms, low_ms,
    high_ms, speedup, speedup_low, speedup_high; gflops: 10^9 operations per second on weights that are not zero (not
    counting those on zeros); intensity: such operations per byte that has to be moved at least once.
    """
    tables = []
    for (n_in, n_out), n, sparsity in track(list(itertools.product(shapes, tokens, sparsities)), "comparing engines"):
        matrix = random_matrix(n_out, n_in, 1 - sparsity)
        functions, weights = sparse_engines(matrix, torch.randn(n, n_in)), len(matrix[0])
        table = compare_speed({engine: functions[engine] for engine in engines}, repeats)
        table.attrs.clear()
        stored = np.where(table["name"] == "dense", 4 * n_in * n_out, 8 * weights)
        table["gflops"] = 2 * weights * n / table["median_ms"] / 1e6
        table["intensity"] = 2 * weights * n / (stored + 4 * n * (n_in + n_out))
        case = {"in": n_in, "out": n_out, "tokens": n, "sparsity": sparsity}
        tables.append(pd.concat([pd.DataFrame([case] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def break_even(table: pd.DataFrame, engine: str = "numba") -> pd.DataFrame:
    """Return the sparsity at which an engine becomes as fast as the dense product, per shape and number of tokens.

    table: from ``compare_engines``. The speed-up is interpolated linearly between measured sparsities. Columns: in,
    out, tokens, sparsity (NaN where the engine is slower at all of them).
    """
    rows = []
    for case, part in table[table["name"] == engine].groupby(["in", "out", "tokens"]):
        part = part.sort_values("sparsity")
        x, y = part["sparsity"].to_numpy(), part["speedup"].to_numpy()
        faster = np.flatnonzero(y >= 1)
        even = np.nan
        if len(faster):
            i = faster[0]
            even = x[0] if i == 0 else np.interp(1, y[i - 1 : i + 1], x[i - 1 : i + 1])
        rows.append((*case, even))
    return pd.DataFrame(rows, columns=["in", "out", "tokens", "sparsity"])


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

    dense_gflops: 10^9 operations per second of a large float32 product; memory_gbs: 10^9 bytes per second of a copy too
    large for any cache (bytes read and written); cache_gbs: the same of reads from the second-level cache, all threads
    together.
    """
    x, weight = torch.randn(2048, 1024), torch.randn(2048, 1024)
    product = best_seconds(lambda: x @ weight.t())
    large = torch.zeros(64 * 2**20)
    target = torch.zeros_like(large)
    copy = best_seconds(lambda: target.copy_(large), 7)
    limits = {"dense_gflops": 2 * 2048 * 2048 * 1024 / product / 1e9, "memory_gbs": 2 * 4 * large.numel() / copy / 1e9}
    return limits | {"cache_gbs": cache_bandwidth() / 1e9}


def cache_bandwidth(times: int = 200) -> float:
    """Return the bytes per second that all of torch's threads together read from their second-level caches."""
    x, threads = np.ones(l2_bytes() // 8, np.float32), torch.get_num_threads()
    kernels.numba.set_num_threads(min(threads, kernels.numba.config.NUMBA_NUM_THREADS))
    seconds = best_seconds(lambda: kernels.sum_often(x, times, threads))
    torch.set_num_threads(threads)  # numba and torch may share OpenMP, and so this number
    return threads * times * x.nbytes / seconds
