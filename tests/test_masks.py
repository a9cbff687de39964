"""Masks on a model: zeros where they fall, also through training, a gradual schedule, and files."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load, save
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from nbhelpers.masks import (
    GradualKeeper,
    MaskKeeper,
    apply_masks,
    cubic_sparsity,
    pack,
    select_blocks,
    select_structures,
    sparsity_of,
    unpack,
)
from nbhelpers.models import prunable_weights, structures
from nbhelpers.selection import select, select_within_bounds

TINY = {"n_embd": 4, "n_layer": 1, "n_head": 2, "vocab_size": 10, "n_positions": 8, "pad_token_id": 0}
TINY |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "initializer_range": 0.3}
LLAMA = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA |= {"intermediate_size": 6, "vocab_size": 10, "pad_token_id": 0, "initializer_range": 0.3}


def small_model(kind="gpt2"):
    """A classifier of a few hundred parameters: GPT-2's ``Conv1D``, or the ``nn.Linear`` of a Llama."""
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA)).eval()
    return GPT2ForSequenceClassification(GPT2Config(**TINY)).eval()


def random_masks(model, density=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {n: torch.from_numpy(rng.random(w.shape) < density) for n, w in prunable_weights(model).items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masks_zero_the_dropped_weights_and_change_nothing_else(kind):
    model = small_model(kind)
    masks = random_masks(model)
    for weight in prunable_weights(model).values():
        # A product with the mask would leave NaN where a weight is dropped.
        weight.data.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        assert apply_masks(model, masks) is model
        for name, value in model.state_dict().items():
            expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
            assert torch.equal(value.view(torch.int32), expected.view(torch.int32)), name
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert sparsity_of(masks) == pytest.approx(1 - kept / sum(mask.numel() for mask in masks.values()))


def test_the_keeper_counts_revived_weights_and_zeroes_them_again():
    model = small_model()
    masks = random_masks(model)
    keeper = MaskKeeper(model, masks)
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        prunable_weights(model)[name][tuple((~masks[name]).nonzero()[3])] = 1e-30
    assert keeper.revived() == 1
    keeper.apply()
    assert keeper.revived() == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", (10, 4)),
        ("transformer.h.7.mlp.c_fc.weight", (4, 16)),
        ("transformer.h.0.mlp.c_fc.weight", (16, 4)),
    ],
    ids=["an embedding", "a block too many", "transposed"],
)
def test_masks_that_fit_no_prunable_weight_are_refused(name, shape):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"must fit prunable weights of the model \\({name} do not"):
        apply_masks(model, {name: torch.zeros(shape, dtype=torch.bool)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- training ---


def train(model, optimizer, steps, keeper=None, masks=None):
    """Steps with clipped gradients, under a keeper or with weights that are multiplied by their masks."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids, labels = torch.randint(1, 10, (3, 5), generator=generator), torch.randint(2, (3,), generator=generator)
        optimizer.zero_grad()
        masked = {name: prunable_weights(model)[name] * mask for name, mask in (masks or {}).items()}
        logits = torch.func.functional_call(model, masked, kwargs={"input_ids": ids}).logits
        nn.functional.cross_entropy(logits, labels).backward()
        if keeper:
            keeper.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if keeper:
            keeper.apply()
            assert keeper.revived() == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options", [{"betas": (0.9, 0.98), "weight_decay": 0.01}, {"weight_decay": 1.0, "amsgrad": True, "foreach": True}]
)
def test_training_under_a_keeper_is_training_the_weights_that_are_left(kind, density, options):
    # In float64, so that the two computations differ by next to nothing, even after Adam's division.
    model = small_model(kind).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    # Adam's momentum from training the dense model would move a weight whose gradient is zero.
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, **options)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = random_masks(model, density)
    train(model, optimizer, range(10, 13), keeper=MaskKeeper(model, masks))
    train(twin, twin_optimizer, range(10, 13), masks=masks)
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones((), dtype=torch.bool)).expand_as(parameter)
        assert not parameter[~kept].view(torch.int64).any(), "zero, and not -0.0"
        torch.testing.assert_close(parameter[kept], expected[name][kept], rtol=1e-6, atol=1e-7)


def test_the_cubic_schedule_follows_its_formula_and_stays_within_its_ends():
    assert [cubic_sparsity(0.8, t) for t in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.8 * (1 - 0.125), 0.8, 0.8])
    # From 60 % on: 0.9 - 0.3 / 8 in the middle.
    assert [cubic_sparsity(0.9, t, 0.6) for t in (0, 0.5, 1)] == pytest.approx([0.6, 0.8625, 0.9])


def test_a_gradual_keeper_follows_the_schedule_and_the_weights():
    model = small_model()
    weights = prunable_weights(model)
    total = sum(w.numel() for w in weights.values())
    keeper = GradualKeeper(model, lambda: {n: w.detach().abs() for n, w in weights.items()}, 0.9, steps=10, every=2)
    before = {name: torch.zeros_like(mask) for name, mask in keeper.masks.items()}
    for step in range(1, 14):
        if step == 6:
            # A checkpoint continues from the same place.
            state = {name: tensor.clone() for name, tensor in keeper.state().items()}
            scores = keeper.scores
            keeper = GradualKeeper(model, scores, 0.9, steps=10, every=2)
            keeper.load_state(state)
        if step <= 10:
            with pytest.raises(RuntimeError, match=rf"ended at step {step - 1} of 10, at sparsity .* instead of 90.0%"):
                keeper.finish()
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        keeper.mask_gradients()
        with torch.no_grad():
            for weight in weights.values():
                weight += 0.01 * weight.grad
        keeper.apply()
        assert keeper.revived() == 0
        dropped = {name: ~mask for name, mask in keeper.masks.items()}
        assert all((dropped[name] | ~before[name]).all() for name in dropped), "a dropped weight stays dropped"
        before = dropped
        # The masks change at every second step and at the end of the schedule.
        scheduled = min(10, step - step % 2)
        assert sum(int(d.sum()) for d in dropped.values()) == round(cubic_sparsity(0.9, scheduled / 10) * total)
    keeper.finish()


CHOOSERS = {
    "weights": lambda model: select,
    "bounded": lambda model: select_within_bounds,
    "blocks": lambda model: lambda scores, sparsity: select_blocks(scores, model, sparsity),
    "structures": lambda model: lambda scores, sparsity: select_structures(scores, structures(model), sparsity),
}


@pytest.mark.parametrize("pattern", CHOOSERS)
@pytest.mark.parametrize("seed", [1, 3])  # with which a gone head would come back instead of two neurons
def test_what_gradual_pruning_has_removed_stays_gone_whatever_later_scores_say(pattern, seed):
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    weights = prunable_weights(model)

    def anew():
        """Scores that forget the earlier ones, of another scale for each matrix."""
        scales = (1 + 3 * torch.rand(len(weights), generator=generator)).tolist()
        return {
            n: a * torch.rand(w.shape, generator=generator) for a, (n, w) in zip(scales, weights.items(), strict=True)
        }

    options = {"steps": 30, "first": 0.3, "choose": CHOOSERS[pattern](model)}
    keeper = GradualKeeper(model, anew, 0.75, **options)
    for _ in range(32):
        before, done = keeper.masks, keeper.step
        keeper.apply()
        assert not any((mask & ~before[name]).any() for name, mask in keeper.masks.items())
        if pattern == "structures":
            # As near as whole structures allow: half a head has 4 % of the weights.
            assert abs(sparsity_of(keeper.masks) - cubic_sparsity(0.75, done / 30, 0.3)) < 0.05
        else:
            size = 4 if pattern == "blocks" else 1
            total = sum(mask.numel() for mask in before.values()) // size
            gone = sum(int((~mask).sum()) for mask in keeper.masks.values())
            assert gone == size * round(cubic_sparsity(0.75, done / 30, 0.3) * total)
    keeper.finish()


# --- files ---


def test_packed_masks_are_a_bit_per_weight_and_come_back():
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "whole bytes": (8, 24),
        "no whole byte": (5, 3),
        "empty": (0, 4),
        "one": (),
        "three dimensions": (2, 3, 7),
    }
    masks = {name: torch.rand(shape, generator=generator) > 0.6 for name, shape in shapes.items()}
    packed = load(save({"packed": pack(masks)}))["packed"]
    # As text: a 1 for every dropped weight, zeros up to the next whole byte.
    text = ""
    for mask in masks.values():
        text += "".join("01"[not kept] for kept in mask.flatten().tolist())
        text += "0" * (-len(text) % 8)
    assert packed.numpy().tobytes() == bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    for name, mask in unpack(packed, masks).items():
        assert mask.dtype == torch.bool and torch.equal(mask, masks[name])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_blocks_are_dropped_whole_by_their_mean_score(toy_model, sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in prunable_weights(toy_model).items()}
    masks = select_blocks(scores, toy_model, sparsity)
    blocks = {n: m.view(-1, 4, m.shape[1]) for n, m in masks.items()}  # GPT-2 stores [in, out]
    means = {n: s.view(-1, 4, s.shape[1]).mean(1) for n, s in scores.items()}
    kept = torch.cat([b.all(1).flatten() for b in blocks.values()])
    assert torch.equal(kept, torch.cat([b.any(1).flatten() for b in blocks.values()]))
    assert int((~kept).sum()) == round(sparsity * len(kept))
    mean = torch.cat([m.flatten() for m in means.values()])
    assert not kept.any() or kept.all() or mean[~kept].max() <= mean[kept].min()
    with pytest.raises(ValueError, match=r"the inputs of .* must be a multiple of 3 \(got 8\)"):
        select_blocks(scores, toy_model, sparsity, size=3)


@pytest.mark.parametrize("pattern", ["blocks", "structures"])
def test_scores_of_minus_infinity_go_first(toy_model, pattern):
    choose, generator = CHOOSERS[pattern](toy_model), torch.Generator().manual_seed(0)
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in prunable_weights(toy_model).items()}
    gone = choose({n: torch.rand(s.shape, generator=generator) for n, s in scores.items()}, 0.3)
    for sparsity in (sparsity_of(gone), 0.6):
        found = choose({n: s.masked_fill(~gone[n], -torch.inf) for n, s in scores.items()}, sparsity)
        expected = choose({n: s - 100.0 * ~gone[n] for n, s in scores.items()}, sparsity)
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())
        assert not any((found[name] & ~mask).any() for name, mask in gone.items())
