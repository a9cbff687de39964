"""The cells of a run (``study.cells``), several at a time, in processes of one thread each, or one per command.

One thread each, since models this small gain little from a second one, and lose most of their speed where it has to
wait for a core that something else is using.

    python -m nbhelpers.pipeline.grid --profile P --seed N --jobs 2      all cells, two at a time, on this machine
    python -m nbhelpers.pipeline.grid --profile P --seed N --list        one command per cell, for a cluster's queue
    python -m nbhelpers.pipeline.grid --profile P --seed N --cell NAME   one of them

``./run_all.sh`` computes the cells of the notebooks that it is about to run, in as many processes as there are cores.
"""

import argparse
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import psutil
import torch
import transformers
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from nbhelpers.models import ModelError, check_model
from nbhelpers.profiles import ProfileError, get_profile, overrides_of
from nbhelpers.reading import DataError
from nbhelpers.study.cells import STAGES, Cell, phases, run_cell
from nbhelpers.study.inputs import reviews_of
from nbhelpers.study.work import Rates, measure_rates
from nbhelpers.system.machine import cores
from nbhelpers.system.progress import progress
from nbhelpers.training import distributed, mixed_precision
from nbhelpers.training.distributed import ProcessError
from nbhelpers.workspace import Run, WorkspaceError, open_run

MEMORY = 3 * 2**30  # bytes that a process of the mini model may need
# What ends a command with its message alone: each says what was wrong and what would be right.
CLEAR_ERRORS = (ProfileError, DataError, ModelError, WorkspaceError, OSError, FloatingPointError, MemoryError)


class GridError(RuntimeError):
    """A cell that failed, or a process that died; the message names the cell."""


# --- many at once ---


def keep_quiet() -> None:
    """Turn off progress bars and warnings: several processes share the terminal, or a log keeps it all."""
    os.environ["NBHELPERS_BATCH"] = "1"
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def end_with_parent() -> None:
    """End this process within a second after the one that started it has ended, however that happened."""
    parent = os.getppid()
    while os.getppid() == parent:
        threading.Event().wait(1)
    os._exit(1)


def start_worker(precision: str) -> None:
    """Prepare a worker: one thread, no output, and no life beyond the process that started it.

    The precision is measured once for all: beside each other, workers might disagree. A terminal sends Ctrl-C to all
    processes; ending the workers is left to the one that started them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["NBHELPERS_PRECISION"] = precision
    torch.set_num_threads(1)
    keep_quiet()
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_timed(run: Run, name: str) -> tuple[str, float]:
    """Compute one cell; returns its name and seconds. Raises ``GridError`` that names the cell where it fails."""
    started = time.time()
    try:
        run_cell(run, name)
    except Exception as error:  # of whatever kind: what failed is only known here
        raise GridError(f"cell {name}: {type(error).__name__}: {error}") from error
    return name, time.time() - started


def in_parallel(function, arguments: list[tuple], jobs: int, precision: str):
    """Yield the results of ``function(*a)`` for each of ``arguments`` as they end, in ``jobs`` processes.

    A process has one thread. Ctrl-C ends all of them. Raises ``GridError`` where a process died.
    """
    options = {"initializer": start_worker, "initargs": (mixed_precision(precision),)}
    with parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1, **options):
        try:
            yield from Parallel(return_as="generator_unordered")(delayed(function)(*a) for a in arguments)
        except TerminatedWorkerError as error:
            raise GridError("a process of the grid died; out of memory? Fewer jobs at once need less") from error


def automatic_jobs() -> int:
    """Return how many processes compute at a time: one per core, as far as the memory reaches, and one for a GPU."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(cores(), psutil.virtual_memory().available // MEMORY))


def measure_speed(run: Run, jobs: int) -> Rates:
    """Return the rates of each of so many processes while all of them compute."""
    found = list(in_parallel(measure_rates, [(run,)] * jobs, jobs, run.profile.precision))
    return Rates(*(sum(getattr(rates, kind) for rates in found) / jobs for kind in ("trained", "judged")))


