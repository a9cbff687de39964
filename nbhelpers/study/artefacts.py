"""Models and statistics of a run as files: their names, how they are saved and read back, their bytes."""

import json
from pathlib import Path

import pandas as pd
import torch

from nbhelpers.models import load_config, save_dense
from nbhelpers.training import distributed
from nbhelpers.workspace import Run, save_tensors

HISTORY = "history.json"


def model_name(stage: str, criterion: str, sparsity: float) -> str:
    """Return ``recovered_magnitude_90`` and the like."""
    return f"{stage}_{criterion}_{percent(sparsity)}"


def percent(share: float) -> str:
    """Return a share in percent as it stands in names; tenths are kept where there are any: 90, 97p5."""
    return f"{100 * share:g}".replace(".", "p")


def is_sparse(run: Run, name: str) -> bool:
    """Return whether a model of a run computes on sparse engines."""
    return run.artifact(name)["kind"] == "sparse"


def on_device(run: Run, name: str) -> torch.nn.Module:
    """Return a model of a run on the device that computes; a sparse one on the CPU, for which its kernels are."""
    return run.load_model(name) if is_sparse(run, name) else run.load_model(name).to(distributed.device())


def layer_count(run: Run, name: str) -> int:
    """Return how many transformer blocks a model of a run has."""
    return load_config(run.folder(name)).num_hidden_layers


def source_of(name: str) -> str | None:
    """Return the model that a model was made from, which may have been trained itself; None for the first of all."""
    stage, _, rest = name.partition("_")
    if name in ("pretrained", "fine_tuned"):
        return None
    if stage == "int8":
        return rest
    earlier = {"sparse": "recovered", "compact": "structured", "compressed": "student_distilled"}.get(stage)
    return f"{earlier}_{rest}" if earlier else "fine_tuned"


def training_effort(run: Run, name: str) -> tuple[int, int]:
    """Return how many optimizer steps and tokens a model took since the fine-tuned model, with those of its sources."""
    steps = tokens = 0
    while source_of(name):
        if (run.folder(name) / HISTORY).is_file():
            history = read_history(run, name)
            steps, tokens = steps + int(history["steps"].iloc[-1]), tokens + int(history["tokens"].sum())
        name = source_of(name)
    return steps, tokens


# --- saving and reading ---


def write_history(folder: Path, history: list[dict]) -> None:
    """Write the learning curve of a training, as ``read_history`` reads it."""
    (folder / HISTORY).write_text(json.dumps(history, indent=1), encoding="utf-8")


def read_history(run: Run, name: str) -> pd.DataFrame:
    """Return the learning curve of a model, a row per epoch; see ``training.train`` for its columns."""
    return pd.DataFrame(json.loads((run.folder(name) / HISTORY).read_text(encoding="utf-8")))


def save_trained(model, history: list[dict], folder: Path) -> None:
    """Write a dense model and its learning curve."""
    save_dense(model, folder)
    write_history(folder, history)


def save_statistics(folder: Path, statistics: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write {statistic: {parameter name: tensor}}, as ``load_statistics`` reads it."""
    save_tensors(folder, {f"{key}/{name}": t for key, tensors in statistics.items() for name, t in tensors.items()})


def load_statistics(run: Run, artefact: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the statistics of an artefact: {statistic: {parameter name: tensor}}."""
    found = {}
    for key, tensor in run.load_tensors(artefact).items():
        statistic, name = key.split("/", 1)
        found.setdefault(statistic, {})[name] = tensor
    return found


# --- bytes ---


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the files that hold a model's weights; statistics that lie beside them do not count."""
    files = [*folder.glob("model*.safetensors"), *folder.glob("sparse.safetensors")]
    return sum(path.stat().st_size for path in files)


def model_bytes(run: Run, name: str) -> int:
    """Return the bytes of a model's weight files."""
    return weight_bytes(run.folder(name))
