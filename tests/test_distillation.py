"""The distillation loss against its formula in NumPy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from nbhelpers.distillation import distillation_loss


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
