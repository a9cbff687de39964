"""Sparse execution against dense float64 products, the transformers model itself, and the bits on disk."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nbhelpers.sparse import (
    SparseLinear,
    convert_gpt2_to_sparse,
    count_actual_params,
    engines,
    formats,
    kernels,
    layers,
    load_sparse,
    save_sparse,
)
from nbhelpers.sparse.gpt2 import SparseGPT2ForSequenceClassification

BACKENDS = ("numba", "torch_csr", "dense")
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 24}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def sparse_weight(n_out, n_in, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator)
    return weight * (torch.rand(n_out, n_in, generator=generator) < density)


def linear(n_in, n_out, density, kind=nn.Linear):
    """A masked layer of either kind; its weight as [out, in] and its bias in float64."""
    weight, bias = sparse_weight(n_out, n_in, density), torch.randn(n_out)
    module = Conv1D(n_out, n_in) if kind is Conv1D else nn.Linear(n_in, n_out)
    module.weight.data, module.bias.data = (weight.t().contiguous() if kind is Conv1D else weight), bias
    return module.eval(), weight.double(), bias.double()


def assert_product(y, expected, weight, x):
    """Sums of n float32 products are off by at most n * 2^-24 of the sum of their sizes; twice that is allowed."""
    bound = 2**-23 * (weight.shape[1] + 2) * (x.double().abs() @ weight.abs().t() + 1 + expected.abs())
    assert ((y.double() - expected).abs() <= bound).all()


def masked_gpt2(density=0.1, **options):
    """A random GPT-2 with sparse blocks, its other parameters far from where they start."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**{**SMALL, **options})).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        is_block = ".h." in name and parameter.ndim == 2
        parameter.data = noise * (torch.rand_like(noise) < density) if is_block else parameter.data + 0.2 * noise
    return model


def reviews(lengths, width=None):
    """Random right-padded reviews whose text never has the padding token."""
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask.long()}


# --- products ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (33, 16), (64, 48)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_every_engine_gives_the_dense_product(backend, kind, shape, density):
    module, weight, bias = linear(*shape, density, kind)
    layer = SparseLinear.from_dense(module, backend)
    assert layer.backend == backend and layer.nonzeros == int((weight != 0).sum())
    for tokens in (1, 15, 16, 67, 200):
        x = torch.randn(tokens, shape[0])
        assert_product(layer(x), x.double() @ weight.t() + bias, weight, x)


@pytest.mark.parametrize("vectors", kernels.VECTORS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_tile_width_and_thread_count_gives_the_same(vectors, threads, monkeypatch):
    module, weight, bias = linear(40, 50, 0.3)
    weight[7] = 0
    module.weight.data[7] = 0
    layer, x = SparseLinear.from_dense(module, "numba"), torch.randn(150, 40)
    monkeypatch.setattr(kernels, "choose_vectors", lambda *_: vectors)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_product(layer(x), x.double() @ weight.t() + bias, weight, x)


def test_numba_threads_give_what_torch_threads_give(monkeypatch):
    layer, x = SparseLinear.from_dense(linear(40, 50, 0.3)[0], "numba"), torch.randn(150, 40)
    expected = layer(x)
    monkeypatch.setattr(kernels, "torch_threads", lambda: None)
    assert torch.equal(layer(x), expected)


def test_tiles_stay_in_the_cache_and_share_the_work(monkeypatch):
    monkeypatch.setattr(kernels, "l2_bytes", lambda: 512 * 1024)
    assert kernels.choose_vectors(2048, 192, 2) == 4  # 48 KiB a tile
    assert kernels.choose_vectors(2048, 3072, 2) == 1  # 64 tokens would take 768 KiB, 32 take 384
    assert kernels.choose_vectors(64, 192, 2) == 2  # 64 tokens on two threads: 32 each
    assert kernels.choose_vectors(2048, 10**6, 2) == 1


def test_fused_layers_give_gelu_between_two_products():
    (first, v, c), (second, w, b) = linear(24, 90, 0.3), linear(90, 20, 0.3)
    x = 3 * torch.randn(70, 24)
    inner, outer = (SparseLinear.from_dense(m, "numba").csr() for m in (first, second))
    expected = F.gelu(x.double() @ v.t() + c, approximate="tanh") @ w.t() + b
    torch.testing.assert_close(kernels.multiply(x, outer, inner).double(), expected, rtol=1e-5, atol=1e-4)


def test_fused_gelu_follows_torch_at_its_ends():
    x = torch.tensor([-1e4, -50.0, -8.0, -3.0, -1.0, -1e-3, -0.0, 1e-30, 0.5, 4.0, 9.0, 1e4])[:, None]
    one = (torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1))
    torch.testing.assert_close(kernels.multiply(x, one, one), F.gelu(x, approximate="tanh"), rtol=2e-6, atol=2e-6)
    assert kernels.multiply(torch.full((1, 1), torch.nan), one, one).isnan()


