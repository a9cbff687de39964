"""Scores -> masks -> a model that stays pruned. A mask is True where a weight is kept."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

try:
    from numba import njit
except ImportError:
    warnings.warn("numba is missing: masks are selected by plain Python loops, a hundred times slower", stacklevel=2)

    def njit(**options):
        return lambda function: function


from nbhelpers.criteria import CRITERIA, flag_below, merge_scores
from nbhelpers.models import Structures, prunable_weights, stored_in_out
from nbhelpers.statistics import GradientMagnitude

Tensors = dict[str, torch.Tensor]


def raw_bits(score: torch.Tensor) -> tuple[np.ndarray, int]:
    """The bits of the scores as unsigned integers, flattened, without a copy where possible; and their number of bits.

    64 for float64; anything else counts as float32.
    """
    if score.dtype == torch.float64:
        return score.detach().flatten().cpu().numpy().view(np.uint64), 64
    return score.detach().float().flatten().cpu().numpy().view(np.uint32), 32


@njit(cache=True, inline="always")
def in_order(bits, width):
    """Bits of a float as an integer that orders as the float does: negative ones turned round, below all others."""
    sign = np.uint64(1) << np.uint64(width - 1)
    bits = np.uint64(bits)
    if bits == sign:
        bits = np.uint64(0)  # -0.0 is the equal of 0.0
    return (~bits) & (sign | (sign - np.uint64(1))) if bits & sign else bits | sign


@njit(cache=True)
def count_digits(bits, width, shift, prefix, counts):
    """Count the 16 bits above ``shift`` of each ordered integer whose higher bits are ``prefix``."""
    for i in range(bits.size):
        upper = in_order(bits[i], width) >> np.uint64(shift)
        if upper >> np.uint64(16) == prefix:
            counts[upper & np.uint64(0xFFFF)] += 1


@njit(cache=True)
def keep_above(bits, width, threshold, ties, kept):
    """Mark what lies above the threshold; of its equals the first ``ties`` are dropped. Returns the ties left over."""
    for i in range(bits.size):
        value = in_order(bits[i], width)
        tie = value == threshold and ties > 0
        ties -= tie
        kept[i] = value >= threshold and not tie
    return ties


def kth_smallest_bits(scores: Mapping[str, torch.Tensor], k: int) -> tuple[int, int]:
    """The k-th smallest score (k from 1) as an ordered integer, and how many of its equals are among the k smallest.

    Histograms of 16 bits at a time, from the top, of the scores that share the bits found so far; tensor by tensor:
    nothing is sorted, copied or concatenated, and the extra memory is one histogram, half a megabyte.
    """
    before, prefix, width = 0, 0, raw_bits(next(iter(scores.values())))[1]
    for shift in range(width - 16, -1, -16):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for score in scores.values():
            count_digits(raw_bits(score)[0], width, shift, np.uint64(prefix), counts)
        cumulative = before + counts.cumsum()
        found = int(np.searchsorted(cumulative, k))
        before = int(cumulative[found] - counts[found])
        prefix = (prefix << 16) | found
    return prefix, k - before


def threshold(scores: Mapping[str, torch.Tensor], share: float) -> float:
    """The score under or at which this share of all weights lies: of N weights, the round(share * N)-th lowest.

    Raises ``ValueError`` where that is none of the weights, or a score is not a number.
    """
    check_numbers(scores)
    scores = same_type(scores)
    k = round(share * sum(score.numel() for score in scores.values()))
    if k < 1:
        raise ValueError(f"a share of {share} is none of the weights: there is no score to go by")
    ordered, _ = kth_smallest_bits(scores, k)
    width = raw_bits(next(iter(scores.values())))[1]
    sign = 1 << (width - 1)
    bits = ordered ^ sign if ordered & sign else ~ordered & (2 * sign - 1)
    return float(np.array(bits, f"uint{width}").view(f"float{width}"))


def check_numbers(scores: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` where a score is not a number."""
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ValueError(f"the scores of {name} are not all numbers")


def same_type(scores: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The scores, all as float64 where they are of several types."""
    if len({score.dtype for score in scores.values()}) > 1:
        return {name: score.double() for name, score in scores.items()}
    return scores


def select_lowest(scores: Mapping[str, torch.Tensor], k: int) -> Tensors:
    """Masks that drop exactly the k weights with the lowest scores, the first ones among equals."""
    if k == 0:
        return {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    scores = same_type(scores)
    limit, ties = kth_smallest_bits(scores, k)
    masks = {}
    for name, score in scores.items():
        masks[name] = torch.empty(score.shape, dtype=torch.bool)
        bits, width = raw_bits(score)
        ties = keep_above(bits, width, np.uint64(limit), ties, masks[name].view(-1).numpy())
    return masks


def select(scores: Mapping[str, torch.Tensor], sparsity: float, scope: str = "global") -> Tensors:
    """Masks that drop the lowest scores: {parameter name: bool tensor, True = kept}.

    Exactly round(sparsity * N) are False: of all weights together (scope "global"), or of each matrix (scope
    "layer"). Equal scores fall in the order of the parameters. The scores may be a mapping that computes each tensor
    when it is asked for: then no two of them need be in memory at once. Raises ``ValueError`` for a sparsity outside
    [0, 1], another scope, or a score that is not a number.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}: it takes a number from 0 to 1")
    check_numbers(scores)
    if scope == "global":
        return select_lowest(scores, round(sparsity * sum(score.numel() for score in scores.values())))
    if scope == "layer":
        masks = [select_lowest({name: score}, round(sparsity * score.numel())) for name, score in scores.items()]
        return {name: mask for part in masks for name, mask in part.items()}
    raise ValueError(f"scope is {scope!r}: it takes global or layer")


