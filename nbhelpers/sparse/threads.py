"""Compiled functions on torch's own threads: a second pool would compete with torch's, which spins after a product."""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np
import torch

L2_ASSUMED = 512 * 1024  # bytes, where the system does not report it


@functools.cache
def torch_threads():
    """Return the function that runs a worker on torch's OpenMP threads; None where it has others (macOS, Windows)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not sys.platform.startswith("linux") or not library.exists():
        return None
    run = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
    if run is not None:
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


def run_workers(
    worker, sizes: np.ndarray, counters: np.ndarray, tensors: tuple[torch.Tensor, ...], workers: int
) -> None:
    """Run a compiled worker on some of torch's threads, or on this one where they cannot be reached."""
    job = np.array([sizes.ctypes.data, counters.ctypes.data, *(tensor.data_ptr() for tensor in tensors)])
    run = torch_threads()
    if run is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker.address)(job.ctypes.data)
    else:
        run(worker.address, job.ctypes.data, workers, 0)


@functools.cache
def l2_bytes() -> int:
    """Return the size of a core's second-level cache in bytes; 512 KiB where the system does not report it."""
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (cache / "level").read_text().strip() == "2":
                return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return L2_ASSUMED
