"""Attention as products: against softmax by hand in float64, and that training leaves a model as it was."""

import copy

import pytest
import torch
from conftest import tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers.attention import NAME, attend, attention_as_products


def heads(batch=2, count=3, tokens=7, features=4):
    torch.manual_seed(0)
    return [torch.randn(batch, count, tokens, features).bfloat16().requires_grad_() for _ in "qkv"]


def by_hand(q, k, v, scaling: float):
    """Token by token, in float64: [batch, tokens, heads, features]."""
    q, k, v = (x.double() for x in (q, k, v))
    rows = []
    for t in range(q.shape[2]):
        scores = torch.einsum("bhf,bhsf->bhs", q[:, :, t], k[:, :, : t + 1]) * scaling
        rows.append(torch.einsum("bhs,bhsf->bhf", scores.softmax(-1), v[:, :, : t + 1]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("scaling", "factor"), [(None, 0.5), (0.2, 0.2)])
def test_products_give_attention_and_its_gradients(scaling, factor):
    mine, reference = heads(), heads()
    mixed, weights = attend(torch.nn.Module(), *mine, None, scaling=scaling)
    expected = by_hand(*reference, factor)
    assert weights is None and mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, rtol=0.02, atol=0.02)
    direction = torch.randn_like(expected)
    (mixed * direction).sum().backward()
    (expected * direction).sum().backward()
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.05)


def test_no_token_sees_a_later_one():
    q, k, v = heads()
    before = attend(torch.nn.Module(), q, k, v, None)[0]
    with torch.no_grad():
        k[:, :, 5:] += 3
        v[:, :, 5:] -= 3
    after = attend(torch.nn.Module(), q, k, v, None)[0]
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_a_mask_and_float32_go_to_the_fused_attention():
    q, k, v = (x.detach() for x in heads())
    whole = torch.zeros(2, 1, 7, 7, dtype=torch.bfloat16)  # nothing is hidden, not even what comes later
    mean = attend(torch.nn.Module(), torch.zeros_like(q), k, v, whole)[0]
    torch.testing.assert_close(mean[:, 0].double(), v.double().mean(2), rtol=0.02, atol=0.02)
    exact = attend(torch.nn.Module(), q.float(), k.float(), v.float(), None, scaling=0.3)[0]
    torch.testing.assert_close(exact, by_hand(q, k, v, 0.3).float(), rtol=1e-5, atol=1e-5)


def llama():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**shape, initializer_range=0.4)).eval()


@pytest.mark.parametrize("make", [tiny_model, llama])
def test_a_model_computes_the_same_within_the_block_and_is_as_before_after_it(make):
    model = make()
    fused, ids = copy.deepcopy(model), torch.randint(1, 20, (3, 11))
    with torch.autocast("cpu", torch.bfloat16):
        expected = fused(input_ids=ids).logits
        with attention_as_products(model):
            assert model.base_model.config._attn_implementation == NAME
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.03)
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == fused.config.to_dict()


def test_a_model_that_failed_in_the_block_is_as_before():
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), attention_as_products(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_that_was_asked_for_stays():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with attention_as_products(model):
        assert model.config._attn_implementation == "eager"
