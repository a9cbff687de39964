"""How far a computation is and how much time it has left, in whatever the reader looks at.

In JupyterLab a bar in the cell, in a terminal a bar in its last line, in a log or a pipe a line every half minute; a
notebook that the pipeline runs writes where it stands into a file, which the pipeline shows. What ends within two
seconds shows nothing, and what has ended leaves nothing behind.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

from IPython import get_ipython
from tqdm import tqdm
from tqdm.notebook import tqdm as tqdm_notebook

DELAY, IN_LOGS = 2, 30  # seconds before anything is shown, and between two lines of a log
IN_WORDS = "{desc}: {percentage:.0f} %, {remaining} left"
WITHOUT_END = "{desc} ..."
ONE_LINE = {"position": 0}  # a bar within a bar would else move the cursor, which only a terminal has


class Lines:
    """A stream for tqdm that writes each of its frames as a line of its own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, frame: str) -> None:
        if frame.strip():
            self.stream.write(frame.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


class LastLine:
    """A stream for tqdm that keeps its latest frame in a file, where another process reads it; empty at the end."""

    def __init__(self, path: str):
        self.path = Path(path)

    def write(self, frame: str) -> None:
        self.path.write_text(frame.strip(), encoding="utf-8")

    def flush(self) -> None:
        """Nothing is held back."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def progress(total: int | None, description: str, done: int = 0) -> tqdm:
    """Return a bar to ``update``, of the main process only (``RANK`` 0); total None: its length is unknown.

    Silent in a batch run that nobody follows (``NBHELPERS_BATCH`` without ``NBHELPERS_PROGRESS``).
    """
    form, delay = (IN_WORDS, DELAY) if total else (WITHOUT_END, 0)
    options = {"total": total, "initial": done, "desc": description, "leave": False, "delay": delay}
    followed = os.environ.get("NBHELPERS_PROGRESS")
    if os.environ.get("RANK", "0") != "0" or ("NBHELPERS_BATCH" in os.environ and not followed):
        return tqdm(disable=True, **options)
    if followed:
        return tqdm(file=LastLine(followed), mininterval=1, bar_format=form, **options | ONE_LINE)
    if in_notebook():
        return tqdm_notebook(mininterval=0.5, **options)
    if sys.stderr.isatty():
        return tqdm(mininterval=0.5, **options)
    # One update at least: of several, tqdm's monitor would write a line again.
    slow = options | ONE_LINE | {"delay": IN_LOGS if total else 0, "miniters": 1}
    return tqdm(file=Lines(sys.stderr), mininterval=IN_LOGS, bar_format=form, **slow)


def track(items: Iterable, description: str) -> Iterator:
    """Return the items one by one, with a bar that counts them."""
    items = items if isinstance(items, Sized) else list(items)
    with progress(len(items), description) as bar:
        for item in items:
            yield item
            bar.update()
