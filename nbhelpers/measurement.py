"""Latency, peak memory, bytes in memory and on disk.

What is compared takes turns (round-robin) in one process, so that a machine that slows down slows all of it, and
ratios are taken round by round. A row gives the median and the quartiles.

    python -m nbhelpers.measurement sparse        every engine on the matrices of GPT-2 and of the mini model
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

QUARTILES = (50, 25, 75)


# --- time ---


def compare_latency(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> pd.DataFrame:
    """Milliseconds of functions without arguments that take turns, under ``torch.inference_mode``.

    Columns: name, median_ms, low_ms, high_ms (quartiles). All times are in ``table.attrs["times"]``: name -> list of
    ``repeats`` milliseconds, the i-th of each name from the same round. Raises ``ValueError`` without repeats.
    """
    if repeats < 1 or not functions:
        raise ValueError(f"{len(functions)} functions and {repeats} repeats: both have to be at least 1")
    times = {name: [] for name in functions}
    with torch.inference_mode():
        for function in functions.values():
            for _ in range(warmup):
                function()
        for _ in range(repeats):
            for name, function in functions.items():
                synchronize()
                started = time.perf_counter()
                function()
                synchronize()
                times[name].append(1e3 * (time.perf_counter() - started))
    rows = [(name, *np.percentile(t, QUARTILES)) for name, t in times.items()]
    table = pd.DataFrame(rows, columns=["name", "median_ms", "low_ms", "high_ms"])
    table.attrs["times"] = times
    return table


def speedups(times: dict[str, list[float]], baseline: str | None = None) -> pd.DataFrame:
    """How many times faster than the baseline (the first name) each is: median and quartiles of the rounds' ratios.

    times: name -> milliseconds, as in ``compare_latency(...).attrs["times"]``. Columns: name, speedup, speedup_low,
    speedup_high; above 1 is faster.
    """
    reference = np.array(times[baseline or next(iter(times))])
    rows = [(name, *np.percentile(reference / np.array(t), QUARTILES)) for name, t in times.items()]
    return pd.DataFrame(rows, columns=["name", "speedup", "speedup_low", "speedup_high"])


def synchronize() -> None:
    """Wait for a GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# --- memory ---


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes of tensors that a call has allocated at one time, beyond those that were there before it.

    On a CPU this adds up the profiler's record of every allocation, so it is exact and the same each time; memory
    that libraries take elsewhere (a BLAS's packing buffers) is not in it. On a GPU it is torch's own peak counter.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            function()
        return torch.cuda.max_memory_allocated() - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with torch.inference_mode():
        with silent_stderr():
            profiler.start()
        try:
            function()
        finally:
            with silent_stderr():
                profiler.stop()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(changes), default=0))


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what libraries write to the process's stderr; torch's profiler notes there that it starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; a tensor that is used twice counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(folder: str | Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# --- models ---


def measure_inference_efficiency(
    models: dict[str, nn.Module], batches: list[dict[str, torch.Tensor]], repeats: int
) -> pd.DataFrame:
    """Latency and peak memory of models on the same batches; the first model is what the others are compared with.

    batches: dicts of input_ids and attention_mask [reviews, length]; a round runs all of them. Columns: model,
    latency_ms (a batch: median), latency_low_ms, latency_high_ms (quartiles), speedup, speedup_low, speedup_high (of
    the rounds' ratios), peak_memory_bytes (parameters and buffers, and the most that the largest batch adds to them).
    """
    if not batches:
        raise ValueError("there are no batches to measure with")
    for model in models.values():
        model.eval()

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(**batch)

    latency = compare_latency({name: partial(run, model) for name, model in models.items()}, repeats)
    times = latency.attrs["times"]
    table = pd.concat([latency, speedups(times).drop(columns="name")], axis=1)
    table[["median_ms", "low_ms", "high_ms"]] /= len(batches)
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    table["peak_memory_bytes"] = [
        tensor_bytes(model) + peak_memory(partial(model, **largest)) for model in models.values()
    ]
    names = {"name": "model", "median_ms": "latency_ms", "low_ms": "latency_low_ms", "high_ms": "latency_high_ms"}
    table = table.rename(columns=names)
    table.attrs["times"] = times
    return table


# --- the engines, matrix by matrix ---

SHAPES = {  # in, out: the four matrices of a block
    "gpt2": ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    "mini": ((192, 576), (192, 192), (192, 768), (768, 192)),
}
SPARSITIES = (0.5, 0.6, 0.8, 0.9, 0.95)
TOKENS = (128, 2048)


def sparse_engines(n_in: int, n_out: int, sparsity: float, tokens: int) -> dict[str, Callable[[], object]]:
    """The same random product [tokens, in] x [in, out] by each engine, [tokens, features] tensors in and out."""
    from scipy.sparse import csr_array

    from nbhelpers.sparse import kernels
    from nbhelpers.sparse.layers import random_matrix, to_weight

    matrix, x = random_matrix(n_out, n_in, 1 - sparsity), torch.randn(tokens, n_in)
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


def compare_engines(shapes, sparsities=SPARSITIES, tokens=TOKENS, repeats: int = 9) -> pd.DataFrame:
    """Milliseconds of each engine and its speed-up over the dense product.

    shapes: pairs (in, out). Columns: in, out, tokens, sparsity, name, median_ms, low_ms, high_ms, speedup,
    speedup_low, speedup_high.
    """
    tables = []
    for n_in, n_out in shapes:
        for n in tokens:
            for sparsity in sparsities:
                latency = compare_latency(sparse_engines(n_in, n_out, sparsity, n), repeats)
                ratios = speedups(latency.attrs.pop("times")).drop(columns="name")
                table = pd.concat([latency, ratios], axis=1)
                where = {"in": n_in, "out": n_out, "tokens": n, "sparsity": sparsity}
                tables.append(pd.concat([pd.DataFrame([where] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.measurement", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["sparse"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; speedup: against dense, above 1 is faster")
    tables = []
    for name in options.models:
        for shape in SHAPES[name]:
            table = compare_engines([shape], options.sparsities, options.tokens, options.repeats)
            print(
                f"\n{name} {shape[0]} x {shape[1]}\n{table.drop(columns=['in', 'out']).round(3).to_string(index=False)}"
            )
            tables.append(table)
    if options.csv:
        pd.concat(tables).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
