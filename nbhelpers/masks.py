"""Scores -> masks -> a model that stays pruned. A mask is True where a weight is kept."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from nbhelpers.criteria import flag_below, merge_scores
from nbhelpers.models import Structures, prunable_weights, stored_in_out
from nbhelpers.selection import select

Tensors = dict[str, torch.Tensor]


def select_two_of_four(scores: Tensors, model: nn.Module) -> Tensors:
    """Return masks that drop the two lowest scores of every four consecutive inputs of an output.

    Some GPUs multiply by matrices of this pattern directly (Mishra et al., 2021). The sparsity is 50 % in every matrix.
    Equal scores are dropped in order. Raises ``ValueError`` where the number of inputs is not a multiple of four.
    """
    masks = {}
    for name, score in scores.items():
        rows = score.t() if stored_in_out(model, name) else score  # [out, in]
        if rows.shape[1] % 4:
            raise ValueError(f"the inputs of {name} must be a multiple of 4 for 2:4 sparsity (got {rows.shape[1]})")
        fours = rows.reshape(len(rows), -1, 4)
        ranks = fours.argsort(dim=-1, stable=True).argsort(dim=-1)
        kept = (ranks >= 2).view(rows.shape)
        masks[name] = (kept.t() if stored_in_out(model, name) else kept).contiguous()
    return masks


def select_blocks(
    scores: Tensors,
    model: nn.Module,
    sparsity: float,
    size: int = 4,
    choose: Callable[[Tensors, float], Tensors] = select,
) -> Tensors:
    """Return masks that drop whole blocks of ``size`` neighbouring inputs of an output: those of the lowest mean score.

    Exactly round(sparsity * number of blocks) are dropped, of all matrices together. Processors that multiply bytes
    take four at a time (see ``sparse.blocks``). choose: see ``GradualKeeper``, here on the scores of blocks. Raises
    ``ValueError`` where the number of inputs is not a multiple of ``size``.
    """
    means = {}
    for name, score in scores.items():
        rows = score.t() if stored_in_out(model, name) else score  # [out, in]
        if rows.shape[1] % size:
            raise ValueError(f"the inputs of {name} must be a multiple of {size} (got {rows.shape[1]})")
        means[name] = rows.reshape(len(rows), -1, size).mean(2)
    kept = {name: mask.repeat_interleave(size, 1) for name, mask in choose(means, sparsity).items()}
    return {n: (mask.t() if stored_in_out(model, n) else mask).contiguous() for n, mask in kept.items()}


def select_structures(scores: Tensors, structures: list[Structures], sparsity: float) -> Tensors:
    """Return masks that drop whole attention heads and neurons: {parameter name: bool tensor, True = kept}.

    A structure's score is the mean of its weights' scores. The lowest ones are dropped until the share of weights
    dropped is as near to ``sparsity`` as whole structures allow. The best of each attention and each MLP is kept. Equal
    scores are dropped in the order of the structures. Raises ``ValueError`` for a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be a number from 0 to 1 (got {sparsity})")
    means, sizes = [], []
    for structure in structures:
        slices = [structure.slices(scores, part).double() for part in structure.parts]
        size = sum(part[:, 0].numel() for part in slices)
        mean = sum(part.sum((0, 2, 3)) for part in slices) / size
        mean[mean.argmax()] = torch.inf
        means.append(mean)
        sizes.append(torch.full((structure.count,), size))
    mean, size = torch.cat(means), torch.cat(sizes)
    order = mean.argsort(stable=True)[: int((mean < torch.inf).sum())]
    total = sum(score.numel() for score in scores.values())
    dropped = torch.cat([torch.zeros(1, dtype=torch.long), size[order].cumsum(0)])
    kept = torch.ones(len(mean), dtype=torch.bool)
    kept[order[: int((dropped - sparsity * total).abs().argmin())]] = False
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    for structure, left in zip(structures, kept.split([s.count for s in structures]), strict=True):
        for part in structure.parts:
            # A view with the dimension first: assigning to it changes the mask.
            name, dimension, groups = part
            first = masks[name].movedim(dimension, 0)
            first[~left.repeat_interleave(len(first) // (groups * structure.count)).repeat(groups)] = False
    return masks


def identify_useless_parameters(
    scores: dict[str, Tensors],
    sparsity: float | None = None,
    thresholds: dict[str, float] | None = None,
    agreement: str = "all",
) -> Tensors:
    """Return the weights that the criteria together call useless: {parameter name: bool tensor, True = useless}.

    scores: {criterion: {parameter name: score}}. Pass either the thresholds of the criteria, or a sparsity, for which a
    common quantile is solved so that exactly round(sparsity * N) weights are flagged.
    """
    if (sparsity is None) == (thresholds is None):
        raise ValueError("pass either `sparsity` or `thresholds` (got both or neither)")
    if thresholds is not None:
        return flag_below(scores, thresholds, agreement)
    return {name: ~kept for name, kept in select(merge_scores(scores, agreement), sparsity).items()}


def sparsity_of(masks: Tensors) -> float:
    """Return the share of weights that masks drop."""
    return 1 - sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class MaskKeeper:
    """Keep a model pruned during training: zero gradients before the step, zero weights after it.

    Adam's momentum and weight decay would revive a masked weight otherwise. Raises ``ValueError`` when a mask fits no
    prunable weight.
    """

    def __init__(self, model: nn.Module, masks: Tensors, apply: bool = True):
        self.weights = prunable_weights(model)
        wrong = [n for n, m in masks.items() if n not in self.weights or self.weights[n].shape != m.shape]
        if wrong:
            raise ValueError(f"masks must fit prunable weights of the model ({', '.join(wrong[:3])} do not)")
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in masks.items()}
        if apply:
            self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the weights that the masks drop to zero."""
        for name, mask in self.masks.items():
            self.weights[name].masked_fill_(~mask, 0.0)

    def mask_gradients(self) -> None:
        """Set the gradients of dropped weights to zero, before clipping, so that they do not count in its norm."""
        for name, mask in self.masks.items():
            self.weights[name].grad.masked_fill_(~mask, 0.0)

    def state(self) -> Tensors:
        """Return the tensors that a checkpoint has to keep: none, since the masks do not change."""
        return {}

    def load_state(self, tensors: Tensors) -> None:
        """Continue from a ``state``."""

    def revived(self) -> int:
        """Return how many dropped weights are not zero; a number above 0 is a bug."""
        return sum(int((self.weights[name][~mask] != 0).sum()) for name, mask in self.masks.items())


def cubic_sparsity(final: float, progress: float, first: float = 0.0) -> float:
    """Return the sparsity of a gradual schedule, final - (final - first) * (1 - t)^3, t from 0 to 1.

    It starts at ``first`` and slows down towards the end (Zhu and Gupta, 2017).
    """
    return final - (final - first) * (1 - min(1.0, max(0.0, progress))) ** 3


class GradualKeeper(MaskKeeper):
    """Prune during training: to ``first`` at once, a little more every ``every`` steps, to the end in ``steps`` steps.

    scores() is called each time, so that scores can follow the weights; a weight that is gone stays gone.
    choose(scores, sparsity) -> masks, by default those of single weights. ``finish`` raises ``RuntimeError`` where the
    training was too short to reach the sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Callable[[], Tensors],
        sparsity: float,
        steps: int,
        every: int = 1,
        first: float = 0.0,
        choose: Callable[[Tensors, float], Tensors] = select,
    ):
        self.scores, self.sparsity, self.first, self.choose = scores, sparsity, first, choose
        self.steps, self.every, self.step = max(1, steps), every, 0
        super().__init__(model, select(scores(), 0.0))

    def apply(self) -> None:
        """Take the next step of the schedule, and set the weights that the masks drop to zero."""
        if self.step <= self.steps and (self.step % self.every == 0 or self.step == self.steps):
            scores = {
                n: s.to(self.masks[n].device).masked_fill(~self.masks[n], -torch.inf) for n, s in self.scores().items()
            }
            chosen = self.choose(scores, cubic_sparsity(self.sparsity, self.step / self.steps, self.first))
            # Whole structures are dropped to the nearest share, which may be one fewer than are gone.
            self.masks = {name: mask.to(self.masks[name].device) & self.masks[name] for name, mask in chosen.items()}
        self.step += 1
        super().apply()

    def state(self) -> Tensors:
        """Return the tensors that a checkpoint has to keep: the step of the schedule, and the masks."""
        return {"step": torch.tensor(self.step), "masks": pack(self.masks)}

    def load_state(self, tensors: Tensors) -> None:
        """Continue from a ``state``."""
        self.step = int(tensors["step"])
        masks = unpack(tensors["masks"], self.masks)
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in masks.items()}

    def finish(self) -> None:
        """Raise ``RuntimeError`` unless the schedule has reached its end."""
        if self.step <= self.steps:
            raise RuntimeError(
                f"gradual pruning ended at step {self.step - 1} of {self.steps}, at sparsity "
                f"{sparsity_of(self.masks):.1%} instead of {self.sparsity:.1%}: train for more steps"
            )


def apply_masks(model: nn.Module, masks: Tensors) -> nn.Module:
    """Zero the dropped weights of a model in place, and return the model."""
    MaskKeeper(model, masks)
    return model


def pack(masks: Tensors) -> torch.Tensor:
    """Return masks as one uint8 tensor, eight weights per byte, 1 = dropped; every matrix starts with a new byte."""
    return torch.from_numpy(np.concatenate([np.packbits(~mask.cpu().numpy()) for mask in masks.values()]))


def unpack(bits: torch.Tensor, weights: Tensors) -> Tensors:
    """Return the masks that ``pack`` packed; weights: tensors with their names and shapes, in their order."""
    parts = bits.split([-(-weight.numel() // 8) for weight in weights.values()])
    masks = {}
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        dropped = np.unpackbits(part.numpy(), count=weight.numel()).astype(bool)
        masks[name] = torch.from_numpy(~dropped).view(weight.shape)
    return masks
