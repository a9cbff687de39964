"""The house: imports point one way, no file is long, every package is pinned, every name of the contract is there."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from nbhelpers.system.code import PACKAGE, find_file, imports_of

# What may be imported by what stands further down. ``__main__`` files are entry points: they may call anything.
ORDER = [
    "system",
    "profiles",
    "reading",
    "data",
    "models",
    "selection",
    "criteria",
    "masks",
    "training",
    "evaluation",
    "distillation",
    "measurement",
    "sparse",
    "workspace",
    "study",
    "report",
    "exercises",
    "pipeline",
    "tools",
]
FILES = sorted(PACKAGE.rglob("*.py"))
REQUIRED = (PACKAGE.parent / "requirements.txt").read_text(encoding="utf-8")
# The names that outside scripts rely on.
CONTRACT = [
    "profiles.get_profile",
    "data.load_reviews",
    "workspace.open_run",
    "workspace.Run.models",
    "workspace.Run.load_model",
    "workspace.Run.predict",
    "models.prunable_weights",
    "criteria.CRITERIA",
    "masks.select",
    "sparse.SparseLinear.from_dense",
    "sparse.convert_gpt2_to_sparse",
    "sparse.count_actual_params",
    "models.create_model",
    "study.fine_tuning.finetune_model",
    "evaluation.evaluate_accuracy",
    "evaluation.evaluate_model",
    "criteria.magnitude_based_pruning",
    "criteria.movement_based_analysis",
    "criteria.gradient_based_analysis",
    "masks.identify_useless_parameters",
    "measurement.measure_inference_efficiency",
    "report.plots.compare_and_visualize",
    "data.load_validation_dataset",
    "data.IMDbDataset",
    "sparse.SparseGPT2MLP",
    "sparse.SparseGPT2Attention",
    "sparse.SparseGPT2Block",
    "sparse.SparseGPT2Model",
    "sparse.SparseGPT2ForSequenceClassification",
]


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room(path):
    """The place in ``ORDER`` of the room that a file is in."""
    return ORDER.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))


def graph():
    """{file: the files of the package that it imports}; importing a name from a package counts as its ``__init__``."""
    found = {}
    for path in FILES:
        names = imports_of(ast.parse(path.read_text(encoding="utf-8")))
        # ``from nbhelpers.study import pruning`` asks for the file pruning.py, not for what ``__init__`` says.
        deepest = {
            name
            for name in names
            if not any(other.startswith(f"{name}.") and find_file(other, PACKAGE) for other in names)
        }
        found[path] = {f for f in (find_file(n, PACKAGE) for n in deepest) if f} - {path, PACKAGE / "__init__.py"}
    return found


@pytest.fixture(scope="module")
def imports():
    return graph()


def test_no_import_points_against_the_order_of_the_rooms(imports):
    wrong = [
        f"{name_of(path)} imports {name_of(other)}"
        for path, others in imports.items()
        if path.name != "__main__.py" and path.parent != PACKAGE / "__init__.py" and path != PACKAGE / "__init__.py"
        for other in others
        if room(other) > room(path)
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle(imports):
    reach = {path: set(others) for path, others in imports.items()}
    for _ in range(len(reach)):
        for path in reach:
            reach[path] |= set().union(*(reach[other] for other in reach[path]))
    assert [name_of(path) for path in reach if path in reach[path]] == []


def test_no_file_is_longer_than_400_lines():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_every_module_says_in_its_first_line_what_it_is_for():
    for path in FILES:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert re.match(r'"""\S.{15,}', first), name_of(path)


def test_every_imported_package_is_pinned():
    imported = set()
    tests = list(Path(__file__).parent.rglob("*.py"))
    for path in [*FILES, *tests]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", REQUIRED, re.MULTILINE)}
    owners = importlib.metadata.packages_distributions()
    # Asked for where it is installed, and said so otherwise.
    optional = {"onnxruntime", "onnxscript"}
    for name in sorted(
        imported - set(sys.stdlib_module_names) - {"nbhelpers"} - {path.stem for path in tests} - optional
    ):
        distributions = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name, [name])}
        assert distributions & pinned, f"{name} is imported and not in requirements.txt"


@pytest.mark.parametrize("name", CONTRACT)
def test_every_name_of_the_contract_is_there(name):
    *path, last = name.split(".")
    for i in range(len(path), 0, -1):
        if find_file(".".join(["nbhelpers", *path[:i]]), PACKAGE):
            thing = importlib.import_module(".".join(["nbhelpers", *path[:i]]))
            break
    for part in [*path[i:], last]:
        thing = getattr(thing, part)
    assert thing is not None
