"""Sparse products against float64 within float32's error bound, and the layer as a module."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sparse_models import BACKENDS, any_bits, bits, linear, repeatable
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbhelpers.sparse import SparseLinear, engines, kernels
from nbhelpers.sparse.formats import to_csr, to_weight

seeds = st.integers(0, 2**32 - 1)
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
# Tiles are 16, 32 and 64 rows; a block of 16 x 16 is transposed at once.
tokens = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 32, 33, 64, 65]), st.integers(0, 150))
features = st.one_of(st.sampled_from([0, 1, 15, 16, 17]), st.integers(1, 70))


def sizes(shape, rng):
    """Numbers from 2^-30 to 2^30 of either sign: sums that cancel, and no product that under- or overflows."""
    return torch.from_numpy((rng.choice([-1, 1], shape) * 2 ** rng.uniform(-30, 30, shape)).astype(np.float32))


def problem(rows, n_out, n_in, density, seed):
    """A sparse weight [out, in], some rows and columns of which are empty; a bias; and inputs."""
    rng = np.random.default_rng(seed)
    kept = rng.random((n_out, n_in)) < density
    kept[rng.random(n_out) < 0.1] = False
    kept[:, rng.random(n_in) < 0.1] = False
    weight = torch.where(torch.from_numpy(kept), sizes((n_out, n_in), rng), 0.0)
    return weight, sizes((n_out,), rng), sizes((rows, n_in), rng)


def assert_product(y, x, weight, bias):
    """y is x @ weight.T + bias, as near as float32 guarantees.

    A row of m weights is a sum of m + 1 numbers in any order: a number goes through at most m additions and one
    multiplication, which makes m + 1 roundings by 2^-24 each and a relative error of at most k u / (1 - k u) (Higham,
    2002, lemma 3.1). The zeros of a dense product add exactly. The reference has the same error in float64.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    expected, size = x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs()
    single = ((weight != 0).sum(1).double() + 1) * 2**-24
    double = (weight.shape[1] + 1) * 2**-53
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= (single / (1 - single) + double / (1 - double)) * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@repeatable(60)
@given(rows=tokens, n_out=features, n_in=features, density=densities, seed=seeds)
def test_every_engine_gives_the_product_as_nearly_as_float32_can(backend, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, seed)
    layer = SparseLinear.from_dense(linear(weight, bias), backend)
    assert layer.backend == backend and layer.nonzeros == int((weight != 0).sum())
    assert_product(layer(x), x, weight, bias)
    if backend != "dense":
        # An input without weights does not matter.
        unread = ~weight.any(0)
        x[:, unread] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(int(unread.sum())) % 3]
        assert_product(layer(x), x.masked_fill(unread, 0.0), weight, bias)


