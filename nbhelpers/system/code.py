"""What code a result came out of: a hash of modules and of all in this package that they import."""

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

from nbhelpers.system.files import fingerprint

PACKAGE = Path(__file__).parents[1]


def find_file(module: str, package: Path) -> Path | None:
    """Return the file of a module such as ``nbhelpers.study.pruning`` in a copy of the package, None for a symbol."""
    path = package.joinpath(*module.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def imports_of(tree: ast.AST) -> set[str]:
    """Return every ``nbhelpers...`` name that a syntax tree imports, ``from a import b`` as both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "nbhelpers"}


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove the docstrings of a syntax tree in place and return it: only what is executed is left."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:]
    return tree


def syntax_as_lists(node):
    """Return a syntax tree as lists that JSON can write, the same in every Python.

    A later Python's new fields are empty here, and empty fields are left out.
    """
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, {name: syntax_as_lists(value) for name, value in fields.items()}]
    return [syntax_as_lists(item) for item in node] if isinstance(node, list) else repr(node)


@functools.cache
def parse(path: Path) -> tuple[frozenset[str], str]:
    """Return what a file imports of the package, and a hash of its code without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(imports_of(tree)), fingerprint(syntax_as_lists(without_docstrings(tree)))


def reachable(modules: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """Return the files of modules and, recursively, of all that they import, less those that compute nothing.

    ``system`` and ``workspace`` show and keep results, and what a profile says stands in the settings of a result.
    """
    skipped = {package / "workspace.py", package / "profiles.py", *(package / "system").glob("*.py")}
    waiting, found = list(modules), set()
    while waiting:
        path = find_file(waiting.pop(), package)
        if path and path not in skipped | found:
            found.add(path)
            waiting += parse(path)[0]
    return sorted(found)


@functools.cache
def code_fingerprint(*modules: str, package: Path = PACKAGE) -> str:
    """Return a hash of the code that modules run, their own and all that they import of this package.

    The same on every machine and in every Python, so that what one has computed another finds.
    """
    return fingerprint([(p.relative_to(package).as_posix(), parse(p)[1]) for p in reachable(modules, package)])
