"""Where a run keeps things: artefacts, tables, figures and results; written beside and renamed into place, checksummed.

    .artifacts/<profile>/seed-<n>/<name>/   weights and statistics: safetensors and JSON, each with an artifact.json
    reports/<profile>/                      figures/, tables/, notebooks/, results.json, index.html
                                            (reports/<profile>-seed-<n>/ for a seed other than 0)

Both lie in the project's folder, or in the one that the environment variable NBHELPERS_ROOT names.
"""

import ast
import contextlib
import datetime
import errno
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from safetensors.torch import load_file, save_file

from nbhelpers import processes
from nbhelpers.profiles import Profile

# Which function gives the model in an artefact of each kind back. Names, so that nothing below is imported here.
LOADERS = {
    "dense": ("nbhelpers.models", "load_dense"),
    "sparse": ("nbhelpers.sparse.storage", "load_sparse"),
}


# The code that artefacts come out of: when it changes, they are built anew.
COMPUTING = ("data", "models", "bfloat16", "training", "checkpoints", "processes", "statistics", "criteria", "masks")
BUILT_HERE: set[Path] = set()
# What is being built: the folder written into -> where its trainings keep checkpoints, and the key of the artefact.
BUILDING: dict[Path, tuple[Path, str]] = {}
# Names of metrics that hang on how fast a machine is at a moment: the nearest rival is chosen by its speed.
TIMED = re.compile(r"minutes|seconds|speedup|latency|limits|_rival$")
# Kinds of files of a figure, and how each is saved; without a date, so that the same figure is the same file.
FIGURES = {"png": {}, "svg": {"metadata": {"Date": None}}}
TENSORS = "tensors.safetensors"  # the file of an artefact's tensors that are not a model's weights


class WorkspaceError(RuntimeError):
    """Something that a run needs is missing, stale or damaged; the message says what and which notebook makes it."""


def root() -> Path:
    """The folder that holds ``.artifacts`` and ``reports``."""
    return Path(os.environ.get("NBHELPERS_ROOT") or Path(__file__).parent.parent).resolve()


def versions() -> dict[str, str]:
    """The library versions and the device that stand beside every metric."""
    names = ("torch", "transformers", "datasets", "accelerate", "numpy")
    found = {name: importlib.import_module(name).__version__ for name in names}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{processor()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **found, "device": device}


def computed_on(record: dict) -> str:
    """The device that an artefact was made on, and its torch; threads do not count, they differ with ``--jobs``."""
    device = re.sub(r", \d+ threads$", "", record["versions"]["device"])
    return f"{device} (torch {record['versions']['torch']})"


@functools.cache
def processor() -> str:
    """The processor's name as its maker gives it, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where ``platform`` knows no name
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def revision() -> str:
    """The git revision of the project's code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value) -> str:
    """A short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree of a source file in which only what is executed is left."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:]
    return tree


def outline(node):
    """A syntax tree as lists that JSON can write, the same in every Python: a later one's new fields are empty here."""
    if isinstance(node, ast.AST):
        return [type(node).__name__, {f: outline(v) for f, v in ast.iter_fields(node) if v is not None and v != []}]
    return [outline(item) for item in node] if isinstance(node, list) else repr(node)


