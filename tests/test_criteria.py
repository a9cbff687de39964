"""Each criterion against a 5x5 worked out by hand, and the merges against brute force."""

import numpy as np
import pytest
import torch

from nbhelpers.criteria import COMPARATORS, CRITERIA, flag_below, global_ranks, merge_scores, sparsegpt

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
def test_a_criterion_gives_what_was_worked_out_by_hand(name, by_hand):
    weights = {"a": torch.nn.Parameter(FINE_TUNED.clone())}
    statistics = {"pretrained": {"a": PRETRAINED}, "mean_abs_gradient": {"a": GRADIENT}}
    scores = CRITERIA[name](weights, statistics)
    assert scores["a"].tolist() == by_hand
    assert not scores["a"].requires_grad
    assert torch.equal(weights["a"], FINE_TUNED), "scoring changes no weight"


def test_the_registry_holds_the_three_criteria_under_the_names_of_the_source_work():
    assert [(name, function.__name__) for name, function in CRITERIA.items()] == [
        ("magnitude", "magnitude_based_pruning"),
        ("movement", "movement_based_analysis"),
        ("gradient", "gradient_based_analysis"),
    ]


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


def test_first_order_movement_is_kept_with_its_sign():
    statistics = {"first_order_movement": {"a": FINE_TUNED}}
    assert torch.equal(COMPARATORS["movement_first_order"]({"a": GRADIENT}, statistics)["a"], FINE_TUNED)


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


def test_random_scores_repeat_for_the_same_weights_and_differ_for_others():
    weights = {"a": FINE_TUNED, "b": PRETRAINED}
    first, again = (COMPARATORS["random"](weights, {}) for _ in range(2))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], first["b"])
    assert ((first["a"] >= 0) & (first["a"] < 1)).all()


def literal_sparsegpt(weight, hessian, sparsity, block, damping):
    """Algorithm 1 read with an explicit inverse of what is left of the Hessian at every column, a row at a time."""
    w, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.double)
    columns = w.shape[1]
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        places = [(float(w[r, c] ** 2 / inverses[c][0, 0]), r, c) for r in range(len(w)) for c in range(start, end)]
        gone = {(r, c) for _, r, c in sorted(places)[: round(sparsity * len(places))]}
        for c in range(start, end):
            for r in range(len(w)):
                if (r, c) in gone:
                    w[r, c:] -= w[r, c] / inverses[c][0, 0] * inverses[c][0]
                    w[r, c] = 0
    return w


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 4), (0.7, 12), (0.3, 5), (0.0, 4)])
def test_sparsegpt_is_what_its_algorithm_says(sparsity, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 12, generator=generator)
    x = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    found = sparsegpt(weight, x.t() @ x, sparsity, block)
    expected = literal_sparsegpt(weight, x.t() @ x, sparsity, block, 0.01)
    # The same numbers by another route, then rounded to float32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    sizes = [6 * (min(s + block, 12) - s) for s in range(0, 12, block)]
    assert int((found == 0).sum()) == sum(round(sparsity * size) for size in sizes)


def test_sparsegpt_loses_less_of_the_output_than_dropping_the_same_share_by_magnitude():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 32, generator=generator)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    pruned = sparsegpt(weight, x.t() @ x, 0.5)
    dropped = weight * (weight.abs() >= weight.abs().flatten().median())
    errors = [((x @ (w - weight).t()) ** 2).sum() for w in (pruned, dropped)]
    assert errors[0] < 0.95 * errors[1]


def test_sparsegpt_survives_an_input_that_is_always_zero():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    pruned = sparsegpt(torch.ones(3, 6), x.t() @ x, 0.5)
    assert torch.isfinite(pruned).all() and (pruned[:, 2] == 0).all()


# --- merging ---


def random_scores(seed: int, count: int = 3, integers: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2)}

    def draw(shape):
        return torch.from_numpy(rng.integers(0, 4, shape).astype(np.float32) if integers else rng.random(shape))

    return {f"criterion{i}": {name: draw(shape) for name, shape in shapes.items()} for i in range(count)}


def flat(tensors: dict) -> np.ndarray:
    return np.concatenate([tensors[name].numpy().ravel() for name in tensors])


