"""Choices are results: each is decided once, on validation reviews, and read from its artefact ever after.

A notebook or a cell decides (``decide``); everything else asks the functions below, which train nothing and raise
``WorkspaceError`` with the notebook to run where nothing has been decided yet.
"""

import json

import pandas as pd

from nbhelpers.workspace import Run

FILE = "choice.json"


def decide(run: Run, name: str, candidates: pd.DataFrame, made_by: str, best: int | None = None) -> pd.Series:
    """Write artefact ``choice_<name>``: the row of ``candidates`` with the best accuracy, the first of equals.

    candidates: one row per candidate, with its validation ``accuracy``; best: the position of another row, where the
    best accuracy is not the rule. Returns the chosen row.
    """
    rows = candidates.to_dict(orient="records")
    best = int(candidates["accuracy"].to_numpy().argmax()) if best is None else best

    def build(target):
        text = json.dumps({"chosen": rows[best], "candidates": rows}, indent=1)
        (target.folder / FILE).write_text(text, encoding="utf-8")

    run.cached(f"choice_{name}", {"candidates": rows, "best": best}, build, made_by=made_by)
    return candidates.iloc[best]


def read_choice(run: Run, name: str) -> dict:
    """Return the chosen row of a decision. Raises ``WorkspaceError`` where it has not been made."""
    return json.loads((run.folder(f"choice_{name}") / FILE).read_text(encoding="utf-8"))["chosen"]


def best_score(run: Run) -> str:
    """Return the score that was best after recovery at the main sparsity, over all seeds."""
    return read_choice(run, "score")["criterion"]


def recovery_rate(run: Run, name: str) -> float:
    """Return the learning rate of recoveries, "pruned", or of the dense "control"."""
    return read_choice(run, f"rate_{name}")["learning_rate"]


def distillation_scales(run: Run) -> tuple[float, float]:
    """Return alpha and temperature of the best short student."""
    chosen = read_choice(run, "distillation")
    return chosen["alpha"], chosen["temperature"]


def best_compressed(run: Run) -> str:
    """Return the compressed model that is small enough and accurate enough (``students.choose_compressed``)."""
    return read_choice(run, "compressed")["model"]
