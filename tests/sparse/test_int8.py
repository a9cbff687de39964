"""The eight-bit engines against float64: bounds that follow from the scales, and whole numbers worked out by numpy."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from llvmlite import binding
from safetensors.torch import load_file
from sparse_models import linear, logits, masked_gpt2, repeatable, reviews

from nbhelpers.measurement import tensor_bytes
from nbhelpers.sparse import (
    SparseLinear,
    blocks,
    convert_gpt2_to_sparse,
    count_actual_params,
    engines,
    engines_of,
    int8,
    load_sparse,
    quantize,
    save_sparse,
)

EIGHT_BITS = [
    pytest.param("int8", marks=pytest.mark.skipif(not int8.is_available(), reason="no int8 product in this PyTorch")),
    pytest.param("int8_blocks", marks=pytest.mark.skipif(not blocks.is_available(), reason="no AVX2 or VNNI here")),
]
FEATURES = binding.get_host_cpu_features()
KINDS = {
    "avx512vnni": FEATURES.get("avx512vnni"),
    "avxvnni": FEATURES.get("avxvnni") or (FEATURES.get("avx512vnni") and FEATURES.get("avx512vl")),
    "avx2": FEATURES.get("avx2"),
}


def problem(rows, n_out, n_in, density, seed):
    """A sparse weight [out, in] with rows of very different sizes; a bias; and tokens of very different sizes."""
    rng = np.random.default_rng(seed)
    weight = (
        rng.normal(size=(n_out, n_in)) * (rng.random((n_out, n_in)) < density) * 10 ** rng.uniform(-3, 3, (n_out, 1))
    )
    x = rng.normal(size=(rows, n_in)) * 10 ** rng.uniform(-3, 3, (rows, 1))
    return (torch.from_numpy(array.astype(np.float32)) for array in (weight, rng.normal(size=n_out), x))


def assert_within_scales(y, x, weight, bias, levels):
    """y is x @ weight.T + bias up to what rounding to whole numbers can do.

    A number is off by at most half its scale, which is the largest of its row over 127 (weights) or ``levels``
    (activations); 0.1 % more for the float32 division before the rounding. So a product is off by |x| dw + |w| dx +
    dx dw. The sum of whole numbers is exact; two multiplications and one addition in float32 follow.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    dx = (0.5005 / levels) * x.abs().amax(1, keepdim=True).expand_as(x)
    dw = (0.5005 / 127) * weight.abs().amax(1, keepdim=True).expand_as(weight) * (weight != 0)
    bound = x.abs() @ dw.t() + dx @ weight.abs().t() + dx @ dw.t()
    expected = x @ weight.t() + bias
    rounding = 4 * 2**-24 * (expected.abs() + bound + bias.abs())
    assert ((y.double() - expected).abs() <= bound + rounding).all()


@pytest.mark.parametrize("backend", EIGHT_BITS)
@repeatable(60)
@given(
    rows=st.integers(0, 70),
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_product_is_within_what_the_scales_allow(backend, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, seed)
    layer = SparseLinear.from_dense(linear(weight, bias), backend)
    assert layer.backend == backend
    y = layer(x)
    assert y.shape == (rows, n_out) and y.dtype == torch.float32
    assert_within_scales(y, x, weight, bias, int8.activation_levels())
    torch.testing.assert_close(layer(x, gelu=True), F.gelu(y, approximate="tanh"), rtol=1e-5, atol=1e-5)


def whole_numbers(x, weight, levels):
    """The product of the rounded numbers, exact in numpy's integers, and the scales."""
    scale_x, scale_w = (np.abs(a).max(1) / n for a, n in ((x, np.float32(levels)), (weight, np.float32(127))))
    x8, w8 = np.rint(x / scale_x[:, None]), np.rint(weight / scale_w[:, None])
    return x8.astype(np.int64) @ w8.astype(np.int64).T, scale_x.astype(np.float64)[:, None] * scale_w


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_instruction_gives_the_whole_numbers(kind, threads, monkeypatch):
    if not KINDS[kind]:
        pytest.skip(f"this processor has no {kind}")
    if kind == "avx2":
        monkeypatch.setattr(int8, "activation_levels", lambda: 63)
    monkeypatch.setattr(blocks, "byte_instructions", lambda: kind)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # Multiples of a power of two with the largest in each row, so that both divisions are exact and nothing is a tie.
    generator = torch.Generator().manual_seed(0)
    levels = int8.activation_levels()
    x = torch.randint(-levels, levels + 1, (150, 50), generator=generator).float() / 64
    weight = torch.randint(-127, 128, (37, 50), generator=generator).float() / 1024
    x[:, 3], weight[:, 5] = levels / 64, 127 / 1024
    weight[:, 8:16] = 0
    layer = SparseLinear.from_dense(linear(weight), "int8_blocks")
    sums, scales = whole_numbers(x.numpy(), weight.numpy(), levels)
    np.testing.assert_allclose(layer(x).numpy(), sums * scales, rtol=1e-6, atol=1e-6)


def test_extreme_bytes_do_not_saturate():
    levels = int8.activation_levels()
    x, weight = torch.full((4, 64), 3.0), torch.full((8, 64), -2.0)
    for backend in [p.values[0] for p in EIGHT_BITS if not p.marks[0].args[0]]:
        for sign in (1, -1):
            y = SparseLinear.from_dense(linear(weight), backend)(sign * x)
            torch.testing.assert_close(y, torch.full((4, 8), -384.0 * sign))
    assert levels in (63, 127)


def test_seven_bits_are_enough_where_eight_overflow(monkeypatch):
    weight, bias, x = problem(20, 30, 40, 1.0, 0)
    monkeypatch.setattr(int8, "activation_levels", lambda: 63)
    layer = SparseLinear.from_dense(linear(weight, bias), "int8")
    assert_within_scales(layer(x), x, weight, bias, 63)


def test_overflow_is_found_by_a_product_that_is_known(monkeypatch):
    """A processor that adds two products in sixteen bits, played by a stand-in."""

    def saturating(x8, zero, packed, scale):
        x, weight = x8.int() - zero, packed.int()
        pairs = (x[:, None, :] * weight[None]).view(len(x), len(weight), -1, 2).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2).float()

    monkeypatch.setattr(int8, "pack", lambda numbers: numbers)
    monkeypatch.setattr(int8, "products", saturating)
    assert int8.activation_levels.__wrapped__() == 63
    monkeypatch.setattr(int8, "products", lambda x8, *_: torch.zeros(16, 16))
    with pytest.raises(RuntimeError, match="exact products of bytes"):
        int8.activation_levels.__wrapped__()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs oneDNN"):
        int8.activation_levels.__wrapped__()


