"""Low-rank embeddings against numpy's SVD, int8 against torch's quantization, and their files."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sparse_models import logits, masked_gpt2, masked_llama, reviews
from torch import nn

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

EMBEDDING = re.compile(r"(table|wpe)\.weight$")
MODELS = {"gpt2": masked_gpt2, "llama": masked_llama}


@pytest.fixture(params=list(MODELS))
def model(request):
    """A pruned decoder with a token embedding of rank 5."""
    return factorize_embedding(MODELS[request.param](), 5)


# --- low-rank embeddings ---


def test_the_low_rank_embedding_is_the_nearest_of_its_rank():
    table = nn.Embedding(30, 12)
    low = FactorizedEmbedding.from_embedding(table, 4)
    singular = np.linalg.svd(table.weight.detach().numpy().astype(float), compute_uv=False)
    error = (low(torch.arange(30)) - table.weight).norm().item()
    assert error == pytest.approx(np.sqrt((singular[4:] ** 2).sum()), rel=1e-5)
    assert [tuple(p.shape) for p in low.parameters()] == [(30, 4), (12, 4)]


@pytest.mark.parametrize("rank", [0, 12, 13, -1])
def test_a_rank_that_saves_nothing_is_refused(rank):
    with pytest.raises(ValueError, match=rf"`rank` must be at least 1 and below the 12 features \(got {rank}\)"):
        FactorizedEmbedding.from_embedding(nn.Embedding(30, 12), rank)


def test_a_model_with_a_low_rank_embedding_trains_and_is_counted(model):
    before = count_actual_params(MODELS[model.config.model_type]())
    sparse = convert_to_sparse(model)
    for counted in (model, sparse):
        assert count_actual_params(counted)["total"] == before["total"] - 50 * 16 + 5 * (50 + 16)
    torch.testing.assert_close(logits(sparse), logits(model), rtol=1e-4, atol=1e-4)
    model(**reviews((9, 4))).logits.sum().backward()
    low = next(module for module in model.modules() if isinstance(module, FactorizedEmbedding))
    assert low.table.weight.grad.abs().sum() > 0 and low.expand.weight.grad.abs().sum() > 0


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
    layer = SparseLinear.from_dense(dense, backend).with_backend(backend, eight_bits=True)
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
            # A weight that is rounded to zero may be left out.
            assert narrow[name].dtype == torch.int8 and len(tensor) - 2 <= len(narrow[name]) <= len(tensor)
        elif EMBEDDING.search(name):
            numbers = narrow[name.replace(".weight", ".numbers")]
            assert (numbers.dtype, numbers.shape) == (torch.int8, tensor.shape)
        elif not name.endswith(".bitmap"):
            assert torch.equal(narrow[name], tensor)


def test_a_model_in_eight_bits_comes_back_to_the_bit(model, tmp_path):
    sparse = quantize(convert_to_sparse(model), "numba")
    loaded = load_sparse(save_sparse(sparse, tmp_path), "numba")
    assert torch.equal(logits(loaded), logits(sparse))
    assert count_actual_params(loaded) == count_actual_params(sparse)
    again = save_sparse(loaded, tmp_path / "again") / "sparse.safetensors"
    first = load_file(tmp_path / "sparse.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(again).items())
