"""Files and folders that are written whole or not at all, and the leftovers of processes that were killed."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import PROJECT

from nbhelpers.system.files import replace_folder, write_text


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new\ud800")
    assert path.read_text() == "old"


def test_leftovers_of_a_killed_build_are_removed_and_those_of_a_running_one_stay(tmp_path):
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    here = platform.node()
    for owner in (f"{here}-{dead}", f"{here}-{os.getpid()}", f"{here}-{os.getppid()}", f"{here}-b-{dead}"):
        (tmp_path / f"x.{owner}.partial").mkdir()
        (tmp_path / f"x.{owner}.partial" / "half").write_text("half")
    (tmp_path / f"x_2.{here}-{dead}.partial").mkdir()
    with replace_folder(tmp_path / "x") as folder:
        (folder / "whole").write_text("whole")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole"]
    # Another process that runs, another machine, another artefact.
    others = [f"x.{here}-{os.getppid()}.partial", f"x.{here}-b-{dead}.partial", f"x_2.{here}-{dead}.partial"]
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == sorted(others)


WRITER = """
import pathlib, sys, time
from nbhelpers.system.files import replace_folder

who, folder, barrier = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
(barrier / who).touch()
while len(list(barrier.iterdir())) < 2:
    time.sleep(0.001)
for turn in range(60):
    with replace_folder(folder) as partial:
        for part in range(20):
            (partial / f"part-{part}").write_text(f"{who} {turn}")
        (partial / who).touch()
"""


def test_of_two_processes_that_write_a_folder_at_once_each_writes_a_whole_one(tmp_path):
    folder, barrier = tmp_path / "folder", tmp_path / "barrier"
    barrier.mkdir()
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, who, folder, barrier], env=environment) for who in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    (last,) = {(folder / f"part-{part}").read_text() for part in range(20)}
    assert {path.name for path in folder.iterdir()} == {last[0], *(f"part-{part}" for part in range(20))}
    assert last.endswith(" 59") and not list(tmp_path.glob("folder.*"))
