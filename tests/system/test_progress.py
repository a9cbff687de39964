"""Progress of a computation: a bar in a terminal, lines in a log, a file for the pipeline, or nothing."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import PROJECT

from nbhelpers.system import progress
from nbhelpers.system.progress import LastLine, track


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.delenv("NBHELPERS_BATCH")
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "IN_LOGS", 0)


def test_a_log_gets_whole_lines_without_control_characters(watched, monkeypatch, capsys):
    assert list(track(range(4), "counting")) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert "\r" not in said and "\x1b" not in said
    assert all(re.fullmatch(r"counting: \d+ %, [\d:?]+ left", line) for line in said.splitlines())
    assert "counting: 50 %" in said


def test_a_bar_within_a_bar_moves_no_cursor(watched, monkeypatch, tmp_path, capsys):
    def nested():
        for _ in track(range(2), "outer"):
            for _ in track(range(2), "inner"):
                pass

    nested()
    said = capsys.readouterr().err
    assert {line.split(":")[0] for line in said.splitlines()} == {"outer", "inner"} and "\x1b" not in said
    written = []
    monkeypatch.setattr(LastLine, "write", lambda self, frame: written.append(frame.strip()))
    monkeypatch.setenv("NBHELPERS_PROGRESS", str(tmp_path / "state"))
    nested()
    assert all(re.fullmatch(r"((outer|inner): \d+ %, [\d:?]+ left)?", frame) for frame in written) and any(written)


def test_a_batch_run_that_nobody_follows_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0)
    assert "NBHELPERS_BATCH" in os.environ
    list(track(range(3), "counting"))
    assert capsys.readouterr() == ("", "")


def test_a_followed_run_keeps_its_state_in_a_file_and_leaves_it_empty(watched, monkeypatch, tmp_path, capsys):
    state = tmp_path / "state"
    monkeypatch.setenv("NBHELPERS_BATCH", "1")
    monkeypatch.setenv("NBHELPERS_PROGRESS", str(state))
    seen = []
    with progress.progress(4, "counting") as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
            seen.append(state.read_text())
    assert seen[1].startswith("counting: 50 %") and "\r" not in seen[1]
    assert state.read_text() == "" and capsys.readouterr() == ("", "")


def test_what_has_no_known_end_is_named_at_once(watched, monkeypatch, capsys):
    with progress.progress(None, "fitting"):
        assert capsys.readouterr().err == "fitting ...\n"


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end():
    code = (
        "import time; from nbhelpers.system import progress; progress.DELAY = 0\n"
        "for _ in progress.track(range(3), 'counting'): time.sleep(0.6)"
    )
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {k: v for k, v in os.environ.items() if k != "NBHELPERS_BATCH"} | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=theirs, stdout=subprocess.PIPE)
    said = os.read(mine, 65536).decode()
    os.close(theirs)
    os.close(mine)
    assert (done.returncode, done.stdout) == (0, b"")
    assert re.search(r"counting:\s+33%.*<00:0", said)
    # The last thing written clears the line.
    assert said.rstrip("\r").split("\r")[-1].strip() == ""