def test_leading_dimensions_and_strides_do_not_matter():
    module, *_ = linear(12, 20, 0.5)
    layer, x = SparseLinear.from_dense(module, "numba"), torch.randn(2, 3, 24)[..., ::2]
    torch.testing.assert_close(layer(x), module(x))
    assert layer(x[0, 0]).shape == (20,)
    assert layer(x[:0]).shape == (0, 3, 20)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="12 features"):
        layer(torch.randn(2, 13))


def test_special_values_go_through():
    module, *_ = linear(4, 2, 1.0)
    module.weight.data = torch.tensor([[0.0, 0, 1, 0], [torch.nan, -0.0, 0, 0]])
    layer = SparseLinear.from_dense(module, "numba")
    y = layer(torch.full((1, 4), torch.inf))
    assert layer.nonzeros == 2  # zeros of either sign are gone, and so do not make inf * 0
    assert y[0, 0] == torch.inf and y[0, 1].isnan()


# --- the layer as a module ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_state_dicts_give_the_same_layer(backend):
    layer, x = SparseLinear.from_dense(linear(12, 20, 0.5)[0], backend), torch.randn(5, 12)
    other = SparseLinear.from_dense(linear(12, 20, 0.5)[0], backend)
    other.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        SparseLinear.from_dense(linear(12, 20, 0.9)[0], "numba").load_state_dict(layer.state_dict())


def test_the_dense_module_is_left_alone():
    module, *_ = linear(12, 20, 0.5)
    layer, x = SparseLinear.from_dense(module, "numba"), torch.randn(5, 12)
    before = layer(x)
    module.weight.data.zero_()
    module.bias.data.zero_()
    assert torch.equal(layer(x), before)
    module.bias = None
    assert not SparseLinear.from_dense(module, "numba")(x).any()


def test_training_and_other_types_are_refused():
    layer, x = SparseLinear.from_dense(linear(12, 20, 0.5)[0], "numba"), torch.randn(5, 12)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="for inference"):
        layer.train()(x)
    with torch.no_grad():
        assert layer(x).shape == (5, 20)
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="float32 only"):
            convert(layer)
    with pytest.raises(TypeError, match="not a linear layer"):
        SparseLinear.from_dense(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="choose one of"):
        SparseLinear.from_dense(linear(2, 2, 1.0)[0], "cuda")


def test_auto_takes_the_engine_that_measured_best(monkeypatch):
    """On a clock that only the engines move, so that a busy machine does not decide."""
    engines.choose_backend.cache_clear()
    clock, calls = [0.0], []
    monkeypatch.setattr(layers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds, function):
        def run(*arguments):
            calls.append(function.__name__)
            clock[0] += seconds
            return function(*arguments)

        return run

    module, *_ = linear(16, 16, 0.1)
    for slow, expected in (("multiply", "dense"), ("dense", "numba")):
        with monkeypatch.context() as patch:
            for name in ("multiply", "dense"):
                patch.setattr(kernels, name, taking(1 + (name == slow), getattr(kernels, name)))
            assert SparseLinear.from_dense(module, tokens=64).backend == expected
            assert SparseLinear.from_dense(module, tokens=64).backend == expected
        engines.choose_backend.cache_clear()
    # Measured once: a warm-up and two clear trials of each engine, for either outcome.
    assert sorted(calls) == ["dense"] * 6 + ["multiply"] * 6


