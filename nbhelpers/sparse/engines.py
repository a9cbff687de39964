"""The engines that multiply by a sparse matrix, and the choice of the fastest for a shape."""

import functools
import time
import warnings

import torch

from nbhelpers.sparse import kernels
from nbhelpers.sparse.formats import random_matrix, to_weight

TRIALS = 5
CLEAR = 1.5  # a lead after which no more trials are needed


# --- engines and their choice ---


def numba_engine(x: torch.Tensor, matrix: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The kernel of ``kernels.py``, which runs on the CPU."""
    if x.device.type != "cpu" or matrix[0].device.type != "cpu":
        raise RuntimeError('the backend "numba" runs on the CPU: convert the model where it will run')
    return kernels.multiply(x, matrix)


ENGINES = {"numba": numba_engine, "torch_csr": kernels.torch_csr}


@functools.cache
def choose_backend(out_features: int, in_features: int, density: float, tokens: int, device: str) -> str:
    """The engine that is fastest for a random matrix of this shape and density; measured once in a process.

    The engines take turns and the best of a few trials counts, so that other programs disturb the choice little.
    """
    matrix, x = random_matrix(out_features, in_features, density, device), torch.randn(tokens, in_features).to(device)
    weight, engines = to_weight(matrix, in_features), {}
    if device == "cpu" and kernels.numba is not None:
        engines["numba"] = lambda: kernels.multiply(x, matrix)
    else:
        if device == "cpu":
            announce_missing_numba()
        engines["torch_csr"] = lambda: kernels.torch_csr(x, matrix)
    engines["dense"] = lambda: kernels.dense(x, weight, matrix[3])
    best = dict.fromkeys(engines, float("inf"))
    with torch.inference_mode():
        for trial in range(TRIALS + 1):
            for name, run in engines.items():
                started = time.perf_counter()
                run()
                if device != "cpu":
                    torch.cuda.synchronize()
                if trial:  # the first one compiles and warms the caches
                    best[name] = min(best[name], time.perf_counter() - started)
            if trial > 1 and max(best.values()) > CLEAR * min(best.values()):
                break
    return min(best, key=best.get)


@functools.cache
def announce_missing_numba() -> None:
    """Say once that the fast engine is missing."""
    warnings.warn(f"sparse layers run on torch's CSR, which is slower: {kernels.MISSING}", stacklevel=3)
