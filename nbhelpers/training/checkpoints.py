"""Where a training stands, on disk: complete or not there, and taken up again as if nothing had happened.

    .artifacts/<profile>/seed-<n>/<artefact>.checkpoint/<training>/step-<n>/    state.safetensors, state.json

A checkpoint holds all that the rest of a training hangs on: the weights and the best ones so far, the optimizer's
moments, the learning rates, the random generators, what observers have gathered, how far masks have come, and the
place in the data. On the same machine and number of threads, a training that goes on from one ends with the weights of
one that was never interrupted, bit for bit.
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
class Standing:
    """How far a training has come: optimizer steps, the entries of finished epochs, and the epoch that is under way."""

    step: int = 0
    history: list[dict] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    best: tuple[float, dict[str, torch.Tensor]] | None = None


class Checkpoints:
    """The checkpoints of one training in a folder; only the newest is kept.

    about: a hash of all that the training depends on; a checkpoint of something else is not taken up. seconds: between
    two of them, ``SECONDS`` or what the environment variable NBHELPERS_CHECKPOINT_SECONDS says.
    """

    def __init__(self, folder: Path, about: str, seconds: float | None = None):
        self.folder, self.about = folder, about
        wish = os.environ.get("NBHELPERS_CHECKPOINT_SECONDS", SECONDS)
        self.seconds = float(wish) if seconds is None else seconds
        self.saved, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time for another one; the main process decides for all."""
        wait = max(self.seconds, 20 * self.cost) if self.seconds else 0.0  # 0: at every step
        return distributed.broadcast(time.monotonic() - self.saved >= wait)

    def save(self, standing: Standing, model: nn.Module, optimizer, parts: list) -> None:
        """Write a checkpoint, and remove the ones before it once it is complete.

        parts: what else has a state: objects with ``state()`` and ``load_state(tensors)``.
        """
        started = time.monotonic()
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
        for i, part in enumerate(parts):
            tensors |= {f"part{i}.{name}": value for name, value in part.state().items()}
        if standing.best:
            tensors |= {f"best.{name}": value for name, value in standing.best[1].items()}
        # Each process has losses and a random generator of its own.
        losses = torch.stack(standing.losses).cpu() if standing.losses else torch.zeros(0)
        for rank, (own, generators) in enumerate(distributed.all_gather((losses, generator_states()))):
            tensors |= {f"losses.{rank}": own, **{f"{name}.{rank}": state for name, state in generators.items()}}
        if distributed.is_main_process():
            self.write(standing, tensors, [group["lr"] for group in optimizer.param_groups])
        self.saved, self.cost = time.monotonic(), time.monotonic() - started

    def write(self, standing: Standing, tensors: dict[str, torch.Tensor], rates: list[float]) -> None:
        folder = self.folder / f"step-{standing.step:08d}"
        record = {"about": self.about, "processes": distributed.world_size(), "step": standing.step}
        record |= {"history": standing.history, "seconds": standing.seconds, "rates": rates}
        record["best"] = standing.best[0] if standing.best else None
        with replace_folder(folder) as partial:
            file = partial / "state.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
            (partial / "state.json").write_text(json.dumps(record | {"sha256": sha256(file)}), encoding="utf-8")
        for other in self.complete():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def complete(self) -> list[Path]:
        """The folders of all checkpoints, the newest first."""
        return sorted(self.folder.glob("step-" + "[0-9]" * 8), reverse=True)

    def newest(self) -> tuple[dict, dict[str, torch.Tensor]] | None:
        """The record and the tensors of the newest whole checkpoint of this training; says why others are passed by."""
        for path in self.complete():
            try:
                record = json.loads((path / "state.json").read_text(encoding="utf-8"))
                if record["sha256"] != sha256(path / "state.safetensors"):
                    raise ValueError("its checksum is wrong")
                tensors = load_file(path / "state.safetensors")
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                say(f"the checkpoint {path} is damaged ({error}): it is passed by")
                continue
            if (record["about"], record["processes"]) == (self.about, distributed.world_size()):
                return record, tensors
            say(f"the checkpoint {path} is of other settings, code or processes: it is passed by")
        return None

    def restore(self, model: nn.Module, optimizer, parts: list) -> Standing:
        """Bring everything to where the newest checkpoint left it; a fresh ``Standing`` where there is none."""
        found = self.newest()
        if not found:
            return Standing()
        record, tensors = found
        model.load_state_dict(under("model.", tensors))
        load_optimizer_tensors(optimizer, under("optimizer.", tensors))
        for group, rate in zip(optimizer.param_groups, record["rates"], strict=True):
            group["lr"] = rate
        for i, part in enumerate(parts):
            part.load_state(under(f"part{i}.", tensors))
        rank = distributed.rank()
        set_generators({name: tensors[f"{name}.{rank}"] for name in generator_states()})
        device = next(model.parameters()).device
        losses = [loss.to(device) for loss in tensors[f"losses.{rank}"]]
        best = None
        if record["best"] is not None:
            best = record["best"], {name: value.to(device) for name, value in under("best.", tensors).items()}
        say(f"going on at step {record['step']}")
        return Standing(record["step"], record["history"], losses, record["seconds"], best)


def say(sentence: str) -> None:
    """Print a sentence, once for all processes."""
    if distributed.is_main_process():
        print(sentence, flush=True)


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def generator_states() -> dict[str, torch.Tensor]:
    """The states of torch's random generators, uint8."""
    states = {"generator": torch.get_rng_state()}
    return states | ({"cuda_generator": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Put torch's random generators into the states that ``generator_states`` gave."""
    torch.set_rng_state(states["generator"])
    if "cuda_generator" in states:
        torch.cuda.set_rng_state(states["cuda_generator"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as named tensors, which safetensors can store: ``"<parameter index>.<entry>"``."""
    return {
        f"{i}.{key}": torch.as_tensor(value).contiguous()
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what ``optimizer_tensors`` gave, for the same parameters in the same order."""
    state = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
