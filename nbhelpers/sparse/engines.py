"""The engines that multiply by a sparse matrix, and the choice of the fastest for a shape."""

import functools
import time

import torch

from nbhelpers.sparse import kernels
from nbhelpers.sparse.formats import random_matrix, to_weight

ENGINES = {"numba": kernels.multiply, "torch_csr": kernels.torch_csr}
TRIALS = 5
CLEAR = 1.5  # a lead after which no more trials are needed


@functools.cache
def choose_backend(out_features: int, in_features: int, density: float, tokens: int, device: str) -> str:
    """Return the engine that is fastest for a random matrix of this shape and density; measured once per process.

    The engines run in turns and the best of a few trials counts, so that other programs affect the choice little. A
    matrix without zeros is not measured: a sparse product would do the same multiplications and read indices as well.
    """
    if density == 1:
        return "dense"
    matrix, x = random_matrix(out_features, in_features, density, device), torch.randn(tokens, in_features).to(device)
    weight = to_weight(matrix, in_features)
    if device == "cpu":
        engines = {"numba": lambda: kernels.multiply(x, matrix)}
    else:
        engines = {"torch_csr": lambda: kernels.torch_csr(x, matrix)}
    engines["dense"] = lambda: kernels.dense(x, weight, matrix[3])
    best = dict.fromkeys(engines, float("inf"))
    with torch.inference_mode():
        for trial in range(TRIALS + 1):
            for name, run in engines.items():
                started = time.perf_counter()
                run()
                if device != "cpu":
                    torch.cuda.synchronize()
                if trial:  # the first trial compiles and warms the caches
                    best[name] = min(best[name], time.perf_counter() - started)
            if trial > 1 and max(best.values()) > CLEAR * min(best.values()):
                break
    return min(best, key=best.get)
