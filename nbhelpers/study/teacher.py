"""The fine-tuned model as a teacher, of students and of recoveries."""

import copy
from collections.abc import Callable

from nbhelpers.data import IMDbDataset
from nbhelpers.distillation import distillation_loss
from nbhelpers.study.inputs import dataset
from nbhelpers.study.predictions import split_logits
from nbhelpers.workspace import Run


def teacher_data_and_loss(run: Run, alpha: float, temperature: float) -> tuple[IMDbDataset, Callable]:
    """Return the training reviews with the fine-tuned model's logits, and the loss that uses them.

    The logits are those of eval mode, computed once for all students.
    """
    data = copy.copy(dataset(run, "train"))
    data.teacher_logits = split_logits(run, "fine_tuned", "train")

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return distillation_loss(batch["teacher_logits"], logits, batch["labels"], alpha, temperature)

    return data, loss
