"""The k lowest scores against a stable sort: on hard kinds of floats, and on scores that hypothesis draws."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.extra.numpy import array_shapes, arrays

from nbhelpers.criteria import flag_below
from nbhelpers.selection import select, select_within_bounds, threshold

# What hypothesis keeps between runs goes where all other test output goes.
set_hypothesis_home_dir(Path(os.environ["NBHELPERS_ROOT"], ".hypothesis"))
# Few values and many ties, zeros of either sign, neighbours, denormals, and the ends of the range.
POOLS = {
    32: [[0.0, -0.0, 2.0**-149, -(2.0**-149)], [1.0, 1 + 2.0**-23, 1 - 2.0**-24], [2.0**-126, np.inf, -np.inf]],
    64: [[0.0, -0.0, 2.0**-1074, -(2.0**-1074)], [1.0, 1 + 2.0**-52, 1 - 2.0**-53], [2.0**-1022, np.inf, -np.inf]],
}


def repeatable(count):
    """The same examples on every machine, however slow it is."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(max_examples=count, phases=phases, deadline=None, derandomize=True, database=None)


@st.composite
def score_tensors(draw):
    """Scores of up to four matrices of one or of several types: some empty, some not contiguous."""
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    common, mixed, scores = draw(st.sampled_from(dtypes[:2])), draw(st.booleans()), {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        dtype = draw(st.sampled_from(dtypes)) if mixed else common
        width = 64 if dtype == torch.float64 else 32
        pools = [st.sampled_from(pool) for pool in POOLS[width]]
        elements = draw(st.sampled_from([*pools[:2], st.one_of(*pools, st.floats(width=width, allow_nan=False))]))
        shape = draw(array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5))
        score = torch.from_numpy(draw(arrays(f"float{width}", shape, elements=elements)))
        scores[name] = (score.t() if draw(st.booleans()) else score).to(dtype)
    return scores


def flat(tensors):
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors.values()])


def kept_by_a_sort(scores, sparsity):
    values = flat(scores)
    kept = np.ones(len(values), dtype=bool)
    kept[np.argsort(values, kind="stable")[: round(sparsity * len(values))]] = False
    return kept


@repeatable(120)
@given(scores=score_tensors(), sparsity=st.one_of(st.floats(0, 1), st.integers(0, 40).map(lambda i: i / 40)))
def test_select_drops_the_weights_that_a_stable_sort_puts_first(scores, sparsity):
    masks = select(scores, sparsity)
    assert [(n, m.shape, m.dtype) for n, m in masks.items()] == [(n, s.shape, torch.bool) for n, s in scores.items()]
    np.testing.assert_array_equal(flat(masks), kept_by_a_sort(scores, sparsity))
    for name, mask in select(scores, sparsity, scope="layer").items():
        np.testing.assert_array_equal(flat({name: mask}), kept_by_a_sort({name: scores[name]}, sparsity))


@repeatable(80)
@given(scores=score_tensors(), share=st.floats(0, 1))
def test_a_threshold_is_the_kth_lowest_score(scores, share):
    ordered = np.sort(flat(scores))
    k = round(share * len(ordered))
    if k:
        assert threshold(scores, share) == ordered[k - 1]
    else:
        with pytest.raises(ValueError, match="must select at least one weight"):
            threshold(scores, share)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.999, 1.0])
def test_exactly_the_share_is_flagged_at_or_under_a_threshold(share):
    values = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    scores = {"a": values[:600].view(20, 30), "b": values[600:]}
    flags = flag_below({"magnitude": scores}, {"magnitude": threshold(scores, share)})
    np.testing.assert_array_equal(flat(flags) == 1, ~kept_by_a_sort(scores, share))
    assert flat(flags).sum() == round(share * 1000)


@pytest.mark.parametrize("count", [1, 2, 7, 101])
def test_the_number_dropped_is_rounded_as_python_rounds(count):
    for k in range(2 * count + 1):
        dropped = ~select({"a": torch.zeros(count)}, k / (2 * count))["a"]
        assert int(dropped.sum()) == round(k / (2 * count) * count)


def test_more_weights_than_a_float32_can_count_are_selected_exactly():
    # Above 2^24 elements torch.quantile refuses, and a float32 count is off by one.
    score = torch.rand(2**24 + 3, generator=torch.Generator().manual_seed(0))
    mask = select({"a": score}, 0.9)["a"]
    assert int((~mask).sum()) == round(0.9 * len(score))
    assert score[~mask].max() <= score[mask].min()


def test_selecting_does_not_change_the_scores():
    weight = torch.nn.Parameter(torch.tensor([-0.0, 2.0, 1.0]))
    assert select({"a": weight}, 1 / 3)["a"].tolist() == [False, True, True]
    assert torch.signbit(weight).tolist() == [True, False, False]


@repeatable(30)
@given(scores=score_tensors(), payload=st.integers(1, 2**22 - 1), sign=st.integers(0, 1))
def test_a_nan_of_any_sign_and_payload_is_refused(scores, payload, sign):
    assume(len(flat(scores)))
    bits = np.array([sign << 31 | 0x7F800000 | payload], np.uint32)
    scores = scores | {"nan": torch.from_numpy(bits.view(np.float32))}
    calls = [lambda: select(scores, 0.5), lambda: select(scores, 0.5, "layer"), lambda: threshold(scores, 1.0)]
    for call in (*calls, lambda: select_within_bounds(scores, 0.5)):
        with pytest.raises(ValueError, match="the scores of nan are not all numbers"):
            call()


@pytest.mark.parametrize("sparsity", [0.3, 0.65, 0.9, 0.95])
def test_within_bounds_no_matrix_keeps_less_than_a_quarter_or_more_than_four_times_the_average(sparsity):
    generator = torch.Generator().manual_seed(0)
    # Of scales so different that a global threshold empties one matrix and leaves another whole.
    scales, shapes = {"a": 1.0, "b": 1e-3, "c": 1e3}, {"a": (30, 40), "b": (25, 40), "c": (21, 5)}
    scores = {n: scales[n] * (1 + torch.rand(shape, generator=generator)) for n, shape in shapes.items()}
    before = {name: score.clone() for name, score in scores.items()}
    shares = {name: mask.double().mean() for name, mask in select(scores, sparsity).items()}
    assert shares["c"] == 1 and (sparsity < 0.5 or shares["b"] == 0)
    masks = select_within_bounds(scores, sparsity)
    assert int((flat(masks) == 0).sum()) == round(sparsity * 2305)
    for name, mask in masks.items():
        average = (1 - sparsity) * mask.numel()
        # 1 - 0.9 is not quite 0.1 in binary.
        assert average / 4 - 1e-9 <= int(mask.sum()) <= 4 * average + 1e-9, name
        assert not mask.any() or mask.all() or scores[name][~mask].max() <= scores[name][mask].min()
        assert torch.equal(scores[name], before[name])
    assert int(masks["c"].sum()) == min(105, int(4 * (1 - sparsity) * 105)), "the highest scores keep what they may"


def test_bounds_that_no_matrix_reaches_change_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(40, 50, generator=generator) for name in "abc"}
    masks = select_within_bounds(scores, 0.8)
    assert all(torch.equal(masks[name], mask) for name, mask in select(scores, 0.8).items())


def test_an_impossible_sparsity_or_scope_is_refused():
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`sparsity` must be a number from 0 to 1"):
            select({"a": torch.zeros(3)}, sparsity)
    with pytest.raises(ValueError, match=r"`scope` must be global or layer \(got 'row'\)"):
        select({"a": torch.zeros(3)}, 0.5, "row")
