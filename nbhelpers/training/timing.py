"""How long a step of training takes on this machine, and with how many threads training is fastest."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from nbhelpers.system.machine import cores
from nbhelpers.training import distributed
from nbhelpers.training.loop import Recipe, Stepper, classification_loss

CLEARLY = 0.75  # of the time of one thread, below which more are used: a choice should not change from run to run


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads inside the block; the sparse kernels use the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(seconds: float, step: Callable[[], object]) -> float:
    """Return how long a step takes: the median over so many seconds, after a first one that does not count."""
    step()
    times, started = [], time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def training_step(model: PreTrainedModel, recipe: Recipe, length: int) -> Callable[[], object]:
    """Return a function that makes one step of training a copy of a model, on reviews of a length in tokens."""
    ids = torch.full((recipe.batch_size, length), model.config.pad_token_id)
    batch = {"input_ids": ids, "lengths": torch.full((len(ids),), length), "labels": torch.zeros(len(ids), dtype=int)}
    loss = partial(classification_loss, prefix_share=recipe.prefix_share)
    stepper = Stepper(copy.deepcopy(model), recipe, 10**6, loss, (), None)
    return lambda: list(stepper.run([batch], 1))


def fastest_threads(model: PreTrainedModel, recipe: Recipe, length: int, seconds: float = 0.5) -> int:
    """Return the number of threads with which training is fastest: one, or all cores where that is ``CLEARLY`` faster.

    Measured on reviews of a length in tokens, for so many seconds with each. Beside other work on the machine, threads
    wait for each other in every product. On a GPU, and of several processes, the number stays as it is.
    """
    if cores() == 1 or distributed.world_size() > 1 or distributed.device().type != "cpu":
        return torch.get_num_threads()
    step, times = training_step(model, recipe, length), {}
    for count in (1, cores()):
        with with_threads(count):
            times[count] = timed(seconds, step)
    return cores() if times[cores()] < CLEARLY * times[1] else 1
