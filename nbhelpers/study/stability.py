"""Where the flagged weights are, and how stable the flagged set is: over seeds, along fine-tuning, by layer."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from nbhelpers.criteria import CRITERIA
from nbhelpers.masks import apply_masks, unpack
from nbhelpers.models import Structures, position, prunable_weights
from nbhelpers.selection import select
from nbhelpers.system.progress import track

Tensors = dict[str, torch.Tensor]


# --- two flagged sets ---


def dropped_counts(a: Tensors, b: Tensors) -> np.ndarray:
    """Return [matrices, 4] integers: the weights of each matrix, those that a drops, that b drops, that both drop.

    Raises ``ValueError`` when the masks are of different parameters, or when a drops nothing.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"masks must be of the same parameters; not in both: {', '.join(sorted(a.keys() ^ b.keys())[:3])}"
        )
    counts = np.array([[m.numel(), (~m).sum(), (~b[n]).sum(), (~(m | b[n])).sum()] for n, m in a.items()])
    if not counts[:, 1].any():
        raise ValueError("masks must drop at least one weight (dropped none)")
    return counts


def overlap(a: Tensors, b: Tensors) -> float:
    """Return the share of the weights dropped by a that b drops too; symmetric where both drop equally many."""
    _, dropped, _, both = dropped_counts(a, b).sum(0)
    return float(both / dropped)


def overlap_and_chance(a: Tensors, b: Tensors) -> dict[str, float]:
    """Return ``overlap`` of two dicts of masks and two levels that it would have by chance.

    "chance": the share of all weights that b drops, which independent choices would share. A criterion that empties
    the same matrices each time is above that even where it chooses at random within them, so "chance_by_layer" keeps
    each matrix's own sparsities: sum over matrices of p_a * p_b * n, divided by the number of weights that a drops.
    An overlap above it is agreement on single weights.
    """
    counts = dropped_counts(a, b)
    total, dropped_a, dropped_b, both = counts.sum(0)
    expected = (counts[:, 1] * counts[:, 2] / counts[:, 0]).sum()
    return {
        "overlap": float(both / dropped_a),
        "chance": float(dropped_b / total),
        "chance_by_layer": float(expected / dropped_a),
    }


def cohen_kappa(a: Tensors, b: Tensors) -> float:
    """Return the agreement of two dicts of masks, 0 at chance and 1 where they are equal (Cohen, 1960).

    NaN where both drop every weight.
    """
    total, dropped_a, dropped_b, both = (int(count) for count in dropped_counts(a, b).sum(0))
    observed = (total - dropped_a - dropped_b + 2 * both) / total
    chance = (dropped_a * dropped_b + (total - dropped_a) * (total - dropped_b)) / total**2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def stability_over_seeds(masks_by_seed: dict[int, Tensors]) -> pd.DataFrame:
    """Return how far runs with different seeds agree on the weights to drop, one row per pair of seeds.

    masks_by_seed: {seed: masks}. Columns seed_a, seed_b, overlap, chance, chance_by_layer (``overlap_and_chance``) and
    kappa (``cohen_kappa``); no rows for one seed. Part of the agreement comes from the pretrained weights that runs
    share: magnitudes agree already before fine-tuning.
    """
    rows = [
        {"seed_a": s, "seed_b": t, **overlap_and_chance(a, b), "kappa": cohen_kappa(a, b)}
        for (s, a), (t, b) in itertools.combinations(masks_by_seed.items(), 2)
    ]
    return pd.DataFrame(rows, columns=["seed_a", "seed_b", "overlap", "chance", "chance_by_layer", "kappa"])


# --- by structure ---


def structure_shares(masks: Tensors, structures: list[Structures]) -> pd.DataFrame:
    """Return how much of each attention head and each MLP neuron masks drop, one row each.

    structures: of ``models.structures``. Columns layer, kind ("head" or "neuron"), index, dropped (the share of the
    weights in all its slices).
    """
    tables = []
    for structure in structures:
        slices = [structure.slices(masks, part) for part in structure.parts]
        kept = sum(piece.sum((0, 2, 3)) for piece in slices) / sum(piece[:, 0].numel() for piece in slices)
        layer, module = position(structure.parts[0][0])
        kind = "head" if module.startswith("attn.") else "neuron"
        tables.append(
            pd.DataFrame({"layer": layer, "kind": kind, "index": range(structure.count), "dropped": 1 - kept.numpy()})
        )
    return pd.concat(tables, ignore_index=True)


# --- along fine-tuning ---


def along_training(tensors: Tensors, weights: Tensors) -> pd.DataFrame:
    """Return how much of its early flagged set a criterion still flags in the end, one row per criterion and record.

    tensors: of ``observers.FlaggedSets.tensors``; weights: any tensors with the names, order and shapes of the prunable
    weights.
    Columns criterion, step (optimizer steps made), overlap (the share of the set that is in the last set too), chance,
    chance_by_layer (``overlap_and_chance``).
    """
    rows = []
    for criterion in CRITERIA:
        steps = sorted(int(key.split("/")[0]) for key in tensors if key.endswith(f"/{criterion}"))
        last = unpack(tensors[f"{steps[-1]}/{criterion}"], weights)
        for step in steps:
            masks = unpack(tensors[f"{step}/{criterion}"], weights)
            rows.append({"criterion": criterion, "step": step, **overlap_and_chance(masks, last)})
    return pd.DataFrame(rows)


# --- layer by layer ---


def sensitivity(
    model: nn.Module, scores: Tensors, evaluate: Callable[[nn.Module], float], sparsities: list[float]
) -> pd.DataFrame:
    """Evaluate a model with one matrix pruned at a time; return one row per matrix and sparsity (Han et al., 2015).

    Zeroes the share ``sparsity`` of a matrix with its lowest scores, calls evaluate(model) for a number, and restores
    the matrix bit for bit, also when evaluate raises. Columns layer, module, sparsity, value; the first row is the
    untouched model: layer -1, module "none", sparsity 0.
    """
    weights = prunable_weights(model)
    rows = [(-1, "none", 0.0, float(evaluate(model)))]
    for name, score in track(scores.items(), "pruning one matrix at a time"):
        for sparsity in sparsities:
            masks = select({name: score}, sparsity)
            saved = weights[name].detach().clone()
            try:
                rows.append((*position(name), sparsity, float(evaluate(apply_masks(model, masks)))))
            finally:
                with torch.no_grad():
                    weights[name].copy_(saved)
    return pd.DataFrame(rows, columns=["layer", "module", "sparsity", "value"])
