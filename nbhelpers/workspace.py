"""Where a run keeps things: artefacts, tables, figures and results; written beside and renamed into place, checksummed.

    .artifacts/<profile>/seed-<n>/<name>/   weights and statistics: safetensors and JSON, each with an artifact.json
    reports/<profile>/                      figures/, tables/, notebooks/, results.json, index.html
                                            (reports/<profile>-seed-<n>/ for a seed other than 0)

Both lie in the project's folder, or in the one that the environment variable NBHELPERS_ROOT names.
"""

import datetime
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2ForSequenceClassification

from nbhelpers.data import tokenize
from nbhelpers.evaluation import predict_logits
from nbhelpers.models import load_dense, load_tokenizer
from nbhelpers.profiles import Profile
from nbhelpers.reading import clean_text
from nbhelpers.sparse import convert_to_sparse
from nbhelpers.sparse.layers import sparse_layers
from nbhelpers.sparse.storage import load_sparse
from nbhelpers.system.code import code_fingerprint
from nbhelpers.system.files import fingerprint, replace_folder, scratch_folder, sha256, write_text
from nbhelpers.system.machine import computed_on, cores, revision, versions
from nbhelpers.training import distributed, mixed_precision
from nbhelpers.training.checkpoints import Checkpoints

MODELS = ("dense", "sparse")  # the kinds of artefacts that are models; any other is "data"
# Names of metrics that hang on how fast a machine is at a moment: the nearest rival is chosen by its speed.
TIMED = re.compile(r"minutes|seconds|speedup|latency|limits|_rival$")
TENSORS = "tensors.safetensors"  # the file of an artefact's tensors that are not a model's weights


class WorkspaceError(RuntimeError):
    """Something that a run needs is missing, stale or damaged; the message says what and which notebook makes it."""


def root() -> Path:
    """Return the folder that holds ``.artifacts`` and ``reports``."""
    return Path(os.environ.get("NBHELPERS_ROOT") or Path(__file__).parent.parent).resolve()


@dataclass(frozen=True)
class Build:
    """What a function that builds an artefact is given: the ``folder`` to fill, and checkpoints for its trainings."""

    folder: Path
    checkpoint_folder: Path
    key: str

    def checkpoints(self, training: str = "training") -> Checkpoints:
        """Return the checkpoints of one of its trainings; all of them are removed when the artefact is complete."""
        return Checkpoints(self.checkpoint_folder / training, self.key)


