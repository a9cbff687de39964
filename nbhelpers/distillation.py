"""The loss with which a student learns from a teacher's logits."""

import torch
from torch import nn

from nbhelpers.training.loop import token_logits, token_weights


def distillation_loss(
    teacher_logits: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    t: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher_T || student_T), all logits [rows, classes].

    T^2 keeps the gradients of both terms on one scale as T grows (Hinton et al., 2015). weights: what each row counts
    [rows], instead of the mean over all rows.
    """
    hard = nn.functional.cross_entropy(logits, labels, reduction="none")
    soft = nn.functional.kl_div(
        nn.functional.log_softmax(logits / t, -1),
        nn.functional.log_softmax(teacher_logits / t, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    losses = alpha * hard + (1 - alpha) * t**2 * soft
    return losses.mean() if weights is None else (losses * weights).sum()


def taught_loss(model: nn.Module, batch: dict, alpha: float, t: float, prefix_share: float) -> torch.Tensor:
    """Return the ``distillation_loss`` at every token of a batch's reviews, weighted by ``token_weights``.

    batch: with ``teacher_logits`` [reviews, length, classes]. With alpha = 1 it is ``classification_loss``.
    """
    logits = token_logits(model, batch)
    weights = token_weights(batch["lengths"], logits.shape[1], prefix_share) / len(logits)
    labels = batch["labels"][:, None].expand(weights.shape)
    rows = (tensor.flatten(0, 1) for tensor in (batch["teacher_logits"].float(), logits, labels))
    return distillation_loss(*rows, alpha, t, weights.flatten())
