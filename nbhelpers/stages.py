"""The six stages: what each needs and promises, whether it kept its promises, and whether it has to run again."""

import ast
import fnmatch
import importlib.metadata
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from nbhelpers.workspace import (
    LOADERS,
    Run,
    WorkspaceError,
    code_fingerprint,
    fingerprint,
    maker_of,
    sha256,
    write_text,
)

PACKAGE = Path(__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"

# Files that no notebook's result depends on: a new line in the report must not make hours of training stale.
NOT_IN_RESULTS = ("stages.py", "pipeline.py", "execution.py", "page.py", "pretrain.py", "grid.py", "full_size.py")
NOT_IN_RESULTS += ("lock.py", "progress.py", "panels.py", "attribution.py", "report.py", "picture.py", "exercises.py")


@dataclass(frozen=True)
class Stage:
    """A notebook, what it needs and what it promises to leave in ``reports/<profile>/``.

    needs: artefacts by name or pattern ("recovered_*"), or numbers of notebooks ("05"); figures and tables: names
    without extension; metrics: "section.metric" in ``results.json``; gaps: "table.column" that may hold empty cells,
    or "table" that may have no rows.
    """

    name: str
    question: str
    needs: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def after(self) -> set[str]:
        """Numbers of the notebooks that make what this one needs."""
        return {need if need.isdigit() else maker_of(need) for need in self.needs}


def promise(section: str, metrics: str) -> tuple[str, ...]:
    """``"section.metric"`` for each word of ``metrics``."""
    return tuple(f"{section}.{metric}" for metric in metrics.split())


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "01_fine_tune",
            "How well does a small GPT-2 tell good reviews from bad ones, and is it worth more than counting words?",
            figures=("01_lengths", "01_learning_curves", "01_accuracy", "01_confusion", "01_gradients"),
            tables=("fine_tuning",),
            metrics=promise("fine_tuning", "tfidf_accuracy untrained_accuracy against_tfidf minutes"),
        ),
        Stage(
            "02_criteria_scoring",
            "Small, unmoved, without gradient: do the three criteria mean the same weights?",
            needs=("pretrained", "fine_tuned"),
            figures=(
                "02_five_by_five",
                "02_distributions",
                "02_retention",
                "02_agreement",
                "02_heads",
                "02_neurons",
                "02_along_training",
                "02_stability",
                "02_votes",
                "02_flagged",
            ),
            tables=("retention", "structure_shares", "along_training", "stability", "flagged"),
            metrics=promise(
                "criteria",
                "sparsity thresholds overlap correlation flagged_by_all_at_median most_uneven known_after_a_tenth "
                "kappa_over_seeds",
            ),
        ),
        Stage(
            "03_prune_and_recover",
            "How many weights can go, who chooses best, and what does recovery bring back?",
            needs=("pretrained", "fine_tuned", "calibration", "scores_*"),
            figures=(
                "03_five_by_five",
                "03_pruned",
                "03_comparators",
                "03_who_paid",
                "03_scopes",
                "03_sensitivity",
                "03_recovered",
                "03_recovery_worth",
                "03_ways",
                "03_against_control",
            ),
            tables=("scopes", "sensitivity", "recovery_rates", "curves", "recovery_ways", "recovery_significance"),
            metrics=promise(
                "pruning",
                "sparsity seeds dense_accuracy control_accuracy best_criterion best_comparator best_accuracy "
                "best_before_recovery recovered ways comparators rates revived",
            ),
        ),
        Stage(
            "04_sparse_conversion",
            "What does it take for zeros to save time and memory?",
            needs=("fine_tuned", "calibration", "scores_*", "recovered_*"),
            figures=(
                "04_bytes",
                "04_break_even",
                "04_layer",
                "04_roofline",
                "04_speedup",
                "04_latency",
                "04_files",
                "04_structured",
            ),
            tables=("engines", "break_even", "latency", "compact_shapes", "structured"),
            gaps=("break_even.sparsity",),
            metrics=promise(
                "sparse",
                "model largest_logit_difference validation_accuracy masked_speedup layer_speedup_at_90 "
                "best_model_speedup file_ratio limits structured unstructured_rival",
            ),
        ),
        Stage(
            "05_distillation",
            "Can a shallower model be taught the same?",
            needs=("fine_tuned",),
            figures=("05_softened", "05_scan", "05_learning_curves", "05_accuracy", "05_speed", "05_compressed"),
            tables=("distillation_scan", "students", "student_speed", "compression", "compressed_speed"),
            metrics=promise(
                "distillation",
                "alpha temperature teacher_accuracy best_student best_accuracy soft_targets_worth_points "
                "teacher_layers_worth_points speedup compressed",
            ),
        ),
        Stage(
            "06_comparison",
            "Which model is worth its bytes and milliseconds, and which differences are real?",
            needs=(
                "pretrained",
                "fine_tuned",
                "scores_*",
                "fine_tuned_extra",
                "recovered_*",
                "sparse_*",
                "compact_*",
                "student_*",
                "compressed_*",
            ),
            figures=(
                "06_accuracy",
                "06_differences",
                "06_rivals",
                "06_accuracy_size",
                "06_accuracy_latency",
                "06_cost",
                "06_forgotten",
                "06_unlearned",
            ),
            tables=("comparison", "significance", "forgotten", "forgotten_associations", "unlearned"),
            metrics=promise(
                "comparison",
                "test_reviews models dense control recovered sparse student compressed tfidf against_tfidf forgotten "
                "test_part",
            )
            + promise("finding", "seeds leaders own merge comparator recovery control kept further compressed"),
            gaps=("forgotten.learned", "forgotten_associations"),
        ),
    )
}


