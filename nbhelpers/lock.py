"""One pipeline at a time in a workspace: a lock that names its holder and that ends with it, however that happens."""

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from nbhelpers.workspace import Run, WorkspaceError, write_text

# A holder who has not said yet who he is, or has just ended.
UNKNOWN = {"pid": "unknown", "machine": "unknown", "since": "a moment ago", "stage": ""}


def files(run: Run) -> tuple[Path, Path]:
    """The lock, which the system takes from a process that dies, and who says that he has it."""
    return run.artifacts / ".running.lock", run.artifacts / ".running.json"


def holder(run: Run) -> dict | None:
    """Who is running in a workspace: pid, machine, since, stage; None where nobody is."""
    lock, about = files(run)
    if not lock.exists():
        return None
    try:
        with FileLock(lock, timeout=0):
            return None
    except Timeout:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(about.read_text(encoding="utf-8"))
        return UNKNOWN


def describe(who: dict) -> str:
    """A holder in words: ``process 123 on laptop, since 10:03``."""
    return f"process {who['pid']} on {who['machine']}, since {who['since']}"


@contextlib.contextmanager
def only_one(run: Run) -> Iterator[Callable[[str], None]]:
    """Hold a workspace while the block runs; gives a function that says which stage is under way.

    Raises ``WorkspaceError`` with the holder's name where another process holds it. What a dead one left is cleared.
    """
    lock, about = files(run)
    lock.parent.mkdir(parents=True, exist_ok=True)
    own = FileLock(lock, timeout=0)
    try:
        own.acquire()
    except Timeout:
        who = describe(holder(run) or UNKNOWN)
        raise WorkspaceError(f"{run.artifacts} is in use by {who}: wait until it has ended, or end it") from None
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    who = {"pid": os.getpid(), "machine": platform.node(), "since": since}

    def at(stage: str) -> None:
        write_text(about, json.dumps(who | {"stage": stage}))

    try:
        at("")
        yield at
    finally:
        about.unlink(missing_ok=True)
        own.release()
