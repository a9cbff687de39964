"""Sparse models on disk: exact to the bit, small, without an engine, and errors that name the file."""

import json
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from sparse_models import BACKENDS, any_bits, bits, linear, logits, masked_gpt2, masked_llama, repeatable
from torch import nn

from nbhelpers.models import prunable_weights
from nbhelpers.sparse import (
    SparseLinear,
    compact,
    convert_to_sparse,
    count_actual_params,
    engines,
    factorize_embedding,
    layers,
    load_sparse,
    quantize,
    save_sparse,
)
from nbhelpers.sparse.layers import sparse_layers
from nbhelpers.sparse.storage import FILE, pack_layer, unpack_layer

shapes = st.tuples(st.integers(0, 20), st.integers(0, 20))
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 2**32 - 1)


def dense_bits(layer):
    """The bits of a layer's weight [out, in], put in their places by scipy."""
    values, columns, starts, _ = layer.csr()
    shape = (layer.out_features, layer.in_features)
    return scipy.sparse.csr_matrix((bits(values), columns.numpy(), starts.numpy()), shape).toarray()


def bits_of_parts(parts, in_features):
    """The bits of a weight [out, in] from its parts in a file, read as the file's format says."""
    shape = (len(parts["bias"]), in_features)
    text = "".join(f"{byte:08b}" for byte in parts["bitmap"].tolist())
    weight = np.zeros(shape[0] * shape[1], np.uint32)
    weight[[i for i, bit in enumerate(text) if bit == "1"]] = bits(parts["values"])
    return weight.reshape(shape)


def layer_of(shape, density, backend, seed):
    rng = np.random.default_rng(seed)
    weight = any_bits(shape, density, rng)
    return SparseLinear.from_dense(linear(weight, any_bits((shape[0],), 0.9, rng)), backend), bits(weight)


@repeatable(80)
@given(shape=shapes, density=densities, backend=st.sampled_from(BACKENDS), seed=seeds)
def test_a_layer_of_any_bits_comes_back_from_its_bitmap(shape, density, backend, seed):
    layer, weight = layer_of(shape, density, backend, seed)
    # -0.0 counts as pruned and comes back as 0.0.
    expected = np.where(weight == 0x80000000, 0, weight)
    parts = load(save(pack_layer(layer)))
    np.testing.assert_array_equal(bits_of_parts(parts, shape[1]), expected)
    assert parts["bitmap"].numel() == math.ceil(shape[0] * shape[1] / 8)
    assert parts["values"].numel() == np.count_nonzero(expected)
    found = unpack_layer(parts, shape[1], backend)
    np.testing.assert_array_equal(dense_bits(found), expected)
    np.testing.assert_array_equal(bits(found.bias), bits(layer.bias))
    assert (found.out_features, found.in_features, found.backend) == (*shape, backend)


@repeatable(40)
@given(shape=shapes, density=densities, seed=seeds, place=st.floats(0, 1, exclude_max=True))
def test_a_bitmap_with_a_wrong_bit_or_a_byte_too_many_is_refused(shape, density, seed, place):
    assume(shape[0] * shape[1])
    parts = pack_layer(layer_of(shape, density, "numba", seed)[0])
    bit, flipped = int(place * shape[0] * shape[1]), parts["bitmap"].clone()
    flipped[bit // 8] ^= 0x80 >> bit % 8
    longer = torch.cat([parts["bitmap"], torch.zeros(1, dtype=torch.uint8)])
    for bitmap in (flipped, longer, parts["bitmap"][1:]):
        with pytest.raises(ValueError, match="the bitmap must"):
            unpack_layer(parts | {"bitmap": bitmap}, shape[1], "numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_a_model_of_any_bits_comes_back_from_its_file(kind, density, backend, tmp_path):
    model, rng = {"gpt2": masked_gpt2, "llama": masked_llama}[kind](), np.random.default_rng(0)
    for weight in prunable_weights(model).values():
        weight.data = any_bits(tuple(weight.shape), density, rng)
    sparse = convert_to_sparse(model, backend)
    loaded = load_sparse(save_sparse(sparse, tmp_path), backend)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", FILE]
    assert type(loaded) is type(sparse) and not loaded.training
    assert {layer.backend for layer in sparse_layers(loaded)} == {backend}
    expected, found = sparse.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.int32), found[name].view(torch.int32)), name


