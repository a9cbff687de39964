"""The loss with which a model learns from a teacher: from its logits at every token, and from its hidden states."""

import torch
from torch import nn

from nbhelpers.training.loop import head_logits, hidden_states, token_weights


def distillation_loss(
    teacher_logits: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    t: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher_T || student_T), all logits [rows, classes].

    T^2 keeps the gradients of both terms on one scale as T grows (Hinton et al., 2015). A row of the label -100
    (``data.UNLABELLED``) has the second term only. weights: what each row counts [rows], instead of the mean over all
    rows.
    """
    hard = nn.functional.cross_entropy(logits, labels, reduction="none")  # 0 for -100, its ignore_index
    soft = nn.functional.kl_div(
        nn.functional.log_softmax(logits / t, -1),
        nn.functional.log_softmax(teacher_logits / t, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    losses = alpha * hard + (1 - alpha) * t**2 * soft
    return losses.mean() if weights is None else (losses * weights).sum()


def hidden_loss(
    states: tuple[torch.Tensor, ...], teacher_states: tuple[torch.Tensor, ...], real: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of hidden states over the teacher's mean square, the mean over layers.

    states: [reviews, length, width] per layer; real: bool [reviews, length], False for padding. Dividing makes layers
    of any scale count alike (SquareHead, Kurtic et al., 2023).
    """
    ratios = [
        (state - taught)[real].square().sum() / taught[real].square().sum()
        for state, taught in zip(states, teacher_states, strict=True)
    ]
    return torch.stack(ratios).mean()


def taught_loss(
    model: nn.Module, batch: dict, alpha: float, t: float, prefix_share: float, teacher: nn.Module | None = None
) -> torch.Tensor:
    """Return the ``distillation_loss`` at every token of a batch's reviews, weighted by ``token_weights``.

    batch: with ``teacher_logits`` [reviews, length, classes]; with alpha = 1 it is ``classification_loss``. teacher: a
    model of as many blocks, in eval mode, whose hidden states count as well (``hidden_loss``).
    """
    states = hidden_states(model, batch)
    logits = head_logits(model, states[-1])
    weights = token_weights(batch["lengths"], logits.shape[1], prefix_share) / len(logits)
    labels = batch["labels"][:, None].expand(weights.shape)
    rows = (tensor.flatten(0, 1) for tensor in (batch["teacher_logits"].float(), logits, labels))
    loss = distillation_loss(*rows, alpha, t, weights.flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        taught = hidden_states(teacher, batch)
    real = torch.arange(logits.shape[1], device=logits.device) < batch["lengths"][:, None]
    return loss + hidden_loss(states[1:], taught[1:], real)