def test_an_engine_that_does_not_run_here_is_refused_and_never_chosen(monkeypatch):
    with pytest.raises(RuntimeError, match=r'"int8" must have all tensors on the CPU \(got cuda\)'):
        engines.check_int8_engine("int8", "cuda")
    monkeypatch.setattr(blocks, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match='"int8_blocks" needs a processor with VNNI or AVX2'):
        SparseLinear.from_dense(linear(torch.ones(4, 4)), "int8_blocks")
    monkeypatch.setattr(int8, "is_available", lambda: False)
    assert engines.int8_engines(torch.ones(2, 4), torch.ones(4, 4), torch.zeros(4)) == {}


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_what_is_not_a_number_stays_that_and_in_its_row(backend):
    weight, bias, x = problem(5, 6, 8, 1.0, 0)
    layer = SparseLinear.from_dense(linear(weight, bias), backend)
    expected = layer(x)
    x[1, 2], x[3, 0], x[4] = torch.nan, -torch.inf, 0
    found = layer(x)
    assert found[[1, 3]].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(found[4], layer.bias)
    with pytest.raises(ValueError, match=r"weights must be finite to be rounded to eight bits \(got NaN or infinity\)"):
        SparseLinear.from_dense(linear(weight / 0), backend)
    with pytest.raises(RuntimeError, match=r"tensors on the CPU \(got meta\)"):
        layer(x.to("meta"))


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_a_layer_in_eight_bits_gives_back_its_weights_and_copies(backend):
    weight, bias, x = problem(5, 30, 50, 0.2, 0)
    layer = SparseLinear.from_dense(linear(weight, bias), backend)
    rounded = SparseLinear.from_dense(linear(weight, bias), "dense").with_backend("dense", eight_bits=True)
    for found, expected in zip(layer.csr(), rounded.csr(), strict=True):
        assert torch.equal(found, expected)
    assert layer.nonzeros == rounded.nonzeros == int(torch.count_nonzero(rounded.weight))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert tensor_bytes(layer) < tensor_bytes(rounded)


# --- models ---


@pytest.fixture(scope="module")
def gpt2():
    return masked_gpt2(0.3)


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_a_models_logits_do_not_depend_on_the_reviews_beside_it(gpt2, backend):
    model, batch = convert_gpt2_to_sparse(gpt2, backend), reviews((9, 4, 7))
    assert engines_of(model) == {backend: 8}
    with torch.inference_mode():
        together = model(**batch).logits
        alone = torch.cat([model(*(tensor[i : i + 1] for tensor in batch.values())).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    expected = logits(convert_gpt2_to_sparse(gpt2, "dense"))
    assert 0 < (logits(model) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_a_file_in_eight_bits_does_not_depend_on_the_engine(gpt2, backend, tmp_path):
    model = quantize(convert_gpt2_to_sparse(gpt2), backend)
    exact = quantize(convert_gpt2_to_sparse(gpt2, "numba"), "numba")
    assert count_actual_params(model) == count_actual_params(exact)
    files = [load_file(save_sparse(m, tmp_path / str(i)) / "sparse.safetensors") for i, m in enumerate((model, exact))]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    loaded = load_sparse(tmp_path / "0", backend)
    assert torch.equal(logits(loaded), logits(model)) and engines_of(loaded) == {backend: 8}


def test_auto_takes_an_int8_engine_only_for_weights_in_eight_bits(gpt2, monkeypatch):
    asked = []

    def choose(*arguments):
        asked.append(arguments[-1])
        return "int8" if arguments[-1] else "numba"

    monkeypatch.setattr("nbhelpers.sparse.layers.choose_backend", choose)
    model = convert_gpt2_to_sparse(gpt2)
    assert asked == [False] * 8 and engines_of(model) == {"numba": 8}
    assert engines_of(quantize(model)) == {"int8": 8} and asked == [False] * 8 + [True] * 8


def test_the_engines_that_run_here_are_measured():
    engines.choose_backend.cache_clear()
    assert engines.choose_backend(16, 32, 1.0, 1.0, 32, "cpu", False) == "dense"
    chosen = engines.choose_backend(16, 32, 0.5, 0.9, 32, "cpu", True)
    assert chosen in ("dense", "numba", "int8", "int8_blocks")
    weight = torch.randn(16, 32)
    available = {p.values[0] for p in EIGHT_BITS if not p.marks[0].args[0]}
    assert engines.int8_engines(torch.randn(4, 32), weight, torch.zeros(16)).keys() == available
