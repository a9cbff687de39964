"""What a run computes with: its seeds, reviews, token ids, and the settings that artefacts depend on."""

import functools

import torch
from datasets import DatasetDict

from nbhelpers.data import IMDbDataset, load_reviews, load_transfer, pad
from nbhelpers.models import load_tokenizer
from nbhelpers.profiles import Profile
from nbhelpers.system.files import fingerprint
from nbhelpers.workspace import Run, open_run

DATA_FIELDS = ("data", "data_revision", "train_size", "validation_size", "test_size", "max_tokens", "head_share")
MODEL_FIELDS = ("model", "model_revision", "dropout")
TRAIN_FIELDS = ("weight_decay", "warmup_share", "max_grad_norm", "precision")
FINETUNE_FIELDS = (*TRAIN_FIELDS, "batch_size", "epochs", "learning_rate", "layer_decay", "prefix_share")


def pick(profile: Profile, *fields: str, **extra) -> dict:
    """Return some fields of a profile as the settings of an artefact."""
    return {field: getattr(profile, field) for field in fields} | extra


def runs_of(run: Run) -> list[Run]:
    """Return the runs of all seeds of a profile, from the run's own upwards; reports are written for the first."""
    return [open_run(run.profile, run.seed + i) for i in range(run.profile.seeds)]


@functools.lru_cache(maxsize=8)
def reviews_of(profile: Profile, seed: int):
    """Return ``load_reviews``, and as the split "transfer" ``load_transfer`` if there are any; once per process."""
    reviews = load_reviews(profile, seed)
    transfer = load_transfer(profile, seed) if profile.transfer_size else []
    return DatasetDict(reviews | {"transfer": transfer}) if len(transfer) else reviews


@functools.lru_cache(maxsize=8)
def reviews_fingerprint(run: Run, split: str) -> str:
    """Return a hash of a split's texts and labels: what is computed from it is computed anew when they change."""
    part = reviews_of(run.profile, run.seed)[split]
    return fingerprint([part["text"][:], part["label"][:]])


@functools.lru_cache(maxsize=8)
def dataset(run: Run, split: str) -> IMDbDataset:
    """Return the tokenised reviews of a split of this run, once per process."""
    return IMDbDataset(reviews_of(run.profile, run.seed)[split], load_tokenizer(run.profile), run.profile)


def latency_reviews(run: Run, size: int) -> list[int]:
    """Return the indices of the test reviews that are timed: evenly spaced over the lengths."""
    rows = dataset(run, "test").input_ids
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[int((i + 0.5) * len(rows) / size)] for i in range(size)]


def latency_batch(run: Run, size: int) -> dict[str, torch.Tensor]:
    """Return a batch of ``latency_reviews``, right-padded."""
    rows = dataset(run, "test").input_ids
    return {"input_ids": pad([rows[i] for i in latency_reviews(run, size)], load_tokenizer(run.profile).pad_token_id)}
