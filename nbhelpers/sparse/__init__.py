"""Sparse execution: the kernel, the layers, GPT-2 and other decoders made of them, and their files."""

from nbhelpers.sparse.decoder import convert_to_sparse, count_actual_params
from nbhelpers.sparse.embeddings import FactorizedEmbedding, Int8Embedding, factorize_embedding, quantize
from nbhelpers.sparse.gpt2 import (
    SparseGPT2Attention,
    SparseGPT2Block,
    SparseGPT2ForSequenceClassification,
    SparseGPT2MLP,
    SparseGPT2Model,
    compact,
    convert_gpt2_to_sparse,
)
from nbhelpers.sparse.layers import SparseLinear, engines_of
from nbhelpers.sparse.semi_structured import convert_to_semi_structured, has_two_of_four
from nbhelpers.sparse.storage import load_sparse, save_sparse

__all__ = [
    "FactorizedEmbedding",
    "Int8Embedding",
    "SparseGPT2Attention",
    "SparseGPT2Block",
    "SparseGPT2ForSequenceClassification",
    "SparseGPT2MLP",
    "SparseGPT2Model",
    "SparseLinear",
    "compact",
    "convert_gpt2_to_sparse",
    "convert_to_semi_structured",
    "convert_to_sparse",
    "count_actual_params",
    "engines_of",
    "factorize_embedding",
    "has_two_of_four",
    "load_sparse",
    "quantize",
    "save_sparse",
]
