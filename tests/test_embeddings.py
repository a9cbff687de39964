"""Low-rank embeddings and int8: against numpy's decomposition, torch's quantization, and the bits on disk."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sparse import masked_gpt2, reviews
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers import criteria, masks, selection
from nbhelpers.models import prunable_weights
from nbhelpers.sparse import (
    FactorizedEmbedding,
    Int8Embedding,
    SparseLinear,
    convert_to_sparse,
    count_actual_params,
    factorize_embedding,
    load_sparse,
    quantize,
    save_sparse,
)
from nbhelpers.sparse.formats import quantize_rows


def llama():
    """A pruned Llama of another architecture: no positions, no biases."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = LlamaForSequenceClassification(LlamaConfig(**shape, initializer_range=0.4)).eval()
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return masks.apply_masks(model, selection.select(criteria.magnitude_based_pruning(weights, {}), 0.8))


EMBEDDING = re.compile(r"(table|wpe)\.weight$")
MODELS = {"gpt2": masked_gpt2, "llama": llama}


@pytest.fixture(params=list(MODELS))
def model(request):
    """A pruned decoder with a token embedding of rank 5."""
    return factorize_embedding(MODELS[request.param](), 5)


def logits(model):
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(**reviews((9, 4))).logits


# --- low-rank embeddings ---


def test_the_low_rank_embedding_is_the_nearest_of_its_rank():
    table = nn.Embedding(30, 12)
    low = FactorizedEmbedding.from_embedding(table, 4)
    singular = np.linalg.svd(table.weight.detach().numpy().astype(float), compute_uv=False)
    error = (low(torch.arange(30)) - table.weight).norm().item()
    assert error == pytest.approx(np.sqrt((singular[4:] ** 2).sum()), rel=1e-5)
    assert [tuple(p.shape) for p in low.parameters()] == [(30, 4), (12, 4)]


@pytest.mark.parametrize("rank", [0, 12, 13, -1])
def test_a_rank_that_is_none_or_saves_nolowg_is_refused(rank):
    with pytest.raises(ValueError, match=f"a rank of {rank}: it takes at least 1 and less than the 12 features"):
        FactorizedEmbedding.from_embedding(nn.Embedding(30, 12), rank)


def test_a_model_with_a_low_rank_embedding_trains_and_is_counted(model):
    before = count_actual_params(MODELS[model.config.model_type]())
    table, width = 50, 16
    assert count_actual_params(model)["total"] == before["total"] - table * width + 5 * (table + width)
    model(**reviews((9, 4))).logits.sum().backward()
    low = next(module for module in model.modules() if isinstance(module, FactorizedEmbedding))
    assert low.table.weight.grad.abs().sum() > 0 and low.expand.weight.grad.abs().sum() > 0


def test_the_sparse_model_with_a_low_rank_embedding_says_the_same(model):
    sparse = convert_to_sparse(model)
    torch.testing.assert_close(logits(sparse), logits(model), rtol=1e-4, atol=1e-4)
    assert count_actual_params(sparse)["total"] == count_actual_params(model)["total"]


# --- eight bits ---


def test_rows_are_rounded_as_torch_does():
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    numbers, scale = quantize_rows(values.flatten(), torch.arange(6).repeat_interleave(40), 6)
    zero = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -127, 127)
    torch.testing.assert_close((numbers.view(6, 40) * scale[:, None]), theirs, rtol=1e-6, atol=1e-7)
    assert numbers.abs().amax() == 127 and scale[2] == 1 and not numbers.view(6, 40)[2].any()
    assert ((numbers.view(6, 40) * scale[:, None] - values).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


def test_an_embedding_in_eight_bits():
    table = nn.Embedding(7, 3)
    table.weight.data = torch.tensor([[127.0, 1.4, -1.6]] * 6 + [[0.0, 0.0, 0.0]])
    found = Int8Embedding.from_embedding(table)
    assert found(torch.tensor([[0, 6]])).tolist() == [[[127.0, 1.0, -2.0], [0.0, 0.0, 0.0]]]
    assert found.numbers.dtype == torch.int8 and not list(found.parameters())


@pytest.mark.parametrize("backend", ["numba", "torch_csr", "dense"])
def test_a_sparse_layer_computes_with_the_rounded_weights(backend):
    dense = nn.Linear(20, 9)
    dense.weight.data *= torch.rand(9, 20) < 0.3
    dense.weight.data[4] = 0
    layer = SparseLinear.from_dense(dense, backend)
    layer.quantize()
    largest = dense.weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    rounded = (dense.weight / scale).round() * scale
    x = torch.randn(5, 20)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), x @ rounded.t() + dense.bias, rtol=1e-5, atol=1e-5)


def test_eight_bits_change_the_logits_little_and_the_file_much(model, tmp_path):
    sparse = convert_to_sparse(model)
    before, counted = logits(sparse), count_actual_params(sparse)["total"]
    wide = load_file(save_sparse(sparse, tmp_path / "wide") / "sparse.safetensors")
    after = logits(quantize(sparse))
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
    assert count_actual_params(sparse)["total"] == counted
    narrow = load_file(save_sparse(sparse, tmp_path / "narrow") / "sparse.safetensors")
    tables = [name.removesuffix(".numbers") for name in narrow if name.endswith(".numbers")]
    assert sorted(tables) == sorted(name.removesuffix(".weight") for name in wide if EMBEDDING.search(name))
    for name, tensor in wide.items():
        if name.endswith(".values"):
            # What is rounded to nolowg may be left out.
            assert narrow[name].dtype == torch.int8 and len(tensor) - 2 <= len(narrow[name]) <= len(tensor)
        elif EMBEDDING.search(name):
            numbers = narrow[name.replace(".weight", ".numbers")]
            assert (numbers.dtype, numbers.shape) == (torch.int8, tensor.shape)
        elif not name.endswith(".bitmap"):
            assert torch.equal(narrow[name], tensor)


def test_what_is_saved_in_eight_bits_comes_back_to_the_bit(model, tmp_path):
    sparse = quantize(convert_to_sparse(model))
    loaded = load_sparse(save_sparse(sparse, tmp_path))
    assert torch.equal(logits(loaded), logits(sparse))
    assert count_actual_params(loaded) == count_actual_params(sparse)
    again = save_sparse(loaded, tmp_path / "again") / "sparse.safetensors"
    first = load_file(tmp_path / "sparse.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(again).items())


@pytest.mark.parametrize("change", ["no scale", "floats", "short scale", "a float table"])
def test_files_that_do_not_fit_together_are_refused(tmp_path, change):
    path = save_sparse(quantize(convert_to_sparse(factorize_embedding(masked_gpt2(), 5))), tmp_path)
    path = path / "sparse.safetensors"
    tensors = load_file(path)
    layer, table = "transformer.h.0.mlp.c_fc", "transformer.wte.table.numbers"
    if change == "no scale":
        del tensors[f"{layer}.scale"]
    elif change == "floats":
        tensors[f"{layer}.values"] = tensors[f"{layer}.values"].float()
    elif change == "short scale":
        tensors[f"{layer}.scale"] = tensors[f"{layer}.scale"][:-1].clone()
    else:
        tensors[table] = tensors[table].float()
    save_file(tensors, path, metadata={"backends": json.dumps({})})
    said = r"sparse\.safetensors is missing or damaged: (values in eight bits|.* instead of )"
    with pytest.raises(ValueError, match=said):
        load_sparse(tmp_path)