def select_two_of_four(scores: Tensors, model: nn.Module) -> Tensors:
    """Masks that drop the two lowest scores of every four weights that stand side by side in an output's row.

    The pattern for which GPUs have products of their own (Mishra et al., 2021): sparsity is 50 %, in each matrix
    alike. Equal scores fall in the order of the weights. Raises ``ValueError`` where inputs are no multiple of four.
    """
    masks = {}
    for name, score in scores.items():
        rows = score.t() if stored_in_out(model, name) else score  # [out, in]
        if rows.shape[1] % 4:
            raise ValueError(f"{name} has {rows.shape[1]} inputs: 2:4 sparsity takes a multiple of 4")
        fours = rows.reshape(len(rows), -1, 4)
        places = fours.argsort(dim=-1, stable=True).argsort(dim=-1)
        kept = (places >= 2).view(rows.shape)
        masks[name] = (kept.t() if stored_in_out(model, name) else kept).contiguous()
    return masks


def select_structures(scores: Tensors, structures: list[Structures], sparsity: float) -> Tensors:
    """Masks that drop whole attention heads and neurons: {parameter name: bool tensor, True = kept}.

    A structure's score is the mean of its weights' scores. The lowest ones fall until the share of weights dropped is
    as near to ``sparsity`` as whole structures allow. The best of each attention and each MLP stays. Equal scores fall
    in the order of the structures. Raises ``ValueError`` for a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}: it takes a number from 0 to 1")
    means, sizes = [], []
    for structure in structures:
        slices = [structure.slices(scores, part).double() for part in structure.parts]
        size = sum(part[:, 0].numel() for part in slices)
        mean = sum(part.sum((0, 2, 3)) for part in slices) / size
        mean[mean.argmax()] = torch.inf
        means.append(mean)
        sizes.append(torch.full((structure.count,), size))
    mean, size = torch.cat(means), torch.cat(sizes)
    order = mean.argsort(stable=True)[: int(mean.isfinite().sum())]
    total = sum(score.numel() for score in scores.values())
    dropped = torch.cat([torch.zeros(1, dtype=torch.long), size[order].cumsum(0)])
    kept = torch.ones(len(mean), dtype=torch.bool)
    kept[order[: int((dropped - sparsity * total).abs().argmin())]] = False
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    for structure, left in zip(structures, kept.split([s.count for s in structures]), strict=True):
        for part in structure.parts:
            # A view of the mask where the dimension comes first: writing into it writes into the mask.
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
    """The weights that the criteria together call useless: {parameter name: bool tensor, True = useless}.

    scores: {criterion: {parameter name: score}}. Give either the thresholds of each criterion, or a sparsity, for
    which a common quantile is solved so that exactly round(sparsity * N) weights are flagged.
    """
    if (sparsity is None) == (thresholds is None):
        raise ValueError("give either a sparsity or thresholds")
    if thresholds is not None:
        return flag_below(scores, thresholds, agreement)
    return {name: ~kept for name, kept in select(merge_scores(scores, agreement), sparsity).items()}


def sparsity_of(masks: Tensors) -> float:
    """The share of weights that masks drop."""
    return 1 - sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class MaskKeeper:
    """Keeps a model pruned while it is trained: zero gradients before the step, zero weights after it.

    Adam's momentum and weight decay would revive a masked weight otherwise. Raises ``ValueError`` when a mask fits
    no prunable weight.
    """

    def __init__(self, model: nn.Module, masks: Tensors, apply: bool = True):
        self.weights = prunable_weights(model)
        wrong = [n for n, m in masks.items() if n not in self.weights or self.weights[n].shape != m.shape]
        if wrong:
            raise ValueError(f"the masks {', '.join(wrong[:3])} fit no prunable weight of this model")
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
        """What a checkpoint has to keep: nothing, since the masks stay what they are."""
        return {}

    def load_state(self, tensors: Tensors) -> None:
        """Go on from a ``state``."""

    def revived(self) -> int:
        """How many dropped weights are not zero; anything but 0 is a bug."""
        return sum(int((self.weights[name][~mask] != 0).sum()) for name, mask in self.masks.items())


def cubic_sparsity(final: float, progress: float) -> float:
    """The sparsity of a gradual schedule, final * (1 - (1 - t)^3) with t from 0 to 1 (Zhu and Gupta, 2017)."""
    return final * (1 - (1 - min(1.0, max(0.0, progress))) ** 3)


class GradualKeeper(MaskKeeper):
    """Prunes while it is trained: a little more every ``every`` steps, the full sparsity after ``steps`` steps.

    scores() is asked anew each time, so that it can follow the weights (gradual magnitude pruning) or stay what it was
    before recovery. ``finish`` raises ``RuntimeError`` where the training was too short to reach the sparsity.
    """

    def __init__(self, model: nn.Module, scores: Callable[[], Tensors], sparsity: float, steps: int, every: int = 1):
        self.scores, self.sparsity, self.steps, self.every, self.step = scores, sparsity, max(1, steps), every, 0
        super().__init__(model, select(scores(), 0.0))

    def apply(self) -> None:
        """Take the next step of the schedule, and set what the masks drop to zero."""
        if self.step % self.every == 0 or self.step == self.steps:
            chosen = select(self.scores(), cubic_sparsity(self.sparsity, self.step / self.steps))
            self.masks = {name: mask.to(self.weights[name].device) for name, mask in chosen.items()}
        self.step += 1
        super().apply()

    def state(self) -> Tensors:
        """What a checkpoint has to keep: the place in the schedule, and the masks."""
        return {"step": torch.tensor(self.step), "masks": pack(self.masks)}

    def load_state(self, tensors: Tensors) -> None:
        """Go on from a ``state``."""
        self.step = int(tensors["step"])
        masks = unpack(tensors["masks"], self.masks)
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in masks.items()}

    def finish(self) -> None:
        """Raise unless the schedule was gone through to its end."""
        if self.step <= self.steps:
            raise RuntimeError(
                f"gradual pruning ended at step {self.step - 1} of {self.steps}, at sparsity "
                f"{sparsity_of(self.masks):.1%} instead of {self.sparsity:.1%}: train for more steps"
            )


def apply_masks(model: nn.Module, masks: Tensors) -> nn.Module:
    """Zero the dropped weights of a model in place and hand it back."""
    MaskKeeper(model, masks)
    return model


def pack(masks: Tensors) -> torch.Tensor:
    """Masks as one uint8 tensor, eight weights a byte, 1 = dropped; every matrix begins with a new byte."""
    return torch.from_numpy(np.concatenate([np.packbits(~mask.cpu().numpy()) for mask in masks.values()]))


def unpack(bits: torch.Tensor, weights: Tensors) -> Tensors:
    """The masks that ``pack`` packed; weights: any tensors with their names and shapes, in their order."""
    parts = bits.split([-(-weight.numel() // 8) for weight in weights.values()])
    masks = {}
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        dropped = np.unpackbits(part.numpy(), count=weight.numel()).astype(bool)
        masks[name] = torch.from_numpy(~dropped).view(weight.shape)
    return masks


class FlaggedSets:
    """Observer: the weights that each criterion would drop after 0, 1, 2, 4, 8, ... optimizer steps.

    Stands before the ``GradientMagnitude`` whose sums it reads: when a backward pass ends, the weights are those after
    the step before, and so are then the gradients. Raises ``RuntimeError`` in another place. A criterion whose scores
    are all zero has no verdict yet and is left out: movement and gradient after 0 steps.
    Extra memory: a copy of the prunable weights, three bits a weight for each record, and while one is made the scores
    of one criterion and the mean gradient.
    """

    def __init__(self, gradients: GradientMagnitude, sparsity: float):
        self.gradients, self.sparsity, self.steps, self.sets = gradients, sparsity, 0, {}
        self.start = {name: weight.detach().clone() for name, weight in gradients.weights.items()}

    def after_backward(self) -> None:
        """Keep what the criteria flag now if the steps made so far are 0 or a power of two."""
        if self.steps & (self.steps - 1) == 0:
            self.record()
        self.steps += 1

    @torch.no_grad()
    def record(self) -> None:
        """Keep what each criterion flags now, as "<steps>/<criterion>"."""
        if self.gradients.steps != self.steps:
            raise RuntimeError("pass train() these observers in this order: FlaggedSets, its GradientMagnitude")
        gradients = self.gradients.mean() if self.steps else self.gradients.sums
        statistics = {"pretrained": self.start, "mean_abs_gradient": gradients}
        for criterion, score in CRITERIA.items():
            scores = score(self.gradients.weights, statistics)
            if any(values.any() for values in scores.values()):
                self.sets[f"{self.steps}/{criterion}"] = pack(select(scores, self.sparsity))

    def state(self) -> Tensors:
        """What a checkpoint has to keep: the number of steps, and the sets."""
        return {"steps": torch.tensor(self.steps)} | {f"set.{key}": bits for key, bits in self.sets.items()}

    def load_state(self, tensors: Tensors) -> None:
        """Go on from a ``state``."""
        self.steps = int(tensors["steps"])
        self.sets = {key.removeprefix("set."): bits for key, bits in tensors.items() if key != "steps"}

    def tensors(self) -> Tensors:
        """{"<steps>/<criterion>": ``pack``ed set}, the last ones of the model as it is now: ask after ``train``.

        Where ``train`` went back to the weights of its best validation, the last sets are those of these weights, with
        the gradients of all steps, as the scores of a run are.
        """
        self.record()
        return self.sets
