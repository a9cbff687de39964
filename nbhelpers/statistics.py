"""What training observes on the way: the mean absolute gradient of every prunable weight."""

import torch
from torch import nn

from nbhelpers.models import prunable_weights


class GradientMagnitude:
    """Observer: the float32 mean over optimizer steps of |dL/dw|, of the batch gradient before clipping.

    Accumulated in place: the extra memory is one float32 copy of the prunable weights.
    """

    def __init__(self, model: nn.Module):
        self.weights = prunable_weights(model)
        self.sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self.weights.items()}
        self.steps = 0

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the gradients that the parameters hold now."""
        self.steps += 1
        for name, weight in self.weights.items():
            self.sums[name] += weight.grad.float().abs()

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean absolute gradient by parameter name. Raises ``RuntimeError`` before the first step."""
        if not self.steps:
            raise RuntimeError("no gradient was observed: pass this observer to train() first")
        return {name: total / self.steps for name, total in self.sums.items()}
