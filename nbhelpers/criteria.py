"""Statistics -> one score per weight. A low score means that the weight can be removed.

Every criterion is a function(weights, statistics) -> {parameter name: score}, with ``weights`` the fine-tuned prunable
weights by name and ``statistics`` a dict of dicts by parameter name: "pretrained" weights, "mean_abs_gradient" and
"first_order_movement" over fine-tuning, and the statistics of ``training.observers.calibrate``.

``CRITERIA`` are the three that the notebooks teach, ``COMPARATORS`` those from the literature, ``MERGES`` what is made
of several; ``score`` takes any of their names.
"""

import functools
import zlib

import torch

Tensors = dict[str, torch.Tensor]


def magnitude_based_pruning(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return |w|: a small weight changes the output of its layer little (Han et al., 2015)."""
    return {name: w.detach().abs() for name, w in weights.items()}


def movement_based_analysis(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return |w_finetuned - w_pretrained|: a weight that fine-tuning hardly changed matters little to the task.

    Not to be confused with Sanh et al.'s first-order movement, the signed sum of -w * gradient.
    """
    return {name: (w.detach() - statistics["pretrained"][name]).abs() for name, w in weights.items()}


def gradient_based_analysis(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return mean |dL/dw| over fine-tuning: a weight without a gradient does not change the loss, to first order."""
    return {name: statistics["mean_abs_gradient"][name] for name in weights}


# --- comparators ---


def random_scores(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return uniform random numbers, the same for the same weights: the floor that a criterion has to beat."""
    scores = {}
    for name, w in weights.items():
        seed = zlib.crc32(w.detach().cpu().contiguous().numpy())
        scores[name] = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed))
    return scores