def forced_since() -> float:
    """Return the time, in seconds since the epoch, before which an artefact counts as missing (``--force``), or 0."""
    text = os.environ.get("NBHELPERS_FORCE")
    if text and not re.fullmatch(r"\d{10,}(\.\d+)?", text):
        raise WorkspaceError(f"NBHELPERS_FORCE must be seconds since the epoch (got {text!r})")
    return float(text or 0)


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
        build: Callable[[Build], None],
        inputs: tuple[str, ...] = (),
        kind: str = "data",
        made_by: str = "",
    ) -> Path:
        """Return the folder of an artefact, built by ``build`` only where it is missing or was made otherwise.

        settings: what the artefact depends on; inputs: names of artefacts it is made from; kind: "dense" or "sparse"
        for a model, "data" for anything else; made_by: the notebook that makes it, named when it is missed elsewhere.
        It also depends on the code of the module that defines ``build`` and of all that this imports. Several
        processes build it together; what the main one has written stays.
        """
        folder = self.artifacts / name
        made_from = {i: self.artifact(i)["fingerprint"] for i in inputs}
        key = fingerprint({"settings": settings, "inputs": made_from, "code": code_fingerprint(module_of(build))})
        if distributed.broadcast(self.is_current(name, key)):
            return folder
        started, checkpoint_folder = time.time(), folder.with_name(f"{name}.checkpoint")
        # What the other processes write is the same, and goes.
        with replace_folder(folder) if distributed.is_main_process() else scratch_folder() as partial:
            build(Build(partial, checkpoint_folder, key))
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
        distributed.barrier()
        if distributed.is_main_process():
            shutil.rmtree(checkpoint_folder, ignore_errors=True)
        return folder

    def is_current(self, name: str, key: str) -> bool:
        """Return whether an artefact is there, was made with this key, and is not to be built again by force."""
        record = self.read_artifact(name)
        if record.get("key") != key:
            return False
        return datetime.datetime.fromisoformat(record["created"]).timestamp() >= forced_since()

    def read_artifact(self, name: str) -> dict:
        """Return what ``artifact.json`` says of an artefact; empty where it is missing; ``WorkspaceError`` if damaged.

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
        """Return the record of an artefact (``artifact.json``). Raises ``WorkspaceError`` without one."""
        record = self.read_artifact(name)
        if not record:
            raise WorkspaceError(
                f"{name} is missing from {self.artifacts}: run notebook {maker_of(name)} "
                f"(./run_all.sh --profile {self.profile.name} --only {maker_of(name)})"
            )
        return record

    def records(self) -> list[dict]:
        """Return what ``artifact.json`` says of each finished artefact."""
        # A folder with a dot in its name is what a killed run left while it was writing.
        paths = [path for path in self.artifacts.glob("*/artifact.json") if "." not in path.parent.name]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def folder(self, name: str) -> Path:
        """Return the folder of a finished artefact after its checksums were found right."""
        record, folder = self.artifact(name), self.artifacts / name
        for file, expected in record["files"].items():
            inside = (folder / file).resolve().is_relative_to(folder.resolve())
            if not inside or not (folder / file).is_file() or sha256(folder / file) != expected:
                raise WorkspaceError(f"{folder / file} is missing or damaged: {rebuild(self, name)}")
        return folder

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of an artefact that are not a model's weights: statistics, scores or masks."""
        return load_file(self.folder(name) / TENSORS)

    # --- models ---

    def models(self) -> list[str]:
        """Return names of the models that this run has made, oldest first."""
        return [r["name"] for r in sorted(self.records(), key=lambda r: r["created"]) if r["kind"] in MODELS]

    def load_model(self, name: str) -> torch.nn.Module:
        """Return a model of this run in eval mode, sparse where it is sparse.

        Raises ``WorkspaceError`` when it is missing, damaged, or not a model.
        """
        kind = self.artifact(name)["kind"]
        if kind not in MODELS:
            raise WorkspaceError(f"{name} is not a model: this run has {', '.join(self.models()) or 'none yet'}")
        return (load_sparse if kind == "sparse" else load_dense)(self.folder(name)).eval()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of texts, with the run's own cleaning, tokenising and truncation."""
        return tokenize([clean_text(text) for text in texts], load_tokenizer(self.profile), self.profile)

    def inference_options(self, sparse: bool = False) -> dict:
        """Return how a model of this run is evaluated everywhere: batch size and precision.

        A dense model in the precision of training: in bfloat16, where the machine is faster at it, it takes half the
        time, and logits differ by about 0.01. The sparse engines compute in float32.
        """
        precision = "no" if sparse else distributed.broadcast(mixed_precision(self.profile.precision))
        return {"batch_size": self.profile.eval_batch_size, "precision": precision}

    def judge(self, model: torch.nn.Module, rows: list[list[int]]) -> np.ndarray:
        """Return the logits [n, 2] of a model on token id lists, computed as everywhere in this run.

        In float32 on a CPU a GPT-2 is packed first (``sparse.gpt2``), since padding and the last block's unread tokens
        take a quarter of the time; logits then differ by float32 rounding.
        """
        options = self.inference_options(sparse=bool(sparse_layers(model)))
        plain = isinstance(model, GPT2ForSequenceClassification) and model.device.type == "cpu"
        packed = convert_to_sparse(model, "dense") if plain and options["precision"] == "no" else model
        return predict_logits(packed, rows, **options)

    def predict(self, name: str, texts: list[str]) -> np.ndarray:
        """Return P(positive) [n] of texts, with the run's own cleaning, tokenising, truncation and precision."""
        model = self.load_model(name)
        # The precision is that of the device on which the tables were computed, too.
        model = model if sparse_layers(model) else model.to(distributed.device())
        return torch.as_tensor(self.judge(model, self.encode(texts))).softmax(-1)[:, 1].numpy()

    # --- reports ---

    def results(self) -> dict:
        """Return all metrics recorded so far: {section: {metric: value}}, those that were timed among them."""
        path = self.reports / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        timed = results.pop("timings", {})
        return join_timed(results, timed)

    def write_results(self, results: dict) -> None:
        """Write ``results.json``: what was timed in a section of its own, so that all else is the same each time."""
        steady, timed = split_timed({name: section for name, section in results.items() if name != "run"})
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

    def record_effort(self, **minutes_of: float) -> None:
        """Put on record what the artefacts of all seeds took to build: minutes of processes, in all and by device.

        minutes_of: other minutes, by names.
        """
        runs, minutes = [Run(self.profile, self.seed + i) for i in range(self.profile.seeds)], {}
        for record in (record for run in runs for record in run.records()):
            device = computed_on(record)
            minutes[device] = minutes.get(device, 0.0) + record["seconds"] / 60
        self.record(
            "effort", process_minutes=sum(minutes.values()), cores=cores(), device_minutes=minutes, **minutes_of
        )

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
        """Return the checksums of all tables as they were written, by name."""
        path = self.reports / ".checksums.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def is_as_written(self, table: str) -> bool:
        """Return whether a table is what ``save_table`` wrote; one that was written otherwise is taken as it is."""
        path = self.reports / "tables" / f"{table}.csv"
        return self.checksums().get(table, "") in ("", sha256(path))

    def load_table(self, name: str) -> pd.DataFrame:
        """Return a table that an earlier notebook wrote."""
        path = self.reports / "tables" / f"{name}.csv"
        if not path.exists():
            raise WorkspaceError(f"table {path} is missing: run the notebook that writes it (see ./run_all.sh --list)")
        if not self.is_as_written(name):
            reason = f"table {path} is damaged or was changed"
            raise WorkspaceError(f"{reason}: run the notebook that writes it again (see ./run_all.sh --list)")
        return pd.read_csv(path)

    def save_figure(self, name: str, figure) -> Path:
        """Draw a figure into ``figures/<name>.png`` and return that path."""
        path = self.reports / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png")
        partial.replace(path)
        return path


