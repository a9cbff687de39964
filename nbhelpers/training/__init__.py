"""The training loop, its observers, its checkpoints, its precision, and several processes that share a batch."""

from nbhelpers.training.loop import Recipe, classification_loss, recipe_for, train
from nbhelpers.training.precision import mixed_precision

__all__ = ["Recipe", "classification_loss", "mixed_precision", "recipe_for", "train"]
