"""Logits of a run's models, once per model and split; and the rule that the test reviews are used once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from scipy.special import softmax

from nbhelpers.study.artefacts import on_device
from nbhelpers.study.inputs import dataset, pick, reviews_fingerprint, reviews_of, runs_of
from nbhelpers.system.code import code_fingerprint
from nbhelpers.system.files import fingerprint, write_text
from nbhelpers.training import distributed
from nbhelpers.workspace import Run, WorkspaceError, root, save_tensors

# --- the test reviews, once ---


def study_key(run: Run) -> str:
    """Return a hash of a study: settings, code, and test reviews, the same for all of its seeds."""
    code = code_fingerprint("nbhelpers.study.comparison")
    return fingerprint([asdict(run.profile), code, reviews_fingerprint(run, "test")])


def register_path() -> Path:
    """Return the file that registers what test reviews were used for, one for all profiles of a workspace."""
    return root() / ".artifacts" / "test_reviews.json"


def read_studies() -> dict[str, dict]:
    """Return what the test reviews of any profile of this workspace were used for: {study key: record}."""
    path = register_path()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def test_record(run: Run) -> dict:
    """Return what is on record of this run's test reviews.

    models and reasons of this study; studies: how many studies (settings or code, of any profile) used some of the
    same reviews, this one included.
    """
    studies, key = read_studies(), study_key(run)
    own = {"models": [], "reasons": []} | studies.get(key, {})
    reviews = set(review_hashes(run))
    others = [record for other, record in studies.items() if other != key and not reviews.isdisjoint(record["reviews"])]
    return {"models": own["models"], "reasons": own["reasons"], "studies": len(others) + 1}


def review_hashes(run: Run) -> list[str]:
    """Return a short hash of each test review's text."""
    texts = reviews_of(run.profile, run.seed)["test"]["text"][:]
    return [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]


def open_test(run: Run, names: list[str], again: str = "") -> dict:
    """Register the models to evaluate on the test reviews, and reject later additions; returns ``test_record``.

    Called once, at the end: whoever looks, adds a model and looks again has chosen on the test reviews. So a second
    call that adds models to the same study raises ``WorkspaceError`` unless ``again`` gives the reason, which is kept.
    """
    key = study_key(run)
    if distributed.is_main_process():
        path = register_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            studies = read_studies()
            record = studies.setdefault(key, {"profile": run.profile.name, "models": [], "reasons": []})
            added = [name for name in names if name not in record["models"]]
            if record["models"] and added and not again:
                raise WorkspaceError(
                    f"{len(record['models'])} models were evaluated on the test reviews, and {', '.join(added[:5])} "
                    "would be chosen with their results in view: choose on validation, or give open_test "
                    "again='the reason'"
                )
            record["models"] += added
            record["reasons"] += [again] if again else []
            record["reviews"] = review_hashes(run)
            write_text(path, json.dumps(studies, indent=1) + "\n")
    distributed.barrier()
    return test_record(run)


def check_declared(run: Run, name: str, split: str) -> None:
    """Raise ``WorkspaceError`` for the test reviews and a model that ``open_test`` has not registered."""
    if split == "test" and name not in read_studies().get(study_key(run), {}).get("models", ()):
        raise WorkspaceError(
            f"{name} is not registered for the test reviews, which are used once, in notebook 06 "
            "(predictions.open_test): use validation until then"
        )


# --- logits ---


def split_logits(run: Run, name: str, split: str) -> np.ndarray:
    """Artefact ``logits_<model>_<split>``: the logits [n, 2] of a model on a split, computed once.

    On "test" only for models that ``open_test`` has registered.
    """
    check_declared(run, name, split)

    def build(target):
        logits = run.judge(on_device(run, name), dataset(run, split).input_ids)
        save_tensors(target.folder, {"logits": torch.from_numpy(logits)})

    artefact = f"logits_{name}_{split}"
    settings = pick(run.profile, "max_tokens", "head_share", "precision", reviews=reviews_fingerprint(run, split))
    run.cached(artefact, settings, build, (name,))
    return run.load_tensors(artefact)["logits"].numpy()


def answers_right(run: Run, name: str, split: str) -> np.ndarray:
    """Return which reviews of a split a model gets right: bool [n]."""
    return split_logits(run, name, split).argmax(1) == dataset(run, split).labels


def right_over_seeds(run: Run, name: str, split: str, seeds: int | None = None) -> np.ndarray:
    """Return which reviews of a split a model of the first so many seeds, or of all, gets right: bool [seeds, n]."""
    return np.stack([answers_right(seed_run, name, split) for seed_run in runs_of(run)[:seeds]])


def validation_accuracy(run: Run, name: str) -> float:
    """Return a model's accuracy on the validation reviews."""
    return float(answers_right(run, name, "validation").mean())


def validator(run: Run) -> Callable[[torch.nn.Module], float]:
    """Return a function(model) -> validation accuracy, for a model that is not saved yet."""
    data = dataset(run, "validation")
    return lambda model: float((run.judge(model, data.input_ids).argmax(1) == data.labels).mean())


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return P(class) [n, classes] of logits, softened by a temperature."""
    return softmax(logits / temperature, axis=-1)
