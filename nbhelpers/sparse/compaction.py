"""What pruning left empty is taken out: the dense matrices shrink, and so does the model.

A neuron is *silent* when no weight leads to it: its activation is then a constant, gelu(bias), which the next layer's
bias can hold. It is *unheard* when no weight leads away from it. The same goes for an attention head: without weights
for its values it adds a constant, since attention weights sum to one. Either way it can go, and the model's output
stays what it was, up to rounding.
"""

import torch
from torch import nn
from transformers import GPT2ForSequenceClassification
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


def conv1d(weight: torch.Tensor, bias: torch.Tensor) -> Conv1D:
    """GPT-2's linear layer from a weight [in, out] and a bias [out]."""
    layer = Conv1D(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.clone())
    return layer


def in_use(incoming: torch.Tensor, outgoing: torch.Tensor) -> torch.Tensor:
    """Which structures still do something: bool [count] from their weights [count, any number] each way."""
    return (incoming != 0).any(1) & (outgoing != 0).any(1)


@torch.no_grad()
def compact_mlp(mlp: nn.Module, activation: str) -> dict[str, Conv1D]:
    """``c_fc`` and ``c_proj`` without the neurons that are silent or unheard; at least one stays."""
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
    """``c_attn`` and ``c_proj`` without the heads that are silent or unheard; at least one stays."""
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
    """The blocks' layers without what does nothing, by name; and how many heads and neurons each block keeps."""
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
