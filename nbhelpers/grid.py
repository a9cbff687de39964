"""The heavy computations of a profile without a notebook, as independent cells; notebooks then find the artefacts.

    python -m nbhelpers.grid --profile P --seed N --jobs 2      all cells, so many at once on this machine
    python -m nbhelpers.grid --profile P --seed N --list        a command a cell, for a cluster's queue
    python -m nbhelpers.grid --profile P --seed N --cell NAME   one of them

A cell is a seed's fine-tuning, its scores, the pruning, recovery or test answers of one score, or a student. Cells of
a later phase need those of the earlier ones; within a phase the order does not matter, and no two cells of a phase make
the same artefact. ``./run_all.sh --jobs N`` computes the cells of the notebooks that it is about to run.
"""

import argparse
import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import pandas as pd
import torch
import transformers
from tqdm import tqdm

from nbhelpers import processes
from nbhelpers.comparison import LINES, open_test_part, recovered_names
from nbhelpers.compression import compress_all, compress_student
from nbhelpers.data import DataError
from nbhelpers.experiments import (
    best_scan,
    distil_all,
    distil_variant,
    finetune_model,
    reviews_of,
    runs_of,
    scan_student,
    scan_trials,
    student_names,
    student_variants,
    train_logits,
)
from nbhelpers.models import ModelError, check_model
from nbhelpers.processes import ProcessError
from nbhelpers.profiles import ProfileError, get_profile, overrides_of
from nbhelpers.pruning import (
    PRUNERS,
    SCORES,
    answers_right,
    best_criterion,
    build_scores,
    compact_model,
    pruned_logits,
    recover_all,
    recover_model,
    recover_otherwise,
    recoveries,
    scores_of,
    structured_sparsities,
    train_control,
)
from nbhelpers.training import mixed_precision
from nbhelpers.workspace import Run, WorkspaceError, cores, open_run

# The notebook that would compute a cell otherwise, by the first word of the cell's name.
NOTEBOOK = {"finetune": "01", "score": "02", "structured": "04", "open": "06", "judge": "06"}
NOTEBOOK |= dict.fromkeys(("scan", "student", "compress"), "05")
NOTEBOOK |= dict.fromkeys(("control", "prune", "recover", "otherwise"), "03")


# What ends a command with its message alone: each says what was wrong and what would be right.
CLEAR_ERRORS = (ProfileError, DataError, ModelError, WorkspaceError, OSError, FloatingPointError, MemoryError)


class GridError(RuntimeError):
    """A cell that failed, or a process that died; the message names the cell."""


# --- the cells ---


def score_cell(one: Run) -> None:
    """All scores of a seed and what later cells share: the dense model's answers."""
    build_scores(one, SCORES)
    train_logits(one)
    answers_right(one, "fine_tuned", "validation")


def recover_cell(run: Run, one: Run, criterion: str) -> None:
    """All recoveries of one score and seed, with their answers on validation; which ones, all seeds decide."""
    for score, sparsity in recoveries(run):
        if score == criterion:
            recover_model(one, criterion, sparsity)


def otherwise_cell(run: Run, one: Run, way: str) -> None:
    """The recovery of the best criterion in another way, with its answers on validation."""
    name = recover_otherwise(one, way, best_criterion(run), run.profile.main_sparsity)
    answers_right(one, name, "validation")


def student_cell(run: Run, variant: str, layers: int) -> None:
    """A student at the best temperature and alpha of the scan."""
    distil_variant(run, variant, layers, *best_scan(run))


def structured_cell(run: Run, sparsity: float) -> None:
    """A model without whole heads and neurons, where they can be taken out of it."""
    if sparsity in structured_sparsities(run):
        compact_model(run, sparsity)


def judge_cell(run: Run, one: Run, criterion: str) -> None:
    """The answers of a seed's recovered models on the test reviews, which ``open-test`` has declared."""
    for (score, _), name in recovered_names(run).items():
        if score == criterion:
            answers_right(one, name, "test")


def judge_dense_cell(one: Run) -> None:
    """The answers of a seed's dense model and its control on the test reviews."""
    for name in LINES:
        answers_right(one, name, "test")


def finetune_all(run: Run) -> pd.DataFrame:
    """The fine-tuning of all seeds: their learning curves."""
    return pd.concat([finetune_model(one).assign(seed=one.seed) for one in runs_of(run)]).drop(columns="losses")