@pytest.mark.parametrize("vectors", kernels.VECTORS)
@pytest.mark.parametrize("threads", [1, 3])
@repeatable(20)
@given(rows=tokens, n_out=features, n_in=features, density=densities, seed=seeds)
def test_every_tile_width_and_thread_count_gives_the_product(vectors, threads, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose_vectors", lambda *_: vectors)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert_product(kernels.multiply(x, (*to_csr(weight), bias)), x, weight, bias)


def test_numba_threads_give_what_torch_threads_give(monkeypatch):
    weight, bias, x = problem(150, 50, 40, 0.3, 0)
    matrix = (*to_csr(weight), bias)
    expected = kernels.multiply(x, matrix)
    monkeypatch.setattr(kernels, "torch_threads", lambda: None)
    assert torch.equal(kernels.multiply(x, matrix), expected)


def test_tiles_stay_in_the_cache_and_share_the_work(monkeypatch):
    monkeypatch.setattr(kernels, "l2_bytes", lambda: 512 * 1024)
    assert kernels.choose_vectors(2048, 192, 2) == 4  # 48 KiB per tile
    assert kernels.choose_vectors(2048, 3072, 2) == 1  # 64 tokens would take 768 KiB, 32 take 384
    assert kernels.choose_vectors(64, 192, 2) == 2  # 64 tokens on two threads: 32 each
    assert kernels.choose_vectors(2048, 10**6, 2) == 1


def test_fused_layers_give_gelu_between_two_products():
    generator = torch.Generator().manual_seed(0)
    v, w = (
        torch.randn(s, generator=generator) * (torch.rand(s, generator=generator) < 0.3) for s in ((90, 24), (20, 90))
    )
    c, b, x = (torch.randn(s, generator=generator) for s in ((90,), (20,), (70, 24)))
    found = kernels.multiply(3 * x, (*to_csr(w), b), (*to_csr(v), c))
    expected = F.gelu(3 * x.double() @ v.double().t() + c, approximate="tanh") @ w.double().t() + b
    # Sums of about 30 numbers of order 3, then of GELU's float32 polynomial, good to 2e-6.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_fused_gelu_follows_torch_at_its_ends():
    x = torch.tensor([-1e4, -50.0, -8.0, -3.0, -1.0, -1e-3, -0.0, 1e-30, 0.5, 4.0, 9.0, 1e4])[:, None]
    identity = (*to_csr(torch.ones(1, 1)), torch.zeros(1))
    torch.testing.assert_close(
        kernels.multiply(x, identity, identity), F.gelu(x, approximate="tanh"), rtol=2e-6, atol=2e-6
    )
    assert kernels.multiply(torch.full((1, 1), torch.nan), identity, identity).isnan()


@pytest.mark.parametrize("place", ["x", "matrix", "inner"])
def test_the_kernel_refuses_tensors_that_are_not_on_the_cpu(place):
    matrix = (*to_csr(torch.ones(3, 3)), torch.zeros(3))
    arguments = {"x": torch.ones(2, 3), "matrix": matrix, "inner": matrix}
    found = arguments[place]
    arguments[place] = found.to("meta") if place == "x" else tuple(tensor.to("meta") for tensor in found)
    with pytest.raises(RuntimeError, match=r"all tensors on the CPU \(got (cpu, )?meta\)"):
        kernels.multiply(**arguments)


# --- the layer as a module ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conv1d_becomes_the_layer_of_its_transpose(backend):
    conv = Conv1D(20, 12)
    with torch.inference_mode():
        x = torch.randn(5, 12)
        torch.testing.assert_close(SparseLinear.from_dense(conv, backend)(x), conv(x))


@repeatable(60)
@given(shape=st.tuples(st.integers(0, 20), st.integers(0, 20)), density=densities, seed=seeds)
def test_csr_is_that_of_scipy_for_any_bits(shape, density, seed):
    weight = any_bits(shape, density, np.random.default_rng(seed))
    values, columns, starts = to_csr(weight)
    expected = scipy.sparse.csr_matrix(weight.numpy())
    np.testing.assert_array_equal(bits(values), expected.data.view(np.uint32))
    assert columns.tolist() == expected.indices.tolist() and starts.tolist() == expected.indptr.tolist()
    found = to_weight((values, columns, starts, torch.zeros(shape[0])), shape[1])
    np.testing.assert_array_equal(bits(found), np.where(bits(weight) == 0x80000000, 0, bits(weight)))


def test_leading_dimensions_and_strides_do_not_matter():
    module = nn.Linear(12, 20)
    layer, x = SparseLinear.from_dense(module, "numba"), torch.randn(2, 3, 24)[..., ::2]
    torch.testing.assert_close(layer(x), module(x))
    assert layer(x[0, 0]).shape == (20,)
    assert layer(x[:0]).shape == (0, 3, 20)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`x` must have 12 features in its last dimension \(got \[2, 13\]\)"):
        layer(torch.randn(2, 13))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_a_copy_and_its_copies_and_state_dicts_give_the_same(backend):
    module, x = nn.Linear(12, 20), torch.randn(5, 12)
    layer, other = (SparseLinear.from_dense(module, backend) for _ in range(2))
    with torch.inference_mode():
        expected = layer(x).clone()
        module.weight.zero_()
        module.bias = None
        assert torch.equal(layer(x), expected) and torch.equal(copy.deepcopy(layer)(x), expected)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), expected)
        assert not SparseLinear.from_dense(module, backend)(x).any()


def test_training_and_other_types_are_refused():
    layer, x = SparseLinear.from_dense(nn.Linear(12, 20), "numba"), torch.randn(5, 12)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="for inference"):
        layer.train()(x)
    for convert in (nn.Module.half, nn.Module.double, lambda module: module.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="must stay in float32"):
            convert(layer)
    with pytest.raises(TypeError, match=r"must be a Conv1D or nn.Linear \(got Embedding\)"):
        SparseLinear.from_dense(nn.Embedding(3, 4))
    with pytest.raises(
        ValueError, match=r"must be one of auto, numba, torch_csr, dense, int8, int8_blocks \(got 'cuda'\)"
    ):
        SparseLinear.from_dense(nn.Linear(2, 2), "cuda")


def test_auto_takes_the_engine_that_measured_best(monkeypatch):
    """On a clock that only the engines move, so that a busy machine does not decide."""
    engines.choose_backend.cache_clear()
    clock, calls = [0.0], []
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds, function):
        def run(*arguments):
            calls.append(function.__name__)
            clock[0] += seconds
            return function(*arguments)

        return run

    module = linear(torch.eye(16))
    for slow, expected in (("multiply", "dense"), ("dense", "numba")):
        with monkeypatch.context() as patch:
            patch.setitem(engines.ENGINES, "numba", taking(1 + (slow == "multiply"), kernels.multiply))
            patch.setattr(engines, "dense", taking(1 + (slow == "dense"), engines.dense))
            assert SparseLinear.from_dense(module, tokens=64).backend == expected
            assert SparseLinear.from_dense(module, tokens=64).backend == expected
            # A matrix without zeros is not measured.
            assert SparseLinear.from_dense(linear(torch.ones(16, 16)), tokens=64).backend == "dense"
        engines.choose_backend.cache_clear()
    # Measured once: a warm-up and two clear trials of each engine, for either outcome.
    assert sorted(calls) == ["dense"] * 6 + ["multiply"] * 6
