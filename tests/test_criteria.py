"""Each criterion against a 5x5 worked out by hand, and the merges against brute force."""

import numpy as np
import pytest
import torch

from nbhelpers.criteria import CRITERIA, flag_below, global_ranks, merge_scores

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
    assert flat(ranks).tolist() == [place / 21 for place in places(flat(scores))]
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
