"""Selection, masks, files, products and tests on inputs that hypothesis draws, against references of another kind."""

import copy
import itertools
import math
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load_file
from safetensors.torch import load, save
from scipy.stats import norm, wilcoxon
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from nbhelpers.evaluation import holm, mcnemar, sign_flip_test, wilson_interval
from nbhelpers.masks import MaskKeeper, apply_masks, pack, unpack
from nbhelpers.models import prunable_weights
from nbhelpers.selection import select, select_lowest, threshold
from nbhelpers.sparse import SparseLinear, convert_to_sparse, kernels, load_sparse, save_sparse
from nbhelpers.sparse.formats import to_csr
from nbhelpers.sparse.storage import FILE, pack_layer, unpack_layer

# What hypothesis keeps between runs goes where all else that tests write goes.
set_hypothesis_home_dir(Path(os.environ["NBHELPERS_ROOT"], ".hypothesis"))

BACKENDS = ("numba", "torch_csr", "dense")
HALVES = (torch.float16, torch.bfloat16)
UINTS = {torch.float32: np.uint32, torch.float64: np.uint64}

sparsities = st.one_of(st.floats(0, 1), st.integers(0, 40).map(lambda i: i / 40))
seeds = st.integers(0, 2**32 - 1)


def examples(count: int):
    """So many examples, the same ones each time, however slow the machine is; of a failure, the smallest example."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(max_examples=count, phases=phases, deadline=None, derandomize=True, database=None)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """What tells NaN from NaN and 0.0 from -0.0."""
    return tensor.detach().contiguous().numpy().view(UINTS[tensor.dtype])


# --- selection ---

# What an exact count is likely to get wrong: few values and many ties, zeros of either sign, neighbours, the ends.
POOLS = {
    32: [[0.0, -0.0, 2.0**-149, -(2.0**-149)], [1.0, 1 + 2.0**-23, 1 - 2.0**-24], [2.0**-126, np.inf, -np.inf]],
    64: [[0.0, -0.0, 2.0**-1074, -(2.0**-1074)], [1.0, 1 + 2.0**-52, 1 - 2.0**-53], [2.0**-1022, np.inf, -np.inf]],
}


@st.composite
def matrices(draw, dtypes=(torch.float32, torch.float64), mixed=False) -> dict[str, torch.Tensor]:
    """The scores of up to four matrices: any floats but NaN, with ties; some empty, some not contiguous."""
    one = draw(st.sampled_from(dtypes))
    scores = {}
    for name in "abcd"[: draw(st.integers(1 + mixed, 4))]:
        dtype = draw(st.sampled_from((*dtypes, *HALVES))) if mixed else one
        width = 64 if dtype == torch.float64 else 32
        few = [st.sampled_from(pool) for pool in POOLS[width]]
        elements = draw(st.sampled_from([*few[:2], st.one_of(*few, st.floats(width=width, allow_nan=False))]))
        shape = draw(array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5))
        score = torch.from_numpy(draw(arrays(f"float{width}", shape, elements=elements)))
        scores[name] = (score.t() if draw(st.booleans()) else score).to(dtype)
    return scores


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors.values()])


def dropped(masks: dict[str, torch.Tensor]) -> np.ndarray:
    return flat(masks) == 0


def first_of_a_sort(scores: dict[str, torch.Tensor], k: int) -> np.ndarray:
    """True at the k lowest, the first ones among equals."""
    values = flat(scores)
    found = np.zeros(len(values), dtype=bool)
    found[np.argsort(values, kind="stable")[:k]] = True
    return found


@examples(150)
@given(scores=matrices(), sparsity=sparsities)
def test_what_falls_is_what_a_stable_sort_puts_first(scores, sparsity):
    masks = select(scores, sparsity)
    assert [(n, m.shape, m.dtype) for n, m in masks.items()] == [(n, s.shape, torch.bool) for n, s in scores.items()]
    np.testing.assert_array_equal(dropped(masks), first_of_a_sort(scores, round(sparsity * len(flat(scores)))))
    by_layer = select(scores, sparsity, "layer")
    for name, score in scores.items():
        expected = first_of_a_sort({name: score}, round(sparsity * score.numel()))
        np.testing.assert_array_equal(dropped({name: by_layer[name]}), expected)


@examples(100)
@given(scores=matrices(mixed=True), sparsity=sparsities)
def test_scores_of_several_types_are_compared_as_numbers(scores, sparsity):
    np.testing.assert_array_equal(
        dropped(select(scores, sparsity)), first_of_a_sort(scores, round(sparsity * len(flat(scores))))
    )


@examples(80)
@given(scores=matrices(), place=st.floats(0, 1))
def test_one_weight_more_falls_with_each_k_and_none_comes_back(scores, place):
    total = len(flat(scores))
    assume(total)
    k = int(place * (total - 1))
    fewer, more = (dropped(select_lowest(scores, number)) for number in (k, k + 1))
    assert (fewer.sum(), more.sum()) == (k, k + 1)
    assert (fewer <= more).all()


@examples(80)
@given(scores=matrices(), some=st.lists(sparsities, min_size=2, max_size=4), scope=st.sampled_from(["global", "layer"]))
def test_what_falls_at_a_sparsity_falls_at_every_higher_one(scores, some, scope):
    for lower, higher in itertools.pairwise(dropped(select(scores, sparsity, scope)) for sparsity in sorted(some)):
        assert (lower <= higher).all()


# Each is strictly increasing on all float32 numbers, and keeps them apart in float64.
RISING = {
    "times 2^800": lambda x: np.ldexp(x, 800),
    "times 2^-800": lambda x: np.ldexp(x, -800),
    "cubed": lambda x: x * x * x,
    "signed root": lambda x: np.sign(x) * np.sqrt(np.abs(x)),
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", RISING)
@examples(15)
@given(scores=matrices(dtypes=[torch.float32]), sparsity=sparsities)
def test_a_rising_function_of_the_scores_changes_no_mask(name, scope, scores, sparsity):
    changed = {key: torch.from_numpy(RISING[name](score.double().numpy())) for key, score in scores.items()}
    np.testing.assert_array_equal(dropped(select(changed, sparsity, scope)), dropped(select(scores, sparsity, scope)))


@examples(120)
@given(scores=matrices(), sparsity=sparsities, seed=seeds, scope=st.sampled_from(["global", "layer"]))
def test_only_the_order_of_the_scores_counts(scores, sparsity, seed, scope):
    # Any rising function at all: distinct scores become other distinct numbers of all sizes, in the same order.
    distinct, places = np.unique(flat(scores), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(2**64, size=10 * len(distinct) + 10, dtype=np.uint64).view(np.float64)
    values = np.unique(drawn[~np.isnan(drawn)])
    values = np.sort(np.random.default_rng(seed).permutation(values)[: len(distinct)])
    parts = torch.from_numpy(values[places]).split([score.numel() for score in scores.values()])
    changed = {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
    np.testing.assert_array_equal(dropped(select(changed, sparsity, scope)), dropped(select(scores, sparsity, scope)))


@examples(120)
@given(scores=matrices(mixed=True), share=sparsities)
def test_fewer_than_k_scores_lie_under_a_threshold_and_at_least_k_not_above_it(scores, share):
    values = flat(scores)
    k = round(share * len(values))
    if not k:
        with pytest.raises(ValueError, match="none of the weights"):
            threshold(scores, share)
        return
    limit = threshold(scores, share)
    assert (values < limit).sum() < k <= (values <= limit).sum()
    gone = dropped(select(scores, share))
    assert (values[gone] <= limit).all() and (values[~gone] >= limit).all()


@st.composite
def with_one_nan(draw) -> tuple[dict[str, torch.Tensor], str]:
    """Scores one of which is a NaN, of either sign and with any payload; and the name of its matrix."""
    scores = draw(matrices().filter(lambda scores: any(score.numel() for score in scores.values())))
    name = draw(st.sampled_from([name for name, score in scores.items() if score.numel()]))
    score = scores[name].contiguous()
    digits, place = (23 if score.dtype == torch.float32 else 52), draw(st.integers(0, score.numel() - 1))
    sign, payload = draw(st.integers(0, 1)), draw(st.integers(1, 2**digits - 1))
    width = 8 * score.element_size()
    bits(score).reshape(-1)[place] = (sign << (width - 1)) | ((1 << (width - 1)) - (1 << digits)) | payload
    assert score.isnan().sum() == 1
    return scores | {name: score}, name


@examples(80)
@given(found=with_one_nan(), sparsity=sparsities, scope=st.sampled_from(["global", "layer"]))
def test_a_nan_of_any_sign_and_payload_is_refused(found, sparsity, scope):
    scores, name = found
    with pytest.raises(ValueError, match=f"the scores of {name} are not all numbers"):
        select(scores, sparsity, scope)


@examples(30)
@given(found=with_one_nan())
def test_a_threshold_of_scores_with_a_nan_is_refused(found):
    with pytest.raises(ValueError, match="not all numbers"):
        threshold(found[0], 1.0)


# --- masks ---

TINY = {"n_embd": 4, "n_layer": 1, "n_head": 2, "vocab_size": 10, "n_positions": 8, "pad_token_id": 0}
TINY |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY_LLAMA = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_LLAMA |= {"intermediate_size": 6, "vocab_size": 10, "max_position_embeddings": 8, "pad_token_id": 0}


def small_model(kind: str = "gpt2") -> nn.Module:
    """A classifier of a few hundred parameters: GPT-2's ``Conv1D``, or the ``nn.Linear`` of a Llama."""
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**TINY_LLAMA, initializer_range=0.3)).eval()
    return GPT2ForSequenceClassification(GPT2Config(**TINY, initializer_range=0.3, use_cache=False)).eval()


