"""Any decoder with its pruned layers made sparse: the architecture's own code with sparse products.

GPT-2 has more (``gpt2.py``: no padding, a fused MLP); here only the layers are replaced, which works for all layers
that ``models.prunable_weights`` finds in a model, such as those of Llama with grouped-query attention and a gated MLP.
"""

import copy

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2ForSequenceClassification, PreTrainedConfig

from nbhelpers.models import prunable_layers, prunable_weights
from nbhelpers.sparse.embeddings import Int8Embedding, shape_embeddings
from nbhelpers.sparse.gpt2 import SparseGPT2ForSequenceClassification, convert_gpt2_to_sparse, skeleton
from nbhelpers.sparse.layers import SparseLinear, sparse_layers


def convert_to_sparse(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Return the sparse model with the logits of a (masked) decoder, within float rounding.

    A GPT-2 becomes a ``SparseGPT2ForSequenceClassification``, any other decoder a copy whose prunable layers are
    ``SparseLinear``. backend: see ``SparseLinear.from_dense``. Raises ``TypeError`` where no layer can be pruned.
    """
    if isinstance(model, GPT2ForSequenceClassification) and not model.config.add_cross_attention:
        return convert_gpt2_to_sparse(model, backend)
    layers = prunable_layers(model)
    if not layers:
        raise TypeError(f"`model` must have layers that can be pruned ({type(model).__name__} has none)")
    sparse = copy.deepcopy(model).float().requires_grad_(False).eval()
    for name, layer in layers.items():
        sparse.set_submodule(name, SparseLinear.from_dense(layer, backend))
    return sparse


def empty_like(config: PreTrainedConfig) -> nn.Module:
    """Return a sparse model of a config's architecture, to be filled: its sparse layers have no weights."""
    if config.model_type == "gpt2":
        return skeleton(config)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for name, layer in prunable_layers(model).items():
        model.set_submodule(name, SparseLinear(layer.in_features, layer.out_features))
    return shape_embeddings(model).requires_grad_(False).eval()


def outside_numbers(model: nn.Module) -> int:
    """Return how many numbers a model has outside of its sparse layers, including those in eight bits."""
    tables = [module.numbers for module in model.modules() if isinstance(module, Int8Embedding)]
    return sum(tensor.numel() for tensor in (*model.parameters(), *tables))


def count_actual_params(model: nn.Module) -> dict[str, int | float]:
    """Return how many parameters a model has and how many of them are active.

    total: all parameters of the architecture; prunable: the attention and MLP matrices of the blocks; active: the
    prunable weights that are not zero, and all others that are left; encoder_sparsity: the share of the prunable
    weights that are zero or removed. A sparse model is counted against the model that it was made from.
    """
    layers = sparse_layers(model)
    if isinstance(model, SparseGPT2ForSequenceClassification):
        config = copy.deepcopy(model.config)
        config.kept_heads = config.kept_neurons = None
        whole = sparse_layers(skeleton(config))
        others = outside_numbers(model)
        prunable = sum(layer.in_features * layer.out_features for layer in whole)
        left = sum(layer.nonzeros for layer in layers)
        total = prunable + sum(layer.out_features for layer in whole) + others
        active = left + sum(len(layer.bias) for layer in layers) + others
    elif layers:
        with torch.device("meta"):
            total = outside_numbers(shape_embeddings(AutoModelForSequenceClassification.from_config(model.config)))
        prunable = sum(layer.in_features * layer.out_features for layer in layers)
        left = sum(layer.nonzeros for layer in layers)
        active = total - prunable + left
    else:
        weights = prunable_weights(model).values()
        prunable = sum(weight.numel() for weight in weights)
        left = sum(int(torch.count_nonzero(weight)) for weight in weights)
        total = outside_numbers(model)
        active = total - prunable + left
    sparsity = 1 - left / prunable if prunable else 0.0
    return {"total": total, "active": active, "prunable": prunable, "encoder_sparsity": sparsity}
