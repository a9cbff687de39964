"""The recipes of nbhelpers/README.md, carried out on a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from nbhelpers.system.code import PACKAGE

RECIPE = re.compile(r"<!-- recipe: (\S+), (at the end|(before|after) \"(.+?)\") -->\n```python\n(.*?)```", re.DOTALL)
FOLLOWED = """
import json, sys
from nbhelpers.profiles import get_profile
from nbhelpers.report.plots.pruning import best_so_far
from nbhelpers.study.fine_tuning import finetune_model
from nbhelpers.study.pruning import pruned_curves
from nbhelpers.workspace import open_run

fields = {"epochs": 1, "calibration_reviews": 4, "sparsities": (0.5,), "comparators": "squared_magnitude"}
run = open_run(get_profile("tiny_study", **fields))
finetune_model(run)
curves = pruned_curves(run)
figure = best_so_far(curves)
rows = curves[curves["sparsity"] == 0.5].set_index("criterion")["accuracy"].to_dict()
print(json.dumps({"rows": rows, "line": len(figure.axes[0].lines[0].get_xdata())}))
"""


def carry_out(text, package):
    """Put each recipe's code where it says; returns how many there were."""
    recipes = RECIPE.findall(text)
    for file, where, side, anchor, code in recipes:
        path = package / file
        source = path.read_text(encoding="utf-8")
        if where == "at the end":
            changed = source + code
        else:
            assert source.count(f"\n{anchor}\n") == 1, f"{file} has no line {anchor}"
            parts = (code + "\n\n" + anchor,) if side == "before" else (anchor + "\n" + code.rstrip("\n"),)
            changed = source.replace(f"\n{anchor}\n", f"\n{parts[0]}\n")
        path.write_text(changed, encoding="utf-8")
    return len(recipes)


def test_a_criterion_a_figure_and_a_profile_take_what_the_readme_says(tmp_path):
    package = tmp_path / "copy" / "nbhelpers"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert carry_out((PACKAGE / "README.md").read_text(encoding="utf-8"), package) == 5
    environment = os.environ | {"PYTHONPATH": str(package.parent), "NBHELPERS_ROOT": str(tmp_path)}
    command = [sys.executable, "-P", "-c", FOLLOWED]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The square orders weights as the magnitude does, so that it prunes the same ones.
    assert found["rows"]["squared_magnitude"] == pytest.approx(found["rows"]["magnitude"])
    assert found["line"] == 2, "the main sparsity and the one asked for"
