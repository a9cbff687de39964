"""The ways of bfloat16: against softmax and GELU by hand in float64, and that they leave a model as it was."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from scipy.stats import norm
from transformers import GPT2Model, LlamaConfig, LlamaForSequenceClassification
from transformers.activations import ACT2FN

from nbhelpers.data import IMDbDataset
from nbhelpers.evaluation import predict_logits
from nbhelpers.training import Recipe, train
from nbhelpers.training.precision import NAME, BitDropout, attend, attention_as_products, exact_gelu, faster_in_bfloat16


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


def test_long_texts_go_to_the_fused_attention(monkeypatch):
    q, k, v = (x.detach() for x in heads())
    short = attend(torch.nn.Module(), q, k, v, None)[0]
    monkeypatch.setattr(bfloat16, "LONGEST", 6)
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: pytest.fail("scores were computed"))
    torch.testing.assert_close(attend(torch.nn.Module(), q, k, v, None)[0], short, rtol=0.02, atol=0.02)


def test_no_token_sees_a_later_one():
    q, k, v = heads()
    before = attend(torch.nn.Module(), q, k, v, None)[0]
    with torch.no_grad():
        k[:, :, 5:] += 3
        v[:, :, 5:] -= 3
    after = attend(torch.nn.Module(), q, k, v, None)[0]
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_a_mask_is_heeded():
    q, k, v = (x.detach() for x in heads())
    whole = torch.zeros(2, 1, 7, 7, dtype=torch.bfloat16)  # nothing is hidden, not even what comes later
    mean = attend(torch.nn.Module(), torch.zeros_like(q), k, v, whole)[0]
    torch.testing.assert_close(mean[:, 0].double(), v.double().mean(2), rtol=0.02, atol=0.02)


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


# --- GELU ---


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_becomes_exact_within_the_block_only(name):
    model, x = tiny_model(), torch.linspace(-4, 4, 801, dtype=torch.double)
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[name]
    before = [block.mlp.act for block in model.transformer.h]
    with exact_gelu(model):
        exact = [block.mlp.act(x) for block in model.transformer.h]
    expected = torch.from_numpy(x.numpy() * norm.cdf(x.numpy()))
    assert all(torch.allclose(one, expected, atol=1e-12) for one in exact)
    assert [block.mlp.act for block in model.transformer.h] == before
    change = (before[0](x) - expected).abs().max()
    rounding = (F.gelu(x.bfloat16().double()) - F.gelu(x)).abs().max()
    assert 1e-4 < change < 5e-4 < rounding, "what docstrings say of them"


def test_another_activation_stays():
    model = llama()
    with exact_gelu(model):
        assert not any(isinstance(module, torch.nn.GELU) for module in model.modules())


# --- dropout ---


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_by_bits_drops_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    n = 400_001  # not a multiple of four
    x = torch.ones(n, requires_grad=True)
    y = BitDropout(p)(x)
    y.sum().backward()
    dropped, five = (y == 0).float(), 5 * (p * (1 - p) / n) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=five)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p))) and torch.equal(x.grad, y.detach())
    # Of the four that share a drawn number each drops alike, and two of them independently.
    lanes = dropped[:400_000].view(-1, 4)
    torch.testing.assert_close(lanes.mean(0), torch.full((4,), p), rtol=0, atol=2 * five)
    together = (lanes.t() @ lanes / len(lanes)).fill_diagonal_(p**2)
    torch.testing.assert_close(together, torch.full((4, 4), p**2), rtol=0, atol=2 * five)


def test_dropout_by_bits_does_nothing_outside_training_or_at_rate_0():
    x = torch.randn(7, 3)
    assert BitDropout(0.5).eval()(x) is x
    assert BitDropout(0.0)(x) is x


# --- all, where they belong ---


@pytest.mark.parametrize(
    ("precision", "training", "gelu", "products"),
    [("bf16", True, True, True), ("bf16", False, True, False), ("no", True, False, False), ("no", False, False, False)],
)
def test_the_ways_are_those_of_bfloat16(precision, training, gelu, products):
    model = tiny_model()
    model.transformer.h[1].mlp.dropout.p = 0.1
    with faster_in_bfloat16(model, precision, training):
        assert isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU) is gelu
        assert (model.config._attn_implementation == NAME) is products
        assert isinstance(model.transformer.h[1].mlp.dropout, BitDropout) is products
        assert model.transformer.h[1].mlp.dropout.p == 0.1 and not model.transformer.h[1].mlp.dropout.training
    assert not isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU)
    assert not isinstance(model.transformer.h[1].mlp.dropout, BitDropout)


@pytest.mark.usefixtures("alone")
def test_training_and_judging_use_them_and_give_the_model_back(monkeypatch):
    seen = []
    monkeypatch.setattr(GPT2Model, "forward", spy(GPT2Model.forward, seen))
    model = tiny_model()
    data = IMDbDataset.__new__(IMDbDataset)
    data.input_ids, data.labels = [[3, 4, 5], [6, 7]] * 4, np.array([0, 1] * 4)

    def validate(one):
        predict_logits(one, data.input_ids, precision="bf16")
        return 0.5

    train(model, data, Recipe(1e-3, 4, precision="bf16"), validate=validate)
    assert set(seen[:2]) == {(NAME, torch.nn.GELU)} and seen[-1] == ("sdpa", torch.nn.GELU)
    assert model.config._attn_implementation == "sdpa"
    assert not isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU)
    predict_logits(model, data.input_ids)
    assert seen[-1] == ("sdpa", type(model.transformer.h[0].mlp.act))


def spy(forward, seen: list):
    """A forward pass that notes the attention and the activation of each call."""

    def watched(self, *args, **kwargs):
        seen.append((self.config._attn_implementation, type(self.h[0].mlp.act)))
        return forward(self, *args, **kwargs)

    return watched
