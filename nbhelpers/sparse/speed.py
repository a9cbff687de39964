"""Engines against each other on one matrix, and the limits of the machine that they run on."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from nbhelpers.measurement import compare_speed
from nbhelpers.sparse import kernels
from nbhelpers.sparse.formats import random_matrix, to_weight
from nbhelpers.system.progress import track

COMPARED_ENGINES = ("dense", "numba", "torch_csr", "scipy")
SPARSITIES = (0.5, 0.6, 0.8, 0.9, 0.95)
TOKENS = (128, 2048)


# --- one matrix ---


def sparse_engines(matrix: tuple[torch.Tensor, ...], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same product by each engine: x [tokens, in] times a matrix of ``random_matrix`` gives [tokens, out]."""
    n_in, n_out = x.shape[1], len(matrix[3])
    weight, bias = to_weight(matrix, n_in), matrix[3]
    values, columns, starts, _ = (tensor.numpy() for tensor in matrix)
    scipy_matrix = csr_array((values, columns, starts), shape=(n_out, n_in))
    engines = {
        "dense": lambda: kernels.dense(x, weight, bias),
        "numba": lambda: kernels.multiply(x, matrix),
        "torch_csr": lambda: kernels.torch_csr(x, matrix),
        "scipy": lambda: np.ascontiguousarray((scipy_matrix @ x.numpy().T).T) + bias.numpy(),
    }
    return {name: run for name, run in engines.items() if name != "numba" or kernels.numba is not None}


def compare_engines(
    shapes, sparsities=SPARSITIES, tokens=TOKENS, repeats: int = 9, engines=COMPARED_ENGINES
) -> pd.DataFrame:
    """Milliseconds of each engine, its speed-up over the dense product, and its rate of useful work.

    shapes: pairs (in, out); engines: names, "dense" first. Columns: in, out, tokens, sparsity, name, median_ms, low_ms,
    high_ms, speedup, speedup_low, speedup_high; gflops: 10^9 operations a second on weights that are not zero, whatever
    the engine does with the others; intensity: such operations for a byte that has to be moved at least once.
    """
    tables = []
    for (n_in, n_out), n, sparsity in track(list(itertools.product(shapes, tokens, sparsities)), "comparing engines"):
        matrix = random_matrix(n_out, n_in, 1 - sparsity)
        functions, weights = sparse_engines(matrix, torch.randn(n, n_in)), len(matrix[0])
        table = compare_speed({e: functions[e] for e in engines if e in functions}, repeats)
        table.attrs.clear()
        stored = np.where(table["name"] == "dense", 4 * n_in * n_out, 8 * weights)
        table["gflops"] = 2 * weights * n / table["median_ms"] / 1e6
        table["intensity"] = 2 * weights * n / (stored + 4 * n * (n_in + n_out))
        where = {"in": n_in, "out": n_out, "tokens": n, "sparsity": sparsity}
        tables.append(pd.concat([pd.DataFrame([where] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def break_even(table: pd.DataFrame, engine: str = "numba") -> pd.DataFrame:
    """From which sparsity on an engine is as fast as the dense product: a row for each shape and number of tokens.

    table: of ``compare_engines``. Between two measured sparsities the speed-up is taken to be a straight line. Columns:
    in, out, tokens, sparsity (NaN where the engine stays behind at all that were measured).
    """
    rows = []
    for where, part in table[table["name"] == engine].groupby(["in", "out", "tokens"]):
        part = part.sort_values("sparsity")
        x, y = part["sparsity"].to_numpy(), part["speedup"].to_numpy()
        after = np.flatnonzero(y >= 1)
        found = np.nan
        if len(after):
            i = after[0]
            found = x[0] if i == 0 else np.interp(1, y[i - 1 : i + 1], x[i - 1 : i + 1])
        rows.append((*where, found))
    return pd.DataFrame(rows, columns=["in", "out", "tokens", "sparsity"])


# --- the machine ---


def best_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """The least time of a call, after one to warm up: a limit is what the machine can do, not what it mostly does."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def machine_limits() -> dict[str, float]:
    """What this machine can do with torch's threads, measured.

    dense_gflops: 10^9 operations a second of a large float32 product; memory_gbs: 10^9 bytes a second of a copy that
    fits no cache (bytes read and bytes written); cache_gbs: of vectors read from the second-level cache, all threads
    together (NaN without numba).
    """
    x, weight = torch.randn(2048, 1024), torch.randn(2048, 1024)
    product = best_seconds(lambda: x @ weight.t())
    large = torch.zeros(64 * 2**20)
    target = torch.zeros_like(large)
    copy = best_seconds(lambda: target.copy_(large), 7)
    limits = {"dense_gflops": 2 * 2048 * 2048 * 1024 / product / 1e9, "memory_gbs": 2 * 4 * large.numel() / copy / 1e9}
    return limits | {"cache_gbs": cache_bandwidth() / 1e9 if kernels.numba is not None else float("nan")}


def cache_bandwidth(times: int = 200) -> float:
    """Bytes a second that all of torch's threads together read from their second-level caches, at best."""
    x, threads = np.ones(kernels.l2_bytes() // 8, np.float32), torch.get_num_threads()
    kernels.numba.set_num_threads(min(threads, kernels.numba.config.NUMBA_NUM_THREADS))
    seconds = best_seconds(lambda: kernels.sum_often(x, times, threads))
    torch.set_num_threads(threads)  # numba and torch may share OpenMP, and then this number too
    return threads * times * x.nbytes / seconds
