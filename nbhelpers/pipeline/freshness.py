"""Whether a notebook has to run again, and why."""

import ast
import fnmatch
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path

import nbformat

from nbhelpers.models import MINI
from nbhelpers.pipeline.promises import artifacts, broken_promises
from nbhelpers.report.chapters import Stage, before
from nbhelpers.system.code import code_fingerprint, imports_of
from nbhelpers.system.files import fingerprint, sha256, write_text
from nbhelpers.workspace import Run, WorkspaceError, maker_of


def missing_needs(run: Run, stage: Stage, stages: dict[str, Stage], planned: set[str]) -> dict[str, str]:
    """Return what a stage needs and neither exists nor will be made by the notebooks in ``planned``: {what: number}."""
    made, found = artifacts(run), {}
    for need in stage.needs:
        maker = need if need.isdigit() else maker_of(need)
        exists = bool(read_record(run, maker, stages)) if need.isdigit() else bool(fnmatch.filter(made, need))
        if not exists and maker not in planned and maker != stage.number:
            found[need] = maker
    for maker in set(found.values()):
        for other in stages.values():
            if other.number == maker:
                found = missing_needs(run, other, stages, planned) | found
    return found


def helpers_fingerprint(cells: list) -> str:
    """Return a hash of the code of this package that a notebook runs, and of the model that ships with it.

    Comments, docstrings and layout do not count, nor does what no code cell imports: the page and the README, say.
    """
    source = "\n".join(cell.source for cell in cells)
    shipped = {path.name: sha256(path) for path in sorted(MINI.glob("*"))}
    return fingerprint([code_fingerprint(*sorted(imports_of(ast.parse(source)))), shipped])


def source_state(source: str) -> list:
    """Return names, sizes and times of change of local data or a local model; empty where ``source`` is not a path."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file()
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def own_parts(run: Run, stage: Stage, notebooks: Path) -> dict[str, str]:
    """Hashes of all that a stage depends on by itself, each under the words that say why it would be stale."""
    cells = nbformat.read(notebooks / f"{stage.name}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "settings": fingerprint([asdict(run.profile), run.seed]),
        "the notebook's code": fingerprint([cell.source for cell in code]),
        "code in nbhelpers": helpers_fingerprint(code),
        "library versions": fingerprint(versions),
        "the data or model on disk": fingerprint([source_state(run.profile.data), source_state(run.profile.model)]),
    }


def expected_fingerprint(run: Run, stage: Stage, notebooks: Path, stages: dict[str, Stage]) -> str:
    """Return the fingerprint that a stage would get if it and all before it were run now."""
    inputs = {o.number: expected_fingerprint(run, o, notebooks, stages) for o in before(stage, stages)}
    return fingerprint([own_parts(run, stage, notebooks), inputs])


def record_path(run: Run, stage: Stage) -> Path:
    return run.artifacts / "stages" / f"{stage.name}.json"


def read_record(run: Run, number: str, stages: dict[str, Stage]) -> dict:
    """Return what was recorded when the notebook of this number last ended well; empty if it never did."""
    for stage in stages.values():
        path = record_path(run, stage)
        if stage.number == number and path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise WorkspaceError(f"{path} is damaged: delete it, and notebook {number} runs again") from None
    return {}


def involved_artifacts(run: Run, stage: Stage) -> dict[str, str]:
    """Fingerprints of the artefacts that a stage needs or makes, by name."""
    numbers = {need for need in stage.needs if need.isdigit()} | {stage.number}
    return {
        name: record["fingerprint"]
        for name, record in artifacts(run).items()
        if record["made_by"] in numbers or any(fnmatch.fnmatch(name, need) for need in stage.needs)
    }


def save_record(
    run: Run, stage: Stage, parts: dict[str, str], stages: dict[str, Stage], minutes: float, peak_memory: int = 0
) -> None:
    """Remember that a stage ended well, with what it was made from and what it took: minutes, and bytes of memory."""
    inputs = {o.number: read_record(run, o.number, stages).get("fingerprint") for o in before(stage, stages)}
    record = {
        "fingerprint": fingerprint([parts, inputs]),
        "parts": parts,
        "inputs": inputs,
        "artifacts": involved_artifacts(run, stage),
        "minutes": round(minutes, 2),
        "peak_memory_bytes": peak_memory,
    }
    write_text(record_path(run, stage), json.dumps(record, indent=2) + "\n")


def state(run: Run, stage: Stage, notebooks: Path, stages: dict[str, Stage]) -> str:
    """Return ``"fresh"``, ``"missing"``, or ``"stale"`` with the reason in brackets."""
    record = read_record(run, stage.number, stages)
    if not record:
        return "missing"
    for part, value in own_parts(run, stage, notebooks).items():
        if record["parts"].get(part) != value:
            return f"stale ({part} changed)"
    for other in before(stage, stages):
        if record["inputs"].get(other.number) != expected_fingerprint(run, other, notebooks, stages):
            return f"stale ({other.name}, which it needs, is stale or was run otherwise)"
    present = {name: record["fingerprint"] for name, record in artifacts(run).items()}
    for name, made in record["artifacts"].items():
        if present.get(name) != made:
            return f"stale ({name} is {'not the same any more' if name in present else 'missing'})"
    copies = [run.reports / "notebooks" / f"{stage.name}{suffix}" for suffix in (".ipynb", ".html")]
    faults = [f"notebooks/{path.name} is missing" for path in copies if not path.is_file()]
    faults += broken_promises(run, stage)
    return f"stale ({faults[0]})" if faults else "fresh"
