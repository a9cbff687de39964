"""Execute one notebook through papermill, in the interpreter of this process, and make its copy fit to be shown."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from nbhelpers.measurement import memory_of_tree
from nbhelpers.system.progress import IN_LOGS
from nbhelpers.workspace import root

PROJECT = Path(__file__).parents[2]
SKIPPED = "solution"  # tag of cells that a run leaves out; the tests set NBHELPERS_SOLUTIONS and execute them


class NotebookError(Exception):
    """Where and why a notebook failed, in one line."""


def clear(copy: Path) -> None:
    """Remove the copy of a run that failed, and the log of its kernel."""
    for leftover in (copy, copy.with_suffix(".log")):
        leftover.unlink(missing_ok=True)


class OwnKernel(AsyncKernelManager):
    """Manages a kernel in the interpreter of this process, whatever kernels are installed elsewhere."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-P", "-m", "nbhelpers.pipeline.kernel", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def kernel_environment() -> dict[str, str]:
    """Return the variables that the notebooks' kernels see beside this process's own."""
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "NBHELPERS_ROOT": str(root()),
        "NBHELPERS_BATCH": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # As in the processes that compute: a second thread gains little here, and the results are the same bits.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Libraries that want a widget for their bars say so in the first cell that imports them.
        "PYTHONWARNINGS": "ignore:IProgress not found",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # Any other backend that the user has set would leave figures out of the executed notebook.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


class Follower:
    """Shows, while its block runs, how far a notebook is and how far the computation in its cell.

    In a terminal papermill's bar over the cells with the computation behind it, in one line; in a log or a pipe nothing
    but a line every half minute of a long computation. ``bar`` is what papermill takes as its progress bar; its kernel
    is told by ``NBHELPERS_PROGRESS`` to keep the state of its computation in the file ``path``.
    """

    def __init__(self, name: str, path: Path, stream=sys.stdout):
        self.name, self.path, self.stream, self.ended = name, path, stream, threading.Event()
        self.cells = self.inner = ""
        form = "{desc} |{bar:24}| cell {n_fmt} of {total_fmt}, {elapsed}"
        options = {"desc": f"{name:22}", "leave": False, "file": self, "bar_format": form, "ncols": 80}
        self.bar = options if stream.isatty() else False

    def write(self, frame: str) -> None:
        """Draw a frame of papermill's bar."""
        self.cells = frame.strip("\r\n ")
        self.draw()

    def flush(self) -> None:
        self.stream.flush()

    def draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        # To the start of the line, the text, and nothing of what was longer before.
        self.stream.write(f"\r{f'{self.cells}  {self.inner}'.strip()[:width]}\x1b[K")
        self.stream.flush()

    def watch(self) -> None:
        last_line = time.monotonic()
        while not self.ended.wait(0.5):
            before = self.inner
            with contextlib.suppress(FileNotFoundError):
                self.inner = self.path.read_text(encoding="utf-8")
            if self.inner.split(":")[0] != before.split(":")[0]:
                last_line = time.monotonic()  # another computation
            if self.bar and self.inner != before:
                self.draw()
            elif not self.bar and self.inner and time.monotonic() - last_line > IN_LOGS:
                print(f"{self.name:22} {self.inner}", file=self.stream, flush=True)
                last_line = time.monotonic()

    def __enter__(self) -> "Follower":
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.watcher.join()
        self.path.unlink(missing_ok=True)
        if self.bar:
            self.cells = self.inner = ""
            self.draw()


def fill_in(path: Path) -> str:
    """Return a path as papermill takes it, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


class Kernels:
    """The kernels of a chain of notebooks: the next one starts and imports its libraries while one notebook runs.

    copies: notebooks in their order, and where the executed copy of each is written. A context manager; at its end a
    kernel that no notebook has used is shut down.
    """

    def __init__(self, copies: dict[Path, Path]):
        self.copies = copies
        self.waiting: dict[Path, OwnKernel] = {}
        self.running: OwnKernel | None = None

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(self, *error) -> None:
        for notebook, kernel in self.waiting.items():
            asyncio.run(kernel.shutdown_kernel(now=True))
            clear(self.copies[notebook])

    def start(self, notebook: Path) -> None:
        """Start the kernel of a notebook."""
        copy = self.copies[notebook]
        clear(copy)
        copy.parent.mkdir(parents=True, exist_ok=True)
        kernel = OwnKernel()
        variables = kernel_environment() | {"NBHELPERS_PROGRESS": str(copy.with_suffix(".progress"))}
        with copy.with_suffix(".log").open("w") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": str(notebook.parent)}
            asyncio.run(kernel.start_kernel(env=os.environ | variables, **options))
        self.waiting[notebook] = kernel

    def memory(self) -> int:
        """Return the bytes in memory of the kernel whose notebook is running, and of the processes it started."""
        return memory_of_tree(self.running.provisioner.pid) if self.running else 0

    def execute(self, notebook: Path, parameters: dict):
        """Execute a notebook in its own folder and return it; its copy shows how far it got, also when it fails.

        Raises ``NotebookError`` with the cell and the error.
        """
        copy = self.copies[notebook]
        if notebook not in self.waiting:
            self.start(notebook)
        self.running = self.waiting.pop(notebook)
        try:
            later = list(self.copies)[list(self.copies).index(notebook) + 1 :]
            if later:
                self.start(later[0])
            with Follower(notebook.stem, copy.with_suffix(".progress")) as follower:
                return papermill.execute_notebook(
                    fill_in(notebook),
                    fill_in(copy),
                    parameters,
                    kernel_name="python3",
                    cwd=str(notebook.parent),
                    progress_bar=follower.bar,
                    km=self.running,
                    skip_cells_with_tag=SKIPPED if not os.environ.get("NBHELPERS_SOLUTIONS") else "",
                    start_timeout=600,  # seconds; a slow disk takes long over the first import of torch
                )
        except PapermillExecutionError as error:
            message = (str(error.evalue).strip().splitlines() or [""])[0][:300]
            raise NotebookError(f"cell In [{error.exec_count}]: {error.ename}: {message}") from error
        except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
            raise NotebookError(f"{cell_running(copy)}: its kernel died ({error}); out of memory?") from error
        finally:
            asyncio.run(self.running.shutdown_kernel(now=True))
            self.running = None


def cell_running(copy: Path) -> str:
    """Return the last cell of an executed copy that had begun."""
    cells = nbformat.read(copy, as_version=4).cells if copy.is_file() else []
    for index, cell in reversed(list(enumerate(cells))):
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time"):
            return f"cell {index + 1} of {len(cells)} ({cell.source.splitlines()[0][:60]})"
    return "before its first cell"


def output_faults(notebook) -> list[str]:
    """Return errors shown and cells not reached: ``sys.exit(0)`` in a cell ends a notebook without an error."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source.strip():
            found += [f"cell {index + 1} shows a {o.ename}" for o in cell.outputs if o.output_type == "error"]
            if cell.execution_count is None and SKIPPED not in cell.metadata.get("tags", []):
                found.append(f"cell {index + 1} was not executed")
    return found


def scrub(notebook) -> None:
    """Take everything out of an executed notebook that belongs to this machine or this moment."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = without_paths(output.text)
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(data, str):
                    output.data[kind] = without_paths(data)
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def without_paths(text: str) -> str:
    """Return a text with "." for the project's and the workspace's folder, and "<cell>" for a temporary file."""
    for folder in sorted({str(PROJECT), str(root())}, key=len, reverse=True):
        text = text.replace(folder, ".")
    return re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text)
