"""Masks: exactly k weights fall, the same ones as in a full sort, they stay zero, and are recorded on the way."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.masks import (
    GradualKeeper,
    MaskKeeper,
    apply_masks,
    cubic_sparsity,
    identify_useless_parameters,
    pack,
    sparsity_of,
    unpack,
)
from nbhelpers.models import prunable_weights
from nbhelpers.selection import select, threshold
from nbhelpers.training.observers import FlaggedSets, GradientMagnitude

SPARSITIES = [0.0, 1e-9, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.612, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]


def scores_of(kind: str) -> dict[str, torch.Tensor]:
    """Scores of three matrices, 1,000 in all, of a kind that is hard to count exactly."""
    rng = np.random.default_rng(0)
    values = {
        "random": rng.normal(size=1000) ** 2,
        "heavy ties": rng.integers(0, 4, 1000),
        "all equal": np.full(1000, 0.25),
        "negative": rng.normal(size=1000),
        "signed zeros": rng.choice([0.0, -0.0, 1.0, -1.0], 1000),
        "denormal": rng.integers(-5, 6, 1000) * np.float64(1e-45),
        "infinite": rng.choice([np.inf, -np.inf, 0.0, 3.4e38, -3.4e38, 1.0], 1000),
        # Neighbouring floats: they share their upper 16 bits and differ in the lower ones.
        "neighbours": np.float32(1.0) + rng.integers(0, 50, 1000) * np.float32(2**-23),
        "many scales": 10.0 ** rng.uniform(-40, 38, 1000) * rng.choice([-1, 1], 1000),
    }[kind]
    flat = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return {"a": flat[:600].view(20, 30), "b": flat[600:999].view(3, 133), "c": flat[999:]}


KINDS = [
    "random",
    "heavy ties",
    "all equal",
    "negative",
    "signed zeros",
    "denormal",
    "infinite",
    "neighbours",
    "many scales",
]


def sorted_reference(scores: dict, sparsity: float) -> np.ndarray:
    """True where a weight is kept, by a stable sort of everything."""
    flat = np.concatenate([score.numpy().ravel() for score in scores.values()])
    kept = np.ones(len(flat), dtype=bool)
    kept[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = False
    return kept


def flat(masks: dict) -> np.ndarray:
    return np.concatenate([mask.numpy().ravel() for mask in masks.values()])


# --- selection ---


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_round_of_sparsity_times_n_fall_and_the_same_ones_as_in_a_stable_sort(kind):
    scores = scores_of(kind)
    for sparsity in SPARSITIES:
        masks = select(scores, sparsity)
        assert {name: mask.shape for name, mask in masks.items()} == {name: s.shape for name, s in scores.items()}
        assert all(mask.dtype == torch.bool for mask in masks.values())
        assert (~flat(masks)).sum() == round(sparsity * 1000)
        np.testing.assert_array_equal(flat(masks), sorted_reference(scores, sparsity))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 101])
def test_the_number_dropped_is_rounded_like_python_does_for_every_small_n(count):
    scores = {"a": torch.zeros(count)}
    for k in range(2 * count + 1):
        sparsity = k / (2 * count)
        assert int((~select(scores, sparsity)["a"]).sum()) == round(sparsity * count)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_rising_sparsity_are_nested(kind, scope):
    scores = scores_of(kind)
    masks = [flat(select(scores, sparsity, scope)) for sparsity in SPARSITIES]
    assert all((sparser <= denser).all() for denser, sparser in itertools.pairwise(masks))


@pytest.mark.parametrize("kind", KINDS)
def test_scope_layer_prunes_each_matrix_alone(kind):
    scores = scores_of(kind)
    for sparsity in SPARSITIES:
        masks = select(scores, sparsity, scope="layer")
        assert list(masks) == list(scores)
        for name, score in scores.items():
            np.testing.assert_array_equal(masks[name].numpy().ravel(), sorted_reference({name: score}, sparsity))


def test_scope_global_may_empty_a_matrix_where_scope_layer_does_not():
    scores = {"weak": torch.full((4,), 0.1), "strong": torch.full((4,), 0.9)}
    assert [int(mask.sum()) for mask in select(scores, 0.5).values()] == [0, 4]
    assert [int(mask.sum()) for mask in select(scores, 0.5, "layer").values()] == [2, 2]


def test_nothing_falls_at_zero_and_everything_at_one():
    scores = scores_of("random")
    assert all(mask.all() for mask in select(scores, 0).values())
    assert not any(mask.any() for mask in select(scores, 1).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_is_the_score_of_the_last_weight_that_a_sort_puts_under_it(kind, dtype):
    scores = {name: score.to(dtype) for name, score in scores_of(kind).items()}
    ordered = np.sort(np.concatenate([score.numpy().ravel() for score in scores.values()]))
    for share in SPARSITIES:
        k = round(share * 1000)
        if k:
            assert threshold(scores, share) == ordered[k - 1]
        else:
            with pytest.raises(ValueError, match="none of the weights"):
                threshold(scores, share)


def test_half_precision_parameters_are_selected_like_their_float32_values():
    scores = {name: score.half() for name, score in scores_of("random").items()}
    widened = {name: score.float() for name, score in scores.items()}
    for sparsity in (0.3, 0.9):
        np.testing.assert_array_equal(flat(select(scores, sparsity)), sorted_reference(widened, sparsity))


def test_more_weights_than_a_float32_can_count_are_selected_exactly():
    # Above 2^24 elements torch.quantile refuses, and a float32 count is off by one.
    size = 2**24 + 3
    score = torch.rand(size, generator=torch.Generator().manual_seed(0))
    mask = select({"a": score}, 0.9)["a"]
    assert size - int(mask.sum()) == round(0.9 * size)
    assert score[~mask].max() <= score[mask].min()


def test_selecting_changes_neither_scores_nor_their_gradients():
    weight = torch.nn.Parameter(torch.tensor([-0.0, 2.0, 1.0]))
    assert select({"a": weight}, 1 / 3)["a"].tolist() == [False, True, True]
    assert torch.signbit(weight).tolist() == [True, False, False]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_score_that_is_not_a_number_is_refused(scope):
    scores = scores_of("random")
    scores["b"][1, 7] = float("nan")
    with pytest.raises(ValueError, match="the scores of b are not all numbers"):
        select(scores, 0.5, scope)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_an_impossible_sparsity_is_refused(sparsity):
    with pytest.raises(ValueError, match="it takes a number from 0 to 1"):
        select(scores_of("random"), sparsity)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope is 'row': it takes global or layer"):
        select(scores_of("random"), 0.5, "row")


def test_sparsity_of_counts_what_falls():
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True])}
    assert sparsity_of(masks) == pytest.approx(3 / 5)


# --- useless weights ---


def three_criteria() -> dict:
    rng = np.random.default_rng(4)
    return {name: {"a": torch.from_numpy(rng.random((10, 10)))} for name in ("magnitude", "movement", "gradient")}


@pytest.mark.parametrize("agreement", ["all", "majority", "any", "mean_rank"])
def test_at_a_sparsity_exactly_that_share_is_flagged_and_the_flagged_agree_most(agreement):
    scores = three_criteria()
    ranks = np.array([score["a"].numpy().ravel().argsort().argsort() for score in scores.values()])
    merge = {"all": ranks.max(0), "majority": np.median(ranks, 0), "any": ranks.min(0), "mean_rank": ranks.mean(0)}
    for sparsity in (0.1, 0.37, 0.9):
        useless = identify_useless_parameters(scores, sparsity, agreement=agreement)["a"].numpy().ravel()
        assert useless.sum() == round(sparsity * 100)
        assert merge[agreement][useless].max() <= merge[agreement][~useless].min()


def test_with_thresholds_the_flagged_lie_under_all_of_them():
    scores = three_criteria()
    thresholds = {"magnitude": 0.5, "movement": 0.6, "gradient": 0.7}
    useless = identify_useless_parameters(scores, thresholds=thresholds)["a"]
    expected = np.logical_and.reduce([scores[c]["a"].numpy() < thresholds[c] for c in thresholds])
    np.testing.assert_array_equal(useless.numpy(), expected)
    assert 0 < expected.sum() < 100


def test_sparsity_and_thresholds_together_or_neither_are_refused():
    thresholds = dict.fromkeys(three_criteria(), 0.5)
    for options in ({}, {"sparsity": 0.5, "thresholds": thresholds}):
        with pytest.raises(ValueError, match="give either a sparsity or thresholds"):
            identify_useless_parameters(three_criteria(), **options)


# --- on a model ---


def tiny_model() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2)).eval()


def masks_for(model, sparsity: float) -> dict[str, torch.Tensor]:
    return select({name: weight.detach().abs() for name, weight in prunable_weights(model).items()}, sparsity)


def test_apply_masks_zeroes_the_dropped_weights_and_touches_nothing_else():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = masks_for(model, 0.7)
    assert apply_masks(model, masks) is model
    for name, value in model.state_dict().items():
        expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
        assert torch.equal(value, expected), name
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    assert sum(int((weight == 0).sum()) for weight in prunable_weights(model).values()) == round(0.7 * total)


def test_the_keeper_counts_revived_weights_and_takes_them_out_again():
    model = tiny_model()
    masks = masks_for(model, 0.5)
    keeper = MaskKeeper(model, masks)
    assert keeper.revived() == 0
    name = "transformer.h.1.mlp.c_fc.weight"
    place = tuple((~masks[name]).nonzero()[3])
    with torch.no_grad():
        prunable_weights(model)[name][place] = 1e-30
    assert keeper.revived() == 1
    keeper.apply()
    assert keeper.revived() == 0


def test_the_keeper_zeroes_the_gradients_of_dropped_weights_only():
    model = tiny_model()
    masks = masks_for(model, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    MaskKeeper(model, masks).mask_gradients()
    for name, parameter in model.named_parameters():
        expected = masks[name].float() if name in masks else torch.ones_like(parameter)
        assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"transformer.wte.weight": torch.ones(20, 8, dtype=torch.bool)},
        {"transformer.h.7.mlp.c_fc.weight": torch.ones(8, 32, dtype=torch.bool)},
        {"transformer.h.0.mlp.c_fc.weight": torch.ones(32, 8, dtype=torch.bool)},
    ],
    ids=["an embedding", "a block too many", "transposed"],
)
def test_masks_that_fit_no_prunable_weight_are_refused(wrong):
    model = tiny_model()
    before = model.transformer.wte.weight.clone()
    with pytest.raises(ValueError, match="fit no prunable weight of this model"):
        apply_masks(model, wrong)
    assert torch.equal(model.transformer.wte.weight, before)


# --- gradual pruning ---


def test_the_cubic_schedule_is_its_formula_and_stays_within_its_ends():
    assert [cubic_sparsity(0.8, t) for t in (0, 0.5, 1)] == pytest.approx([0, 0.8 * (1 - 0.125), 0.8])
    assert cubic_sparsity(0.8, -1) == 0
    assert cubic_sparsity(0.8, 2) == pytest.approx(0.8)


def test_a_gradual_keeper_prunes_step_by_step_follows_the_weights_and_reaches_exactly_its_sparsity():
    model = tiny_model()
    weights = prunable_weights(model)
    total = sum(w.numel() for w in weights.values())
    keeper = GradualKeeper(model, lambda: {n: w.detach().abs() for n, w in weights.items()}, 0.9, steps=10, every=2)
    assert sparsity_of(keeper.masks) == 0
    gone, before = [], None
    for step in range(1, 14):
        with torch.no_grad():
            for weight in weights.values():
                # A training step that would revive what was pruned, were its gradient not masked.
                weight.grad = torch.ones_like(weight)
        keeper.mask_gradients()
        with torch.no_grad():
            for weight in weights.values():
                weight += 0.01 * weight.grad
        keeper.apply()
        assert keeper.revived() == 0
        pruned = {n: ~mask for n, mask in keeper.masks.items()}
        if before:
            assert all((pruned[n] | ~before[n]).all() for n in pruned), "what is gone stays gone"
        before = pruned
        gone.append(sum(int(p.sum()) for p in pruned.values()))
        # Renewed at every second step and at the end of the schedule.
        asked = min(10, step - step % 2)
        assert gone[-1] == round(cubic_sparsity(0.9, asked / 10) * total)
    assert gone[-1] == round(0.9 * total)
    keeper.finish()


def test_a_schedule_that_was_cut_short_is_an_error():
    model = tiny_model()
    keeper = GradualKeeper(model, lambda: {n: w.detach().abs() for n, w in prunable_weights(model).items()}, 0.9, 10)
    for _ in range(5):
        keeper.apply()
    with pytest.raises(RuntimeError, match=r"ended at step 5 of 10, at sparsity 78.* instead of 90.0%"):
        keeper.finish()


# --- packed, and recorded along fine-tuning ---


def test_packed_masks_come_back_also_where_a_matrix_does_not_fill_its_last_byte():
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(shape, generator=generator) > 0.6 for name, shape in (("a", (8, 24)), ("b", (5, 3)))}
    bits = pack(masks)
    assert bits.dtype == torch.uint8
    assert len(bits) == 8 * 24 // 8 + 2
    places = "".join(f"{byte:08b}" for byte in bits.tolist())[: 8 * 24 + 5 * 3]
    assert [place == "0" for place in places] == flat(masks).tolist(), "1 is a dropped weight, the first one on top"
    found = unpack(bits, {name: torch.empty(mask.shape) for name, mask in masks.items()})
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def train_by_hand(model, observers, steps: int, learning_rate: float = 0.05) -> tuple[list, list]:
    """Gradient descent on random tokens: the weights after 0, 1, ... steps, and the gradients of each step."""
    weights, generator = prunable_weights(model), torch.Generator().manual_seed(1)
    kept, gradients = [[w.detach().clone() for w in weights.values()]], []
    for step in range(steps):
        model.zero_grad()
        ids = torch.randint(1, 20, (1, 6), generator=generator)
        torch.nn.functional.cross_entropy(model(ids).logits, torch.tensor([step % 2])).backward()
        gradients.append([w.grad.clone() for w in weights.values()])
        for observer in observers:
            observer.after_backward()
        with torch.no_grad():
            for weight in weights.values():
                weight -= learning_rate * weight.grad
        kept.append([w.detach().clone() for w in weights.values()])
    return kept, gradients


def test_flagged_sets_are_those_of_the_steps_made_so_far_and_the_last_of_the_trained_model():
    model = tiny_model()
    gradients = GradientMagnitude(model)
    observer = FlaggedSets(gradients, 0.7)
    kept, seen = train_by_hand(model, (observer, gradients), steps=6)
    tensors, weights = load(save(observer.tensors())), prunable_weights(model)
    expected = {"0/magnitude"}
    expected |= {f"{step}/{name}" for step in (1, 2, 4, 6) for name in ("magnitude", "movement", "gradient")}
    assert set(tensors) == expected
    for key, bits in tensors.items():
        step, criterion = int(key.split("/")[0]), key.split("/")[1]
        scores = {
            "magnitude": lambda step: [w.abs() for w in kept[step]],
            "movement": lambda step: [(w - start).abs() for w, start in zip(kept[step], kept[0], strict=True)],
            "gradient": lambda step: [sum(g.abs() for g in parts) / step for parts in zip(*seen[:step], strict=True)],
        }[criterion](step)
        expected = sorted_reference(dict(enumerate(scores)), 0.7)
        assert np.array_equal(flat(unpack(bits, weights)), expected), key


def test_the_last_set_is_recorded_once_where_the_number_of_steps_is_a_power_of_two():
    model = tiny_model()
    gradients = GradientMagnitude(model)
    observer = FlaggedSets(gradients, 0.5)
    kept, _ = train_by_hand(model, (observer, gradients), steps=4)
    steps = sorted({int(key.split("/")[0]) for key in observer.tensors()})
    assert steps == [0, 1, 2, 4]
    found = unpack(observer.tensors()["4/magnitude"], prunable_weights(model))
    assert np.array_equal(flat(found), sorted_reference({i: w.abs() for i, w in enumerate(kept[4])}, 0.5))


def test_a_movement_that_has_not_begun_is_left_out():
    model = tiny_model()
    gradients = GradientMagnitude(model)
    observer = FlaggedSets(gradients, 0.5)
    train_by_hand(model, (observer, gradients), steps=2, learning_rate=0.0)
    assert set(observer.tensors()) == {
        *(f"{step}/magnitude" for step in (0, 1, 2)),
        *(f"{step}/gradient" for step in (1, 2)),
    }


def test_an_observer_behind_the_gradients_it_reads_is_refused():
    model = tiny_model()
    gradients = GradientMagnitude(model)
    with pytest.raises(RuntimeError, match="in this order: FlaggedSets"):
        train_by_hand(model, (gradients, FlaggedSets(gradients, 0.5)), steps=1)
