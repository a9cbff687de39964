"""What this machine is: versions, processor, cores, and the revision of the code."""

import functools
import importlib
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Return the library versions and the device that stand beside every metric."""
    names = ("torch", "transformers", "datasets", "accelerate", "numpy")
    found = {name: importlib.import_module(name).__version__ for name in names}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{processor()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **found, "device": device}


def computed_on(record: dict) -> str:
    """Return the device that made an artefact, and its torch; threads are left out, they differ with ``--jobs``."""
    device = re.sub(r", \d+ threads$", "", record["versions"]["device"])
    return f"{device} (torch {record['versions']['torch']})"


@functools.cache
def processor() -> str:
    """Return the processor's name as its maker gives it, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where ``platform`` knows no name
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def revision() -> str:
    """Return the git revision of the project's code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