MODELS = {kind: small_model(kind) for kind in ("gpt2", "llama")}
kinds = st.sampled_from(list(MODELS))

# -0.0, the smallest and largest denormals, the smallest and the largest number, infinities; NaN that signal, are quiet,
# and have every bit set.
SPECIAL_BITS = [0x80000000, 0x1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
SPECIAL_BITS += [0x7F800001, 0xFFA00000, 0x7FC12345, 0xFFFFFFFF]


def any_bits(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> torch.Tensor:
    """A float32 matrix of any bit patterns whatever; some rows have no weights."""
    drawn = rng.integers(2**32, size=shape, dtype=np.uint32)
    drawn = np.where(rng.random(shape) < 0.3, rng.choice(np.array(SPECIAL_BITS, np.uint32), shape), drawn)
    drawn[rng.random(shape) >= density] = 0
    drawn[rng.random(shape[0]) < 0.2] = 0
    return torch.from_numpy(drawn.view(np.float32))


def random_masks(model: nn.Module, density: float, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(rng.random(w.shape) < density) for n, w in prunable_weights(model).items()}


def refilled(kind: str, make) -> nn.Module:
    """A model whose prunable weights are make(shape)."""
    model = copy.deepcopy(MODELS[kind])
    for weight in prunable_weights(model).values():
        weight.data = make(tuple(weight.shape))
    return model


@examples(60)
@given(kind=kinds, seed=seeds, densities=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks_applied_twice_or_one_after_another_are_masks_applied_once(kind, seed, densities):
    rng = np.random.default_rng(seed)
    # NaN and infinity too: a product with the mask would leave NaN where a weight falls.
    model = refilled(kind, lambda shape: any_bits(shape, 1.0, rng))
    before = {name: bits(value).copy() for name, value in model.state_dict().items()}
    one, two = (random_masks(model, density, rng) for density in densities)
    both = {name: one[name] & two[name] for name in one}
    for masks, kept in ((one, one), (one, one), (two, both), (one, both)):
        apply_masks(model, masks)
        for name, value in model.state_dict().items():
            expected = np.where(kept[name].numpy(), before[name], 0) if name in kept else before[name]
            np.testing.assert_array_equal(bits(value), expected, err_msg=name)


@examples(150)
@given(st.lists(arrays(bool, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)), min_size=1, max_size=4))
def test_masks_survive_being_packed_and_saved(drawn):
    masks = {f"mask {i}": torch.from_numpy(np.asarray(mask)) for i, mask in enumerate(drawn)}
    packed = pack(masks)
    # Read as text: a 1 for every weight that is gone, zeros up to the next whole byte.
    text = ""
    for mask in drawn:
        text += "".join("01"[not kept] for kept in np.ravel(mask).tolist())
        text += "0" * (-len(text) % 8)
    assert packed.numpy().tobytes() == bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    stored = load(save({**masks, "packed": packed}))
    found = unpack(stored["packed"], masks)
    for name, mask in masks.items():
        for copied in (found[name], stored[name]):
            assert copied.dtype == torch.bool and torch.equal(copied, mask)


def loss_of(model: nn.Module, step: int, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The loss on a batch of random tokens, of the model or of one with other weights in the same places."""
    generator = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(1, 10, (3, 5), generator=generator), torch.randint(2, (3,), generator=generator)
    logits = torch.func.functional_call(model, weights or {}, kwargs={"input_ids": ids}).logits
    return F.cross_entropy(logits.float() if logits.dtype in HALVES else logits, labels)


adamw_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-4, 1e-2, 0.3]),
        "betas": st.sampled_from([(0.9, 0.98), (0.9, 0.999), (0.0, 0.5)]),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "amsgrad": st.booleans(),
        "foreach": st.booleans(),
    }
)


def train(model: nn.Module, optimizer, steps: range, keeper: MaskKeeper | None = None, masks=None) -> None:
    """Some steps with clipped gradients, under a keeper or with weights that count only times their masks."""
    for step in steps:
        optimizer.zero_grad()
        masked = {name: prunable_weights(model)[name] * mask for name, mask in (masks or {}).items()}
        loss_of(model, step, masked).backward()
        if keeper:
            keeper.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if keeper:
            keeper.apply()
            assert keeper.revived() == 0


@examples(40)
@given(kind=kinds, seed=seeds, density=st.floats(0, 1), options=adamw_options, dense=st.integers(0, 3))
def test_training_under_a_keeper_is_training_the_weights_that_are_left(kind, seed, density, options, dense):
    # In float64, so that both ways of computing the same differ by next to nothing, even after Adam's division.
    model = copy.deepcopy(MODELS[kind]).double()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    # Adam remembers the steps of the dense model: what it remembers would move a weight whose gradient is zero.
    train(model, optimizer, range(dense))
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = random_masks(model, density, np.random.default_rng(seed))
    train(model, optimizer, range(10, 13), keeper=MaskKeeper(model, masks))
    train(twin, other, range(10, 13), masks=masks)
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones((), dtype=torch.bool)).expand_as(parameter)
        assert not bits(parameter)[~kept.numpy()].any(), "zero, and not -0.0"
        torch.testing.assert_close(parameter[kept], expected[name][kept], rtol=1e-6, atol=1e-7)


@examples(40)
@given(
    kind=kinds,
    seed=seeds,
    density=st.floats(0, 1),
    dtypes=st.lists(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), max_size=4),
)
def test_zeros_stay_where_they_are_through_other_types_and_training_in_them(kind, seed, density, dtypes):
    rng = np.random.default_rng(seed)
    # Numbers that every type has, so that no other weight becomes zero: 2^-14 is float16's smallest normal one.
    model = refilled(kind, lambda shape: torch.from_numpy(rng.uniform(2.0**-14, 2, shape).astype(np.float32)))
    masks = random_masks(model, density, rng)
    keeper = MaskKeeper(model, masks)
    for dtype in (*dtypes, torch.float32):
        model.to(dtype)
        for name, weight in prunable_weights(model).items():
            assert weight.dtype == dtype
            np.testing.assert_array_equal((weight != 0).numpy(), masks[name].numpy())
    # The keeper was made before the model changed its type, and goes on keeping it.
    model.to(torch.bfloat16)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(2), keeper=keeper)
    for name, weight in prunable_weights(model.float()).items():
        assert not weight[~masks[name]].any()


# --- files ---


def counted(weight: np.ndarray) -> np.ndarray:
    """The bits of a weight as a file keeps them: -0.0 counts as pruned and comes back as 0.0."""
    return np.where(weight == 0x80000000, 0, weight).astype(np.uint32)


def dense_bits(layer: SparseLinear) -> np.ndarray:
    """The bits of a layer's weight [out, in], put in their places by scipy."""
    values, columns, starts, _ = layer.csr()
    shape = (layer.out_features, layer.in_features)
    return scipy.sparse.csr_matrix((bits(values), columns.numpy(), starts.numpy()), shape).toarray()


def bits_of_parts(parts: dict[str, np.ndarray], in_features: int) -> np.ndarray:
    """The bits of a weight [out, in] from its parts in a file, read as the file's format says."""
    shape = (len(parts["bias"]), in_features)
    text = "".join(f"{byte:08b}" for byte in parts["bitmap"].tolist())
    weight = np.zeros(shape[0] * shape[1], np.uint32)
    weight[[i for i, bit in enumerate(text) if bit == "1"]] = parts["values"].view(np.uint32)
    return weight.reshape(shape)


def layer_of(weight: torch.Tensor, backend: str, rng: np.random.Generator) -> SparseLinear:
    module = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    module.weight.data, module.bias.data = weight, any_bits((weight.shape[0],), 0.9, rng)
    return SparseLinear.from_dense(module, backend)


shapes = st.tuples(st.integers(0, 20), st.integers(0, 20))
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@examples(120)
@given(shape=shapes, density=densities, backend=st.sampled_from(BACKENDS), seed=seeds)
def test_a_layer_of_any_bits_comes_back_from_its_bitmap(shape, density, backend, seed):
    rng = np.random.default_rng(seed)
    weight = any_bits(shape, density, rng)
    expected, layer = counted(bits(weight)), layer_of(weight, backend, rng)
    parts = load(save(pack_layer(layer)))
    np.testing.assert_array_equal(bits_of_parts({n: p.numpy() for n, p in parts.items()}, shape[1]), expected)
    assert parts["bitmap"].numel() == math.ceil(shape[0] * shape[1] / 8)
    assert parts["values"].numel() == np.count_nonzero(expected)
    found = unpack_layer(parts, shape[1], backend)
    np.testing.assert_array_equal(dense_bits(found), expected)
    np.testing.assert_array_equal(bits(found.bias), bits(layer.bias))
    assert (found.out_features, found.in_features, found.backend) == (*shape, backend)


@examples(100)
@given(shape=shapes, density=densities, seed=seeds, place=st.floats(0, 1, exclude_max=True))
def test_a_bitmap_with_a_wrong_bit_or_a_byte_too_many_is_refused(shape, density, seed, place):
    assume(shape[0] * shape[1])
    rng = np.random.default_rng(seed)
    parts = pack_layer(layer_of(any_bits(shape, density, rng), "numba", rng))
    bit, flipped = int(place * shape[0] * shape[1]), parts["bitmap"].clone()
    flipped[bit // 8] ^= 0x80 >> bit % 8
    longer = torch.cat([parts["bitmap"], torch.zeros(1, dtype=torch.uint8)])
    for bitmap in (flipped, longer, parts["bitmap"][1:]):
        with pytest.raises(ValueError, match=r"a bitmap (of|has) \d+"):
            unpack_layer(parts | {"bitmap": bitmap}, shape[1], "numba")


@examples(20)
@given(kind=kinds, density=densities, backend=st.sampled_from(BACKENDS), seed=seeds)
@example(kind="gpt2", density=0.0, backend="numba", seed=0)
@example(kind="llama", density=0.0, backend="torch_csr", seed=0)
def test_a_model_of_any_bits_comes_back_from_its_file(kind, density, backend, seed):
    rng = np.random.default_rng(seed)
    model = refilled(kind, lambda shape: any_bits(shape, density, rng))
    sparse = convert_to_sparse(model, backend)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_sparse(save_sparse(sparse, folder))
        stored = load_file(f"{folder}/{FILE}")
    for name, parameter in sparse.named_parameters():
        np.testing.assert_array_equal(bits(loaded.get_parameter(name)), bits(parameter), err_msg=name)
    for name, layer in sparse.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        # Of a GPT-2 whole heads and neurons may have gone on the way; a Llama's matrices keep their shape.
        weight = model.get_submodule(name).weight if kind == "llama" else None
        expected = dense_bits(layer) if weight is None else counted(bits(weight))
        np.testing.assert_array_equal(dense_bits(loaded.get_submodule(name)), expected, err_msg=name)
        np.testing.assert_array_equal(bits(loaded.get_submodule(name).bias), bits(layer.bias), err_msg=name)
        parts = {part: stored[f"{name}.{part}"] for part in ("bitmap", "values", "bias")}
        np.testing.assert_array_equal(bits_of_parts(parts, layer.in_features), expected, err_msg=name)


@examples(100)
@given(shape=shapes, density=densities, seed=seeds)
def test_csr_is_that_of_scipy(shape, density, seed):
    weight = any_bits(shape, density, np.random.default_rng(seed))
    values, columns, starts = to_csr(weight)
    expected = scipy.sparse.csr_matrix(weight.numpy())
    np.testing.assert_array_equal(bits(values), expected.data.view(np.uint32))
    assert columns.tolist() == expected.indices.tolist() and starts.tolist() == expected.indptr.tolist()


# --- products ---


def sizes(shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Numbers from 2^-30 to 2^30 of either sign: sums that cancel, and no product that under- or overflows."""
    return torch.from_numpy((rng.choice([-1, 1], shape) * 2 ** rng.uniform(-30, 30, shape)).astype(np.float32))


def gamma(roundings: torch.Tensor, unit: float) -> torch.Tensor:
    """The relative error that so many roundings add up to at most (Higham, 2002, lemma 3.1)."""
    return roundings * unit / (1 - roundings * unit)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """y is x @ weight.T + bias, as near as float32 guarantees.

    A row of m weights is a sum of m + 1 numbers, in an order that is the engine's: a number goes through at most m
    additions and one multiplication, which makes m + 1 roundings by 2^-24 each. The zeros of a dense product add
    exactly. The reference has the same error in float64.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    expected, size = x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs()
    roundings = (weight != 0).sum(1).double() + 1
    dense = torch.full_like(roundings, weight.shape[1] + 1)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= (gamma(roundings, 2**-24) + gamma(dense, 2**-53)) * size).all()


def problem(rows: int, n_out: int, n_in: int, density: float, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """A sparse weight [out, in], some rows and columns of which have nothing at all; a bias; and inputs."""
    kept = rng.random((n_out, n_in)) < density
    kept[rng.random(n_out) < 0.1] = False
    kept[:, rng.random(n_in) < 0.1] = False
    weight = torch.where(torch.from_numpy(kept), sizes((n_out, n_in), rng), 0.0)
    return weight, sizes((n_out,), rng), sizes((rows, n_in), rng)


# Tiles are 16, 32 and 64 rows; a block of 16 x 16 is transposed at once.
tokens = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 32, 33, 64, 65]), st.integers(0, 150))
features = st.one_of(st.sampled_from([1, 15, 16, 17]), st.integers(1, 70))


@pytest.mark.parametrize("backend", BACKENDS)
@examples(80)
@given(rows=tokens, n_out=st.one_of(st.just(0), features), n_in=features, density=densities, seed=seeds)
def test_every_engine_gives_the_product_as_nearly_as_float32_can(backend, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, np.random.default_rng(seed))
    layer = SparseLinear.from_csr(*to_csr(weight), bias, n_in, backend)
    assert_product(layer(x), x, weight, bias)


@pytest.mark.parametrize("vectors", kernels.VECTORS)
@examples(60)
@given(rows=tokens, n_out=st.integers(0, 40), n_in=st.integers(0, 40), density=densities, seed=seeds)
def test_the_kernel_takes_empty_matrices_and_every_tile(vectors, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, np.random.default_rng(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose_vectors", lambda *_: vectors)
        assert_product(kernels.multiply(x, (*to_csr(weight), bias)), x, weight, bias)


@examples(10)
@given(rows=tokens, n_out=st.integers(0, 20), backend=st.sampled_from(BACKENDS), seed=seeds)
def test_a_layer_without_inputs_gives_its_bias(rows, n_out, backend, seed):
    weight, bias, x = problem(rows, n_out, 0, 1.0, np.random.default_rng(seed))
    layer = SparseLinear.from_csr(*to_csr(weight), bias, 0, backend)
    assert torch.equal(layer(x), bias.expand(rows, n_out))


@pytest.mark.parametrize("backend", ["numba", "torch_csr"])
@examples(80)
@given(rows=tokens, n_out=features, n_in=features, density=st.floats(0, 0.3), seed=seeds)
def test_what_no_weight_reads_does_not_matter(backend, rows, n_out, n_in, density, seed):
    weight, bias, x = problem(rows, n_out, n_in, density, np.random.default_rng(seed))
    unread = ~weight.any(0)
    x[:, unread] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(int(unread.sum())) % 3]
    layer = SparseLinear.from_csr(*to_csr(weight), bias, n_in, backend)
    assert_product(layer(x), x.masked_fill(unread, 0.0), weight, bias)


# --- intervals and tests ---


def shuffled(values: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(values)


@examples(150)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), seeds)
@example((0, 1), 0)
@example((3000, 3000), 0)
def test_wilsons_limits_are_the_shares_that_the_score_test_just_accepts(counts, seed):
    right, total = counts
    correct = shuffled(np.arange(total) < right, seed)
    # n (share - p)^2 = z^2 p (1 - p), as a polynomial in p.
    square, share = norm.ppf(0.975) ** 2, right / total
    limits = np.sort(np.roots([total + square, -2 * right - square, right * share]).real)
    assert wilson_interval(correct) == pytest.approx(limits, abs=1e-9)
    low, high = wilson_interval(~correct)
    assert (1 - high, 1 - low) == pytest.approx(limits, abs=1e-9), "what is wrong has the mirrored interval"


@examples(150)
@given(st.tuples(*[st.integers(0, 150)] * 4), seeds)
@example((3, 0, 0, 2), 0)
def test_mcnemars_p_value_is_the_exact_share_of_coin_tosses(counts, seed):
    a = shuffled(np.repeat([True, True, False, False], counts), seed)
    b = shuffled(np.repeat([True, False, True, False], counts), seed)
    # Of all 2^n ways in which n coins fall, those with at most as many on the rarer side, twice.
    fewer, n = min(counts[1:3]), counts[1] + counts[2]
    ways = sum(math.comb(n, i) for i in range(fewer + 1))
    assert mcnemar(a, b) == pytest.approx(float(min(1, Fraction(2 * ways, 2**n))), rel=1e-9)


@examples(120)
@given(st.lists(st.one_of(st.sampled_from([0.0, 0.01, 0.04, 1.0]), st.floats(0, 1)), max_size=8))
def test_holm_is_the_closure_of_bonferroni(p_values):
    # An adjusted p-value is the largest that Bonferroni gives any set of hypotheses to which this one belongs.
    indices = range(len(p_values))
    sets = [chosen for size in indices for chosen in itertools.combinations(indices, size + 1)]
    expected = [
        max(min(1.0, len(chosen) * min(p_values[j] for j in chosen)) for chosen in sets if i in chosen) for i in indices
    ]
    assert holm(p_values) == pytest.approx(expected, rel=1e-12, abs=0)


@examples(120)
@given(st.lists(st.integers(-6, 6), max_size=9))
def test_the_sign_flip_test_is_the_share_of_all_flips_that_are_as_far_out(sums):
    totals = [
        sum(sign * s for sign, s in zip(signs, sums, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    # Equal, not nearly: shares of 2^n are exact in binary.
    assert sign_flip_test(np.array(sums, dtype=int)) == sum(abs(t) >= abs(sum(sums)) for t in totals) / len(totals)


@examples(80)
@given(st.lists(st.booleans(), min_size=1, max_size=45), seeds)
def test_the_sign_flip_test_of_signed_ranks_is_wilcoxons(signs, seed):
    ranks = shuffled(np.arange(1, len(signs) + 1), seed) * np.where(signs, 1, -1)
    assert sign_flip_test(ranks) == pytest.approx(wilcoxon(ranks, method="exact").pvalue, rel=1e-9)
