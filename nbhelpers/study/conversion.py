"""Notebook 04: pruned models on sparse engines, models without whole heads and neurons, and models in eight bits."""

from pathlib import Path

import numpy as np
import pandas as pd

from nbhelpers.profiles import Profile
from nbhelpers.sparse import convert_to_sparse, engines_of, quantize, save_sparse
from nbhelpers.study.artefacts import is_sparse, model_bytes, model_name
from nbhelpers.study.predictions import split_logits, validation_accuracy
from nbhelpers.study.recovery import recover_model, structured_sparsities
from nbhelpers.workspace import Run


def converted_sparsities(profile: Profile) -> tuple[float, ...]:
    """Return the sparsities at which notebook 04 converts: those of recovery from 80 % on, and the main one."""
    return tuple(s for s in profile.recovery_sparsities if s >= 0.8 or s == profile.main_sparsity)


def sparsify(run: Run, criterion: str, sparsity: float, stage: str = "sparse", source: str = "recovered") -> Path:
    """Artefact ``<stage>_<criterion>_<percent>``: the model of the stage ``source``, converted to sparse execution.

    The file holds the weights that are left and no engine: the machine that loads it chooses.
    """
    dense = model_name(source, criterion, sparsity)

    def build(target):
        save_sparse(convert_to_sparse(run.load_model(dense), "torch_csr"), target.folder)

    settings = {"criterion": criterion, "sparsity": sparsity}
    return run.cached(model_name(stage, criterion, sparsity), settings, build, (dense,), kind="sparse", made_by="04")


def compact_model(run: Run, criterion: str, sparsity: float) -> dict:
    """Artefacts ``structured_<criterion>_<percent>``, recovered, and ``compact_...``, the same with smaller matrices.

    Returns the row of ``recover_model``, with the compact model's name as ``model``.
    """
    row = recover_model(run, criterion, sparsity, "structured", "structures")
    sparsify(run, criterion, sparsity, "compact", "structured")
    return row | {"model": model_name("compact", criterion, sparsity)}


# --- eight bits ---


def block_model(run: Run, criterion: str, sparsity: float) -> dict:
    """Artefact ``blocks_<criterion>_<percent>``: pruned in blocks of four weights, and recovered like all others.

    Returns the row of ``recover_model``.
    """
    return recover_model(run, criterion, sparsity, "blocks", "blocks")


def to_int8(run: Run, name: str, made_by: str = "04") -> str:
    """Artefact ``int8_<name>``: a model with the weights of its blocks in eight bits; returns its name.

    Embeddings, biases, LayerNorms and the head stay in float32. The machine that loads it chooses the engines.
    """

    def build(target):
        model = run.load_model(name)
        sparse = model if is_sparse(run, name) else convert_to_sparse(model, "dense")
        save_sparse(quantize(sparse, "dense", tables=False), target.folder)

    run.cached(f"int8_{name}", {}, build, (name,), kind="sparse", made_by=made_by)
    return f"int8_{name}"


def int8_sources(run: Run, criterion: str) -> list[str]:
    """Return the models that notebook 04 rounds: the dense one, the one without blocks, and the compact ones."""
    compact = [model_name("compact", criterion, sparsity) for sparsity in structured_sparsities(run)]
    return ["fine_tuned", model_name("blocks", criterion, run.profile.main_sparsity), *compact]


def compare_int8(run: Run, names: list[str], made_by: str = "04") -> pd.DataFrame:
    """Return what eight bits change in each model: accuracy (validation), largest change of a logit, bytes, engines.

    Columns: model, accuracy, accuracy_int8, largest_logit_difference, file_bytes, file_bytes_int8, engines.
    """
    rows = []
    for name in names:
        rounded = to_int8(run, name, made_by)
        before, after = (split_logits(run, n, "validation") for n in (name, rounded))
        engines = engines_of(run.load_model(rounded))
        rows.append(
            {
                "model": name,
                "accuracy": validation_accuracy(run, name),
                "accuracy_int8": validation_accuracy(run, rounded),
                "largest_logit_difference": float(np.abs(before - after).max()),
                "file_bytes": model_bytes(run, name),
                "file_bytes_int8": model_bytes(run, rounded),
                "engines": ", ".join(f"{count} {engine}" for engine, count in engines.items()),
            }
        )
    return pd.DataFrame(rows)
