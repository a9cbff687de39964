"""The faster forms for bfloat16: against softmax and GELU by hand in float64, and that they leave a model as it was."""

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
from nbhelpers.training import Recipe, mixed_precision, precision, train
from nbhelpers.training.precision import NAME, BitDropout, attend, attention_as_products, exact_gelu, faster_in_bfloat16


def test_a_precision_that_was_asked_for_is_taken_and_auto_decides_once_per_process():
    assert [mixed_precision(setting) for setting in ("no", "bf16")] == ["no", "bf16"]
    # Which of the two depends on the processor.
    assert mixed_precision() in ("no", "bf16")
    assert mixed_precision() == mixed_precision()


# --- attention ---


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


# bfloat16 keeps 8 bits, so each of the few roundings on the way (scores, weights, their product) is off by at most
# 2^-9 = 0.2 % of a value of up to 4, on any processor: 0.02 leaves room for several, in gradients for twice as many.
FORWARD, BACKWARD = {"rtol": 0.02, "atol": 0.02}, {"rtol": 0.05, "atol": 0.05}


@pytest.mark.parametrize(("scaling", "factor"), [(None, 0.5), (0.2, 0.2)])
def test_products_give_causal_attention_and_its_gradients(scaling, factor):
    mine, reference = heads(), heads()
    mixed, weights = attend(torch.nn.Module(), *mine, None, scaling=scaling)
    expected = by_hand(*reference, factor)
    assert weights is None and mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, **FORWARD)
    direction = torch.randn_like(expected)
    (mixed * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **BACKWARD)


def test_long_texts_and_masks_go_to_the_fused_attention(monkeypatch):
    q, k, v = (x.detach() for x in heads())
    short = attend(torch.nn.Module(), q, k, v, None)[0]
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: pytest.fail("scores were computed"))
    whole = torch.zeros(2, 1, 7, 7, dtype=torch.bfloat16)  # nothing is hidden, not even later tokens
    mean = attend(torch.nn.Module(), torch.zeros_like(q), k, v, whole)[0]
    torch.testing.assert_close(mean[:, 0].double(), v.double().mean(2), **FORWARD)
    monkeypatch.setattr(precision, "LONGEST", 6)
    torch.testing.assert_close(attend(torch.nn.Module(), q, k, v, None)[0], short, **FORWARD)


def llama():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**shape, initializer_range=0.4)).eval()


@pytest.mark.parametrize("make", [tiny_model, llama])
def test_a_model_computes_the_same_within_the_block_and_is_as_before_after_it(make):
    model = make()
    fused, ids = copy.deepcopy(model), torch.randint(1, 20, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        expected = fused(input_ids=ids).logits
        with pytest.raises(ZeroDivisionError), attention_as_products(model):
            assert model.base_model.config._attn_implementation == NAME
            found = model(input_ids=ids).logits
            raise ZeroDivisionError
    torch.testing.assert_close(found.float(), expected.float(), **BACKWARD)
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == fused.config.to_dict()
    model.set_attn_implementation("eager")
    with attention_as_products(model):
        assert model.config._attn_implementation == "eager", "another attention that was asked for stays"


# --- GELU and dropout ---


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_becomes_exact_within_the_block_only(name):
    model, x = tiny_model(), torch.linspace(-4, 4, 801, dtype=torch.double)
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[name]
    before = [block.mlp.act for block in model.transformer.h]
    with exact_gelu(model):
        exact = [block.mlp.act(x) for block in model.transformer.h]
    expected = torch.from_numpy(x.numpy() * norm.cdf(x.numpy()))
    assert all(torch.allclose(found, expected, atol=1e-12) for found in exact)
    assert [block.mlp.act for block in model.transformer.h] == before
    change = (before[0](x) - expected).abs().max()
    rounding = (F.gelu(x.bfloat16().double()) - F.gelu(x)).abs().max()
    assert 1e-4 < change < 5e-4 < rounding, "as the docstring says"
    other = llama()
    with exact_gelu(other):
        assert not any(isinstance(module, torch.nn.GELU) for module in other.modules()), "SiLU stays"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_by_bits_drops_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    n = 400_001  # not a multiple of four
    x = torch.ones(n, requires_grad=True)
    y = BitDropout(p)(x)
    y.sum().backward()
    dropped, five_sigma = (y == 0).float(), 5 * (p * (1 - p) / n) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=five_sigma)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p))) and torch.equal(x.grad, y.detach())
    # Each of the four that share a drawn number drops at the same rate, and any two of them independently.
    lanes = dropped[:400_000].view(-1, 4)
    torch.testing.assert_close(lanes.mean(0), torch.full((4,), p), rtol=0, atol=2 * five_sigma)
    together = (lanes.t() @ lanes / len(lanes)).fill_diagonal_(p**2)
    torch.testing.assert_close(together, torch.full((4, 4), p**2), rtol=0, atol=2 * five_sigma)
    assert BitDropout(p).eval()(x) is x and BitDropout(0.0)(x) is x


# --- where they are used ---


@pytest.mark.parametrize(
    ("dtype", "training", "gelu", "products"),
    [("bf16", True, True, True), ("bf16", False, True, False), ("no", True, False, False)],
)
def test_the_faster_forms_are_those_of_bfloat16(dtype, training, gelu, products):
    model = tiny_model()
    model.transformer.h[1].mlp.dropout.p = 0.1
    with faster_in_bfloat16(model, dtype, training):
        assert isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU) is gelu
        assert (model.config._attn_implementation == NAME) is products
        assert isinstance(model.transformer.h[1].mlp.dropout, BitDropout) is products
        assert model.transformer.h[1].mlp.dropout.p == 0.1 and not model.transformer.h[1].mlp.dropout.training
    assert not isinstance(model.transformer.h[1].mlp.dropout, BitDropout)


@pytest.mark.usefixtures("alone")
def test_training_and_evaluation_use_them_and_hand_the_model_back(monkeypatch):
    seen, forward = [], GPT2Model.forward

    def watched(self, *args, **kwargs):
        seen.append((self.config._attn_implementation, type(self.h[0].mlp.act)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", watched)
    model, data = tiny_model(), IMDbDataset.__new__(IMDbDataset)
    data.input_ids, data.labels = [[3, 4, 5], [6, 7]] * 4, np.array([0, 1] * 4)

    def validate(model):
        predict_logits(model, data.input_ids, precision="bf16")
        return 0.5

    train(model, data, Recipe(1e-3, 4, precision="bf16"), validate=validate)
    assert set(seen[:2]) == {(NAME, torch.nn.GELU)} and seen[-1] == ("sdpa", torch.nn.GELU)
    predict_logits(model, data.input_ids)
    assert seen[-1] == ("sdpa", type(model.transformer.h[0].mlp.act)) != ("sdpa", torch.nn.GELU)
