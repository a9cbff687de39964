"""Rounding in the forward pass, against the rounding of files and against gradients by hand."""

import copy

import torch

from nbhelpers.models import prunable_weights
from nbhelpers.sparse import convert_to_sparse, quantize
from nbhelpers.training.rounding import RoundedModel, rounded


def test_a_rounded_matrix_has_whole_multiples_of_its_scales_and_the_gradient_of_the_matrix():
    weight = torch.tensor([[1.27, -0.004, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    found = rounded(weight, 1)
    torch.testing.assert_close(found, torch.tensor([[1.27, 0.0, 0.5], [0.0, 0.0, 0.0]]))
    down = rounded(weight, 0)
    torch.testing.assert_close(down[0], weight[0].detach())  # each column's largest value is a whole multiple
    torch.testing.assert_close(down[1], torch.zeros(3))
    factors = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (found * factors).sum().backward()
    assert torch.equal(weight.grad, factors)


def test_a_rounded_model_computes_what_its_file_in_eight_bits_will(toy_model):
    ids = torch.tensor([[3, 5, 7, 9]])
    before = copy.deepcopy(toy_model.state_dict())
    found = RoundedModel(toy_model)(input_ids=ids).logits
    stored = quantize(convert_to_sparse(toy_model, "dense"), "dense")
    # The same weights, computed in another order of sums.
    torch.testing.assert_close(found, stored(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, toy_model(input_ids=ids).logits, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in toy_model.state_dict().items())


def test_training_a_rounded_model_moves_the_weights_behind_it(toy_model):
    model = toy_model.train()
    RoundedModel(model)(input_ids=torch.tensor([[3, 5, 7, 9]])).logits.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in prunable_weights(model).values())
