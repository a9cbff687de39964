"""How fast each kind of a run's work is: with one thread, with all, in several processes, and beside other work.

    python -m nbhelpers.tools.chain --profile quick --csv reports/benchmark/chain.csv

Every way of computing takes its turn in each round. A busy neighbour is a process that keeps one core occupied.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from nbhelpers.models import blocks, create_model, prunable_weights
from nbhelpers.pipeline import grid, kernel
from nbhelpers.profiles import get_profile
from nbhelpers.study.work import Amounts, Rates, measure_rates
from nbhelpers.system.machine import cores
from nbhelpers.training import mixed_precision
from nbhelpers.training.timing import timed, with_threads
from nbhelpers.workspace import Run, open_run

SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Keep one core busy within the block, or not."""
    process = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def rates_of(run: Run, threads: int) -> Rates:
    """Return the rates of this process with a number of threads."""
    with with_threads(threads):
        return measure_rates(run, seconds=1.0)


def total_rates(run: Run, processes: int, threads: int) -> Rates:
    """Return the tokens a second of so many processes together, all measuring at the same time."""
    found = list(grid.in_parallel(rates_of, [(run, threads)] * processes, cores(), run.profile.precision))
    return Rates(sum(rates.trained for rates in found), sum(rates.judged for rates in found))


def compare_ways(run: Run, repeats: int) -> pd.DataFrame:
    """Return tokens a second by kind of work, processes, threads and neighbour: median and quartiles of the rounds."""
    many = cores()
    ways = [(p, t, busy) for busy in (False, True) for p, t in dict.fromkeys([(1, 1), (1, many), (many, 1)])]
    found = {way: [] for way in ways}
    for _ in range(repeats):
        for processes, threads, busy in ways:
            with neighbour(busy):
                found[processes, threads, busy].append(total_rates(run, processes, threads))
    rows = []
    for kind in ("trained", "judged"):
        for (processes, threads, busy), rounds in found.items():
            low, median, high = np.percentile([getattr(rates, kind) for rates in rounds], (25, 50, 75))
            row = {"work": f"tokens {kind} a second", "processes": processes, "threads": threads}
            rows.append(row | {"neighbour": "busy" if busy else "quiet", "median": median, "low": low, "high": high})
    return pd.DataFrame(rows)


def product_rate(rows: int, width: int, precision: str) -> float:
    """Return the operations a second of this thread in a product of the model's own shape: [rows, d] x [d, 4 d]."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(rows, width, dtype=kind), torch.randn(width, 4 * width, dtype=kind)
    return 2 * rows * width * 4 * width / timed(0.5, lambda: x @ weight)


def token_operations(run: Run) -> float:
    """Return the operations of a forward pass per token: the products of the blocks, and those of attention."""
    model = create_model(run.profile, run.seed)
    weights = sum(weight.numel() for weight in prunable_weights(model).values())
    return 2 * weights + 4 * len(blocks(model)) * model.config.hidden_size * Amounts(run).review


def shares_of_the_limit(run: Run) -> pd.DataFrame:
    """Return which share of one thread's dense rate training and judging reach; a training step is three passes."""
    rates, operations = rates_of(run, 1), token_operations(run)
    width = create_model(run.profile, run.seed).config.hidden_size
    with with_threads(1):
        limit = product_rate(2048, width, mixed_precision(run.profile.precision))
    passes = {"trained": 3, "judged": 1}
    values = {f"share of the dense rate, {k}": n * operations * getattr(rates, k) / limit for k, n in passes.items()}
    return pd.DataFrame({"work": values.keys(), "processes": 1, "threads": 1, "median": values.values()})


def draw() -> None:
    """Draw a figure and save it as PNG and SVG."""
    figure, axes = plt.subplots()
    axes.plot(range(50))
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("png", "svg"):
            figure.savefig(Path(folder) / f"figure.{kind}", dpi=200)
    plt.close(figure)


def fixed_costs(repeats: int) -> pd.DataFrame:
    """Return the seconds of starting a notebook's kernel with its libraries, and of drawing a figure."""
    imports = "; ".join(f"import {name}" for name in kernel.LIBRARIES)
    costs = {
        "seconds to start a kernel": partial(subprocess.run, [sys.executable, "-c", imports], check=True),
        "seconds to draw a figure": draw,
    }
    rows = []
    for name, step in costs.items():
        low, median, high = np.percentile([timed(0.0, step) for _ in range(repeats)], (25, 50, 75))
        rows.append({"work": name, "processes": 1, "median": median, "low": low, "high": high})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.tools.chain", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    os.environ["NBHELPERS_BATCH"] = "1"  # no progress bars: drawing them takes time
    run = open_run(get_profile(options.profile))
    tables = [compare_ways(run, options.repeats), shares_of_the_limit(run), fixed_costs(min(3, options.repeats))]
    table = pd.concat(tables, ignore_index=True).assign(precision=mixed_precision(run.profile.precision))
    print(table.round(3).to_string(index=False))
    if options.csv:
        table.to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