@functools.cache
def code_fingerprint(*modules: str) -> str:
    """A hash of modules and packages of nbhelpers as they are on disk, without comments, docstrings and layout.

    The same on every machine and in every Python, so that what one has computed another finds.
    """
    package = Path(__file__).parent
    files = [file for name in modules for file in (package / f"{name}.py", *(package / name).glob("*.py"))]
    trees = {
        file.relative_to(package).as_posix(): outline(without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))
        for file in sorted(files)
        if file.exists()
    }
    return fingerprint(trees)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def beside(folder: Path, kind: str) -> Path:
    """Where this process, of all that may write into one workspace from several machines, keeps part of a folder."""
    return folder.with_name(f"{folder.name}.{platform.node()}-{os.getpid()}.{kind}")


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there and not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error as error:
        return not isinstance(error, psutil.NoSuchProcess)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine left beside a folder that they were writing when they were killed."""
    for path in folder.parent.glob(f"{folder.name}.*-*.*"):
        machine, _, pid = path.stem.removeprefix(f"{folder.name}.").rpartition("-")
        if machine == platform.node() and (int(pid) == os.getpid() or not is_running(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def put_in_place(partial: Path, folder: Path, old: Path) -> None:
    """Rename ``partial`` to ``folder``; what was there goes to ``old``."""
    while True:
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        try:
            partial.rename(folder)
            return
        except OSError as error:
            # Another process has put its own there meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give a fresh folder to write into, which takes the place of ``folder`` only when the block ends without error.

    Of several processes that write the same folder at once, each writes a whole one; the last to end stays.
    """
    remove_leftovers(folder)
    partial, old = beside(folder, "partial"), beside(folder, "old")
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, folder, old)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def throw_away() -> Iterator[Path]:
    """Give a fresh folder to write into that is gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Run:
    """One profile and seed: where its artefacts and reports are, and how to get them back."""

    profile: Profile
    seed: int

    @property
    def artifacts(self) -> Path:
        return root() / ".artifacts" / self.profile.name / f"seed-{self.seed}"

    @property
    def reports(self) -> Path:
        return root() / "reports" / (self.profile.name + (f"-seed-{self.seed}" if self.seed else ""))

    def describe(self) -> None:
        """Print the profile, what was changed in it, the seed, and the versions."""
        print(f"profile {self.profile.name} ({self.profile.description}), seed {self.seed}")
        print(", ".join(f"{name} {version}" for name, version in versions().items()))

    # --- artefacts ---

    def cached(
        self,
        name: str,
        settings: dict,
        build: Callable[[Path], None],
        inputs: tuple[str, ...] = (),
        kind: str = "data",
        made_by: str = "",
    ) -> Path:
        """The folder of an artefact, built by ``build(folder)`` only where it is missing or was made otherwise.

        settings: what the artefact depends on; inputs: names of artefacts it is made from; kind: "dense" or "sparse"
        for a model, "data" for anything else; made_by: the notebook that makes it, named when it is missed elsewhere.
        Several processes build it together; what the main one has written stays.
        """
        folder = self.artifacts / name
        made_from = {i: self.artifact(i)["fingerprint"] for i in inputs}
        code = code_fingerprint(*COMPUTING, *(["sparse"] if kind == "sparse" else []))
        key = fingerprint({"settings": settings, "inputs": made_from, "code": code})
        # Forced, each process builds an artefact anew once.
        forced = bool(os.environ.get("NBHELPERS_FORCE")) and folder not in BUILT_HERE
        if processes.agree(not forced and self.read_artifact(name).get("key") == key):
            return folder
        started, checkpoints = time.time(), folder.with_name(f"{name}.checkpoint")
        # What the other processes write is the same, and goes.
        with replace_folder(folder) if processes.is_main() else throw_away() as partial:
            BUILDING[partial] = checkpoints, key
            build(partial)
            del BUILDING[partial]
            files = {p.relative_to(partial).as_posix(): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
            record = {
                "name": name,
                "kind": kind,
                "made_by": made_by,
                "key": key,
                "fingerprint": fingerprint([key, files]),
                "settings": settings,
                "inputs": list(inputs),
                "profile": asdict(self.profile),
                "seed": self.seed,
                "versions": versions(),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
                "seconds": round(time.time() - started, 2),
                "files": files,
            }
            write_text(partial / "artifact.json", json.dumps(record, indent=2, default=list) + "\n")
        BUILT_HERE.add(folder)
        processes.wait()
        if processes.is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        return folder

    def read_artifact(self, name: str) -> dict:
        """What ``artifact.json`` says of an artefact; empty where it is missing; ``WorkspaceError`` if damaged.

        Another process may be replacing the folder: whether the file is there is found out by reading it.
        """
        path = self.artifacts / name / "artifact.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise WorkspaceError(f"{path} is damaged: {rebuild(self, name)}") from None
        found = (record.get("name"), record.get("profile", {}).get("name"), record.get("seed"))
        if found != (name, self.profile.name, self.seed):
            raise WorkspaceError(
                f"{path} is that of {found[0]}, profile {found[1]}, seed {found[2]}: {rebuild(self, name)}"
            )
        return record

    def artifact(self, name: str) -> dict:
        """What ``artifact.json`` says of an artefact. Raises ``WorkspaceError`` when it is missing or unreadable."""
        record = self.read_artifact(name)
        if not record:
            raise WorkspaceError(
                f"{name} is missing from {self.artifacts}: run notebook {maker_of(name)} "
                f"(./run_all.sh --profile {self.profile.name} --only {maker_of(name)})"
            )
        return record

    def records(self) -> list[dict]:
        """What ``artifact.json`` says of each finished artefact."""
        # A folder with a dot in its name is what a killed run left while it was writing.
        paths = [path for path in self.artifacts.glob("*/artifact.json") if "." not in path.parent.name]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def folder(self, name: str) -> Path:
        """The folder of a finished artefact after its checksums were found right."""
        record, folder = self.artifact(name), self.artifacts / name
        for file, expected in record["files"].items():
            inside = (folder / file).resolve().is_relative_to(folder.resolve())
            if not inside or not (folder / file).is_file() or sha256(folder / file) != expected:
                raise WorkspaceError(f"{folder / file} is missing or damaged: {rebuild(self, name)}")
        return folder

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of an artefact that keeps some beside or instead of a model: statistics, scores or masks."""
        return load_file(self.folder(name) / TENSORS)

    # --- models ---

    def models(self) -> list[str]:
        """Names of the models that this run has made, oldest first."""
        return [r["name"] for r in sorted(self.records(), key=lambda r: r["created"]) if r["kind"] in LOADERS]

    def load_model(self, name: str) -> torch.nn.Module:
        """A model of this run in eval mode, sparse where it is sparse.

        Raises ``WorkspaceError`` when it is missing, damaged, or not a model.
        """
        kind = self.artifact(name)["kind"]
        if kind not in LOADERS:
            raise WorkspaceError(f"{name} is not a model: this run has {', '.join(self.models()) or 'none yet'}")
        module, function = LOADERS[kind]
        return getattr(importlib.import_module(module), function)(self.folder(name)).eval()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, with the run's own cleaning, tokenising and truncation."""
        from nbhelpers.data import clean_text, tokenize
        from nbhelpers.models import load_tokenizer

        return tokenize([clean_text(text) for text in texts], load_tokenizer(self.profile), self.profile)

    def predict(self, name: str, texts: list[str]) -> np.ndarray:
        """P(positive) [n] of texts, with the run's own cleaning, tokenising and truncation."""
        from nbhelpers.models import predict_logits

        logits = predict_logits(self.load_model(name), self.encode(texts), self.profile.eval_batch_size)
        return torch.as_tensor(logits).softmax(-1)[:, 1].numpy()

    # --- reports ---

    def results(self) -> dict:
        """All metrics recorded so far: {section: {metric: value}}, those that were timed among them."""
        path = self.reports / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        timed = results.pop("timings", {})
        return together(results, timed)

    def write_results(self, results: dict) -> None:
        """Write ``results.json``: what was timed in a section of its own, so that all else is the same each time."""
        steady, timed = apart({name: section for name, section in results.items() if name != "run"})
        steady |= {"run": results["run"]} if "run" in results else {}
        plain = json.dumps(steady | ({"timings": timed} if timed else {}), indent=2, default=plain_value)
        write_text(self.reports / "results.json", plain + "\n")

    def record(self, section: str, **metrics) -> None:
        """Set metrics of a section in ``results.json``; every number must be finite."""
        for name, value in metrics.items():
            if isinstance(value, float | np.floating) and not math.isfinite(value):
                raise FloatingPointError(f"metric {section}.{name} is {value}")
        results = self.results()
        results.setdefault(section, {}).update(metrics)
        results["run"] = {"profile": asdict(self.profile), "seed": self.seed, "versions": versions()}
        results["run"]["revision"] = revision()
        self.write_results(results)

    def record_effort(self) -> None:
        """Put on record what the artefacts of all seeds took to build: minutes of processes, in all and by device."""
        runs, minutes = [Run(self.profile, self.seed + i) for i in range(self.profile.seeds)], {}
        for record in (record for run in runs for record in run.records()):
            where = computed_on(record)
            minutes[where] = minutes.get(where, 0.0) + record["seconds"] / 60
        self.record("effort", process_minutes=sum(minutes.values()), cores=cores(), device_minutes=minutes)

    def skip(self, reason: str, *names: str) -> None:
        """Say and put on record why promised figures, tables or metrics ("section.metric") do not apply to this run."""
        print(reason)
        self.record("skipped", **dict.fromkeys(names, reason))

    def save_table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Write ``tables/<name>.csv`` (without the index) and hand the table back, to be shown."""
        path = self.reports / "tables" / f"{name}.csv"
        write_text(path, table.to_csv(index=False))
        sums = self.checksums() | {name: sha256(path)}
        write_text(self.reports / ".checksums.json", json.dumps(sums, indent=1) + "\n")
        return table

    def checksums(self) -> dict[str, str]:
        """The checksums of all tables as they were written, by name."""
        path = self.reports / ".checksums.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def is_as_written(self, table: str) -> bool:
        """Whether a table is what ``save_table`` wrote; one that was written otherwise is taken as it is."""
        path = self.reports / "tables" / f"{table}.csv"
        return self.checksums().get(table, "") in ("", sha256(path))

    def load_table(self, name: str) -> pd.DataFrame:
        """A table that an earlier notebook wrote."""
        path = self.reports / "tables" / f"{name}.csv"
        if not path.exists():
            raise WorkspaceError(f"table {path} is missing: run the notebook that writes it (see ./run_all.sh --list)")
        if not self.is_as_written(name):
            reason = f"table {path} is damaged or was changed"
            raise WorkspaceError(f"{reason}: run the notebook that writes it again (see ./run_all.sh --list)")
        return pd.read_csv(path)

    def save_figure(self, name: str, figure) -> None:
        """Write ``figures/<name>.png`` and ``.svg``; the figure stays open, so that the notebook shows it."""
        for kind, options in FIGURES.items():
            path = self.reports / "figures" / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            figure.savefig(partial, format=kind, **options)
            partial.replace(path)


def plain_value(value):
    """A number of numpy's or torch's as Python's, anything else as a list, for JSON."""
    return value.item() if hasattr(value, "item") else list(value)


