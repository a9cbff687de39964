"""The distillation loss against its formula in NumPy."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from scipy.special import log_softmax

from nbhelpers.data import pad
from nbhelpers.distillation import distillation_loss, hidden_loss, taught_loss
from nbhelpers.training import classification_loss
from nbhelpers.training.loop import micro_batch


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_the_distillation_loss_is_its_formula(alpha, t):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 6, 3)) * 2
    labels = np.array([0, 1, 2, 0, 1, 2])
    p, q = log_softmax(teacher / t, axis=1), log_softmax(student / t, axis=1)
    cross_entropy = -np.mean(log_softmax(student, axis=1)[np.arange(6), labels])
    kl = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
    expected = alpha * cross_entropy + (1 - alpha) * t**2 * kl
    found = distillation_loss(*map(torch.from_numpy, (teacher, student, labels)), alpha, t)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_soft_gradient_keeps_its_scale_as_the_temperature_grows():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 50, 2, dtype=torch.float64, generator=generator) * 0.3
    labels, norms = torch.zeros(50, dtype=torch.long), []
    for t in (1.0, 4.0, 16.0, 64.0):
        logits = student.clone().requires_grad_()
        distillation_loss(teacher, logits, labels, 0.0, t).backward()
        expected = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1)) / 50
        torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-14)
        norms.append(logits.grad.norm().item())
    # Small logits: softmax is near linear already at T = 1. Without T^2 the norms would fall to 1/4096.
    assert norms == pytest.approx([norms[-1]] * 4, rel=0.1)


@pytest.mark.parametrize("prefix_share", [0.0, 0.5])
def test_every_token_is_taught_by_the_teachers_logits_of_that_token(toy_model, prefix_share):
    """Against a review at a time, cut after every token."""
    reviews, labels, alpha, t = [[3, 5, 7, 9], [11, 2]], [1, 0], 0.3, 2.0
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(len(review), 2, generator=generator) for review in reviews]
    expected = 0.0
    for review, label, said in zip(reviews, labels, teacher, strict=True):
        n, truth = len(review), torch.tensor([label])
        gains = np.arange(1, n + 1) / np.arange(1, n + 1).sum()
        for k in range(1, n + 1):
            with torch.no_grad():
                student = toy_model(torch.tensor([review[:k]])).logits
            loss = distillation_loss(said[k - 1 : k], student, truth, alpha, t).item()
            expected += (prefix_share * gains[k - 1] + (1 - prefix_share) * (k == n)) * loss / 2
    batch = {"input_ids": pad(reviews, 0), "labels": torch.tensor(labels), "lengths": torch.tensor([4, 2])}
    batch["teacher_logits"] = torch.nn.utils.rnn.pad_sequence(teacher, batch_first=True)
    assert taught_loss(toy_model, batch, alpha, t, prefix_share).item() == pytest.approx(expected, rel=1e-5)
    labels_alone = taught_loss(toy_model, batch, 1.0, t, prefix_share)
    torch.testing.assert_close(labels_alone, classification_loss(toy_model, batch, prefix_share))


def test_the_hidden_loss_is_the_squared_error_over_the_teachers_square_of_each_layer():
    rng = np.random.default_rng(0)
    mine, taught = rng.normal(size=(2, 3, 2, 4, 5)) * np.array([1, 10, 100])[:, None, None, None]
    real = np.array([[True, True, True, True], [True, True, False, False]])
    ratios = [((m[real] - t[real]) ** 2).sum() / (t[real] ** 2).sum() for m, t in zip(mine, taught, strict=True)]
    found = hidden_loss(tuple(torch.from_numpy(mine)), tuple(torch.from_numpy(taught)), torch.from_numpy(real))
    assert found.item() == pytest.approx(np.mean(ratios), rel=1e-12)


def test_a_teacher_adds_the_loss_of_the_blocks_hidden_states_without_padding(toy_model):
    reviews, teacher = [[3, 5, 7, 9], [11, 2]], tiny_model(seed=1)
    batch = {"input_ids": pad(reviews, 0), "labels": torch.tensor([1, 0]), "lengths": torch.tensor([4, 2])}
    batch["teacher_logits"] = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    # A review at a time, so that nothing is padded; without the embeddings.
    with torch.no_grad():
        mine, taught = (
            [
                np.concatenate([layer[0].numpy() for layer in layers])
                for layers in zip(
                    *(m(torch.tensor([r]), output_hidden_states=True).hidden_states[1:] for r in reviews), strict=True
                )
            ]
            for m in (toy_model, teacher)
        )
    expected = np.mean([((m - t) ** 2).sum() / (t**2).sum() for m, t in zip(mine, taught, strict=True)])
    losses = [taught_loss(toy_model, batch, 0.3, 2.0, 0.5, teacher=one) for one in (teacher, None)]
    assert (losses[0] - losses[1]).item() == pytest.approx(expected, rel=1e-4)
    losses[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_micro_batch_cuts_the_teachers_logits_with_its_reviews():
    batch = {"input_ids": torch.ones(3, 5), "lengths": torch.tensor([5, 2, 3]), "labels": torch.zeros(3)}
    batch["teacher_logits"] = torch.rand(3, 5, 2)
    micro, _ = micro_batch(batch, 1, 2)
    assert micro["input_ids"].shape == (1, 2)
    assert torch.equal(micro["teacher_logits"], batch["teacher_logits"][1:2, :2])
