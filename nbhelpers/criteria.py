"""Observation -> one score per weight. A low score says that the weight can go.

Every criterion is a function(weights, statistics) -> {parameter name: score}, with ``weights`` the fine-tuned prunable
weights by name and ``statistics`` a dict of the same shape of dicts: "pretrained" and "mean_abs_gradient".
"""

import torch

Tensors = dict[str, torch.Tensor]


def magnitude_based_pruning(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """|w|: a small weight changes little in what the layer computes (Han et al., 2015)."""
    return {name: w.detach().abs() for name, w in weights.items()}


def movement_based_analysis(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """|w_finetuned - w_pretrained|: a weight that fine-tuning left where it was is not part of what it taught.

    Not to be confused with Sanh et al.'s first-order movement, the signed sum of -w * gradient.
    """
    return {name: (w.detach() - statistics["pretrained"][name]).abs() for name, w in weights.items()}


def gradient_based_analysis(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """mean |dL/dw| over fine-tuning: a weight with no gradient has no say in the loss, at first order."""
    return {name: statistics["mean_abs_gradient"][name] for name in weights}


CRITERIA = {
    "magnitude": magnitude_based_pruning,
    "movement": movement_based_analysis,
    "gradient": gradient_based_analysis,
}


def global_ranks(scores: Tensors) -> Tensors:
    """Each weight's place among all weights, from 0 (lowest score) to just under 1; float64, ties in order."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    ranks = torch.empty(len(flat), dtype=torch.float64)
    ranks[flat.argsort(stable=True)] = torch.arange(len(flat), dtype=torch.float64) / len(flat)
    parts = ranks.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


AGREEMENTS = {
    # A weight is under a common quantile q by all criteria when the largest of its ranks is, and so on.
    "all": lambda ranks: ranks.max(0).values,
    "majority": lambda ranks: ranks.sort(0).values[len(ranks) // 2],
    "any": lambda ranks: ranks.min(0).values,
    "mean_rank": lambda ranks: ranks.mean(0),
}


def merge_scores(scores: dict[str, Tensors], agreement: str = "all") -> Tensors:
    """One score per weight out of several criteria's: the rank at which they agree that the weight can go.

    scores: {criterion: {parameter name: score}}; agreement: "all" (the worst rank: every criterion puts the weight
    under the common quantile), "majority", "any", or "mean_rank". Raises ``ValueError`` for another word.
    """
    if agreement not in AGREEMENTS:
        raise ValueError(f"agreement is {agreement!r}: it takes {', '.join(AGREEMENTS)}")
    ranks = [global_ranks(score) for score in scores.values()]
    return {name: AGREEMENTS[agreement](torch.stack([rank[name] for rank in ranks])) for name in ranks[0]}


def flag_below(scores: dict[str, Tensors], thresholds: dict[str, float], agreement: str = "all") -> Tensors:
    """The weights that the criteria put under a threshold each: {parameter name: bool tensor, True = useless}."""
    votes_needed = {"all": len(scores), "majority": len(scores) // 2 + 1, "any": 1}
    if agreement not in votes_needed:
        raise ValueError(f"agreement is {agreement!r}: with thresholds it takes {', '.join(votes_needed)}")
    names = next(iter(scores.values()))
    votes = {n: sum((scores[c][n] < thresholds[c]).int() for c in scores) for n in names}
    return {name: count >= votes_needed[agreement] for name, count in votes.items()}
