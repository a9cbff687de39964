"""Observation -> one score per weight. A low score says that the weight can go.

Every criterion is a function(weights, statistics) -> {parameter name: score}, with ``weights`` the fine-tuned prunable
weights by name and ``statistics`` a dict of dicts by parameter name: "pretrained" weights, "mean_abs_gradient" and
"first_order_movement" over fine-tuning, and what ``statistics.calibrate`` found of the fine-tuned model.

``CRITERIA`` are the three that the notebooks are about, ``COMPARATORS`` what the literature would put beside them.
"""

import zlib

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


# --- comparators ---


def random_scores(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """Uniform random numbers, the same for the same weights each time: the floor that a criterion has to beat."""
    scores = {}
    for name, w in weights.items():
        seed = zlib.crc32(w.detach().cpu().contiguous().numpy())
        scores[name] = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed))
    return scores


def taylor(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """|w| * mean |dL/dw|: how much the loss changes at first order if the weight goes (Molchanov et al., 2017)."""
    return {name: w.detach().abs() * statistics["calibration_gradient"][name] for name, w in weights.items()}


def fisher(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """w^2 * E[(dL/dw)^2] / 2: at second order, with the Fisher diagonal for the Hessian's.

    Optimal brain damage (LeCun et al., 1990) with the empirical Fisher information (Theis et al., 2018).
    """
    return {name: w.detach().square() * statistics["squared_gradient"][name] / 2 for name, w in weights.items()}


def movement_first_order(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """-mean w * dL/dw over fine-tuning, signed: what training drives towards zero goes first (Sanh et al., 2020)."""
    return {name: statistics["first_order_movement"][name] for name in weights}


def wanda(weights: Tensors, statistics: dict[str, Tensors]) -> Tensors:
    """|w| * ||x||_2, ranked among the weights of the same output (Sun et al., 2024): every output loses the same share.

    The score is the rank, from 0 to just under 1, so that a global threshold prunes each output alike.
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
    """A weight [out, in] pruned by SparseGPT (Frantar and Alistarh, 2023): some zeros, and the rest updated for them.

    hessian: X^T X [in, in] of the layer's inputs. Columns are taken in order, in blocks: within a block the weights of
    least w^2 / [H^-1]_jj go, round(sparsity * size) of them, and what each one's loss does to the layer's output is
    made good by the columns after it. Dear: a Cholesky factor of [in, in] and a loop over columns; float64.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # Row j of the upper factor of H^-1 holds what is needed of the inverse of H[j:, j:], for every j at once.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        saliency = w[:, start:end].square() / factor.diagonal()[start:end].square()
        lowest = saliency.flatten().argsort(stable=True)[: round(sparsity * saliency.numel())]
        gone = torch.zeros(saliency.numel(), dtype=torch.bool, device=w.device)
        gone = gone.index_fill_(0, lowest, True).view_as(saliency)
        part, errors = w[:, start:end], torch.zeros_like(saliency)
        for j in range(end - start):
            errors[:, j] = torch.where(gone[:, j], part[:, j], 0) / factor[start + j, start + j]
            part[:, j:] -= errors[:, j, None] * factor[start + j, start + j : end]
            part[gone[:, j], j] = 0
        # The columns after the block wait for it: one product instead of as many updates.
        w[:, end:] -= errors @ factor[start:end, end:]
    return w.to(weight.dtype)


# --- ranks and merges ---


def global_ranks(scores: Tensors) -> Tensors:
    """Each weight's place among all weights, from 0 (lowest score) upwards; ties in order. int32 where that suffices.

    Extra memory: 20 bytes a weight while it is computed (a copy to sort, an order, the places); 4 of them stay.
    """
    order = torch.cat([score.flatten() for score in scores.values()]).argsort(stable=True)
    kind = torch.int32 if len(order) < 2**31 else torch.int64
    places = torch.empty_like(order, dtype=kind)
    places[order] = torch.arange(len(order), dtype=kind, device=order.device)
    parts = places.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


AGREEMENTS = {
    # A weight is under a common quantile q by all criteria when the largest of its ranks is, and so on.
    "all": lambda places: places.amax(0).double(),
    "majority": lambda places: places.sort(0).values[len(places) // 2].double(),
    "any": lambda places: places.amin(0).double(),
    "mean_rank": lambda places: places.double().mean(0),
}


def merge_scores(scores: dict[str, Tensors], agreement: str = "all") -> Tensors:
    """One score per weight out of several criteria's: the rank at which they agree that the weight can go, 0 to 1.

    scores: {criterion: {parameter name: score}}; agreement: "all" (the worst rank: every criterion puts the weight
    under the common quantile), "majority", "any", or "mean_rank". Raises ``ValueError`` for another word.
    """
    if agreement not in AGREEMENTS:
        raise ValueError(f"agreement is {agreement!r}: it takes {', '.join(AGREEMENTS)}")
    agree, places = AGREEMENTS[agreement], [global_ranks(score) for score in scores.values()]
    total = sum(place.numel() for place in places[0].values())
    return {name: agree(torch.stack([place[name] for place in places])) / total for name in places[0]}


def votes_needed(criteria: int) -> dict[str, int]:
    """How many of so many criteria have to flag a weight, by agreement."""
    return {"all": criteria, "majority": criteria // 2 + 1, "any": 1}


def flag_below(scores: dict[str, Tensors], thresholds: dict[str, float], agreement: str = "all") -> Tensors:
    """The weights that the criteria put under a threshold each: {parameter name: bool tensor, True = useless}."""
    needed = votes_needed(len(scores))
    if agreement not in needed:
        raise ValueError(f"agreement is {agreement!r}: with thresholds it takes {', '.join(needed)}")
    names = next(iter(scores.values()))
    votes = {n: sum((scores[c][n] < thresholds[c]).int() for c in scores) for n in names}
    return {name: count >= needed[agreement] for name, count in votes.items()}
