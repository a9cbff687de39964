"""Smaller models beyond the blocks: low-rank embeddings, and values in eight bits.

A table of V tokens and d features becomes the product of [V, r] and [r, d] (factorized embeddings, as in ALBERT: Lan et
al., 2020). Each row of a table or of a sparse matrix is stored as whole numbers from -127 to 127 and one scale
(symmetric per-row quantization).
"""

import torch
from torch import nn

from nbhelpers.sparse.formats import quantize_matrix
from nbhelpers.sparse.layers import sparse_names


class Int8Embedding(nn.Module):
    """An embedding in eight bits: ``numbers`` int8 [tokens, features] times ``scale`` float32 [tokens]."""

    def __init__(self, tokens: int, features: int):
        super().__init__()
        self.register_buffer("numbers", torch.zeros(tokens, features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(tokens))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        """Return the nearest one to an embedding."""
        weight = embedding.weight.detach().float()
        quantized = cls(*weight.shape)
        quantized.numbers, quantized.scale = quantize_matrix(weight)
        return quantized

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., features] of ids [...]."""
        return self.numbers[ids] * self.scale[ids, None]


class FactorizedEmbedding(nn.Module):
    """A low-rank embedding: ``table`` [tokens, rank], then ``expand`` to the features."""

    def __init__(self, tokens: int, rank: int, features: int):
        super().__init__()
        self.table, self.expand = nn.Embedding(tokens, rank), nn.Linear(rank, features, bias=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, rank: int) -> "FactorizedEmbedding":
        """Return the nearest one of a rank, in the sum of squares (truncated SVD; Eckart and Young, 1936).

        Raises ``ValueError`` for a rank below 1, or not below the number of features.
        """
        tokens, features = embedding.weight.shape
        if not 1 <= rank < features:
            raise ValueError(f"`rank` must be at least 1 and below the {features} features (got {rank})")
        u, s, v = torch.linalg.svd(embedding.weight.detach().float(), full_matrices=False)
        low = cls(tokens, rank, features)
        low.table.weight.data, low.expand.weight.data = u[:, :rank] * s[:rank], v[:rank].t().contiguous()
        return low

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., features] of ids [...]."""
        return self.expand(self.table(ids))


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return a model's embeddings in float32, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def token_table(model: nn.Module) -> str:
    """Return the name of the embedding of a model's tokens."""
    return next(n for n, module in embeddings(model).items() if module.num_embeddings == model.config.vocab_size)


def factorize_embedding(model: nn.Module, rank: int) -> nn.Module:
    """Replace, in place, a model's token embedding by one of a rank, and return the model, which can be trained."""
    name = token_table(model)
    model.set_submodule(name, FactorizedEmbedding.from_embedding(model.get_submodule(name), rank))
    model.config.embedding_rank = rank
    return model


@torch.no_grad()
def quantize(model: nn.Module, backend: str = "auto", tables: bool = True) -> nn.Module:
    """Round, in place, the weights of a sparse model's layers to eight bits, and return the model.

    backend: see ``SparseLinear.from_dense``; "auto" chooses among all engines, also those that round the activations.
    tables: whether the embeddings are rounded, too. Biases, LayerNorms and the head stay in float32.
    """
    for name in sparse_names(model):
        model.set_submodule(name, model.get_submodule(name).with_backend(backend, eight_bits=True))
    if tables:
        for name, embedding in embeddings(model).items():
            model.set_submodule(name, Int8Embedding.from_embedding(embedding))
        model.config.weight_bits = 8
    return model


def shape_embeddings(model: nn.Module) -> nn.Module:
    """Replace, in place, the embeddings of a model without weights by those that its config names; return the model."""
    rank, bits = (getattr(model.config, name, None) for name in ("embedding_rank", "weight_bits"))
    if rank:
        table = model.get_submodule(name := token_table(model))
        model.set_submodule(name, FactorizedEmbedding(table.num_embeddings, rank, table.embedding_dim))
    if bits == 8:
        for name, module in embeddings(model).items():
            model.set_submodule(name, Int8Embedding(module.num_embeddings, module.embedding_dim))
    return model
