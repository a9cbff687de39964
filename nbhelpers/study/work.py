"""What the heavy computations of a run take: tokens that are trained on and tokens that are judged, and their time."""

import functools
from dataclasses import dataclass

import numpy as np

from nbhelpers.models import base_config, create_model, load_tokenizer
from nbhelpers.profiles import Profile
from nbhelpers.study.inputs import reviews_of
from nbhelpers.training import distributed, recipe_for
from nbhelpers.training.timing import timed, training_step
from nbhelpers.workspace import Run

CHARACTERS = 4.4  # per token, of English reviews and a vocabulary of 8,192


@dataclass(frozen=True)
class Rates:
    """How many tokens a second one process trains on, and judges, with all blocks of a run's model."""

    trained: float
    judged: float


@dataclass(frozen=True)
class Work:
    """Tokens to train on and to judge, counted as if they went through all blocks of the model."""

    trained: float = 0.0
    judged: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.trained + other.trained, self.judged + other.judged)

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.trained, times * self.judged)

    def seconds(self, rates: Rates) -> float:
        """Return how long one process takes."""
        return self.trained / rates.trained + self.judged / rates.judged


@functools.lru_cache(maxsize=8)
def tokens_in(profile: Profile, seed: int, split: str) -> float:
    """Return how many tokens the reviews of a split have, estimated from their characters; 0 for no such split."""
    reviews = reviews_of(profile, seed)
    if split not in reviews:
        return 0.0
    lengths = np.array([len(text) for text in reviews[split]["text"]])
    return float(np.minimum(lengths / CHARACTERS, profile.max_tokens).sum())


class Amounts:
    """What the steps of a run take: ``train`` a number of optimizer steps, ``judge`` the reviews of a split."""

    def __init__(self, run: Run):
        profile, seed = run.profile, run.seed
        reviews = reviews_of(profile, seed)
        self.tokens = {split: tokens_in(profile, seed, split) for split in reviews}
        self.review = self.tokens["train"] / len(reviews["train"])
        self.blocks = base_config(profile, load_tokenizer(profile)).num_hidden_layers

    def share(self, layers: int) -> float:
        """Return what a model of fewer blocks takes; the embeddings are like a quarter of a block."""
        return (layers + 0.25) / (self.blocks + 0.25) if layers else 1.0

    def train(self, steps: int, batch_size: int, layers: int = 0) -> Work:
        """Return the work of so many optimizer steps, on all blocks or on ``layers``."""
        return Work(trained=steps * batch_size * self.review * self.share(layers))

    def judge(self, *splits: str, layers: int = 0) -> Work:
        """Return the work of judging the reviews of some splits, with all blocks or with ``layers``."""
        return Work(judged=sum(self.tokens.get(split, 0.0) for split in splits) * self.share(layers))


def measure_rates(run: Run, seconds: float = 0.5) -> Rates:
    """Return at which rates this process trains and judges the run's model, on reviews of a typical length."""
    model = create_model(run.profile, run.seed).to(distributed.device())
    recipe, length = recipe_for(run.profile, "finetune"), max(1, round(Amounts(run).review))
    trained = recipe.batch_size * length / timed(seconds, training_step(model, recipe, length))
    rows = [[model.config.pad_token_id] * length] * run.profile.eval_batch_size
    return Rates(trained, len(rows) * length / timed(seconds, lambda: run.judge(model, rows)))
