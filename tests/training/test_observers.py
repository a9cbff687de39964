"""What the observers and a calibration pass gather, against gradients taken one review at a time in float64."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers.masks import unpack
from nbhelpers.models import prunable_weights
from nbhelpers.selection import select
from nbhelpers.training.observers import FirstOrderMovement, FlaggedSets, GradientMagnitude, RunningGradient, calibrate

REVIEWS, LABELS = [[3, 4, 5], [6, 7], [8, 9, 3, 4, 5, 2], [1]], [0, 1, 1, 0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16, "initializer_range": 0.4}
    return GPT2ForSequenceClassification(GPT2Config(**shape, pad_token_id=0, eos_token_id=0, bos_token_id=0)).eval()


def test_a_calibration_pass_averages_sizes_and_squares_of_single_gradients_and_leaves_the_model_as_it_was(model):
    reference = copy.deepcopy(model).double()
    found = calibrate(model.train(), REVIEWS, LABELS)  # with dropout, were the pass not in eval mode
    sums = {name: [0, 0] for name in prunable_weights(model)}
    for ids, label in zip(REVIEWS, LABELS, strict=True):
        reference.zero_grad()
        loss = -reference(torch.tensor([ids])).logits.log_softmax(-1)[0, label]
        loss.backward()
        for name, weight in prunable_weights(reference).items():
            sums[name][0] += weight.grad.abs() / 4
            sums[name][1] += weight.grad**2 / 4
    for name, (size, square) in sums.items():
        # float32 against float64: of a tensor's largest value, so that values near zero do not decide.
        for expected, key in ((size, "calibration_gradient"), (square, "squared_gradient")):
            assert (found[key][name].double() - expected).abs().max() < 1e-4 * expected.max(), (key, name)
    assert set(found) == {"calibration_gradient", "squared_gradient", "input_norm"}
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="at least one review"):
        calibrate(model, [], [])


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
    torch.testing.assert_close(found["hessian"][name].double(), x.t() @ x, rtol=1e-4, atol=1e-4)
    assert found["input_norm"]["transformer.h.1.mlp.c_proj.weight"].shape == (32, 1)


def take_step(model, i, *observers):
    """Compute the gradient of one review, call the observers, and make a step of plain gradient descent."""
    model.zero_grad()
    model(torch.tensor([REVIEWS[i % 4]])).logits[0, LABELS[i % 4]].backward()
    for observer in observers:
        observer.after_backward()
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight -= 0.1 * weight.grad


def test_first_order_movement_is_minus_weight_times_gradient_averaged_over_steps(model):
    observer, twin = FirstOrderMovement(model), copy.deepcopy(model).double()
    expected = {name: 0 for name in prunable_weights(model)}
    for i in range(3):
        take_step(model, i, observer)
        before = {name: weight.detach().clone() for name, weight in prunable_weights(twin).items()}
        take_step(twin, i)
        expected = {n: expected[n] - before[n] * w.grad / 3 for n, w in prunable_weights(twin).items()}
    for name, value in observer.mean().items():
        assert (value.double() - expected[name]).abs().max() < 1e-4 * expected[name].abs().max(), name
    assert min(value.min() for value in observer.mean().values()) < 0


def test_flagged_sets_are_those_of_the_weights_and_gradients_after_0_1_2_4_steps_and_at_the_end(model):
    gradients, start = GradientMagnitude(model), copy.deepcopy(prunable_weights(model))
    flagged, magnitude = FlaggedSets(gradients, 0.5), {}
    for i in range(5):
        magnitude[i] = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
        take_step(model, i, flagged, gradients)
    found, weights = flagged.tensors(), prunable_weights(model)
    # Movement and gradient are zero everywhere before the first step.
    every = {f"{step}/{c}" for step in (0, 1, 2, 4, 5) for c in ("magnitude", "movement", "gradient")}
    assert set(found) == every - {"0/movement", "0/gradient"}
    final = {"magnitude": {n: w.detach().abs() for n, w in weights.items()}, "gradient": gradients.mean()}
    final["movement"] = {n: (w - start[n]).detach().abs() for n, w in weights.items()}
    expected = {f"{i}/magnitude": magnitude[i] for i in (0, 1, 2, 4)} | {f"5/{c}": s for c, s in final.items()}
    for key, scores in expected.items():
        masks, kept = select(scores, 0.5), unpack(found[key], weights)
        assert all(torch.equal(kept[name], masks[name]) for name in masks), key


def test_observers_that_have_seen_nothing_or_come_in_the_wrong_order_are_refused(model):
    gradients = GradientMagnitude(model)
    flagged = FlaggedSets(gradients, 0.5)
    with pytest.raises(RuntimeError, match="no gradient was observed yet"):
        gradients.mean()
    with pytest.raises(RuntimeError, match="must come before its GradientMagnitude"):
        take_step(model, 0, gradients, flagged)


def test_a_running_mean_of_gradients_starts_with_the_first_step_and_forgets(model):
    weights, expected = prunable_weights(model), None
    observer = RunningGradient(model, memory=0.75)
    assert observer.gradients == {}, "before the first step there are none"
    for step in range(4):
        if step in (0, 2):
            # A checkpoint continues from the same place.
            state = {name: tensor.clone() for name, tensor in observer.state().items()}
            observer = RunningGradient(model, memory=0.75)
            observer.load_state(state)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        observer.after_backward()
        now = {name: weight.grad.double().abs() for name, weight in weights.items()}
        expected = now if expected is None else {n: 0.75 * e + 0.25 * now[n] for n, e in expected.items()}
        assert observer.gradients.keys() == weights.keys()
        for name, found in observer.gradients.items():
            torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-7)
