"""Whether a notebook left what it promised, whole and finite."""

import ast
import math
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from nbhelpers.report.chapters import Stage, promised_files
from nbhelpers.workspace import MODELS, Run


def parameters_of(notebook: Path) -> set[str]:
    """Return the names that the cell tagged ``parameters`` of a notebook sets.

    Read as Python: papermill's own parser skips a line whose comment has an equals sign in it.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)}


# --- what a stage leaves ---


def artifacts(run: Run) -> dict[str, dict]:
    """Return the records of all finished artefacts of a run by name."""
    folders = sorted(path.parent.name for path in run.artifacts.glob("*/artifact.json"))
    return {name: run.artifact(name) for name in folders if "." not in name}


def broken_promises(run: Run, stage: Stage, since: float = 0.0) -> list[str]:
    """Return what a stage promised and did not leave whole: one sentence each.

    since: seconds since the epoch; figures and tables that are older count as not written.
    """
    found = []
    for path in promised_files(run, stage):
        if not path.is_file():
            found.append(f"{path.parent.name}/{path.name} is missing")
        elif path.stat().st_mtime < since:
            found.append(f"{path.parent.name}/{path.name} was not written by this run")
        elif path.suffix == ".csv" and not run.is_as_written(path.stem):
            found.append(f"{path.parent.name}/{path.name} is damaged or was changed")
        elif path.suffix == ".csv":
            found += table_faults(path, stage.gaps)
        elif not is_whole_png(path):
            found.append(f"{path.parent.name}/{path.name} is not a whole PNG image")
    results = run.results()
    for metric in stage.metrics:
        section, name = metric.split(".", 1)
        if metric in results.get("skipped", {}):
            continue
        if results.get(section, {}).get(name) is None:
            found.append(f"metric {metric} is missing from results.json")
        elif not is_finite(results[section][name]):
            found.append(f"metric {metric} is not finite")
    return found


def table_faults(path: Path, gaps: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a table, its stage's ``gaps`` aside: empty, or numbers that are none."""
    try:
        table = pd.read_csv(path)
    except ValueError:
        return [f"tables/{path.name} is empty or not a table"]
    if table.empty:
        return [] if path.stem in gaps else [f"tables/{path.name} has no rows"]
    columns = [column for column in table if f"{path.stem}.{column}" not in gaps]
    numbers = table[columns].select_dtypes("number")
    bad = numbers.columns[~np.isfinite(numbers.to_numpy(dtype=float)).all(axis=0)]
    return [f"tables/{path.name} has numbers that are missing or infinite in column {column}" for column in bad]


def is_whole_png(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]


def is_finite(value) -> bool:
    """Return whether a metric, with all that is nested in it, holds no empty, infinite or not-a-number value."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def forget_metrics(run: Run, stage: Stage) -> None:
    """Take what a stage promised or skipped out of ``results.json``, so that what is there afterwards is new."""
    results = run.results()
    for name in (*stage.figures, *stage.tables, *stage.metrics):
        results.get("skipped", {}).pop(name, None)
    for metric in stage.metrics:
        section, name = metric.split(".", 1)
        results.get(section, {}).pop(name, None)
    if results:
        run.write_results(results)


def count_written(run: Run, since: float) -> str:
    """Return what a stage that began at ``since`` wrote, in words: ``"5 figures, 1 table, 2 models"``."""
    counts = {}
    for kind, suffix in {"figure": "png", "table": "csv"}.items():
        counts[kind] = sum(path.stat().st_mtime >= since for path in (run.reports / f"{kind}s").glob(f"*.{suffix}"))
    folders = {name: run.artifacts / name / "artifact.json" for name in artifacts(run)}
    made = [name for name, path in folders.items() if path.stat().st_mtime >= since]
    counts["model"] = sum(run.artifact(name)["kind"] in MODELS for name in made)
    return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items() if n) or "nothing new"