def seconds_of(phase: list[Cell], rates: Rates, jobs: int) -> float:
    """Return how long so many processes take over the cells of a phase."""
    seconds = [cell.work.seconds(rates) for cell in phase]
    return max(sum(seconds) / jobs, *seconds)


def run_grid(run: Run, jobs: int, notebooks: set[str] | None = None, rates: Rates | None = None) -> Iterator[str]:
    """Compute the cells of these notebooks (of all, by default), ``jobs`` at a time; yield a line for each that ends.

    What is there already is found, so an interrupted grid goes on where it stopped. The first failure is raised as
    ``GridError``; what was computed until then is kept. A bar counts what the cells take at some rates.
    """
    started, every, rates = time.time(), phases(run, notebooks), rates or Rates(1.0, 3.0)
    work = {cell.name: cell.work.seconds(rates) for phase in every for cell in phase}
    with progress(sum(work.values()), f"{len(work)} computations, {jobs} at a time") as bar:
        for phase in every:
            cells = [(run, cell.name) for cell in phase]
            for name, seconds in in_parallel(run_timed, cells, jobs, run.profile.precision):
                bar.update(work[name])
                yield f"{(time.time() - started) / 60:7.1f} min  {name:32} {seconds:7.1f} s"
    if jobs > 1:
        get_reusable_executor().shutdown()  # idle workers would keep their memory


def print_commands(run: Run, overrides: dict[str, str]) -> None:
    """Print one command line per cell, phase by phase, for the same profile, seed and settings."""
    words = [sys.executable, "-m", "nbhelpers.pipeline.grid", "--profile", run.profile.name, "--seed", str(run.seed)]
    words += [word for field, value in overrides.items() for word in ("--set", f"{field}={value}")]
    for number, phase in enumerate(phases(run), 1):
        print(f"# phase {number}" + (f": in any order, after phase {number - 1}" if number > 1 else ": in any order"))
        print("\n".join(shlex.join([*words, "--cell", cell.name]) for cell in phase))


# --- command lines ---


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run."""
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")


def open_checked(options: argparse.Namespace) -> Run:
    """Return the run that the options name, after its model and its data were found usable."""
    run = open_run(get_profile(options.profile, **overrides_of(options.set)), options.seed)
    check_model(run.profile)
    reviews_of(run.profile, run.seed)
    return run


def main_of_training() -> None:
    """Run one of ``study.cells.STAGES``, also on several processes or machines: ``python -m nbhelpers.training``."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.training", description="One stage, without a notebook.")
    parser.add_argument("stage", choices=list(STAGES))
    add_run(parser)
    options = parser.parse_args()
    try:
        main = distributed.is_main_process()
        if not (main and sys.stderr.isatty()):
            keep_quiet()
        run = open_checked(options)
        if main:
            run.describe()
            print(f"processes: {distributed.world_size()}", flush=True)
        table = STAGES[options.stage](run)
        if main:
            print(table.round(4).to_string(index=False))
    except (*CLEAR_ERRORS, ProcessError) as error:
        sys.exit(f"error: {error}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this module; errors end it with one line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.pipeline.grid", description=__doc__.split("\n")[0])
    add_run(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="print one command per cell and compute nothing")
    parser.add_argument("--cell", metavar="NAME", help="compute one cell only")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be a whole number of at least 1 (got {options.jobs})")
    try:
        if options.list:
            overrides = overrides_of(options.set)
            print_commands(open_run(get_profile(options.profile, **overrides), options.seed), overrides)
            return
        if not sys.stderr.isatty():
            keep_quiet()
        run = open_checked(options)
        if options.cell:
            print("{} {:.1f} s".format(*run_timed(run, options.cell)))
        else:
            for line in run_grid(run, options.jobs):
                print(line, flush=True)
    except (*CLEAR_ERRORS, GridError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("error: interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
