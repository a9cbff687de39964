"""Run the notebooks in order through papermill: skip what is up to date, check what each promises, stop when one fails.

    python -m nbhelpers.pipeline --profile P --seed N --only 03 --from 03 --set field=value --jobs N --force --list

Exit code: 0 when all is well, 1 when a notebook failed, 2 when it could not start, 130 after Ctrl-C.
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
from filelock import FileLock, Timeout

from nbhelpers.data import check_data
from nbhelpers.measurement import PeakMemory
from nbhelpers.models import ModelError, check_model
from nbhelpers.pipeline import execution, freshness, grid, promises
from nbhelpers.profiles import ProfileError, get_profile, overrides_of
from nbhelpers.reading import DataError
from nbhelpers.report import chapters, page
from nbhelpers.report.chapters import NOTEBOOKS, STAGES, Stage
from nbhelpers.study.work import Rates
from nbhelpers.system.files import write_text
from nbhelpers.system.machine import cores
from nbhelpers.workspace import Run, WorkspaceError, open_run

PARAMETERS = ("profile", "seed", "overrides")

# Seconds that a notebook takes beside the computations before it, as measured with profile quick where one process
# judges so many tokens a second.
OWN_SECONDS = {"01": 25, "02": 20, "03": 25, "04": 90, "05": 45, "06": 90}
OWN_JUDGED = 13_000


class PipelineError(Exception):
    """Why the pipeline stops, in one or two lines; ``code`` is its exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# --- options ---


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PipelineError(f"{message}; see ./run_all.sh --help")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line. Raises ``PipelineError`` for one that does not exist or cannot be."""
    parser = Parser(
        prog="./run_all.sh", description="Run the notebooks and write reports/<profile>/.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--profile", default="quick", metavar="P", help="smoke, quick (default), thorough or gpt2")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    add("--only", action="append", default=[], metavar="03", help="this notebook alone; may be repeated, or 03,04")
    add("--from", dest="first", metavar="03", help="this notebook and all after it")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the profile; repeatable")
    add("--force", action="store_true", help="compute again what is up to date")
    add("--jobs", type=int, metavar="N", help="how many processes compute at a time (default: as many as fit)")
    add("--list", action="store_true", help="say what is fresh, stale or missing, and run nothing")
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise ``PipelineError`` for options that do not go together."""
    if options.jobs is not None and options.jobs < 1:
        raise PipelineError(f"--jobs must be a whole number of at least 1 (got {options.jobs})")
    if options.only and options.first:
        raise PipelineError("--only and --from exclude each other")


def chosen(options: argparse.Namespace, known: dict[str, Stage]) -> list[Stage]:
    """Return the stages that the options ask for, in order."""
    ordered = chapters.in_order(known)
    numbers = [stage.number for stage in ordered]
    wanted = [word.strip() for item in options.only for word in item.split(",") if word.strip()]
    for word in [*wanted, *([options.first] if options.first is not None else [])]:
        if not any(word in (stage.number, stage.name) for stage in ordered):
            raise PipelineError(f"no notebook {word!r}: there are {', '.join(numbers)}")
    if options.first is not None:
        start = next(i for i, stage in enumerate(ordered) if options.first in (stage.number, stage.name))
        return ordered[start:]
    return [stage for stage in ordered if not wanted or stage.number in wanted or stage.name in wanted]


def selection(options: argparse.Namespace) -> list[str]:
    """Return the options that choose notebooks, as they were given."""
    return ["--only", ",".join(options.only)] * bool(options.only) + ["--from", options.first] * bool(options.first)


def go_on(options: argparse.Namespace, stage: Stage, selected: list[Stage]) -> str:
    """Return how to call the pipeline to go on with a stage that did not end."""
    rest = [other.number for other in selected[selected.index(stage) :]]
    return command(options, *(["--only", ",".join(rest)] if options.only else ["--from", stage.number]))


def command(options: argparse.Namespace, *more: str) -> str:
    """Return how to call the pipeline with the same profile, seed and settings."""
    words = ["./run_all.sh"]
    words += ["--profile", options.profile] if options.profile != "quick" else []
    words += ["--seed", str(options.seed)] if options.seed else []
    words += [word for pair in options.set for word in ("--set", pair)]
    words += ["--force"] if options.force else []
    words += ["--jobs", str(options.jobs)] if options.jobs else []
    return shlex.join([*words, *more])


# --- before the first kernel ---


def check_writable(folder: Path) -> None:
    """Raise ``PipelineError`` where a folder can neither be made nor be written into."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        fault = "cannot be written into" if nearest.is_dir() else "is not a folder"
        raise PipelineError(f"{nearest} {fault}, and {folder} would be in it: set NBHELPERS_ROOT to another folder")


def preflight(run: Run) -> None:
    """Raise ``PipelineError`` when a profile's data, model or workspace cannot be used, before anything is written."""
    for folder in (run.artifacts, run.reports):
        check_writable(folder)
    try:
        check_model(run.profile)
        check_data(run.profile)
    except (DataError, ModelError) as error:
        raise PipelineError(str(error)) from error


