"""The checks of the exercises: whether an answer is right and, where it is not, in which direction to look.

A check takes a student's answer and then what the right one is computed from, so that it holds for every profile,
model and data. It prints one line ("Not answered yet", "Not yet: ..." or "Right: ...") and returns whether the answer
is right. It raises nothing on an answer of the wrong type or shape, and never prints the right one.

    python -m nbhelpers.exercises 02_ada.ipynb 02_ben.ipynb      # of executed notebooks, how many answers are right
"""

from nbhelpers.exercises.comparison import (
    check_bits,
    check_bootstrap,
    check_holm,
    check_mcnemar,
    check_overlapping,
    check_reviews_needed,
)
from nbhelpers.exercises.criteria_scoring import (
    check_layer_masks,
    check_least_overlap,
    check_majority_by_chance,
    check_product,
    check_threshold,
)
from nbhelpers.exercises.distillation import (
    check_eight_bits,
    check_first_blocks,
    check_hidden_loss,
    check_lost_reviews,
    check_soft_loss,
    check_softened,
)
from nbhelpers.exercises.fine_tune import (
    check_disagreements,
    check_fooling_review,
    check_heads_only,
    check_parameters_left,
    check_shuffled,
)
from nbhelpers.exercises.prune_and_recover import (
    check_against_control,
    check_halfway,
    check_keeper,
    check_mask,
    check_merges_overlap,
    check_taylor,
)
from nbhelpers.exercises.sparse_conversion import (
    check_backend,
    check_bitmap_bytes,
    check_break_even,
    check_csr,
    check_head_masks,
    check_speedup,
)

__all__ = [
    "check_against_control",
    "check_backend",
    "check_bitmap_bytes",
    "check_bits",
    "check_bootstrap",
    "check_break_even",
    "check_csr",
    "check_disagreements",
    "check_eight_bits",
    "check_first_blocks",
    "check_fooling_review",
    "check_halfway",
    "check_head_masks",
    "check_heads_only",
    "check_hidden_loss",
    "check_holm",
    "check_keeper",
    "check_layer_masks",
    "check_least_overlap",
    "check_lost_reviews",
    "check_majority_by_chance",
    "check_mask",
    "check_mcnemar",
    "check_merges_overlap",
    "check_overlapping",
    "check_parameters_left",
    "check_product",
    "check_reviews_needed",
    "check_shuffled",
    "check_soft_loss",
    "check_softened",
    "check_speedup",
    "check_taylor",
    "check_threshold",
]
