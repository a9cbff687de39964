"""2:4 sparsity: two of every four weights gone, for which NVIDIA GPUs since Ampere have products of their own.

Not run here: no such GPU was at hand. What comes before the GPU's own product is tested on a CPU.
"""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbhelpers.models import prunable_layers


def has_two_of_four() -> bool:
    """Whether the GPU has products for 2:4 matrices: one of compute capability 8.0 or later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def as_linear(module: nn.Module) -> nn.Linear:
    """The ``nn.Linear`` that computes what a ``Conv1D`` or ``nn.Linear`` does."""
    weight = module.weight.detach()
    weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight.clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return linear


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every four weights in a row of [out, in] at most two are not zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.view(len(weight), -1, 4).count_nonzero(-1) <= 2).all())


def convert_to_semi_structured(model: nn.Module) -> nn.Module:
    """A float16 copy of a model, on the GPU, whose 2:4 matrices are computed by the GPU's sparse products.

    Raises ``RuntimeError`` where there is no such GPU, and ``ValueError`` for a prunable matrix that is not 2:4 (see
    ``masks.select_two_of_four``).
    """
    if not has_two_of_four():
        raise RuntimeError("2:4 products need an NVIDIA GPU of compute capability 8.0 or later, and there is none here")
    sparse = copy.deepcopy(model).requires_grad_(False).eval()
    for name, layer in prunable_layers(model).items():
        linear = as_linear(layer)
        if not is_two_of_four(linear.weight):
            raise ValueError(f"{name} is not 2:4 sparse: prune with the masks of select_two_of_four first")
        sparse.set_submodule(name, linear)
    sparse = sparse.to("cuda", torch.float16)
    for linear in prunable_layers(sparse).values():
        linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(linear.weight), requires_grad=False)
    return sparse