def score_all(run: Run) -> pd.DataFrame:
    """The scores of all seeds: a row a score and seed, its least and largest value."""
    rows = []
    for one in runs_of(run):
        score_cell(one)
        for name in SCORES:
            scores = scores_of(one, name).values()
            rows.append((one.seed, name, min(map(torch.min, scores)).item(), max(map(torch.max, scores)).item()))
    return pd.DataFrame(rows, columns=["seed", "score", "lowest", "highest"])


def distil_and_compress(run: Run) -> pd.DataFrame:
    """The students, and the compressed models that come out of them: a row a model."""
    students, steps = distil_all(run), compress_all(run)
    last = steps[steps["step"] == "int8"][["model", "layers", "accuracy"]]
    return pd.concat([students, last], ignore_index=True)


def evaluate_all(run: Run) -> pd.DataFrame:
    """The answers on the test reviews of all recovered models, the dense ones and the students: a row a model."""
    open_test_part(run)
    rows = []
    for one in runs_of(run):
        students = student_names(run.profile) if one == run else []
        for name in [*LINES, *recovered_names(run).values(), *students]:
            right = answers_right(one, name, "test")
            rows.append({"seed": one.seed, "model": name, "accuracy": right.mean(), "reviews": len(right)})
    return pd.DataFrame(rows)


STAGES = {
    "finetune": finetune_all,
    "score": score_all,
    "recover": recover_all,
    "distill": distil_and_compress,
    "evaluate": evaluate_all,
}


def phases(run: Run, notebooks: Collection[str] = tuple(NOTEBOOK.values())) -> list[dict[str, Callable[[], object]]]:
    """The cells of a run by name, phase by phase; only those that these notebooks would compute otherwise."""
    seeds, ways, shares = runs_of(run), ("gradual", "taught"), run.profile.structured_sparsities
    variants = student_variants(run.profile)
    every = [
        {f"finetune-{one.seed}": lambda one=one: finetune_model(one) for one in seeds},
        {f"score-{one.seed}": lambda one=one: score_cell(one) for one in seeds},
        {f"scan-{run.seed}-{a:g}-{t:g}": lambda a=a, t=t: scan_student(run, a, t) for a, t in scan_trials(run.profile)}
        | {f"control-{one.seed}": lambda one=one: train_control(one) for one in seeds}
        | {f"prune-{one.seed}-{p}": lambda one=one, p=p: pruned_logits(one, p) for one in seeds for p in PRUNERS},
        {f"student-{run.seed}-{v}-{n}": lambda v=v, n=n: student_cell(run, v, n) for v, n in variants}
        | {f"recover-{one.seed}-{c}": lambda one=one, c=c: recover_cell(run, one, c) for one in seeds for c in SCORES},
        {f"otherwise-{one.seed}-{w}": lambda one=one, w=w: otherwise_cell(run, one, w) for one in seeds for w in ways}
        | {f"compress-{run.seed}-{n}": lambda n=n: compress_student(run, n) for n in run.profile.student_layers}
        | {f"structured-{run.seed}-{share:g}": lambda share=share: structured_cell(run, share) for share in shares}
        | {"open-test": lambda: open_test_part(run)},
        {f"judge-{one.seed}-dense": lambda one=one: judge_dense_cell(one) for one in seeds}
        | {f"judge-{one.seed}-{c}": lambda one=one, c=c: judge_cell(run, one, c) for one in seeds for c in SCORES},
    ]
    wanted = [{name: cell for name, cell in p.items() if NOTEBOOK[name.split("-")[0]] in notebooks} for p in every]
    return [phase for phase in wanted if phase]


def run_cell(run: Run, name: str) -> float:
    """Compute one cell; returns its seconds. Raises ``WorkspaceError`` for a name that is none."""
    cells = {known: cell for phase in phases(run) for known, cell in phase.items()}
    if name not in cells:
        raise WorkspaceError(f"no cell {name!r}: there are {', '.join(cells)}")
    started = time.time()
    cells[name]()
    return time.time() - started


# --- many at once ---


def keep_quiet() -> None:
    """No progress bars and no warnings: several processes share the terminal, or a log keeps it all."""
    os.environ["NBHELPERS_BATCH"] = "1"
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def leave_with_parent() -> None:
    """End this process when the one that started it has ended, however that happened."""
    multiprocessing.parent_process().join()
    os._exit(1)


