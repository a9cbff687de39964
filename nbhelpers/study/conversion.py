"""Notebook 04: pruned models converted to sparse execution, and models without whole heads and neurons."""

from pathlib import Path

import torch

from nbhelpers import masks
from nbhelpers.models import has_structures, load_config, structures
from nbhelpers.profiles import Profile
from nbhelpers.sparse import convert_to_sparse, save_sparse
from nbhelpers.study.artefacts import model_name
from nbhelpers.study.pruning import recover_model
from nbhelpers.study.scoring import scores_of
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


def structured_sparsities(run: Run) -> tuple[float, ...]:
    """Return the sparsities at which whole heads and neurons are taken out: the profile's, or none without a GPT-2."""
    return run.profile.structured_sparsities if has_structures(load_config(run.folder("fine_tuned"))) else ()


def structured_masks(run: Run, criterion: str, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks of whole heads and neurons by a criterion's scores, nearest to a sparsity."""
    scores = scores_of(run, criterion)
    return masks.select_structures(scores, structures(run.load_model("fine_tuned")), sparsity)


def compact_model(run: Run, criterion: str, sparsity: float) -> dict:
    """Artefacts ``structured_<criterion>_<percent>``, recovered, and ``compact_...``, the same with smaller matrices.

    Returns the row of ``recover_model``, with the compact model's name as ``model``.
    """
    row = recover_model(run, criterion, sparsity, structured_masks(run, criterion, sparsity), "structured")
    sparsify(run, criterion, sparsity, "compact", "structured")
    return {"model": model_name("compact", criterion, sparsity), **row}
