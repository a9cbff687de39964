"""Removal of the heads and neurons that pruning left without weights: the dense matrices and the model shrink.

A neuron is *silent* when it has no incoming weight: its activation is then a constant, gelu(bias), which the next
layer's bias can include. It is *unheard* when it has no outgoing weight. The same holds for an attention head: without
weights for its values it adds a constant, since attention weights sum to one. In both cases it can be removed without
changing the model's output, up to rounding.
"""

import torch
from torch import nn
from transformers import GPT2ForSequenceClassification
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


def conv1d(weight: torch.Tensor, bias: torch.Tensor) -> Conv1D:
    """Return GPT-2's linear layer from a weight [in, out] and a bias [out]."""
    layer = Conv1D(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.clone())
    return layer


def in_use(incoming: torch.Tensor, outgoing: torch.Tensor) -> torch.Tensor:
    """Return which structures affect the output: bool [count] from their weights [count, any number] in and out."""
    return (incoming != 0).any(1) & (outgoing != 0).any(1)


@torch.no_grad()
def compact_mlp(mlp: nn.Module, activation: str) -> dict[str, Conv1D]:
    """Return ``c_fc`` and ``c_proj`` without the silent and unheard neurons; at least one neuron is kept."""
    c_fc, c_proj = mlp.c_fc, mlp.c_proj
    kept = in_use(c_fc.weight.t(), c_proj.weight)
    kept[0] |= not kept.any()
    constant = ACT2FN[activation](c_fc.bias[~kept]) @ c_proj.weight[~kept]
    return {
        "c_fc": conv1d(c_fc.weight[:, kept], c_fc.bias[kept]),
        "c_proj": conv1d(c_proj.weight[kept], c_proj.bias + constant),
    }


@torch.no_grad()
def compact_attention(attention: nn.Module, heads: int) -> dict[str, Conv1D]:
    """Return ``c_attn`` and ``c_proj`` without the silent and unheard heads; at least one head is kept."""
    c_attn, c_proj = attention.c_attn, attention.c_proj
    width = len(c_proj.weight)
    size = width // heads
    values = c_attn.weight[:, 2 * width :].t().reshape(heads, -1)
    kept = in_use(values, c_proj.weight.view(heads, -1))
    kept[0] |= not kept.any()
    rows = kept.repeat_interleave(size)
    constant = c_attn.bias[2 * width :][~rows] @ c_proj.weight[~rows]
    return {
        "c_attn": conv1d(c_attn.weight[:, rows.repeat(3)], c_attn.bias[rows.repeat(3)]),
        "c_proj": conv1d(c_proj.weight[rows], c_proj.bias + constant),
    }


def compact_blocks(model: GPT2ForSequenceClassification) -> tuple[dict[str, Conv1D], list[int], list[int]]:
    """Return the blocks' smaller layers by name, and how many heads and neurons each block keeps."""
    config, layers, heads, neurons = model.config, {}, [], []
    for i, block in enumerate(model.transformer.h):
        attention = compact_attention(block.attn, config.num_attention_heads)
        mlp = compact_mlp(block.mlp, config.activation_function)
        layers |= {f"transformer.h.{i}.attn.{name}": layer for name, layer in attention.items()}
        layers |= {f"transformer.h.{i}.mlp.{name}": layer for name, layer in mlp.items()}
        size = config.hidden_size // config.num_attention_heads
        heads.append(len(attention["c_proj"].weight) // size)
        neurons.append(len(mlp["c_proj"].weight))
    return layers, heads, neurons
