"""Training with weights in eight bits in the forward pass, so that a model learns to bear the rounding."""

import torch
from torch import nn

from nbhelpers.models import prunable_weights, stored_in_out

LEVELS = 127  # the largest whole number of eight bits with a sign


def rounded(weight: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return a matrix rounded to eight bits with one scale per row or column; its gradient is that of the matrix.

    inputs: the dimension over which a scale is shared. Rounding has no useful gradient of its own: it is passed over
    ("straight-through", Bengio et al., 2013; quantization-aware training, Jacob et al., 2018).
    """
    scale = weight.detach().abs().amax(inputs, keepdim=True) / LEVELS
    nearest = (weight.detach() / scale.where(scale > 0, 1.0)).round() * scale
    return weight + (nearest - weight.detach())


class RoundedModel:
    """A model that computes with its block weights and embeddings ``rounded``; the weights themselves do not change."""

    def __init__(self, model: nn.Module):
        bare = getattr(model, "module", model)  # among several processes the model is wrapped
        dimension = {name: 0 if stored_in_out(bare, name) else 1 for name in prunable_weights(bare)}
        dimension |= {f"{name}.weight": 1 for name, part in bare.named_modules() if isinstance(part, nn.Embedding)}
        prefix = "" if bare is model else "module."
        self.model, self.score = model, bare.score
        self.dimension = {prefix + name: inputs for name, inputs in dimension.items()}

    def __call__(self, **inputs):
        """Return what the model returns for these inputs."""
        parameters = dict(self.model.named_parameters())
        weights = {name: rounded(parameters[name], dimension) for name, dimension in self.dimension.items()}
        return torch.func.functional_call(self.model, weights, kwargs=inputs)