def module_of(build: Callable) -> str:
    """Return the name of the module that defines a function, also where it was given some of its arguments."""
    return getattr(build, "func", build).__module__


def plain_value(value):
    """Return a number of numpy's or torch's as Python's, anything else as a list, for JSON."""
    return value.item() if hasattr(value, "item") else list(value)


def split_timed(metrics: dict) -> tuple[dict, dict]:
    """Metrics without those that say how long something took, or were chosen by that; and those alone."""
    steady, timed = {}, {}
    for name, value in metrics.items():
        if TIMED.search(name):
            timed[name] = value
        elif isinstance(value, dict):
            steady[name], times = split_timed(value)
            timed |= {name: times} if times else {}
        else:
            steady[name] = value
    return steady, timed


def join_timed(steady: dict, timed: dict) -> dict:
    """Return what ``split_timed`` took apart."""
    both = dict(steady)
    for name, value in timed.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = join_timed(both[name], value) if nested else value
    return both


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the file that ``Run.load_tensors`` reads."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)


def rebuild(run: Run, name: str) -> str:
    """Return how to make an artefact anew, in words."""
    options = f"--profile {run.profile.name}" + (f" --seed {run.seed}" if run.seed else "")
    return f"run notebook {maker_of(name)} again (./run_all.sh {options} --only {maker_of(name)} --force)"


MAKERS = {"scores": "02", "calibration": "02", "int8_student": "05"}
MAKERS |= dict.fromkeys(("sparse", "compact", "blocks", "int8"), "04")
MAKERS |= dict.fromkeys(
    ("rates", "pruned", "labels", "taught", "rescored", "recovered", "hidden", "structured", "fine_tuned_extra"), "03"
)
MAKERS |= dict.fromkeys(("choice_rate", "choice_score"), "03")
MAKERS |= dict.fromkeys(("student", "compressed", "choice_distillation", "choice_compressed"), "05")


def maker_of(name: str) -> str:
    """Return the number of the notebook that makes an artefact, from the artefact's name."""
    return next((number for prefix, number in MAKERS.items() if name.startswith(prefix)), "01")


def open_run(profile: Profile, seed: int = 0) -> Run:
    """Return the run of a profile and a seed; nothing is written until something is saved in it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise WorkspaceError(f"seed must be a whole number from 0 to {2**31 - 1:,} (got {seed!r})")
    return Run(profile, seed)
