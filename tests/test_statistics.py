"""What a calibration pass and the observers see, against gradients taken one review at a time in float64."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.models import prunable_weights
from nbhelpers.training.observers import FirstOrderMovement, calibrate

REVIEWS, LABELS = [[3, 4, 5], [6, 7], [8, 9, 3, 4, 5, 2], [1]], [0, 1, 1, 0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16, "initializer_range": 0.4}
    return GPT2ForSequenceClassification(GPT2Config(**shape, pad_token_id=0, eos_token_id=0, bos_token_id=0)).eval()


def test_gradients_of_single_reviews_are_averaged_as_their_size_and_their_square(model):
    found = calibrate(model, REVIEWS, LABELS)
    reference = copy.deepcopy(model).double()
    sums = {name: [0, 0] for name in prunable_weights(model)}
    for ids, label in zip(REVIEWS, LABELS, strict=True):
        reference.zero_grad()
        loss = -reference(torch.tensor([ids])).logits.log_softmax(-1)[0, label]
        loss.backward()
        for name, weight in prunable_weights(reference).items():
            sums[name][0] += weight.grad.abs() / 4
            sums[name][1] += weight.grad**2 / 4
    for name, (size, square) in sums.items():
        torch.testing.assert_close(found["calibration_gradient"][name].double(), size, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found["squared_gradient"][name].double(), square, rtol=1e-4, atol=1e-9)
    assert set(found) == {"calibration_gradient", "squared_gradient", "input_norm"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_input_norms_and_hessians_are_those_of_all_tokens_that_enter_a_layer(model):
    found = calibrate(model, REVIEWS, LABELS, hessians=True)
    block, entered = model.transformer.h[0], []
    with torch.no_grad():
        for ids in REVIEWS:
            places = torch.arange(len(ids))
            entered.append(block.ln_1(model.transformer.wte(torch.tensor(ids)) + model.transformer.wpe(places)))
    x, name = torch.cat(entered).double(), "transformer.h.0.attn.c_attn.weight"
    assert found["input_norm"][name].shape == (8, 1)
    torch.testing.assert_close(found["input_norm"][name][:, 0].double(), x.square().sum(0).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["hessian"][name].double(), x.t() @ x, rtol=1e-4, atol=1e-5)
    assert found["input_norm"]["transformer.h.1.mlp.c_proj.weight"].shape == (32, 1)


def test_a_training_model_is_calibrated_without_dropout_and_stays_in_training(model):
    expected = calibrate(model, REVIEWS, LABELS)
    model.train()
    found = calibrate(model, REVIEWS, LABELS)
    assert model.training
    for name, value in expected["squared_gradient"].items():
        assert torch.equal(found["squared_gradient"][name], value)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_reviews_are_refused(model):
    with pytest.raises(ValueError, match="no reviews"):
        calibrate(model, [], [])


def test_first_order_movement_is_minus_weight_times_gradient_averaged_over_steps(model):
    observer, weights = FirstOrderMovement(model), prunable_weights(model)
    expected = {name: torch.zeros_like(w, dtype=torch.double) for name, w in weights.items()}
    for step in range(3):
        model.zero_grad()
        model(torch.tensor([REVIEWS[step]])).logits[0, LABELS[step]].backward()
        for name, weight in weights.items():
            expected[name] -= weight.detach().double() * weight.grad.double() / 3
        observer.after_backward()
        with torch.no_grad():
            for weight in weights.values():
                weight -= 0.1 * weight.grad
    for name, value in observer.mean().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-7)
    assert min(value.min() for value in observer.mean().values()) < 0
