"""2:4 sparsity: at most two of every four weights are not zero, the pattern of the sparse products of some NVIDIA GPUs.

Everything up to the GPU's own product (masks, layers, the check of the pattern) is tested on a CPU. The product itself
has not been run in this project, so its speed is not known here.
"""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbhelpers.models import prunable_layers


def has_two_of_four() -> bool:
    """Return whether there is a GPU of compute capability 8.0 or later, which torch requires for 2:4 matrices."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def as_linear(module: nn.Module) -> nn.Linear:
    """Return an ``nn.Linear`` that computes the same as a ``Conv1D`` or ``nn.Linear``."""
    weight = module.weight.detach()
    weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight.clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return linear


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Return whether at most two of every four weights in a row of [out, in] are not zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.view(len(weight), -1, 4).count_nonzero(-1) <= 2).all())


def convert_to_semi_structured(model: nn.Module) -> nn.Module:
    """Return a float16 copy of a model on the GPU, its 2:4 matrices in torch's format for the GPU's sparse products.

    Not run in this project (see above). Raises ``RuntimeError`` where there is no such GPU, and ``ValueError`` for a
    prunable matrix that is not 2:4 (see ``masks.select_two_of_four``).
    """
    if not has_two_of_four():
        raise RuntimeError("2:4 products need an NVIDIA GPU of compute capability 8.0 or later (found none)")
    sparse = copy.deepcopy(model).requires_grad_(False).eval()
    for name, layer in prunable_layers(model).items():
        linear = as_linear(layer)
        if not is_two_of_four(linear.weight):
            raise ValueError(f"{name} must be 2:4 sparse: prune with the masks of select_two_of_four first")
        sparse.set_submodule(name, linear)
    sparse = sparse.to("cuda", torch.float16)
    for linear in prunable_layers(sparse).values():
        linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(linear.weight), requires_grad=False)
    return sparse