def test_a_missing_numba_is_announced_once(monkeypatch):
    engines.announce_missing_numba.cache_clear()
    monkeypatch.setattr(kernels, "numba", None)
    monkeypatch.setattr(kernels, "MISSING", "No module named 'numba'", raising=False)
    module, weight, bias = linear(12, 20, 0.5)
    with pytest.warns(UserWarning, match="No module named 'numba'") as caught:
        made = [SparseLinear.from_dense(module, "numba") for _ in range(2)]
    assert len(caught) == 1 and made[0].backend == "torch_csr"
    x = torch.randn(5, 12)
    assert_product(made[0](x), x.double() @ weight.t() + bias, weight, x)
    engines.announce_missing_numba.cache_clear()


# --- the model ---

OPTIONS = [
    {},
    {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "relu", "n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "num_labels": 3},
]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_sparse_model_gives_the_dense_logits(backend):
    model = masked_gpt2()
    sparse = convert_gpt2_to_sparse(model, backend)
    for lengths in ([24], [9, 9], [5, 24, 1, 17]):
        batch = reviews(lengths)
        with torch.inference_mode():
            expected = model(**batch).logits
            torch.testing.assert_close(sparse(**batch).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sparse(batch["input_ids"]).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_configurations_are_followed(options):
    model, batch = masked_gpt2(**options), reviews([20, 7, 13])
    with torch.inference_mode():
        expected = model(**batch).logits
        torch.testing.assert_close(
            convert_gpt2_to_sparse(model, "numba")(**batch).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_of_the_last_block_only_the_last_tokens_are_computed():
    sparse, seen = convert_gpt2_to_sparse(masked_gpt2()), []
    for block in sparse.transformer.h:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.inference_mode():
        sparse(**reviews((9, 4, 1)))
    assert seen == [9 + 4 + 1, 3]


def test_padding_changes_nothing():
    sparse, batch = convert_gpt2_to_sparse(masked_gpt2(), "numba"), reviews([11, 6])
    wide = {name: F.pad(tensor, (0, 9)) for name, tensor in batch.items()}
    rubbish = {**wide, "input_ids": wide["input_ids"] + 7 * (1 - wide["attention_mask"])}
    with torch.inference_mode():
        alone = [sparse(ids[None, :n]).logits[0] for ids, n in zip(batch["input_ids"], (11, 6), strict=True)]
        for padded in (batch, wide, rubbish):
            torch.testing.assert_close(sparse(**padded).logits, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_the_last_token_is_found_as_transformers_does():
    ids = torch.tensor([[5, 0, 6, 7, 0], [8, 9, 0, 0, 0], [0, 0, 0, 0, 0]])
    model = masked_gpt2()
    sparse = convert_gpt2_to_sparse(model, "numba")
    with torch.inference_mode():
        torch.testing.assert_close(sparse(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        model.config.pad_token_id = sparse.config.pad_token_id = None
        torch.testing.assert_close(sparse(ids[:1]).logits, model(ids[:1]).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="pad_token_id"):
            sparse(ids)
        with pytest.raises(ValueError, match="on the right"):
            sparse(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 3))


def test_other_models_and_training_are_refused():
    with pytest.raises(TypeError, match="GPT2LMHeadModel"):
        convert_gpt2_to_sparse(GPT2LMHeadModel(GPT2Config(**SMALL)))
    sparse = convert_gpt2_to_sparse(masked_gpt2(), "dense")
    with pytest.raises(RuntimeError, match="for inference"):
        sparse.train()(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="float32 only"):
        sparse.half()
    assert sparse.transformer.wte.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_parameters_are_counted_alike_in_both_forms():
    model = masked_gpt2(density=0.5)  # no neuron is without any weight
    blocks = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    prunable = sum(p.numel() for p in blocks)
    zeros = sum(int((p == 0).sum()) for p in blocks)
    total = sum(p.numel() for p in model.parameters())
    expected = {"total": total, "active": total - zeros, "prunable": prunable, "encoder_sparsity": zeros / prunable}
    for backend in BACKENDS:
        assert count_actual_params(convert_gpt2_to_sparse(model, backend)) == pytest.approx(expected)
    assert count_actual_params(model) == pytest.approx(expected)


# --- files ---


def bits(tensor):
    return tensor.numpy().view(np.uint32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_round_trip_is_exact(tmp_path, backend):
    model = masked_gpt2()
    special = torch.tensor([0x7FC12345, 0x7F800000, 0x00000001, 0x80000000 - 2**32, 0x3F800001], dtype=torch.int32)
    model.transformer.h[0].attn.c_attn.weight.data[3, :5] = special.view(torch.float32)
    sparse = convert_gpt2_to_sparse(model, backend)
    loaded = load_sparse(save_sparse(sparse, tmp_path / "model"))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "sparse.safetensors"]
    assert isinstance(loaded, SparseGPT2ForSequenceClassification)
    assert not loaded.training
    one, two = sparse.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype == torch.float32:
            np.testing.assert_array_equal(bits(one[name]), bits(two[name]))
        else:
            assert torch.equal(one[name], two[name])
    layer = loaded.transformer.h[0].attn.c_attn
    assert layer.backend == backend
    weight = formats.to_weight(layer.csr(), layer.in_features).t()[3, :5].contiguous()
    assert weight.view(torch.int32).tolist() == [0x7FC12345, 0x7F800000, 1, 0, 0x3F800001]  # -0.0 counts as pruned


def test_a_loaded_model_is_not_measured_again(tmp_path, monkeypatch):
    save_sparse(convert_gpt2_to_sparse(masked_gpt2(), "numba"), tmp_path)
    monkeypatch.setattr(layers, "choose_backend", None)
    assert load_sparse(tmp_path).transformer.h[0].attn.c_attn.backend == "numba"


def test_the_file_is_small(tmp_path):
    model = masked_gpt2(density=0.1, n_embd=64, n_head=4)
    save_sparse(convert_gpt2_to_sparse(model, "numba"), tmp_path)
    stored = load_file(tmp_path / "sparse.safetensors")
    packed = sum(t.numel() * t.element_size() for n, t in stored.items() if n.endswith((".bitmap", ".values")))
    dense = 4 * count_actual_params(model)["prunable"]
    assert packed <= 0.135 * dense  # 1 bit of 32, and a tenth of the values
    assert (tmp_path / "sparse.safetensors").stat().st_size < sum(4 * p.numel() for p in model.parameters()) / 4


def test_damaged_files_are_named(tmp_path):
    save_sparse(convert_gpt2_to_sparse(masked_gpt2(), "numba"), tmp_path)
    path = tmp_path / "sparse.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    name = "transformer.h.0.attn.c_attn"
    damaged = [
        ({k: v for k, v in tensors.items() if k != f"{name}.values"}, "incomplete"),
        ({k: v for k, v in tensors.items() if k != "score.weight"}, "incomplete"),
        ({**tensors, f"{name}.values": tensors[f"{name}.values"][1:].clone()}, "damaged"),
        ({**tensors, f"{name}.bitmap": tensors[f"{name}.bitmap"][1:].clone()}, "damaged"),
        ({**tensors, "score.weight": torch.zeros(5, 5)}, "damaged"),
    ]
    for content, message in damaged:
        save_file(content, path)
        with pytest.raises(ValueError, match=f"sparse.safetensors is .*{message}"):
            load_sparse(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sparse\.safetensors is .*damaged"):
        load_sparse(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"sparse\.safetensors is missing"):
        load_sparse(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"})[:-5])
    with pytest.raises(ValueError, match=r"config\.json is missing or damaged"):
        load_sparse(tmp_path)
    with pytest.raises(TypeError, match="GPT2ForSequenceClassification"):
        save_sparse(masked_gpt2(), tmp_path)