def in_order(stages: dict[str, Stage]) -> list[Stage]:
    """The stages, each after those that make what it needs; by number where that leaves a choice."""
    waiting, ordered = sorted(stages.values(), key=lambda stage: stage.name), []
    while waiting:
        blocked = {stage.number for stage in waiting}
        ready = [stage for stage in waiting if not stage.after & (blocked - {stage.number})]
        if not ready:
            raise ValueError(f"the notebooks {', '.join(sorted(blocked))} need each other in a circle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def before(stage: Stage, stages: dict[str, Stage]) -> list[Stage]:
    """The stages that make what a stage needs."""
    return [other for other in in_order(stages) if other.number in stage.after - {stage.number}]


def parameters_of(notebook: Path) -> set[str]:
    """The names that the cell tagged ``parameters`` of a notebook sets.

    Read as Python: papermill's own parser skips a line whose comment has an equals sign in it.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)}


# --- what a stage leaves ---


def artifacts(run: Run) -> dict[str, dict]:
    """The records of all finished artefacts of a run by name."""
    folders = sorted(path.parent.name for path in run.artifacts.glob("*/artifact.json"))
    return {name: run.artifact(name) for name in folders if "." not in name}


def promised_files(run: Run, stage: Stage) -> list[Path]:
    """The figures and tables that a stage promises to leave, less those that ``Run.skip`` has given a reason for."""
    skipped = run.results().get("skipped", {})
    files = [run.reports / "figures" / f"{name}.png" for name in stage.figures if name not in skipped]
    return files + [run.reports / "tables" / f"{name}.csv" for name in stage.tables if name not in skipped]


def broken_promises(run: Run, stage: Stage, since: float = 0.0) -> list[str]:
    """What a stage promised and did not leave whole: one sentence each.

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
    """What is wrong with a table, its stage's ``gaps`` aside: empty, or numbers that are none."""
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
    """Whether a metric, with all that is nested in it, holds no empty, infinite or not-a-number value."""
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
    """What a stage that began at ``since`` wrote, in words: ``"5 figures, 1 table, 2 models"``."""
    counts = {}
    for kind, suffix in {"figure": "png", "table": "csv"}.items():
        counts[kind] = sum(path.stat().st_mtime >= since for path in (run.reports / f"{kind}s").glob(f"*.{suffix}"))
    folders = {name: run.artifacts / name / "artifact.json" for name in artifacts(run)}
    made = [name for name, path in folders.items() if path.stat().st_mtime >= since]
    counts["model"] = sum(run.artifact(name)["kind"] in LOADERS for name in made)
    return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items() if n) or "nothing new"


# --- whether a stage has to run again ---


def missing_needs(run: Run, stage: Stage, stages: dict[str, Stage], planned: set[str]) -> dict[str, str]:
    """What a stage needs and neither exists nor will be made by the notebooks in ``planned``: {what: number}."""
    made, found = artifacts(run), {}
    for need in stage.needs:
        maker = need if need.isdigit() else maker_of(need)
        there = bool(read_record(run, maker, stages)) if need.isdigit() else bool(fnmatch.filter(made, need))
        if not there and maker not in planned and maker != stage.number:
            found[need] = maker
    for maker in set(found.values()):
        for other in stages.values():
            if other.number == maker:
                found = missing_needs(run, other, stages, planned) | found
    return found


def helpers_fingerprint() -> str:
    """A hash of this package's code without comments, docstrings and layout, and of the model that ships with it."""
    modules = [path.stem for path in sorted(PACKAGE.glob("*.py")) if path.name not in NOT_IN_RESULTS]
    shipped = {path.name: sha256(path) for path in sorted((PACKAGE / "pretrained").glob("*"))}
    return fingerprint([code_fingerprint(*modules, "sparse"), shipped])


def source_state(source: str) -> list:
    """Names, sizes and times of change of local data or a local model; empty where ``source`` is not a path."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file()
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def own_parts(run: Run, stage: Stage, notebooks: Path) -> dict[str, str]:
    """Hashes of all that a stage depends on by itself, each under the words that say why it would be stale."""
    cells = nbformat.read(notebooks / f"{stage.name}.ipynb", as_version=4).cells
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "settings": fingerprint([asdict(run.profile), run.seed]),
        "the notebook's code": fingerprint([cell.source for cell in cells if cell.cell_type == "code"]),
        "code in nbhelpers": helpers_fingerprint(),
        "library versions": fingerprint(versions),
        "the data or model on disk": fingerprint([source_state(run.profile.data), source_state(run.profile.model)]),
    }


def expected_fingerprint(run: Run, stage: Stage, notebooks: Path, stages: dict[str, Stage]) -> str:
    """The fingerprint that a stage would get if it and all before it were run now."""
    inputs = {o.number: expected_fingerprint(run, o, notebooks, stages) for o in before(stage, stages)}
    return fingerprint([own_parts(run, stage, notebooks), inputs])


def record_path(run: Run, stage: Stage) -> Path:
    return run.artifacts / "stages" / f"{stage.name}.json"


def read_record(run: Run, number: str, stages: dict[str, Stage]) -> dict:
    """What was recorded when the notebook of this number last ended well; empty if it never did."""
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
    """``"fresh"``, ``"missing"``, or ``"stale"`` with the reason in brackets."""
    record = read_record(run, stage.number, stages)
    if not record:
        return "missing"
    for what, value in own_parts(run, stage, notebooks).items():
        if record["parts"].get(what) != value:
            return f"stale ({what} changed)"
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