def taylor(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return |w| * mean |dL/dw|: the change of the loss without the weight, to first order (Molchanov et al., 2017)."""
    return {name: w.detach().abs() * statistics["calibration_gradient"][name] for name, w in weights.items()}


def fisher(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return w^2 * E[(dL/dw)^2] / 2: the change of the loss to second order, with the Fisher diagonal as Hessian.

    Optimal brain damage (LeCun et al., 1990) with the empirical Fisher information (Theis et al., 2018).
    """
    return {name: w.detach().square() * statistics["squared_gradient"][name] / 2 for name, w in weights.items()}


def movement_first_order(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return -mean w * dL/dw over fine-tuning, signed: lowest where training moves w towards 0 (Sanh et al., 2020)."""
    return {name: statistics["first_order_movement"][name] for name in weights}


def wanda(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return |w| * ||x||_2 as ranks, from 0 to just under 1, among the weights of the same output (Sun et al., 2024).

    Ranks, so that a global threshold removes the same share of every output's weights.
    """
    scores = {}
    for name, w in weights.items():
        norm = statistics["input_norm"][name]
        inputs = int(norm.shape[0] == 1)
        product = w.detach().abs() * norm
        scores[name] = product.argsort(dim=inputs, stable=True).argsort(dim=inputs) / w.shape[inputs]
    return scores


CRITERIA = {
    "magnitude": magnitude_based_pruning,
    "movement": movement_based_analysis,
    "gradient": gradient_based_analysis,
}

COMPARATORS = {
    "random": random_scores,
    "taylor": taylor,
    "fisher": fisher,
    "movement_first_order": movement_first_order,
    "wanda": wanda,
}


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, block: int = 128, damping: float = 0.01):
    """Return a weight [out, in] pruned by SparseGPT (Frantar and Alistarh, 2023): zeros, and the other weights updated.

    hessian: X^T X [in, in] of the layer's inputs. Columns are processed in order, in blocks: within a block the
    round(sparsity * size) weights of lowest w^2 / [H^-1]_jj are removed, and the columns after each are updated to
    compensate for its effect on the layer's output. Expensive: one Cholesky factorization of [in, in] per matrix and a
    loop over columns, in float64.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # Row j of the upper factor of H^-1 is, up to a factor, the first row of the inverse of H[j:, j:].
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        saliency = w[:, start:end].square() / factor.diagonal()[start:end].square()
        lowest = saliency.flatten().argsort(stable=True)[: round(sparsity * saliency.numel())]
        dropped = torch.zeros(saliency.numel(), dtype=torch.bool, device=w.device)
        dropped = dropped.index_fill_(0, lowest, True).view_as(saliency)
        part, errors = w[:, start:end], torch.zeros_like(saliency)
        for j in range(end - start):
            errors[:, j] = torch.where(dropped[:, j], part[:, j], 0) / factor[start + j, start + j]
            part[:, j:] -= errors[:, j, None] * factor[start + j, start + j : end]
            part[dropped[:, j], j] = 0
        # The columns after the block are updated once per block: one product instead of one per column.
        w[:, end:] -= errors @ factor[start:end, end:]
    return w.to(weight.dtype)


# --- ranks and merges ---


def global_ranks(scores: Tensors) -> Tensors:
    """Return each weight's rank among all weights, from 0 (lowest score); ties in order; int32 where it suffices.

    Extra memory: 20 bytes per weight during the computation (a copy to sort, the order, the ranks), 4 for the result.
    """
    order = torch.cat([score.flatten() for score in scores.values()]).argsort(stable=True)
    dtype = torch.int32 if len(order) < 2**31 else torch.int64
    ranks = torch.empty_like(order, dtype=dtype)
    ranks[order] = torch.arange(len(order), dtype=dtype, device=order.device)
    parts = ranks.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


AGREEMENTS = {
    # All criteria put a weight at or under a common quantile when the largest of its ranks is there, and so on.
    "all": lambda ranks: ranks.amax(0).double(),
    "majority": lambda ranks: ranks.sort(0).values[len(ranks) // 2].double(),
    "any": lambda ranks: ranks.amin(0).double(),
    "mean_rank": lambda ranks: ranks.double().mean(0),
}


def merge_scores(scores: dict[str, Tensors], agreement: str = "all") -> Tensors:
    """Return one score per weight from several criteria: the rank at which they agree to remove the weight, 0 to 1.

    scores: {criterion: {parameter name: score}}; agreement: "all" (the highest rank: every criterion puts the weight
    at or under the common quantile), "majority", "any", or "mean_rank". Raises ``ValueError`` for another word.
    """
    if agreement not in AGREEMENTS:
        raise ValueError(f"`agreement` must be one of {', '.join(AGREEMENTS)} (got {agreement!r})")
    merge, ranks = AGREEMENTS[agreement], [global_ranks(score) for score in scores.values()]
    total = sum(rank.numel() for rank in ranks[0].values())
    return {name: merge(torch.stack([rank[name] for rank in ranks])) / total for name in ranks[0]}


def merge_normalised(scores: dict[str, Tensors]) -> Tensors:
    """Return the mean over criteria of each score over its mean of all weights: unlike ranks, it keeps distances."""
    means = {c: sum(s.sum() for s in of.values()) / sum(s.numel() for s in of.values()) for c, of in scores.items()}
    return {n: sum(of[n] / means[c] for c, of in scores.items()) / len(scores) for n in next(iter(scores.values()))}


THREE = tuple(CRITERIA)
# Merges by name: what they are made of, and how.
MERGES = {
    "merged": (THREE, functools.partial(merge_scores, agreement="all")),
    "merged_majority": (THREE, functools.partial(merge_scores, agreement="majority")),
    "merged_any": (THREE, functools.partial(merge_scores, agreement="any")),
    "merged_mean_rank": (THREE, functools.partial(merge_scores, agreement="mean_rank")),
    "merged_normalised": (THREE, merge_normalised),
    "merged_with_taylor": ((*THREE, "taylor"), functools.partial(merge_scores, agreement="all")),
}


def score(name: str, weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Return the scores of a criterion, a comparator or a merge, by its name."""
    if name in MERGES:
        parts, merge = MERGES[name]
        return merge({part: score(part, weights, statistics) for part in parts})
    return (CRITERIA | COMPARATORS)[name](weights, statistics)


def votes_needed(criteria: int) -> dict[str, int]:
    """Return how many of the criteria have to flag a weight, by agreement."""
    return {"all": criteria, "majority": criteria // 2 + 1, "any": 1}


def flag_below(scores: dict[str, Tensors], thresholds: dict[str, float], agreement: str = "all") -> Tensors:
    """Return the weights that the criteria put at or under their thresholds: {parameter name: bool, True = useless}.

    With ``selection.threshold(scores, share)`` and distinct scores, a criterion alone flags round(share * N) weights.
    """
    needed = votes_needed(len(scores))
    if agreement not in needed:
        raise ValueError(f"with thresholds, `agreement` must be one of {', '.join(needed)} (got {agreement!r})")
    names = next(iter(scores.values()))
    votes = {n: sum((scores[c][n] <= thresholds[c]).int() for c in scores) for n in names}
    return {name: count >= needed[agreement] for name, count in votes.items()}
