"""Overlaps against sets, scikit-learn and literal loops."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_model
from sklearn.metrics import cohen_kappa_score

from nbhelpers.masks import pack
from nbhelpers.models import prunable_weights, structures
from nbhelpers.study import stability

SHAPES = {"t.h.0.attn.c_attn.weight": (8, 24), "t.h.0.mlp.c_fc.weight": (8, 32), "t.h.1.mlp.c_proj.weight": (5, 3)}


def random_masks(seed: int, shares: tuple = (0.9, 0.5, 0.2)) -> dict[str, torch.Tensor]:
    """Masks that drop each matrix's weights with another probability."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator) >= p for (n, s), p in zip(SHAPES.items(), shares, strict=True)}


def flat(masks: dict) -> np.ndarray:
    return np.concatenate([mask.numpy().ravel() for mask in masks.values()])


# --- two flagged sets ---


def test_overlap_and_its_two_chance_levels_by_hand():
    a = {"x": torch.tensor([False, False, False, True]), "y": torch.tensor([False, True])}
    b = {"x": torch.tensor([False, True, True, True]), "y": torch.tensor([False, False])}
    assert (stability.overlap(a, b), stability.overlap(b, a), stability.overlap(a, a)) == (2 / 4, 2 / 3, 1)
    found = stability.overlap_and_chance(a, b)
    # x: 3/4 and 1/4 of 4 weights; y: 1/2 and 1 of 2.
    assert found == pytest.approx({"overlap": 2 / 4, "chance": 3 / 6, "chance_by_layer": (3 / 4 + 1) / 4})


def test_masks_of_other_parameters_and_masks_that_drop_nothing_are_refused():
    masks = random_masks(0)
    with pytest.raises(ValueError, match=r"must be of the same parameters; not in both: t\.h\.0\.attn"):
        stability.overlap(masks, dict(list(masks.items())[1:]))
    with pytest.raises(ValueError, match="must drop at least one weight"):
        stability.overlap({n: torch.ones_like(m) for n, m in masks.items()}, masks)


@pytest.mark.parametrize("shares", [(0.9, 0.5, 0.2), (0.99, 0.99, 0.99), (0.0, 0.1, 0.0)])
def test_kappa_is_that_of_scikit_learn(shares):
    a, b = random_masks(0, shares), random_masks(1, (0.5, 0.5, 0.5))
    assert stability.cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(flat(a), flat(b)), abs=1e-12)
    assert stability.cohen_kappa(a, a) == 1
    nothing = {name: torch.zeros_like(mask) for name, mask in a.items()}
    assert np.isnan(stability.cohen_kappa(nothing, nothing))


def test_seeds_are_compared_pair_by_pair():
    by_seed = {seed: random_masks(seed) for seed in (0, 1, 5)}
    table = stability.stability_over_seeds(by_seed)
    assert list(zip(table["seed_a"], table["seed_b"], strict=True)) == [(0, 1), (0, 5), (1, 5)]
    for _, row in table.iterrows():
        a, b = ({i for i, kept in enumerate(flat(by_seed[row[s]])) if not kept} for s in ("seed_a", "seed_b"))
        assert row["overlap"] == pytest.approx(len(a & b) / len(a))
        assert row["chance"] == pytest.approx(len(b) / sum(np.prod(shape) for shape in SHAPES.values()))
        kappa = cohen_kappa_score(flat(by_seed[row["seed_a"]]), flat(by_seed[row["seed_b"]]))
        assert row["kappa"] == pytest.approx(kappa)
    single = stability.stability_over_seeds({0: by_seed[0]})
    assert single.empty and list(single) == list(table)


# --- by structure ---


