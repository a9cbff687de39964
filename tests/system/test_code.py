"""Which changes of the code make a result anew: executed code that its builder reaches, and nothing else."""

import ast
import re
import shutil

import pytest

from nbhelpers.system.code import PACKAGE, code_fingerprint, reachable, syntax_as_lists, without_docstrings

# The modules that define the ``build`` of an artefact.
BUILDERS = [
    f"nbhelpers.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
    for path in sorted(PACKAGE.glob("study/*.py"))
    if re.search(r"\.cached\(", path.read_text(encoding="utf-8"))
]


@pytest.fixture
def package(tmp_path):
    """A copy of the package's code, to be changed."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    return shutil.copytree(PACKAGE, tmp_path / "nbhelpers", ignore=ignored)


def change(package, file, old, new):
    path = package / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} no longer says {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def keys(package=PACKAGE):
    """Return the fingerprint of each builder; for a copy only once it has been changed, as parsed files are cached."""
    return {module: code_fingerprint(module, package=package) for module in BUILDERS}


def test_the_copy_of_a_package_has_its_fingerprints(package):
    assert {f"nbhelpers.study.{name}" for name in ("pruning", "recovery", "students", "baseline")} <= set(BUILDERS)
    assert keys(package) == keys()


@pytest.mark.parametrize(
    ("file", "old", "new", "module"),
    [
        ("study/recovery.py", "GRADUAL_SHARE = 0.6", "GRADUAL_SHARE = 0.8", "recovery"),
        ("study/students.py", "ACCEPTED = 0.01", "ACCEPTED = 0.02", "students"),
        ("study/baseline.py", "FOLDS = 5", "FOLDS = 4", "baseline"),
    ],
)
def test_a_changed_constant_changes_the_key_of_what_its_module_builds(package, file, old, new, module):
    change(package, file, old, new)
    before, after = keys(), keys(package)
    changed = {name.rpartition(".")[2] for name in BUILDERS if after[name] != before[name]}
    assert module in changed
    assert not changed & {"fine_tuning", "scoring"}, "what imports nothing of it keeps its key"


@pytest.mark.parametrize("file", ["criteria.py", "selection.py", "training/loop.py", "data.py"])
def test_a_change_to_the_science_changes_the_key_of_what_uses_it(package, file):
    (package / file).write_text((package / file).read_text(encoding="utf-8") + "\nCHANGED = 1\n", encoding="utf-8")
    assert keys(package)["nbhelpers.study.pruning"] != keys()["nbhelpers.study.pruning"]


def test_no_artefact_depends_on_reports_or_machinery():
    rooms = {path.relative_to(PACKAGE).parts[0] for module in BUILDERS for path in reachable([module])}
    assert not rooms & {"report", "exercises", "pipeline", "tools", "system", "workspace.py", "profiles.py"}


def test_a_change_to_the_reports_changes_no_key(package):
    for file in [*package.glob("report/**/*.py"), package / "workspace.py", package / "system" / "progress.py"]:
        file.write_text(file.read_text(encoding="utf-8") + "\nCHANGED = 1\n", encoding="utf-8")
    assert keys(package) == keys()


def test_executed_code_counts_and_comments_and_docstrings_do_not():
    def outline(source):
        return syntax_as_lists(without_docstrings(ast.parse(source)))

    function = 'def f(x):\n    """One."""\n    return x + 1\n'
    assert outline(function) == outline('# why\ndef f(x):\n    """Two."""\n\n    return (x + 1)  # so\n')
    assert outline(function) != outline(function.replace("+ 1", "+ 2"))
    assert outline('x = "text"') != outline('x = "other"')
    assert outline("x = 0") != outline("x = False") and outline("return_ = None") != outline("return_ = []")


def test_the_outline_of_code_is_the_same_in_later_pythons():
    tree = ast.parse("def f(x):\n    return x\n")
    before = syntax_as_lists(tree)
    # Python 3.12 added this field to every function; 3.11 has none.
    tree.body[0].type_params, tree.body[0]._fields = [], (*tree.body[0]._fields, "type_params")
    assert syntax_as_lists(tree) == before
