"""Several processes that work as one: torchrun or ``accelerate launch`` starts them, Accelerate connects them.

Every process runs the same program in the same order. Each computes its share of a batch and receives the others'
results, so all hold the same weights, scores and logits; only the main one writes artefacts (``Run.cached``). A process
that was started alone is the main one, and the functions below return at once.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


class ProcessError(RuntimeError):
    """Raised where fewer processes were started than were asked for; the message says how to start them."""


def process_state() -> PartialState:
    """Return Accelerate's record of this process, the others and its device; the first call connects them.

    Raises ``ProcessError`` where ``accelerate launch`` was asked for several processes and, without GPUs, started one.
    """
    launched = "LOCAL_RANK" in os.environ
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not launched:
        raise ProcessError(
            "accelerate launch started one process instead of several, as it does on a machine without GPUs: "
            "add --multi_gpu, which on CPUs connects them by gloo, or use torchrun --nproc-per-node N"
        )
    on_cpu = launched and not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the accelerators that are made later
    return PartialState(cpu=on_cpu)


def world_size() -> int:
    """Return the number of processes."""
    return process_state().num_processes


def rank() -> int:
    """Return the number of this process, from 0."""
    return process_state().process_index


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return the device on which this process computes."""
    return process_state().device


def barrier() -> None:
    """Wait until all processes have called this."""
    process_state().wait_for_everyone()


def broadcast(value):
    """Return the main process's value, in all of them."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def all_gather(value) -> list:
    """Return the values of all processes, in the order of their numbers."""
    return gather_object([value]) if world_size() > 1 else [value]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if world_size() > 1:
        on_device = tensor.to(device())  # NCCL sums on GPUs only
        torch.distributed.all_reduce(on_device)
        tensor.copy_(on_device)
    return tensor
