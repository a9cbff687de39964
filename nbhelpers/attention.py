"""Causal attention as plain matrix products: what trains fastest in bfloat16 on a CPU."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "products"  # under which transformers finds it


def attend(module: nn.Module, query, key, value, attention_mask, scaling: float | None = None, **options):
    """softmax(scaling * q k^T) v over each token and those before it: [batch, heads, tokens, features] in.

    Returns [batch, tokens, heads, features] and, as the interface asks for weights, None. Only bfloat16 on a CPU is
    computed here: there the backward pass of PyTorch's fused attention takes several times as long for texts of up
    to a few hundred tokens. All else, and what has a mask or grouped heads, goes to the fused attention.
    """
    (batch, heads, tokens, features), mask = query.shape, attention_mask
    plain = mask is None and key.shape == query.shape and not options.get("dropout")
    if not plain or query.device.type != "cpu" or query.dtype != torch.bfloat16:
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