def places(values: np.ndarray) -> list[int]:
    """How many weights come before each: those with a lower score, and equal ones that stand further up."""
    return [
        sum(other < value or (other == value and j < i) for j, other in enumerate(values))
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("integers", [False, True], ids=["distinct", "ties"])
def test_global_ranks_count_the_weights_that_come_before(integers):
    (scores,) = random_scores(1, count=1, integers=integers).values()
    ranks = global_ranks(scores)
    assert flat(ranks).tolist() == places(flat(scores))
    assert {name: rank.shape for name, rank in ranks.items()} == {name: s.shape for name, s in scores.items()}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("agreement", ["all", "majority", "any", "mean_rank"])
@pytest.mark.parametrize("integers", [False, True], ids=["distinct", "ties"])
def test_a_merge_is_the_rank_at_which_enough_criteria_agree(agreement, count, integers):
    scores = random_scores(count, count, integers)
    ranks = np.array([places(flat(score)) for score in scores.values()]) / 21
    needed = {"all": count, "majority": count // 2 + 1, "any": 1}.get(agreement)
    expected = ranks.mean(0) if needed is None else [sorted(column)[needed - 1] for column in ranks.T]
    # Sums of at most five float64 ranks below one.
    np.testing.assert_allclose(flat(merge_scores(scores, agreement)), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("agreement", ["all", "majority", "any"])
def test_weights_under_a_common_quantile_by_enough_criteria_have_the_lowest_merged_scores(agreement):
    scores = random_scores(7)
    ranks = np.array([places(flat(score)) for score in scores.values()])
    merged = flat(merge_scores(scores, agreement))
    needed = {"all": 3, "majority": 2, "any": 1}[agreement]
    sizes = set()
    for quantile in range(22):
        agreed = (ranks < quantile).sum(0) >= needed
        sizes.add(int(agreed.sum()))
        assert merged[agreed].max(initial=-1) < merged[~agreed].min(initial=2)
    assert len(sizes) > 5, "the quantiles must tell sets apart"


def test_all_is_stricter_than_majority_and_majority_than_any():
    scores = random_scores(3)
    everyone, most, anyone = (flat(merge_scores(scores, agreement)) for agreement in ("all", "majority", "any"))
    assert (everyone >= most).all()
    assert (most >= anyone).all()
    assert (everyone > anyone).any()


def test_a_merge_asks_for_ranks_not_scales():
    scores = random_scores(5)
    stretched = scores | {"criterion1": {name: (1e6 * s) ** 3 for name, s in scores["criterion1"].items()}}
    np.testing.assert_array_equal(flat(merge_scores(scores)), flat(merge_scores(stretched)))


def test_an_unknown_agreement_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match="agreement is 'most': it takes all, majority, any, mean_rank"):
        merge_scores(random_scores(0), "most")
    with pytest.raises(ValueError, match="agreement is 'mean_rank': with thresholds it takes all, majority, any"):
        flag_below(random_scores(0), dict.fromkeys(random_scores(0), 0.5), "mean_rank")


# --- thresholds ---


@pytest.mark.parametrize(
    ("agreement", "flagged"),
    [
        # votes are 3, 2, 1, 0, and 0 where a score equals its threshold
        ("all", [True, False, False, False, False]),
        ("majority", [True, True, False, False, False]),
        ("any", [True, True, True, False, False]),
    ],
)
def test_flag_below_counts_the_votes(agreement, flagged):
    scores = {
        "magnitude": {"a": torch.tensor([0.1, 0.1, 0.1, 0.9, 0.5])},
        "movement": {"a": torch.tensor([1.0, 1.0, 9.0, 9.0, 5.0])},
        "gradient": {"a": torch.tensor([10.0, 90.0, 90.0, 90.0, 50.0])},
    }
    thresholds = {"magnitude": 0.5, "movement": 5.0, "gradient": 50.0}
    assert flag_below(scores, thresholds, agreement)["a"].tolist() == flagged


@pytest.mark.parametrize(("count", "needed"), [(2, 2), (4, 3)])
def test_a_majority_is_more_than_half(count, needed):
    scores = {
        f"criterion{i}": {"a": torch.tensor([0.0 if i < k else 1.0 for k in range(count + 1)])} for i in range(count)
    }
    flags = flag_below(scores, dict.fromkeys(scores, 0.5), "majority")["a"]
    assert flags.tolist() == [k >= needed for k in range(count + 1)]