def check_notebooks(selected: list[Stage], notebooks: Path) -> None:
    """Raise ``PipelineError`` for a notebook that is missing or would not take the parameters."""
    for stage in selected:
        path = notebooks / f"{stage.name}.ipynb"
        if not path.is_file():
            raise PipelineError(f"notebook {path} is missing")
        # Papermill passes a parameter that a notebook does not know with a mere warning.
        absent = set(PARAMETERS) - promises.parameters_of(path)
        if absent:
            raise PipelineError(f"notebook {path} has no parameter {', '.join(sorted(absent))} in its parameters cell")


def check_needs(run: Run, selected: list[Stage], known: dict[str, Stage], options: argparse.Namespace) -> None:
    """Raise ``PipelineError`` when a chosen notebook needs what neither exists nor is about to be made."""
    planned = {stage.number for stage in selected}
    for stage in selected:
        missing = freshness.missing_needs(run, stage, known, planned)
        if missing:
            needed = ", ".join(need for need in missing if need in stage.needs)
            numbers = ",".join(sorted(set(missing.values())))
            raise PipelineError(
                f"{stage.name} needs {needed}: run notebook {numbers.replace(',', ', ')} first "
                f"({command(options, '--only', numbers)})"
            )


def in_words(seconds: float) -> str:
    """Return a time as it is promised: in minutes, or from two hours on in hours."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes > 1)}" if minutes < 120 else f"{minutes / 60:.0f} hours"


def own_seconds(due: list[Stage], rates: Rates) -> float:
    """Return how long notebooks take once all that is heavy has been computed."""
    return sum(OWN_SECONDS.get(stage.number, 0) for stage in due) * OWN_JUDGED / rates.judged


# --- one stage ---


def failed_copy(run: Run, stage: Stage) -> Path:
    return run.artifacts / "failed" / f"{stage.name}.ipynb"


def run_stage(run: Run, stage: Stage, kernels: execution.Kernels, notebooks: Path, known, options) -> str:
    """Execute a notebook, check what it promised, and put its copies into the report; returns what it wrote.

    Raises ``NotebookError`` when it fails; its executed copy is then in the artefacts' folder ``failed``.
    """
    parts = freshness.own_parts(run, stage, notebooks)
    promises.forget_metrics(run, stage)
    started = time.time()
    overrides = shlex.join(f"{field}={value}" for field, value in overrides_of(options.set).items())
    parameters = dict(zip(PARAMETERS, (run.profile.name, run.seed, overrides), strict=True))
    with PeakMemory(kernels.memory, 0.2) as memory:
        notebook = kernels.execute(notebooks / f"{stage.name}.ipynb", parameters)
    faults = execution.output_faults(notebook) + promises.broken_promises(run, stage, since=started)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise execution.NotebookError(f"it ran, but {faults[0]}{more}")
    execution.scrub(notebook)
    folder = run.reports / "notebooks"
    write_text(folder / f"{stage.name}.ipynb", nbformat.writes(notebook))
    write_text(folder / f"{stage.name}.html", page.notebook_html(notebook, stage.name))
    minutes = (time.time() - started) / 60
    freshness.save_record(run, stage, parts, known, minutes, memory.peak)
    execution.clear(failed_copy(run, stage))
    return f"{minutes:5.1f} min  {memory.peak / 1e9:5.1f} GB   {promises.count_written(run, started)}"


# --- what is heavy ---


def announce(run: Run, due: list[Stage], jobs: int) -> tuple[Rates, float]:
    """Measure this machine and say how long the notebooks take; returns its rates, and the seconds of their cells."""
    rates = grid.measure_speed(run, jobs)
    phases = grid.phases(run, {stage.number for stage in due})
    seconds = sum(grid.seconds_of(phase, rates, jobs) for phase in phases)
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"machine: {cores()} cores, {memory:.0f} GiB of memory; {jobs} at a time, each trains {rates.trained:,.0f} and "
        f"judges {rates.judged:,.0f} tokens a second: about {in_words(seconds + own_seconds(due, rates))}",
        flush=True,
    )
    return rates, seconds


def compute_cells(run: Run, options: argparse.Namespace, due: list[Stage], jobs: int) -> None:
    """Say how long the notebooks take, and compute their cells, ``jobs`` at a time, so that these find them.

    One at a time, a notebook computes them as well itself.
    """
    rates, expected = announce(run, due, jobs)
    if jobs == 1 or not expected:
        return
    again = f"go on with: {command(options, *selection(options))}"
    started = time.time()
    try:
        for _ in grid.run_grid(run, jobs, {stage.number for stage in due}, rates):
            pass
    except KeyboardInterrupt:
        raise PipelineError(f"interrupted before the first notebook; {again}", code=130) from None
    except grid.GridError as error:
        raise PipelineError(f"{error}\n{again}", code=1) from error
    took = time.time() - started
    left = own_seconds(due, rates) * max(0.5, took / expected)  # less where much was there already
    print(f"{'computations':22} {took / 60:5.1f} min; about {in_words(left)} left", flush=True)


# --- all of them ---


def short_path(path: Path) -> str:
    """Return a path as short as the reader's folder allows."""
    current = Path.cwd()
    return str(path.relative_to(current) if path.is_relative_to(current) else path)