# --- engines ---


def test_a_file_names_no_engine_and_the_machine_that_loads_it_chooses(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "choose_backend", lambda *shape: asked.append(shape) or "torch_csr")
    sparse = convert_to_sparse(masked_gpt2(), "numba")
    save_sparse(sparse, tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert not file.metadata()
    assert {layer.backend for layer in sparse_layers(load_sparse(tmp_path))} == {"torch_csr"}
    assert len(asked) == 8, "once per layer, and cached by shape and density"
    assert {layer.backend for layer in sparse_layers(load_sparse(tmp_path, "dense"))} == {"dense"}
    assert len(asked) == 8


def test_an_older_file_that_names_its_engines_loads(tmp_path):
    sparse = convert_to_sparse(masked_gpt2(), "numba")
    save_sparse(sparse, tmp_path)
    backends = {"backends": json.dumps({"transformer.h.0.attn.c_attn": "no longer known"})}
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=backends)
    assert torch.equal(logits(load_sparse(tmp_path, "numba")), logits(sparse))


def test_loading_a_compact_model_measures_nothing(tmp_path, monkeypatch):
    model = masked_gpt2(density=1.0)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, :5] = 0
    monkeypatch.setattr(engines, "random_matrix", lambda *_: pytest.fail("an engine was measured"))
    small = compact(model)
    loaded = load_sparse(save_sparse(small, tmp_path))
    assert {layer.backend for layer in sparse_layers(loaded)} == {"dense"}
    assert torch.equal(logits(loaded), logits(small))


# --- sizes and errors ---


def test_the_file_is_small(tmp_path):
    sparse = convert_to_sparse(masked_gpt2(density=0.1, n_embd=64, n_head=4), "numba")
    stored = load_file(save_sparse(sparse, tmp_path) / FILE)
    packed = sum(t.numel() * t.element_size() for n, t in stored.items() if n.endswith((".bitmap", ".values")))
    # One bit of 32, and a tenth of the values.
    assert packed <= 0.135 * 4 * count_actual_params(sparse)["prunable"]


LAYER, TABLE = "transformer.h.0.mlp.c_fc", "transformer.wte.table.numbers"
DAMAGED = {
    "no values": (False, lambda t: t.pop(f"{LAYER}.values"), "incomplete: it has no tensor"),
    "no head": (False, lambda t: t.pop("score.weight"), "incomplete: it has no tensor"),
    "short values": (
        False,
        lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"][1:].clone()}),
        "a bit per value",
    ),
    "another head": (False, lambda t: t.update({"score.weight": torch.zeros(5, 5)}), "score.weight must be"),
    "no scale": (True, lambda t: t.pop(f"{LAYER}.scale"), "must come with a scale per row"),
    "floats": (True, lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].float()}), "a scale per row"),
    "short scale": (True, lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"][:-1].clone()}), "a scale per row"),
    "a float table": (True, lambda t: t.update({TABLE: t[TABLE].float()}), "must be .* torch.int8"),
}


@pytest.mark.parametrize(("eight_bits", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_tensors_that_do_not_fit_together_are_refused(tmp_path, eight_bits, damage, message):
    model = masked_gpt2()
    sparse = quantize(convert_to_sparse(factorize_embedding(model, 5))) if eight_bits else convert_to_sparse(model)
    save_sparse(sparse, tmp_path)
    tensors = load_file(tmp_path / FILE)
    damage(tensors)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"sparse\.safetensors is .*{message}"):
        load_sparse(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    save_sparse(convert_to_sparse(masked_gpt2(), "numba"), tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"sparse\.safetensors is missing or damaged"):
        load_sparse(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"sparse\.safetensors is missing or damaged"):
        load_sparse(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is missing or damaged"):
        load_sparse(tmp_path)
    with pytest.raises(TypeError, match="convert_to_sparse has made"):
        save_sparse(nn.Linear(2, 2), tmp_path)
