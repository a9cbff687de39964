"""2:4 masks against a literal reading, and the conversion up to the GPU's own product."""

import copy

import pytest
import torch
from sparse_models import masked_llama

from nbhelpers.masks import apply_masks, select_two_of_four, sparsity_of
from nbhelpers.models import prunable_weights, stored_in_out
from nbhelpers.sparse import convert_to_semi_structured, has_two_of_four, semi_structured


def random_scores(model):
    generator = torch.Generator().manual_seed(3)
    # Whole numbers, so that there are ties.
    return {n: torch.randint(5, w.shape, generator=generator).float() for n, w in prunable_weights(model).items()}


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_the_two_lowest_scores_of_every_four_inputs_of_an_output_are_dropped(build, toy_model):
    model = toy_model if build == "gpt2" else masked_llama()
    scores = random_scores(model)
    masks = select_two_of_four(scores, model)
    assert sparsity_of(masks) == 0.5
    for name, score in scores.items():
        turned = stored_in_out(model, name)
        rows, kept = (t.t() if turned else t for t in (score, masks[name]))
        assert masks[name].shape == score.shape and masks[name].is_contiguous()
        for row, mask in zip(rows.tolist(), kept.tolist(), strict=True):
            for i in range(0, len(row), 4):
                lowest = sorted(range(4), key=lambda j, i=i, row=row: (row[i + j], j))[:2]
                assert [not k for k in mask[i : i + 4]] == [j in lowest for j in range(4)]


def test_a_matrix_whose_inputs_are_not_a_multiple_of_four_is_refused(toy_model):
    name, weight = next(iter(prunable_weights(toy_model).items()))
    with pytest.raises(ValueError, match=rf"inputs of {name} must be a multiple of 4 for 2:4 sparsity \(got 6\)"):
        select_two_of_four({name: torch.rand(6, weight.shape[1])}, toy_model)


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_the_converted_model_computes_the_masked_models_logits_up_to_the_gpus_product(build, toy_model, monkeypatch):
    model = toy_model if build == "gpt2" else masked_llama()
    masked = apply_masks(copy.deepcopy(model), select_two_of_four(random_scores(model), model))
    # The GPU's product is replaced by the dense one, on the CPU, in float32.
    seen = []
    monkeypatch.setattr(semi_structured, "has_two_of_four", lambda: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: seen.append(weight) or weight)
    monkeypatch.setattr(type(model), "to", lambda self, *_: self)
    ids = torch.randint(1, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = masked(input_ids=ids).logits
        found = convert_to_semi_structured(masked)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == len(prunable_weights(model)) and all(map(semi_structured.is_two_of_four, seen))


def test_a_model_that_is_not_two_of_four_is_refused(toy_model, monkeypatch):
    monkeypatch.setattr(semi_structured, "has_two_of_four", lambda: True)
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn must be 2:4 sparse"):
        convert_to_semi_structured(toy_model)


@pytest.mark.skipif(has_two_of_four(), reason="this machine has such a GPU")
def test_without_such_a_gpu_the_error_says_so(toy_model):
    with pytest.raises(RuntimeError, match=r"2:4 products need an NVIDIA GPU of compute capability 8\.0 or later"):
        convert_to_semi_structured(toy_model)
