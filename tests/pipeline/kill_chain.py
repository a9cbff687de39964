"""Kill a run at random moments, go on each time, and compare what it ends with to a run that was left alone.

    .venv/bin/python tests/pipeline/kill_chain.py --profile quick --kills 20 --folder /tmp/killed
    .venv/bin/python tests/pipeline/kill_chain.py ... --left-alone .       # a workspace that has been run already

Left out of the comparison are times, and results that depend on them: each sparse layer takes the engine that was
fastest. All else has to be equal: weights, scores and logits bit for bit, tables and metrics to the last digit.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil

PROJECT = Path(__file__).parents[2]
# Names of columns that depend on the time that something took, or on the engine that was fastest.
TIMED = re.compile(r"minutes|seconds|speedup|latency|_ms|gflops|memory")
# Sections and metrics that are not compared: captions quote timings, and the code may have been committed meanwhile.
SKIPPED = ("timings", "captions", "run.revision", "sparse.largest_logit_difference")
TIMED_TABLES = ("engines", "break_even", "latency", "student_speed")
# Computed on engines that were chosen by their speed: equal up to rounding, which is tested elsewhere.
TIMED_ARTEFACTS = re.compile(r"^((logits_)?(sparse|compact)_|logits_compressed_)")


def command(arguments: argparse.Namespace) -> list[str]:
    words = [word for pair in arguments.set for word in ("--set", pair)]
    return [sys.executable, "-m", "nbhelpers.pipeline", "--profile", arguments.profile, *words]


def start(arguments: argparse.Namespace, root: Path) -> subprocess.Popen:
    """The pipeline in a workspace, saving checkpoints often."""
    root.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"NBHELPERS_ROOT": str(root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    environment["NBHELPERS_CHECKPOINT_SECONDS"] = "2"
    with (root / "log.txt").open("a") as log:
        return subprocess.Popen(command(arguments), env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen) -> None:
    """End the pipeline and all that it has started, as a power cut does."""
    found = psutil.Process(process.pid)
    for one in [*found.children(recursive=True), found]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def run_and_kill(arguments: argparse.Namespace, root: Path, usual: float) -> int:
    """Run to the end, killed so often on the way; returns how often that was."""
    draw, killed = random.Random(arguments.seed), 0
    while True:
        process, moment = start(arguments, root), None
        if killed < arguments.kills:
            # So that all kills together fall into about the time that a whole run takes.
            moment = 8 + draw.random() * 2 * usual / arguments.kills
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
            print(f"kill {killed} after {moment:.0f} s: {last_line(root)}", flush=True)
            continue
        if code:
            sys.exit(f"the run failed with {code}: see {root / 'log.txt'}")
        return killed


def minutes_of(root: Path, profile: str) -> float:
    """Return how long the notebooks of a finished run took, from their records."""
    records = [json.loads(path.read_text()) for path in (root / ".artifacts" / profile).glob("seed-0/stages/*.json")]
    return sum(record["minutes"] for record in records)


def last_line(root: Path) -> str:
    lines = (root / "log.txt").read_text().splitlines()
    return lines[-1] if lines else "before its first line"


# --- what is compared ---


def metrics(value, name: str = ""):
    """Return every number and text of ``results.json`` by its path, without those in ``SKIPPED``."""
    if name in SKIPPED:
        return {}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in metrics(part, f"{name}.{key}".strip(".")).items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in metrics(part, f"{name}.{i}").items()}
    return {name: value}


def tables(reports: Path) -> dict[str, str]:
    found = {}
    for path in sorted((reports / "tables").glob("*.csv")):
        table = pd.read_csv(path)
        if path.stem not in TIMED_TABLES:
            found[path.name] = table[[column for column in table if not TIMED.search(column)]].to_csv()
    return found


def artefacts(folder: Path) -> dict[str, str]:
    """The checksums of all weights, scores and logits."""
    found = {}
    for path in sorted(folder.glob("seed-*/*/artifact.json")):
        if not TIMED_ARTEFACTS.search(path.parent.name):
            files = json.loads(path.read_text())["files"]
            where = f"{path.parent.parent.name}/{path.parent.name}"
            found |= {f"{where}/{name}": sum_ for name, sum_ in files.items() if name.endswith(".safetensors")}
    return found


def everything(root: Path, profile: str) -> dict[str, dict]:
    reports = root / "reports" / profile
    results = json.loads((reports / "results.json").read_text())
    kinds = {"metrics": metrics(results), "tables": tables(reports)}
    return kinds | {"artefacts": artefacts(root / ".artifacts" / profile)}


def leftovers(root: Path) -> list[str]:
    """Return half-written folders and checkpoints, none of which may be left after a run."""
    folders = [*root.glob(".artifacts/*/seed-*/*.partial"), *root.glob(".artifacts/*/seed-*/*.checkpoint")]
    return [folder.name for folder in folders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, required=True, help="for the two workspaces; kept")
    parser.add_argument("--left-alone", type=Path, help="the workspace of a run that has ended; else one is made")
    arguments = parser.parse_args()
    whole, broken = arguments.left_alone or arguments.folder / "left-alone", arguments.folder / "killed"
    if not arguments.left_alone and start(arguments, whole).wait():
        sys.exit(f"the run that was left alone failed: see {whole / 'log.txt'}")
    usual = minutes_of(whole, arguments.profile)
    print(f"left alone: {usual:.1f} minutes", flush=True)
    killed = run_and_kill(arguments, broken, 60 * usual)
    expected, found = (everything(root, arguments.profile) for root in (whole, broken))
    differ = []
    for kind, values in expected.items():
        names = values.keys() | found[kind].keys()
        wrong = sorted(name for name in names if values.get(name) != found[kind].get(name))
        print(f"{kind}: {len(names) - len(wrong)} of {len(names)} equal")
        differ += [f"{kind}: {name}" for name in wrong] + [f"left behind: {name}" for name in leftovers(broken)]
    print("\n".join(differ) or f"killed {killed} times, and the same in the end")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
