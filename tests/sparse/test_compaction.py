"""Whole heads and neurons: structured masks, and smaller models with the same logits."""

import pytest
import torch
from sparse_models import logits
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.masks import apply_masks, select_structures, sparsity_of
from nbhelpers.models import ModelError, prunable_weights, structures
from nbhelpers.sparse import compact, count_actual_params, load_sparse, save_sparse
from nbhelpers.sparse.gpt2 import SparseGPT2ForSequenceClassification

SHAPE = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 10, "vocab_size": 50, "n_positions": 24}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**SHAPE)).eval()
    for name, parameter in model.named_parameters():
        # Initial biases are zero; a compaction that forgot them would go unnoticed.
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def random_scores(model):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(w.shape, generator=generator) for name, w in prunable_weights(model).items()}


# --- structured masks ---


def literal_scores(scores, i):
    """Mean score of each head (its columns of query, key, value, its rows of c_proj) and neuron of block i."""
    h = f"transformer.h.{i}."
    heads, neurons = [], []
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        parts = [scores[h + "attn.c_attn.weight"][:, 12 * g + 4 * head : 12 * g + 4 * head + 4] for g in range(3)]
        parts.append(scores[h + "attn.c_proj.weight"][own])
        heads.append(torch.cat([p.flatten() for p in parts]).double().mean().item())
    for j in range(10):
        parts = [scores[h + "mlp.c_fc.weight"][:, j], scores[h + "mlp.c_proj.weight"][j]]
        neurons.append(torch.cat(parts).double().mean().item())
    return heads, neurons


def test_structured_masks_drop_the_heads_and_neurons_of_the_lowest_mean_score(model):
    scores = random_scores(model)
    ranked, keepers = [], set()
    for i in range(2):
        for kind, means in zip(("head", "neuron"), literal_scores(scores, i), strict=True):
            size = 16 * 12 if kind == "head" else 24
            ranked += [(mean, i, kind, j, size) for j, mean in enumerate(means)]
            keepers.add((i, kind, max(range(len(means)), key=means.__getitem__)))
    ranked = sorted(r for r in ranked if (r[1], r[2], r[3]) not in keepers)
    total = sum(s.numel() for s in scores.values())
    for sparsity in (0.0, 0.2, 0.5, 0.7):
        masks = select_structures(scores, structures(model), sparsity)
        # Every number of dropped structures, and the one nearest to the target.
        reached = [sum(r[4] for r in ranked[:n]) / total for n in range(len(ranked) + 1)]
        best = min(range(len(reached)), key=lambda n: abs(reached[n] - sparsity))
        assert sparsity_of(masks) == pytest.approx(reached[best])
        dropped = {r[1:4] for r in ranked[:best]}
        for i in range(2):
            h = f"transformer.h.{i}."
            heads = [(i, "head", j) in dropped for j in range(3)]
            neurons = [(i, "neuron", j) in dropped for j in range(10)]
            columns = torch.tensor(heads).repeat_interleave(4)
            assert torch.equal(~masks[h + "attn.c_attn.weight"], columns.repeat(3).expand(12, 36))
            assert torch.equal(~masks[h + "attn.c_proj.weight"], columns[:, None].expand(12, 12))
            assert torch.equal(~masks[h + "mlp.c_fc.weight"], torch.tensor(neurons).expand(12, 10))
            assert torch.equal(~masks[h + "mlp.c_proj.weight"], torch.tensor(neurons)[:, None].expand(10, 12))


def test_one_head_and_one_neuron_of_each_block_are_kept_at_any_sparsity(model):
    masks = select_structures(random_scores(model), structures(model), 1.0)
    for i in range(2):
        h = f"transformer.h.{i}."
        assert masks[h + "attn.c_proj.weight"].sum() == 4 * 12
        assert masks[h + "mlp.c_proj.weight"].sum() == 12


def test_equal_scores_are_dropped_in_the_order_of_the_structures(model):
    scores = {name: torch.ones_like(s) for name, s in random_scores(model).items()}
    masks = select_structures(scores, structures(model), 16 * 12 / sum(s.numel() for s in scores.values()))
    assert not masks["transformer.h.0.attn.c_proj.weight"][4:8].any(), "the first stays as the best, the second falls"
    assert sum(int((~mask).sum()) for mask in masks.values()) == 16 * 12


def test_an_impossible_sparsity_and_another_architecture_are_refused(model):
    with pytest.raises(ValueError, match="from 0 to 1"):
        select_structures(random_scores(model), structures(model), 1.5)
    model.config.model_type = "llama"
    with pytest.raises(ModelError, match="must be a GPT-2 to remove heads and neurons"):
        structures(model)


# --- compaction ---


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 1.0])
def test_a_compacted_model_gives_the_masked_models_logits_with_fewer_weights(model, sparsity, tmp_path):
    masks = select_structures(random_scores(model), structures(model), sparsity)
    apply_masks(model, masks)
    small = compact(model)
    assert isinstance(small, SparseGPT2ForSequenceClassification)
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    shapes = [(tuple(b.attn.c_attn.weight.shape), tuple(b.mlp.c_fc.weight.shape)) for b in small.transformer.h]
    for i, (attention, mlp) in enumerate(shapes):
        h = f"transformer.h.{i}."
        assert attention == (int(masks[h + "attn.c_attn.weight"][0].sum()), 12)
        assert mlp == (int(masks[h + "mlp.c_fc.weight"][0].sum()), 12)
    counts, dense = count_actual_params(small), count_actual_params(model)
    assert counts["total"] == dense["total"]
    assert counts["prunable"] == dense["prunable"]
    assert counts["encoder_sparsity"] == pytest.approx(sparsity_of(masks)) == pytest.approx(dense["encoder_sparsity"])
    biases = sum(4 * 3 - a[0] // 3 for a, _ in shapes) * 3 + sum(10 - m[0] for _, m in shapes)
    assert counts["active"] == dense["active"] - biases
    loaded = load_sparse(save_sparse(small, tmp_path))
    assert torch.equal(logits(loaded), logits(small))


def test_equally_many_neurons_in_every_block_make_a_plain_transformers_model(model, tmp_path):
    with torch.no_grad():
        for block, gone in zip(model.transformer.h, ([1, 4, 7], [0, 2, 9]), strict=True):
            # Three ways of doing nothing: nothing leads there, nothing leads away, neither.
            block.mlp.c_fc.weight[:, gone[:2]] = 0
            block.mlp.c_proj.weight[gone[1:]] = 0
    before = logits(model)
    small = compact(model)
    assert type(small) is GPT2ForSequenceClassification
    assert small.config.n_inner == 7
    assert model.config.n_inner == 10, "the model itself is left alone"
    torch.testing.assert_close(logits(small), before, rtol=1e-4, atol=1e-5)
    small.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(GPT2ForSequenceClassification.from_pretrained(tmp_path)), before)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == 2 * 3 * 25


def test_a_silent_head_leaves_its_constant_behind(model):
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 24 + 4 : 24 + 8] = 0
    small = compact(model)
    assert small.config.kept_heads == [2, 3]
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    without = model.transformer.h[0].attn.c_attn.bias
    with torch.no_grad():
        without[24 + 4 : 24 + 8] = 0
    assert (logits(model) - logits(small)).abs().max() > 1e-3, "the constant matters in this model"


def test_a_block_without_any_weight_left_still_runs(model):
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight.zero_()
    small = compact(model)
    assert small.config.kept_heads == [1, 1]
    assert small.config.kept_neurons == [1, 1]
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
