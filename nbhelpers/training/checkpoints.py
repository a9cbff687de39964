"""Checkpoints of a training: written whole or not at all, and continued from as if nothing had happened.

    .artifacts/<profile>/seed-<n>/<artefact>.checkpoint/<training>/step-<n>/    state.safetensors, state.json

A checkpoint holds all that the rest of a training depends on: the weights and the best ones so far, the optimizer's
moments, the learning rates, the random generators, the observers' sums, the masks, and the position in the data. On
the same machine and number of threads, a training that continues from one ends with the weights of one that was never
interrupted, bit for bit.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nbhelpers.system.files import replace_folder, sha256
from nbhelpers.training import distributed

SECONDS = 60.0  # between two checkpoints, or 20 times what the last one took to write, if that is more


@dataclass
class TrainingState:
    """How far a training has come: optimizer steps, finished epochs, and the losses and seconds of the current one."""

    step: int = 0
    history: list[dict] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    best: tuple[float, dict[str, torch.Tensor]] | None = None


class Checkpoints:
    """The checkpoints of one training in a folder; only the newest is kept.

    key: a hash of all that the training depends on; a checkpoint with another key is not used. At least ``SECONDS``,
    or what the environment variable NBHELPERS_CHECKPOINT_SECONDS says, lie between two of them.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.seconds = float(os.environ.get("NBHELPERS_CHECKPOINT_SECONDS", SECONDS))
        self.saved, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Return whether it is time for another one; the main process decides for all."""
        wait = max(self.seconds, 20 * self.cost) if self.seconds else 0.0  # 0: at every step
        return distributed.broadcast(time.monotonic() - self.saved >= wait)

    def save(self, state: TrainingState, model: nn.Module, optimizer, others: list) -> None:
        """Write a checkpoint, and remove the ones before it once it is complete.

        others: what else has a state: objects with ``state()`` and ``load_state(tensors)``.
        """
        started = time.monotonic()
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
        for i, other in enumerate(others):
            tensors |= {f"other{i}.{name}": value for name, value in other.state().items()}
        if state.best:
            tensors |= {f"best.{name}": value for name, value in state.best[1].items()}
        # Each process has losses and random generators of its own.
        own = {"losses": torch.stack(state.losses).cpu() if state.losses else torch.zeros(0)} | generator_states()
        for rank, values in enumerate(distributed.all_gather(own)):
            tensors |= {f"{name}.{rank}": value for name, value in values.items()}
        if distributed.is_main_process():
            self.write(state, tensors, [group["lr"] for group in optimizer.param_groups])
        self.saved, self.cost = time.monotonic(), time.monotonic() - started

    def write(self, state: TrainingState, tensors: dict[str, torch.Tensor], rates: list[float]) -> None:
        """Write one checkpoint, and remove the others."""
        folder = self.folder / f"step-{state.step:08d}"
        record = {"key": self.key, "processes": distributed.world_size(), "step": state.step}
        record |= {"history": state.history, "seconds": state.seconds, "rates": rates}
        record["best"] = state.best[0] if state.best else None
        with replace_folder(folder) as partial:
            file = partial / "state.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
            (partial / "state.json").write_text(json.dumps(record | {"sha256": sha256(file)}), encoding="utf-8")
        for other in self.complete():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def complete(self) -> list[Path]:
        """Return the folders of all checkpoints, the newest first."""
        return sorted(self.folder.glob("step-" + "[0-9]" * 8), reverse=True)

    def newest(self) -> tuple[dict, dict[str, torch.Tensor]] | None:
        """Return record and tensors of the newest usable checkpoint, or None; print why others are not used."""
        for path in self.complete():
            try:
                record = json.loads((path / "state.json").read_text(encoding="utf-8"))
                if record["sha256"] != sha256(path / "state.safetensors"):
                    raise ValueError("its checksum is wrong")
                tensors = load_file(path / "state.safetensors")
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                print_once(f"skipping checkpoint {path}: it is damaged ({error})")
                continue
            if (record["key"], record["processes"]) == (self.key, distributed.world_size()):
                return record, tensors
            print_once(f"skipping checkpoint {path}: it was made by other settings, code or number of processes")
        return None

    def restore(self, model: nn.Module, optimizer, others: list) -> TrainingState:
        """Set everything to what the newest checkpoint stored; return its state, or a new one where there is none."""
        found = self.newest()
        if not found:
            return TrainingState()
        record, tensors = found
        model.load_state_dict(under("model.", tensors))
        load_optimizer_tensors(optimizer, under("optimizer.", tensors))
        for group, rate in zip(optimizer.param_groups, record["rates"], strict=True):
            group["lr"] = rate
        for i, other in enumerate(others):
            other.load_state(under(f"other{i}.", tensors))
        rank = distributed.rank()
        set_generators({name: tensors[f"{name}.{rank}"] for name in generator_states()})
        device = next(model.parameters()).device
        losses = [loss.to(device) for loss in tensors[f"losses.{rank}"]]
        best = None
        if record["best"] is not None:
            best = record["best"], {name: value.to(device) for name, value in under("best.", tensors).items()}
        print_once(f"continuing at step {record['step']}")
        return TrainingState(record["step"], record["history"], losses, record["seconds"], best)


def print_once(sentence: str) -> None:
    """Print a sentence, in the main process only."""
    if distributed.is_main_process():
        print(sentence, flush=True)


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def generator_states() -> dict[str, torch.Tensor]:
    """Return the states of torch's random generators, uint8."""
    states = {"generator": torch.get_rng_state()}
    return states | ({"cuda_generator": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Set torch's random generators to what ``generator_states`` returned."""
    torch.set_rng_state(states["generator"])
    if "cuda_generator" in states:
        torch.cuda.set_rng_state(states["cuda_generator"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as named tensors, which safetensors can store: ``"<parameter index>.<entry>"``."""
    return {
        f"{i}.{key}": torch.as_tensor(value).contiguous()
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what ``optimizer_tensors`` returned, for the same parameters in the same order."""
    state = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
