"""The fine-tuned model as a teacher, of students and of recoveries."""

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch

from nbhelpers.data import IMDbDataset
from nbhelpers.distillation import taught_loss
from nbhelpers.evaluation import predict_token_logits
from nbhelpers.study.artefacts import on_device
from nbhelpers.study.inputs import dataset, pick, reviews_fingerprint, reviews_of
from nbhelpers.workspace import Run, save_tensors


def teacher_logits(run: Run, split: str = "train") -> tuple[torch.Tensor, ...]:
    """Artefact ``teacher_logits_<split>``: the fine-tuned model's logits at every token of its reviews, in eval mode.

    Returns float16 [tokens, classes] per review.
    """
    name, rows = f"teacher_logits_{split}", dataset(run, split).input_ids

    def build(target):
        logits = predict_token_logits(on_device(run, "fine_tuned"), rows, **run.inference_options())
        save_tensors(target.folder, {"logits": logits})

    reviews = reviews_fingerprint(run, split)
    settings = pick(run.profile, "max_tokens", "head_share", "precision", reviews=reviews)
    run.cached(name, settings, build, ("fine_tuned",))
    return run.load_tensors(name)["logits"].split([len(row) for row in rows])


def taught_splits(run: Run) -> tuple[str, ...]:
    """Return the splits that students learn from: "train", and "transfer" where there is one."""
    return tuple(split for split in ("train", "transfer") if split in reviews_of(run.profile, run.seed))


def taught_dataset(run: Run, splits: tuple[str, ...]) -> IMDbDataset:
    """Return the reviews of some splits as one data set, with the fine-tuned model's logits at every token."""
    parts = [dataset(run, split) for split in splits]
    data = copy.copy(parts[0])
    data.input_ids = [row for part in parts for row in part.input_ids]
    data.labels = np.concatenate([part.labels for part in parts])
    data.teacher_logits = [logits for split in splits for logits in teacher_logits(run, split)]
    return data


def teacher_data_and_loss(
    run: Run, alpha: float, temperature: float, hidden: bool = False, splits: tuple[str, ...] = ("train",)
) -> tuple[IMDbDataset, Callable]:
    """Return ``taught_dataset`` of some splits, and the loss that uses its logits.

    hidden: use the fine-tuned model's hidden states as well, which it computes in each step.
    """
    data = taught_dataset(run, splits)
    scales = {"alpha": alpha, "t": temperature, "prefix_share": run.profile.prefix_share}
    teacher = on_device(run, "fine_tuned").eval() if hidden else None
    return data, functools.partial(taught_loss, **scales, teacher=teacher)
