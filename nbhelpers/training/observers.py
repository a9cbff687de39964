"""Statistics of every prunable weight, gathered during training or in a calibration pass."""

import torch
from torch import nn

from nbhelpers.criteria import CRITERIA
from nbhelpers.masks import pack
from nbhelpers.models import prunable_layers, prunable_weights, stored_in_out
from nbhelpers.selection import select
from nbhelpers.system.progress import track
from nbhelpers.training import distributed

Tensors = dict[str, torch.Tensor]


class GradientMagnitude:
    """Observer: the float32 mean over optimizer steps of |dL/dw|, of the batch gradient before clipping.

    Accumulated in place: the extra memory is one float32 copy of the prunable weights.
    """

    def __init__(self, model: nn.Module):
        self.weights = prunable_weights(model)
        self.sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self.weights.items()}
        self.steps = 0

    def value(self, weight: nn.Parameter) -> torch.Tensor:
        """Return what is averaged, for one parameter."""
        return weight.grad.float().abs()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add this step's value of every prunable weight."""
        self.steps += 1
        for name, weight in self.weights.items():
            self.sums[name] += self.value(weight)

    def state(self) -> Tensors:
        """Return what a checkpoint stores: the number of steps, and the sums."""
        return {"steps": torch.tensor(self.steps)} | {f"sum.{name}": total for name, total in self.sums.items()}

    def load_state(self, tensors: Tensors) -> None:
        """Restore a ``state``."""
        self.steps = int(tensors["steps"])
        for name, total in self.sums.items():
            total.copy_(tensors[f"sum.{name}"])

    def mean(self) -> Tensors:
        """Return the mean by parameter name. Raises ``RuntimeError`` before the first step."""
        if not self.steps:
            raise RuntimeError("no gradient was observed yet: pass this observer to train() first")
        return {name: total / self.steps for name, total in self.sums.items()}


class FirstOrderMovement(GradientMagnitude):
    """Observer: the mean over optimizer steps of -w * dL/dw, positive where a step drives a weight away from zero.

    Up to the learning rate the movement score of Sanh, Wolf and Rush (2020); signed.
    """

    def value(self, weight: nn.Parameter) -> torch.Tensor:
        return -weight.detach().float() * weight.grad.float()


class RunningGradient:
    """Observer: a running mean of |dL/dw|, of the batch gradient before clipping and before any mask.

    Each step replaces a share of 1 - ``memory`` of it; the first step sets it. ``gradients`` are {} before.
    """

    def __init__(self, model: nn.Module, memory: float = 0.9):
        self.weights, self.gradients, self.memory = prunable_weights(model), {}, memory

    @torch.no_grad()
    def after_backward(self) -> None:
        """Mix this step's |dL/dw| into the mean."""
        for name, weight in self.weights.items():
            now = weight.grad.float().abs()
            self.gradients[name] = torch.lerp(self.gradients.get(name, now), now, 1 - self.memory)

    def state(self) -> Tensors:
        """Return what a checkpoint stores: the mean."""
        return dict(self.gradients)

    def load_state(self, tensors: Tensors) -> None:
        """Restore a ``state``."""
        self.gradients = {name: tensor.to(self.weights[name]) for name, tensor in tensors.items()}