def test_the_share_of_a_head_and_of_a_neuron_is_counted_over_all_its_slices():
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=generator) > 0.6 for n, w in prunable_weights(model).items()}
    table = stability.structure_shares(masks, structures(model))
    assert len(table) == 2 * (2 + 32)
    for layer, head in itertools.product(range(2), range(2)):
        into, out = (masks[f"transformer.h.{layer}.attn.{part}.weight"] for part in ("c_attn", "c_proj"))
        mine = slice(4 * head, 4 * head + 4)
        kept = torch.cat([part[:, mine].flatten() for part in into.split(8, 1)] + [out[mine].flatten()])
        row = table.query("kind == 'head' and layer == @layer and index == @head")
        assert row["dropped"].item() == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)
    for layer, neuron in ((0, 0), (1, 31)):
        into, out = (masks[f"transformer.h.{layer}.mlp.{part}.weight"] for part in ("c_fc", "c_proj"))
        kept = torch.cat([into[:, neuron], out[neuron]])
        row = table.query("kind == 'neuron' and layer == @layer and index == @neuron")
        assert row["dropped"].item() == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)


# --- along fine-tuning ---


def test_every_record_is_compared_with_the_last_of_its_criterion():
    keys = ["0/magnitude", "16/magnitude", "2/magnitude", "2/gradient", "16/gradient", "16/movement", "2/movement"]
    sets = {key: random_masks(seed) for seed, key in enumerate(keys)}
    weights = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    table = stability.along_training({key: pack(masks) for key, masks in sets.items()}, weights)
    assert list(zip(table["criterion"], table["step"], strict=True)) == [
        *(("magnitude", step) for step in (0, 2, 16)),
        *(("movement", step) for step in (2, 16)),
        *(("gradient", step) for step in (2, 16)),
    ]
    for _, row in table.iterrows():
        early, last = (~flat(sets[f"{step}/{row['criterion']}"]) for step in (row["step"], 16))
        assert row["overlap"] == pytest.approx((early & last).sum() / early.sum())
        assert row["chance"] == pytest.approx(last.mean())
        matrices = zip(*(sets[f"{step}/{row['criterion']}"].values() for step in (row["step"], 16)), strict=True)
        expected = sum((~a).double().mean() * (~b).double().mean() * a.numel() for a, b in matrices)
        assert row["chance_by_layer"] == pytest.approx(expected.item() / early.sum())


# --- layer by layer ---


def test_sensitivity_prunes_one_matrix_at_a_time_and_puts_it_back():
    model = tiny_model()
    weights = prunable_weights(model)
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    before = copy.deepcopy(model.state_dict())
    zeros = []

    def evaluate(pruned):
        weights = prunable_weights(pruned).items()
        zeros.append({name: (weight.flatten() == 0).nonzero()[:, 0] for name, weight in weights})
        return len(zeros)

    table = stability.sensitivity(model, scores, evaluate, [0.5, 0.9])
    assert list(table) == ["layer", "module", "sparsity", "value"]
    assert table.iloc[0].tolist() == [-1, "none", 0.0, 1.0]
    assert table["value"].tolist() == list(range(1, 2 + 2 * len(weights)))
    modules = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    asked = list(itertools.product(range(2), modules, (0.5, 0.9)))
    assert list(table.iloc[1:, :3].itertuples(index=False, name=None)) == asked
    assert not any(len(places) for places in zeros[0].values())
    for (layer, module, sparsity), found in zip(asked, zeros[1:], strict=True):
        for name, weight in weights.items():
            alone = name == f"transformer.h.{layer}.{module}.weight"
            lowest = scores[name].flatten().sort().indices[: round(sparsity * weight.numel()) if alone else 0]
            assert set(found[name].tolist()) == set(lowest.tolist())
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name


def test_weights_come_back_bit_for_bit_when_the_evaluation_raises():
    model = tiny_model()
    weights = prunable_weights(model)
    with torch.no_grad():
        # Bits that a comparison of numbers does not see.
        weights["transformer.h.0.attn.c_attn.weight"][0, 0] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(pruned):
        if any((weight == 0).sum() > 1 for weight in prunable_weights(pruned).values()):
            raise RuntimeError("out of memory")
        return 0.0

    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        stability.sensitivity(model, scores, evaluate, [0.5])
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
