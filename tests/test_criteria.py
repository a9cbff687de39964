"""Each criterion against a 5x5 computed by hand, SparseGPT and the merges against brute force."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from nbhelpers.criteria import COMPARATORS, CRITERIA, MERGES, flag_below, global_ranks, merge_scores, score, sparsegpt
from nbhelpers.masks import identify_useless_parameters
from nbhelpers.profiles import PRUNERS

# All numbers are multiples of 1/8, which float32 holds exactly: the comparisons below need no tolerance.
FINE_TUNED = torch.tensor(
    [
        [0.500, -0.250, 0.000, 1.000, -1.500],
        [0.125, 0.750, -0.500, 0.250, 0.000],
        [-2.000, 0.375, 0.625, -0.125, 1.250],
        [0.875, -0.875, 0.500, 0.500, -0.750],
        [0.000, 1.125, -0.375, 2.000, 0.250],
    ]
)
PRETRAINED = torch.tensor(
    [
        [0.500, 0.250, 0.125, 0.500, -1.000],
        [0.250, 0.750, 0.500, 0.000, 0.000],
        [-2.500, 0.375, 0.500, 0.125, 1.000],
        [0.875, 0.875, 0.250, 0.500, -0.500],
        [0.125, 1.000, -0.500, 1.000, -0.250],
    ]
)
GRADIENT = torch.arange(25.0).reshape(5, 5) / 8

MAGNITUDE_BY_HAND = [
    [0.500, 0.250, 0.000, 1.000, 1.500],
    [0.125, 0.750, 0.500, 0.250, 0.000],
    [2.000, 0.375, 0.625, 0.125, 1.250],
    [0.875, 0.875, 0.500, 0.500, 0.750],
    [0.000, 1.125, 0.375, 2.000, 0.250],
]
MOVEMENT_BY_HAND = [
    [0.000, 0.500, 0.125, 0.500, 0.500],
    [0.125, 0.000, 1.000, 0.250, 0.000],
    [0.500, 0.000, 0.125, 0.250, 0.250],
    [0.000, 1.750, 0.250, 0.000, 0.250],
    [0.125, 0.125, 0.125, 1.000, 0.500],
]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [("magnitude", MAGNITUDE_BY_HAND), ("movement", MOVEMENT_BY_HAND), ("gradient", GRADIENT.tolist())],
)
def test_a_criterion_gives_the_scores_computed_by_hand(name, by_hand):
    weights = {"a": torch.nn.Parameter(FINE_TUNED.clone())}
    statistics = {"pretrained": {"a": PRETRAINED}, "mean_abs_gradient": {"a": GRADIENT}}
    scores = CRITERIA[name](weights, statistics)
    assert scores["a"].tolist() == by_hand
    assert not scores["a"].requires_grad
    assert torch.equal(weights["a"], FINE_TUNED), "scoring changes no weight"


# --- comparators, against a literal reading of their formulas in float64 ---

NORM = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25])


def test_taylor_and_fisher_are_the_products_that_their_papers_say():
    weights = {"a": torch.nn.Parameter(FINE_TUNED.clone())}
    statistics = {"calibration_gradient": {"a": GRADIENT}, "squared_gradient": {"a": GRADIENT * 2}}
    found = {name: COMPARATORS[name](weights, statistics)["a"] for name in ("taylor", "fisher")}
    for i in range(5):
        for j in range(5):
            w, g = float(FINE_TUNED[i, j]), float(GRADIENT[i, j])
            assert found["taylor"][i, j] == abs(w * g)
            assert found["fisher"][i, j] == w * w * (2 * g) / 2
    assert not any(score.requires_grad for score in found.values())


@pytest.mark.parametrize("layout", ["conv1d", "linear"])
def test_wanda_ranks_weight_times_input_norm_within_each_output(layout):
    """A layer of five inputs and three outputs, in either layout of its weight."""
    rows = FINE_TUNED[:3]
    weight, norm = (rows.t().contiguous(), NORM[:, None]) if layout == "conv1d" else (rows, NORM[None])
    scores = COMPARATORS["wanda"]({"a": weight}, {"input_norm": {"a": norm}})["a"]
    assert scores.shape == weight.shape
    scores = scores.t() if layout == "conv1d" else scores
    for out in range(3):
        products = [abs(float(rows[out, i]) * float(NORM[i])) for i in range(5)]
        order = sorted(range(5), key=products.__getitem__)
        assert [round(5 * float(scores[out, i])) for i in order] == [0, 1, 2, 3, 4]


def literal_sparsegpt(weight, hessian, sparsity, block, damping):
    """Algorithm 1 read with an explicit inverse of what is left of the Hessian at every column, a row at a time."""
    w, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.double)
    columns = w.shape[1]
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        places = [(float(w[r, c] ** 2 / inverses[c][0, 0]), r, c) for r in range(len(w)) for c in range(start, end)]
        dropped = {(r, c) for _, r, c in sorted(places)[: round(sparsity * len(places))]}
        for c in range(start, end):
            for r in range(len(w)):
                if (r, c) in dropped:
                    w[r, c:] -= w[r, c] / inverses[c][0, 0] * inverses[c][0]
                    w[r, c] = 0
    return w


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 4), (0.3, 5)])
def test_sparsegpt_follows_its_algorithm(sparsity, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 12, generator=generator)
    x = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    found = sparsegpt(weight, x.t() @ x, sparsity, block)
    expected = literal_sparsegpt(weight, x.t() @ x, sparsity, block, 0.01)
    # The same numbers by another route, then rounded to float32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    sizes = [6 * (min(s + block, 12) - s) for s in range(0, 12, block)]
    assert int((found == 0).sum()) == sum(round(sparsity * size) for size in sizes)


def test_sparsegpt_prunes_an_input_that_is_always_zero():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    pruned = sparsegpt(torch.ones(3, 6), x.t() @ x, 0.5)
    assert torch.isfinite(pruned).all() and (pruned[:, 2] == 0).all()


# --- merging ---


def random_scores(count, ties):
    """Scores of 21 weights by several criteria, in tensors of several shapes."""
    rng, shapes = np.random.default_rng(count), {"a": (3, 4), "b": (5,), "c": (2, 2)}
    draw = (lambda shape: rng.integers(0, 4, shape).astype(np.float32)) if ties else rng.random
    return {f"criterion{i}": {n: torch.from_numpy(draw(shape)) for n, shape in shapes.items()} for i in range(count)}


def flat(tensors):
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors.values()])


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_global_ranks_are_those_of_scipy(ties):
    (scores,) = random_scores(1, ties).values()
    ranks = global_ranks(scores)
    np.testing.assert_array_equal(flat(ranks), rankdata(flat(scores), "ordinal") - 1)
    assert {name: rank.shape for name, rank in ranks.items()} == {name: s.shape for name, s in scores.items()}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("agreement", ["all", "majority", "any", "mean_rank"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_a_merged_score_is_the_rank_at_which_enough_criteria_agree(agreement, count, ties):
    scores = random_scores(count, ties)
    ranks = np.array([rankdata(flat(score), "ordinal") - 1 for score in scores.values()]) / 21
    needed = {"all": count, "majority": count // 2 + 1, "any": 1}.get(agreement)
    expected = ranks.mean(0) if needed is None else np.sort(ranks, 0)[needed - 1]
    # Sums of at most four float64 ranks below one.
    np.testing.assert_allclose(flat(merge_scores(scores, agreement)), expected, rtol=0, atol=1e-15)


def test_a_score_by_name_is_a_criterion_a_comparator_or_a_merge():
    rng, shapes = np.random.default_rng(0), {"a": (3, 4), "b": (9,)}
    w, before, g, c = (rng.normal(size=21) for _ in range(4))

    def tensors(values):
        parts = np.split(values, [12])
        return {n: torch.from_numpy(part.reshape(shapes[n])) for n, part in zip(shapes, parts, strict=True)}

    statistics = {"pretrained": before, "mean_abs_gradient": abs(g), "calibration_gradient": abs(c)}
    three = [abs(w), abs(w - before), abs(g)]
    ranks = np.array([rankdata(scores) - 1 for scores in (*three, abs(w * c))]) / 21
    expected = {
        "movement": three[1],
        "taylor": abs(w * c),
        "merged": ranks[:3].max(0),
        "merged_majority": np.median(ranks[:3], 0),
        "merged_any": ranks[:3].min(0),
        "merged_mean_rank": ranks[:3].mean(0),
        "merged_normalised": sum(scores / scores.mean() for scores in three) / 3,
        "merged_with_taylor": ranks.max(0),
    }
    assert set(MERGES) <= set(expected)
    for name, values in expected.items():
        found = flat(score(name, tensors(w), {key: tensors(value) for key, value in statistics.items()}))
        np.testing.assert_allclose(found, values, rtol=1e-12, err_msg=name)
    assert set(PRUNERS) == {*CRITERIA, *COMPARATORS, *MERGES, "sparsegpt"}, "a profile may ask for each of them"


@pytest.mark.parametrize(
    ("agreement", "flagged"),
    [
        # votes are 3, 2, 1, 0, and 3 where the scores equal their thresholds
        ("all", [True, False, False, False, True]),
        ("majority", [True, True, False, False, True]),
        ("any", [True, True, True, False, True]),
    ],
)
def test_scores_at_or_under_their_thresholds_are_votes(agreement, flagged):
    scores = {
        "magnitude": {"a": torch.tensor([0.1, 0.1, 0.1, 0.9, 0.5])},
        "movement": {"a": torch.tensor([1.0, 1.0, 9.0, 9.0, 5.0])},
        "gradient": {"a": torch.tensor([10.0, 90.0, 90.0, 90.0, 50.0])},
    }
    thresholds = {"magnitude": 0.5, "movement": 5.0, "gradient": 50.0}
    assert identify_useless_parameters(scores, thresholds=thresholds, agreement=agreement)["a"].tolist() == flagged


@pytest.mark.parametrize(("count", "needed"), [(2, 2), (4, 3)])
def test_a_majority_is_more_than_half(count, needed):
    votes = [[0.0 if criterion < k else 1.0 for k in range(count + 1)] for criterion in range(count)]
    scores = {f"criterion{i}": {"a": torch.tensor(row)} for i, row in enumerate(votes)}
    flags = flag_below(scores, dict.fromkeys(scores, 0.5), "majority")["a"]
    assert flags.tolist() == [k >= needed for k in range(count + 1)]


@pytest.mark.parametrize("agreement", ["all", "mean_rank"])
def test_at_a_sparsity_the_lowest_merged_scores_are_flagged(agreement):
    scores = random_scores(3, ties=False)
    useless = flat(identify_useless_parameters(scores, 0.37, agreement=agreement))
    merged = flat(merge_scores(scores, agreement))
    np.testing.assert_array_equal(useless, rankdata(merged, "ordinal") <= round(0.37 * 21))


def test_unknown_agreements_and_contradicting_arguments_are_refused():
    scores = random_scores(2, ties=False)
    thresholds = dict.fromkeys(scores, 0.5)
    with pytest.raises(ValueError, match=r"`agreement` must be one of all, majority, any, mean_rank \(got 'most'\)"):
        merge_scores(scores, "most")
    with pytest.raises(ValueError, match=r"with thresholds, `agreement` must be one of all, majority, any \(got"):
        flag_below(scores, thresholds, "mean_rank")
    for options in ({}, {"sparsity": 0.5, "thresholds": thresholds}):
        with pytest.raises(ValueError, match="pass either `sparsity` or `thresholds`"):
            identify_useless_parameters(scores, **options)