def calibrate(model: nn.Module, reviews: list[list[int]], labels: list[int], hessians: bool = False) -> dict:
    """Return the statistics of one pass over some reviews, {statistic: {parameter name: tensor}}; no weight changes.

    One review at a time, so that gradients are those of single reviews. "calibration_gradient": mean |dL/dw|;
    "squared_gradient": mean (dL/dw)^2, the diagonal of the empirical Fisher information; "input_norm": the L2 norm over
    all tokens of each feature that enters, [in, 1] for a weight [in, out] and [1, in] for [out, in]; with ``hessians``,
    "hessian" [in, in]: X^T X of these features. Several processes share the reviews; each returns the sums of all.
    Raises ``ValueError`` without reviews.
    """
    if not reviews:
        raise ValueError("`reviews` must hold at least one review (got none)")
    weights = prunable_weights(model)
    found = {
        key: {n: torch.zeros_like(w) for n, w in weights.items()}
        for key in ("calibration_gradient", "squared_gradient")
    }
    features = {name: weight.shape[0 if stored_in_out(model, name) else 1] for name, weight in weights.items()}
    device = next(model.parameters()).device
    squares = {name: torch.zeros(size, device=device) for name, size in features.items()}
    products = {name: torch.zeros(size, size, device=device) for name, size in features.items() if hessians}

    def sum_inputs(name):
        def hook(module, inputs):
            x = inputs[0].detach().flatten(0, -2).float()
            squares[name] += x.square().sum(0)
            if hessians:
                products[name] += x.t() @ x

        return hook

    layers = prunable_layers(model).items()
    hooks = [layer.register_forward_pre_hook(sum_inputs(f"{name}.weight")) for name, layer in layers]
    was_training = model.training
    try:
        model.eval()
        mine = slice(distributed.rank(), None, distributed.world_size())
        pairs = list(zip(reviews[mine], labels[mine], strict=True))
        for ids, label in track(pairs, "calibrating, review by review"):
            model.zero_grad()
            logits = model(input_ids=torch.tensor([ids], device=device)).logits
            nn.functional.cross_entropy(logits, torch.tensor([label], device=device)).backward()
            for name, weight in weights.items():
                found["calibration_gradient"][name] += weight.grad.abs() / len(reviews)
                found["squared_gradient"][name] += weight.grad.square() / len(reviews)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        model.train(was_training)
    for tensors in (*found.values(), squares, products):
        for tensor in tensors.values():
            distributed.all_reduce(tensor)
    found["input_norm"] = {n: t.sqrt().unsqueeze(1 if stored_in_out(model, n) else 0) for n, t in squares.items()}
    return found | ({"hessian": products} if hessians else {})


class FlaggedSets:
    """Observer: the weights that each criterion would drop after 0, 1, 2, 4, 8, ... optimizer steps.

    It must come before the ``GradientMagnitude`` whose sums it reads, so that weights and gradients are those after the
    same number of steps; ``RuntimeError`` otherwise. A criterion whose scores are all zero is left out: movement and
    gradient after 0 steps. Extra memory: a copy of the prunable weights, three bits per weight and record, and while
    one is made the scores of one criterion and the mean gradient.
    """

    def __init__(self, gradients: GradientMagnitude, sparsity: float):
        self.gradients, self.sparsity, self.steps, self.sets = gradients, sparsity, 0, {}
        self.start = {name: weight.detach().clone() for name, weight in gradients.weights.items()}

    def after_backward(self) -> None:
        """Call ``record`` if the number of steps made so far is 0 or a power of two."""
        if self.steps & (self.steps - 1) == 0:
            self.record()
        self.steps += 1

    @torch.no_grad()
    def record(self) -> None:
        """Keep the set that each criterion flags now, as "<steps>/<criterion>"."""
        if self.gradients.steps != self.steps:
            raise RuntimeError("FlaggedSets must come before its GradientMagnitude in the observers of train()")
        gradients = self.gradients.mean() if self.steps else self.gradients.sums
        statistics = {"pretrained": self.start, "mean_abs_gradient": gradients}
        for criterion, score in CRITERIA.items():
            scores = score(self.gradients.weights, statistics)
            if any(values.any() for values in scores.values()):
                self.sets[f"{self.steps}/{criterion}"] = pack(select(scores, self.sparsity))

    def state(self) -> Tensors:
        """Return what a checkpoint stores: the number of steps, and the sets."""
        return {"steps": torch.tensor(self.steps)} | {f"set.{key}": bits for key, bits in self.sets.items()}

    def load_state(self, tensors: Tensors) -> None:
        """Restore a ``state``."""
        self.steps = int(tensors["steps"])
        self.sets = {key.removeprefix("set."): bits for key, bits in tensors.items() if key != "steps"}

    def tensors(self) -> Tensors:
        """Return {"<steps>/<criterion>": ``pack``ed set}; the last sets are those of the model as it is now.

        Call it after ``train``: where that restored the weights of the best validation, the last sets are those of
        these weights with the gradients of all steps, as are the scores of a run.
        """
        self.record()
        return self.sets