def apart(metrics: dict) -> tuple[dict, dict]:
    """Metrics without those that say how long something took, or were chosen by that; and those alone."""
    steady, timed = {}, {}
    for name, value in metrics.items():
        if TIMED.search(name):
            timed[name] = value
        elif isinstance(value, dict):
            steady[name], times = apart(value)
            timed |= {name: times} if times else {}
        else:
            steady[name] = value
    return steady, timed


def together(steady: dict, timed: dict) -> dict:
    """What ``apart`` took apart."""
    both = dict(steady)
    for name, value in timed.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = together(both[name], value) if nested else value
    return both


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the file that ``Run.load_tensors`` reads."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)


def rebuild(run: Run, name: str) -> str:
    """How to make an artefact anew, in words."""
    options = f"--profile {run.profile.name}" + (f" --seed {run.seed}" if run.seed else "")
    return f"run notebook {maker_of(name)} again (./run_all.sh {options} --only {maker_of(name)} --force)"


def maker_of(name: str) -> str:
    """The number of the notebook that makes an artefact, from the artefact's name."""
    makers = {
        "scores": "02",
        "calibration": "02",
        "masks": "03",
        "recovered": "03",
        "rates": "03",
        "pruned": "03",
        "fine_tuned_extra": "03",
    }
    makers |= {"sparse": "04", "structured": "04", "compact": "04", "gradual": "03", "taught": "03"}
    makers |= {"student": "05", "compressed": "05"}
    return next((number for prefix, number in makers.items() if name.startswith(prefix)), "01")


def open_run(profile: Profile, seed: int = 0) -> Run:
    """The run of a profile and a seed; nothing is written until something is saved in it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise WorkspaceError(f"seed is {seed!r}: it takes a whole number of at least 0 and below {2**31:,}")
    return Run(profile, seed)
