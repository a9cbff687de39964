"""Latency, peak memory, bytes in memory and on disk.

Functions that are compared run in turns, in shuffled order, in one process, so that a machine that slows down slows
all of them, and ratios are taken round by round. A row gives the median and the quartiles.
"""

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nbhelpers.models import device_of
from nbhelpers.system.progress import track

QUARTILES = (50, 25, 75)


# --- time ---


def compare_latency(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> pd.DataFrame:
    """Return milliseconds of functions without arguments, run in turns under ``torch.inference_mode``.

    A round runs every function once, in a new random order. Columns: name, median_ms, low_ms, high_ms (quartiles). All
    times are in ``table.attrs["times"]``: name -> list of ``repeats`` milliseconds, the i-th of each name from round i.
    Raises ``ValueError`` without functions or repeats.
    """
    if repeats < 1 or not functions:
        raise ValueError(f"`functions` and `repeats` must be at least 1 (got {len(functions)} and {repeats})")
    times, shuffled, rng = {name: [] for name in functions}, list(functions.items()), random.Random(0)
    with torch.inference_mode():
        for function in functions.values():
            for _ in range(warmup):
                function()
        for _ in track(range(repeats), "timing in turns"):
            # In a fixed order, each would always find the caches and clock rate that the same other one left.
            rng.shuffle(shuffled)
            for name, function in shuffled:
                synchronize()
                started = time.perf_counter()
                function()
                synchronize()
                times[name].append(1e3 * (time.perf_counter() - started))
    rows = [(name, *np.percentile(t, QUARTILES)) for name, t in times.items()]
    table = pd.DataFrame(rows, columns=["name", "median_ms", "low_ms", "high_ms"])
    table.attrs["times"] = times
    return table


def speedups(times: dict[str, list[float]]) -> pd.DataFrame:
    """Return how many times as fast as the first one each is: median and quartiles of the rounds' ratios.

    times: name -> milliseconds, as in ``compare_latency(...).attrs["times"]``. Columns: name, speedup, speedup_low,
    speedup_high; above 1 is faster.
    """
    reference = np.array(next(iter(times.values())))
    rows = [(name, *np.percentile(reference / np.array(t), QUARTILES)) for name, t in times.items()]
    return pd.DataFrame(rows, columns=["name", "speedup", "speedup_low", "speedup_high"])


def compare_speed(functions: dict[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Return the columns of ``compare_latency``, then those of ``speedups`` over the first function."""
    latency = compare_latency(functions, repeats)
    times = latency.attrs["times"]
    table = pd.concat([latency, speedups(times).drop(columns="name")], axis=1)
    table.attrs["times"] = times
    return table


def by_model(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of ``compare_speed`` with the column names of tables of models."""
    names = {"name": "model", "median_ms": "latency_ms", "low_ms": "latency_low_ms", "high_ms": "latency_high_ms"}
    return table.rename(columns=names)


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# --- memory ---


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes of tensors on a device that a call holds at one time, beyond those allocated before it.

    On a CPU this sums the profiler's record of every allocation, so it is exact and the same each time; it does not
    include memory that libraries allocate themselves (a BLAS's packing buffers). On a GPU it is torch's peak counter.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            function()
        return torch.cuda.max_memory_allocated(device) - before
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


def memory_of_tree(pid: int) -> int:
    """Return the bytes in memory of a process and of all that it has started; 0 where it has ended."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # this one has ended meanwhile
                total += member.memory_info().rss
    return total


class PeakMemory:
    """Record the memory of processes while its block runs: ``before`` it and at most (``peak``), in bytes.

    measure: a function, such as ``Kernels.memory``, called every ``interval`` seconds. Unlike ``peak_memory`` it counts
    all memory of a process, also that of libraries, and it misses peaks shorter than the interval.
    """

    def __init__(self, measure: Callable[[], int], interval: float):
        self.measure, self.interval, self.ended = measure, interval, threading.Event()

    def watch(self) -> None:
        while not self.ended.wait(self.interval):
            self.peak = max(self.peak, self.measure())

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self.measure()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.watcher.join()
        self.peak = max(self.peak, self.measure())


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what libraries write to the process's stderr, such as the start and stop messages of torch's profiler."""
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
    """Return the bytes of a model's parameters and buffers in memory; a tensor that is used twice counts once."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]
    # oneDNN's packed weights have no address.
    tensors = {id(tensor) if tensor.is_mkldnn else tensor.data_ptr(): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(folder: str | Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# --- models ---


def measure_inference_efficiency(
    models: dict[str, nn.Module], batches: list[dict[str, torch.Tensor]], repeats: int
) -> pd.DataFrame:
    """Return latency and peak memory of models on the same batches; the others are compared with the first model.

    batches: dicts of input_ids and attention_mask [reviews, length]; a round runs all of them. Columns: model,
    latency_ms (per batch: median), latency_low_ms, latency_high_ms (quartiles), speedup, speedup_low, speedup_high (of
    the rounds' ratios), peak_memory_bytes (parameters and buffers, and the most that the largest batch adds to them).
    """
    if not batches:
        raise ValueError("`batches` must have at least one batch (got none)")
    for model in models.values():
        model.eval()

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(**batch)

    table = compare_speed({name: partial(run, model) for name, model in models.items()}, repeats)
    table[["median_ms", "low_ms", "high_ms"]] /= len(batches)
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    table["peak_memory_bytes"] = [
        tensor_bytes(model) + peak_memory(partial(model, **largest), device_of(model)) for model in models.values()
    ]
    return by_model(table)
