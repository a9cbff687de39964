"""What bfloat16 on a CPU computes faster in another way: attention as plain products, and GELU in its exact form."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "products"  # under which transformers finds it


def attend(module: nn.Module, query, key, value, attention_mask, scaling: float | None = None, **options):
    """softmax(scaling * q k^T) v over each token and those before it: [batch, heads, tokens, features] in.

    Returns [batch, tokens, heads, features] and, as the interface asks for weights, None. What has a mask, dropout or
    grouped heads goes to PyTorch's fused attention.
    """
    (batch, heads, tokens, features), mask = query.shape, attention_mask
    if mask is not None or key.shape != query.shape or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    later = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu(1)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=features**-0.5 if scaling is None else scaling)
    mixed = scores.softmax(-1, dtype=query.dtype) @ v
    return mixed.view(batch, heads, tokens, features).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def attention_as_products(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a model that has the fused attention computes ``attend`` instead."""
    before = model.config._attn_implementation
    if before == "sdpa":
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def exact_gelu(model: nn.Module) -> Iterator[None]:
    """Within the block a model computes x * Phi(x) where it has the tanh form of it, which is slower on a CPU.

    The two differ by less than 0.0005 (Hendrycks and Gimpel, 2016), as much as rounding x to bfloat16 changes either.
    """
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, GELUTanh | NewGELUActivation)
    ]
    for parent, name, _ in replaced:
        setattr(parent, name, nn.GELU())
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@contextlib.contextmanager
def faster_in_bfloat16(model: PreTrainedModel, precision: str, training: bool = False) -> Iterator[None]:
    """Within the block a model that computes in "bf16" on a CPU does so in the faster ways; any other, as it is.

    In training that is attention, too: the backward pass of the fused one takes several times as long for texts of up
    to a few hundred tokens.
    """
    with contextlib.ExitStack() as ways:
        if precision == "bf16" and model.device.type == "cpu":
            ways.enter_context(exact_gelu(model))
            if training:
                ways.enter_context(attention_as_products(model))
        yield
