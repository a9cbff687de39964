"""The engines that multiply by a sparse matrix, and the choice of the fastest for a shape."""

import functools
import time
from collections.abc import Callable

import torch

from nbhelpers.sparse import blocks, int8, kernels
from nbhelpers.sparse.formats import quantize_matrix, random_matrix, to_weight

EIGHT_BITS = ("int8", "int8_blocks")
TRIALS = 5
CLEAR = 1.5  # a lead after which no more trials are needed


def dense(x: torch.Tensor, matrix: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return x @ weight.T + bias, with the zeros in it; matrix: (weight, bias)."""
    return torch.nn.functional.linear(x, *matrix)


ENGINES = {"numba": kernels.multiply, "torch_csr": kernels.torch_csr, "dense": dense}


def check_int8_engine(backend: str, device: str) -> None:
    """Raise ``RuntimeError`` where an int8 engine does not run: off the CPU, or on a machine that lacks it."""
    if device != "cpu":
        raise RuntimeError(f'the backend "{backend}" must have all tensors on the CPU (got {device})')
    int8.activation_levels()
    if backend == "int8_blocks" and not blocks.is_available():
        raise RuntimeError('the backend "int8_blocks" needs a processor with VNNI or AVX2, which this one has not')


def int8_engines(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the products by the int8 engines that run here, of a weight [out, in] that is rounded to eight bits."""
    (numbers, scale), engines = quantize_matrix(weight), {}
    if int8.is_available():
        packed = (int8.pack(numbers), scale, bias)
        engines["int8"] = lambda: int8.multiply(x, packed)
    if blocks.is_available():
        stored = (*blocks.to_blocks(numbers), scale, bias)
        engines["int8_blocks"] = lambda: blocks.multiply(x, stored)
    return engines


@functools.cache
def choose_backend(
    out_features: int,
    in_features: int,
    density: float,
    block_density: float,
    tokens: int,
    device: str,
    eight_bits: bool,
) -> str:
    """Return the engine that is fastest for a random matrix of this shape and density; measured once per process.

    density: of single weights; block_density: of blocks of four; eight_bits: whether the int8 engines are candidates.
    The engines run in turns and the best of a few trials counts, so that other programs affect the choice little. A
    sparse product of a matrix without zeros is not measured: it would do the same multiplications and read indices too.
    """
    if density == 1 and not eight_bits:
        return "dense"
    x, engines = torch.randn(tokens, in_features).to(device), {}
    matrix = random_matrix(out_features, in_features, density, device)
    weight = to_weight(matrix, in_features)
    engines["dense"] = lambda: dense(x, (weight, matrix[3]))
    if density < 1:
        name = "numba" if device == "cpu" else "torch_csr"
        engines[name] = lambda: ENGINES[name](x, matrix)
    if eight_bits and device == "cpu":
        of_blocks = random_matrix(out_features, in_features, block_density, block=blocks.BLOCK)
        engines |= int8_engines(x, to_weight(of_blocks, in_features), of_blocks[3])
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
            fastest, second = sorted(best.values())[:2]
            if trial > 1 and second > CLEAR * fastest:
                break
    return min(best, key=best.get)
