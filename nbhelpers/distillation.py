"""The loss with which a student learns from a teacher's logits."""

import torch
from torch import nn


def distillation_loss(teacher_logits: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, alpha: float, t: float):
    """Return alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher_T || student_T), all logits [batch, classes].

    T^2 keeps the gradients of both terms on one scale as T grows (Hinton et al., 2015).
    """
    hard = nn.functional.cross_entropy(logits, labels)
    soft = nn.functional.kl_div(
        nn.functional.log_softmax(logits / t, -1),
        nn.functional.log_softmax(teacher_logits / t, -1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * hard + (1 - alpha) * t**2 * soft