def run_chain(options: argparse.Namespace, notebooks: Path, known: dict[str, Stage]) -> None:
    """Do what the options say, with a line a notebook."""
    profile = get_profile(options.profile, **overrides_of(options.set))
    run = open_run(profile, options.seed)
    selected = chosen(options, known)
    check_notebooks(selected, notebooks)
    if options.list:
        running = " (a run of this profile and seed is under way)" if in_use(run) else ""
        for stage in selected:
            print(f"{stage.name:22} {freshness.state(run, stage, notebooks, known)}{running}")
        return
    check_needs(run, selected, known, options)
    print(
        f"profile {profile.name} ({profile.description}), seed {run.seed}, model {profile.model}, data {profile.data}"
    )
    preflight(run)
    with lock_workspace(run):
        run_stages(run, selected, notebooks, known, options)


def lock_path(run: Run) -> Path:
    """Return the file that a pipeline locks in its workspace; the system releases it when the process ends."""
    return run.artifacts / ".running.lock"


def in_use(run: Run) -> bool:
    """Return whether a pipeline is running in a workspace."""
    if not lock_path(run).exists():
        return False
    try:
        with FileLock(lock_path(run), timeout=0):
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def lock_workspace(run: Run) -> Iterator[None]:
    """Hold a workspace while the block runs. Raises ``PipelineError`` where another pipeline holds it."""
    run.artifacts.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(run), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise PipelineError(f"{run.artifacts} is in use by another run: wait until it has ended, or end it") from None
    try:
        yield
    finally:
        lock.release()


def run_stages(run: Run, selected: list[Stage], notebooks: Path, known, options) -> None:
    """Run the chosen notebooks that are not fresh, with a line each."""
    started = time.time()

    def is_due(stage: Stage) -> bool:
        return options.force or freshness.state(run, stage, notebooks, known) != "fresh"

    due = list(filter(is_due, selected))
    if due:
        compute_cells(run, options, due, options.jobs or grid.automatic_jobs())
    copies = {notebooks / f"{stage.name}.ipynb": failed_copy(run, stage) for stage in selected}
    with execution.Kernels(copies) as kernels:
        for stage in selected:
            if not is_due(stage):
                print(f"{stage.name:22} up to date", flush=True)
                continue
            try:
                print(f"{stage.name:22} {run_stage(run, stage, kernels, notebooks, known, options)}", flush=True)
            except KeyboardInterrupt:
                message = f"interrupted in {stage.name}; go on with: {go_on(options, stage, selected)}"
                raise PipelineError(message, code=130) from None
            except execution.NotebookError as error:
                hint = f"see {short_path(failed_copy(run, stage))}; go on with: {go_on(options, stage, selected)}"
                raise PipelineError(f"{stage.name}, {error}\n{hint}", code=1) from error
            whole = len(due) == len(known) and stage == selected[-1]
            run.record_effort(**({"run_minutes": (time.time() - started) / 60} if whole else {}))
            page.write_index(run, known)
    say_where(run, (time.time() - started) / 60)


def say_where(run: Run, minutes: float) -> None:
    places = {
        run.reports / "index.html": "everything on one page",
        run.reports / "results.json": "every number",
        run.reports / "tables" / "comparison.csv": "all models side by side",
    }
    print(f"done in {minutes:.1f} minutes; look at")
    for path, description in places.items():
        if path.is_file():
            print(f"  {short_path(path):42} {description}")
    print(f"  {'.venv/bin/jupyter lab notebooks/':42} explore")


@contextlib.contextmanager
def forcing(force: bool) -> Iterator[None]:
    """Within the block, where ``force`` is given, artefacts from before it count as missing, in all processes."""
    before = os.environ.get("NBHELPERS_FORCE")
    if force:
        os.environ["NBHELPERS_FORCE"] = f"{time.time():.3f}"
    try:
        yield
    finally:
        os.environ.pop("NBHELPERS_FORCE", None)
        os.environ |= {"NBHELPERS_FORCE": before} if before else {}


def main(arguments: list[str] | None = None, notebooks: Path = NOTEBOOKS, known: dict[str, Stage] | None = None) -> int:
    """Run the command line; returns the exit code. notebooks and known: another folder and other stages, for tests."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        options = parse(arguments)
        with warnings.catch_warnings(action="ignore"), forcing(options.force):
            run_chain(options, notebooks, known or STAGES)
    except (PipelineError, ProfileError, WorkspaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        print("error: interrupted before the first notebook", file=sys.stderr)
        return 130
    return 0
