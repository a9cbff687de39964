"""Small pruned models and matrices that the tests of sparse execution share."""

import os
from pathlib import Path

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from nbhelpers import criteria, masks, selection
from nbhelpers.models import prunable_weights

# What hypothesis keeps between runs goes where all other test output goes.
set_hypothesis_home_dir(Path(os.environ["NBHELPERS_ROOT"], ".hypothesis"))
BACKENDS = ("numba", "torch_csr", "dense")
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 24}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.4}
# -0.0, the smallest and largest denormals, the smallest and the largest number, infinities; NaN that signal, are quiet,
# and have every bit set.
SPECIAL_BITS = [0x80000000, 0x1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
SPECIAL_BITS += [0x7F800001, 0xFFA00000, 0x7FC12345, 0xFFFFFFFF]


def repeatable(count):
    """The same examples on every machine, however slow it is."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(max_examples=count, phases=phases, deadline=None, derandomize=True, database=None)


def masked_gpt2(density=0.1, **options):
    """A random GPT-2 with sparse blocks, its other parameters far from their initial values."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**{**SMALL, **options})).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        is_block = ".h." in name and parameter.ndim == 2
        parameter.data = noise * (torch.rand_like(noise) < density) if is_block else parameter.data + 0.2 * noise
    return model


def prune(model, sparsity=0.8):
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return masks.apply_masks(model, selection.select(criteria.magnitude_based_pruning(weights, {}), sparsity))


def masked_llama():
    """A pruned Llama: another architecture, without position embeddings and biases."""
    torch.manual_seed(0)
    return prune(LlamaForSequenceClassification(LlamaConfig(**LLAMA)).eval())


def reviews(lengths, width=None):
    """Random right-padded reviews whose text never has the padding token."""
    torch.manual_seed(1)
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask.long()}


def logits(model):
    with torch.inference_mode():
        return model(**reviews((9, 4))).logits


def bits(tensor):
    """The bits of float32 numbers, which tell NaN from NaN and 0.0 from -0.0."""
    return tensor.detach().contiguous().numpy().view(np.uint32)


def any_bits(shape, density, rng):
    """A float32 matrix of any bit patterns whatever; some rows have no weights."""
    drawn = rng.integers(2**32, size=shape, dtype=np.uint32)
    drawn = np.where(rng.random(shape) < 0.3, rng.choice(np.array(SPECIAL_BITS, np.uint32), shape), drawn)
    drawn[rng.random(shape) >= density] = 0
    drawn[rng.random(shape[0]) < 0.2] = 0
    return torch.from_numpy(drawn.view(np.float32))


def linear(weight, bias=None):
    """An ``nn.Linear`` with this weight [out, in], whose gradients are not needed."""
    module = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight.data = weight
    if bias is not None:
        module.bias.data = bias
    return module.requires_grad_(False)