def be_one_of(jobs: int, precision: str) -> None:
    """What a worker does first: take its share of the cores, keep quiet, and never outlive the grid.

    The precision is measured once for all: beside each other, workers might disagree.
    """
    os.environ["NBHELPERS_PRECISION"] = precision
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // jobs)))
    keep_quiet()
    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def children_deaf_to_ctrl_c():
    """Processes started in here ignore Ctrl-C, which a terminal sends to all: ending them is the grid's task."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def workers(jobs: int, precision: str) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each with its share of the cores; where the block fails, what has not begun is dropped.

    After Ctrl-C all end at once. Call it from a main thread, under ``if __name__ == "__main__"``.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, be_one_of, (jobs, mixed_precision(precision))) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise


def run_phase(pool: ProcessPoolExecutor, run: Run, names: Collection[str], started: float, bar: tqdm) -> None:
    """Compute the cells of one phase and print a line each. Raises ``GridError`` at the first that fails."""
    with children_deaf_to_ctrl_c():
        waiting = {pool.submit(run_cell, run, name): name for name in names}
    for done in as_completed(waiting):
        name = waiting[done]
        try:
            seconds = done.result()
        except BrokenProcessPool as error:
            raise GridError("a process of the grid died; out of memory? Fewer jobs at once need less") from error
        except Exception as error:
            raise GridError(f"cell {name}: {type(error).__name__}: {error}") from error
        bar.write(f"{(time.time() - started) / 60:7.1f} min  {name:32} {seconds:7.1f} s", file=sys.stdout)
        bar.update()
        sys.stdout.flush()


def run_grid(run: Run, jobs: int, notebooks: Collection[str] = tuple(NOTEBOOK.values())) -> None:
    """Compute the cells of these notebooks, ``jobs`` at a time, a process each with its share of the cores.

    What is there already is found, so an interrupted grid goes on where it stopped. The first failure is raised as
    ``GridError``, after the cells that are running have ended; Ctrl-C ends them all at once (``workers``).
    """
    started, every = time.time(), phases(run, notebooks)
    # The lines are enough where nobody sees a bar move.
    options = {"total": sum(map(len, every)), "desc": "cells", "leave": False, "disable": not sys.stderr.isatty()}
    with workers(jobs, run.profile.precision) as pool, tqdm(**options) as bar:
        for phase in every:
            run_phase(pool, run, phase, started, bar)


def print_commands(run: Run, overrides: dict[str, str]) -> None:
    """Print a command line a cell, phase by phase, for the same profile, seed and settings."""
    words = [sys.executable, "-m", "nbhelpers.grid", "--profile", run.profile.name, "--seed", str(run.seed)]
    words += [word for field, value in overrides.items() for word in ("--set", f"{field}={value}")]
    for number, phase in enumerate(phases(run), 1):
        print(f"# phase {number}" + (f": in any order, after phase {number - 1}" if number > 1 else ": in any order"))
        print("\n".join(shlex.join([*words, "--cell", name]) for name in phase))


# --- command lines ---


def add_run(parser: argparse.ArgumentParser) -> None:
    """The options that name a run."""
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")


def open_checked(options: argparse.Namespace) -> Run:
    """The run that the options name, after its model and its data were found usable."""
    run = open_run(get_profile(options.profile, **overrides_of(options.set)), options.seed)
    check_model(run.profile)
    reviews_of(run.profile, run.seed)
    return run


def main_of_training() -> None:
    """``python -m nbhelpers.training STAGE``: one of ``STAGES``, also on many processes or machines."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.training", description="One stage, without a notebook.")
    parser.add_argument("stage", choices=list(STAGES))
    add_run(parser)
    options = parser.parse_args()
    try:
        main = processes.is_main()
        if not (main and sys.stderr.isatty()):
            keep_quiet()
        run = open_checked(options)
        if main:
            run.describe()
            print(f"processes: {processes.count()}", flush=True)
        table = STAGES[options.stage](run)
        if main:
            print(table.round(4).to_string(index=False))
    except (*CLEAR_ERRORS, ProcessError) as error:
        sys.exit(f"error: {error}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.grid", description=__doc__.split("\n")[0])
    add_run(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="print a command a cell and compute nothing")
    parser.add_argument("--cell", metavar="NAME", help="compute one cell only")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: it takes a whole number of at least 1")
    if os.environ.get("NBHELPERS_FORCE") and not options.list:
        # Each cell's process would build anew what the cells before it have just built.
        parser.error("NBHELPERS_FORCE is set: delete the artefacts that are to be built again instead")
    try:
        if options.list:
            overrides = overrides_of(options.set)
            print_commands(open_run(get_profile(options.profile, **overrides), options.seed), overrides)
            return
        if not sys.stderr.isatty():
            keep_quiet()
        run = open_checked(options)
        if options.cell:
            print(f"{options.cell} {run_cell(run, options.cell):.1f} s")
        else:
            run_grid(run, options.jobs)
    except (*CLEAR_ERRORS, GridError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("error: interrupted; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
