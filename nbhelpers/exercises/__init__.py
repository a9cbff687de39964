"""The checks of the exercises: they say whether an answer is right and, where it is not, what to look at.

A check takes a student's answer and then what the right one is computed from, so that it works for every profile,
model and data. It prints one line ("Not answered yet", "Not yet: ..." or "Right: ...") and returns whether the answer
is right. It raises no error on an answer of the wrong type or shape, and never prints the right one.

    python -m nbhelpers.exercises 02_ada.ipynb 02_ben.ipynb      # number of right answers in executed notebooks
"""

# ruff: noqa: F401 (notebooks call every check as exercises.check_...)

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
