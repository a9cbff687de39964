"""Files that are written whole or not at all: beside their place, then renamed into it; and their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value) -> str:
    """Return a short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def own_sibling(folder: Path, kind: str) -> Path:
    """Return where this process, of all that may write into one workspace, keeps its part of a folder."""
    return folder.with_name(f"{folder.name}.{platform.node()}-{os.getpid()}.{kind}")


def is_running(pid: int) -> bool:
    """Return whether a process of this machine is there and not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error as error:
        return not isinstance(error, psutil.NoSuchProcess)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine left beside a folder that they were writing when they were killed."""
    for path in folder.parent.glob(f"{folder.name}.*-*.*"):
        machine, _, pid = path.stem.removeprefix(f"{folder.name}.").rpartition("-")
        if machine == platform.node() and (int(pid) == os.getpid() or not is_running(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def put_in_place(partial: Path, folder: Path, old: Path) -> None:
    """Rename ``partial`` to ``folder``; what was there goes to ``old``."""
    while True:
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        try:
            partial.rename(folder)
            return
        except OSError as error:
            # Another process has put its own there meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give a fresh folder to write into, which takes the place of ``folder`` only when the block ends without error.

    Of several processes that write the same folder at once, each writes a whole one; the last to end stays.
    """
    remove_leftovers(folder)
    partial, old = own_sibling(folder, "partial"), own_sibling(folder, "old")
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, folder, old)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a fresh folder to write into that is gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
