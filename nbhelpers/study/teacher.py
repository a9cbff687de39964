"""The fine-tuned model as a teacher, of students and of recoveries."""

import copy
import functools
from collections.abc import Callable

import torch

from nbhelpers.data import IMDbDataset
from nbhelpers.distillation import taught_loss
from nbhelpers.evaluation import predict_token_logits
from nbhelpers.study.artefacts import on_device
from nbhelpers.study.inputs import dataset, pick, reviews_fingerprint
from nbhelpers.workspace import Run, save_tensors


def teacher_logits(run: Run) -> tuple[torch.Tensor, ...]:
    """Artefact ``teacher_logits``: the fine-tuned model's logits at every token of the training reviews, in eval mode.

    Returns float16 [tokens, classes] per review.
    """
    rows = dataset(run, "train").input_ids

    def build(target):
        logits = predict_token_logits(on_device(run, "fine_tuned"), rows, **run.inference_options())
        save_tensors(target.folder, {"logits": logits})

    reviews = reviews_fingerprint(run, "train")
    settings = pick(run.profile, "max_tokens", "head_share", "precision", reviews=reviews)
    run.cached("teacher_logits", settings, build, ("fine_tuned",))
    return run.load_tensors("teacher_logits")["logits"].split([len(row) for row in rows])


def teacher_data_and_loss(
    run: Run, alpha: float, temperature: float, hidden: bool = False
) -> tuple[IMDbDataset, Callable]:
    """Return the training reviews with the fine-tuned model's logits at every token, and the loss that uses them.

    hidden: use the fine-tuned model's hidden states as well, which it computes in each step.
    """
    data = copy.copy(dataset(run, "train"))
    data.teacher_logits = teacher_logits(run)
    scales = {"alpha": alpha, "t": temperature, "prefix_share": run.profile.prefix_share}
    teacher = on_device(run, "fine_tuned").eval() if hidden else None
    return data, functools.partial(taught_loss, **scales, teacher=teacher)
