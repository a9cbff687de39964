"""Several processes that work as one: torchrun or ``accelerate launch`` starts them, Accelerate connects them.

Every process runs the same program in the same order. Each computes its share of a batch and hears the others' results,
so that all hold the same weights, scores and answers; only the main one leaves artefacts (``Run.cached``). A process
that was started alone is all there are: it is the main one, and nothing below does anything.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


class ProcessError(RuntimeError):
    """Processes that were not started as they were meant to be; the message says how to start them."""


def process_state() -> PartialState:
    """Accelerate's record of this process among the others, and of its device; connects them where it must.

    Raises ``ProcessError`` where ``accelerate launch`` was asked for several processes and, for want of GPUs, started
    one.
    """
    launched = "LOCAL_RANK" in os.environ
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not launched:
        raise ProcessError(
            "accelerate launch has started one process instead of several, as it does where there is no GPU: "
            "add --multi_gpu, which on CPUs connects them by gloo, or use torchrun --nproc-per-node N"
        )
    on_cpu = launched and not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the accelerators that are made later
    return PartialState(cpu=on_cpu)


def world_size() -> int:
    """How many processes there are."""
    return process_state().num_processes


def rank() -> int:
    """The number of this process, from 0."""
    return process_state().process_index


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device on which this process computes."""
    return process_state().device


def barrier() -> None:
    """Go on when all processes have come here."""
    process_state().wait_for_everyone()


def broadcast(value):
    """The main process's value, in all of them."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def all_gather(value) -> list:
    """The values of all processes, in the order of their numbers."""
    return gather_object([value]) if world_size() > 1 else [value]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        on_device = tensor.to(device())  # NCCL sums on GPUs only
        torch.distributed.all_reduce(on_device)
        tensor.copy_(on_device)
    return tensor
