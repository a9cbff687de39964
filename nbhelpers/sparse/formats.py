"""Sparse matrices: CSR, bitmaps, and eight-bit rows."""

import math

import torch

BLOCK = 4  # weights of one output that are stored, or left out, together
LEVELS = 127  # of int8, on either side of zero


def to_csr(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (values, columns, starts) of the weights of [out, in] that are not zero; NaN is kept."""
    return mask_to_csr(weight != 0, weight[weight != 0])


def mask_to_csr(mask: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the CSR of values [nnz] that are, row by row, where the mask [out, in] is True."""
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
    starts[1:] = mask.sum(1).cumsum(0)
    return values, mask.nonzero()[:, 1].to(torch.int32), starts


def row_numbers(starts: torch.Tensor) -> torch.Tensor:
    """Return the row [nnz] of each value of a matrix in CSR."""
    return torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())


def to_mask(matrix: tuple[torch.Tensor, ...], in_features: int) -> torch.Tensor:
    """Return where the matrix [out, in] has weights: bool."""
    _, columns, starts, bias = matrix
    mask = torch.zeros(len(bias), in_features, dtype=torch.bool, device=columns.device)
    mask[row_numbers(starts), columns] = True
    return mask


def to_weight(matrix: tuple[torch.Tensor, ...], in_features: int) -> torch.Tensor:
    """Return the dense weight [out, in] with zeros where weights are gone."""
    mask = to_mask(matrix, in_features)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, matrix[0])


def densities(matrix: tuple[torch.Tensor, ...], in_features: int) -> tuple[float, float]:
    """Return the share of the weights [out, in] that are left, and that of the blocks of four inputs that have any.

    Both are rounded, to one digit that matters: engines are compared once for all layers that are about as dense.
    """
    _, columns, starts, bias = matrix
    width = math.ceil(in_features / BLOCK)
    used = torch.unique(row_numbers(starts) * width + columns.long() // BLOCK)
    shares = len(columns) / max(1, len(bias) * in_features), len(used) / max(1, len(bias) * width)
    return tuple(share if share == 1 else round(share, 1 if share > 0.1 else 2) for share in shares)


def random_matrix(out_features: int, in_features: int, density: float, device: str = "cpu", block: int = 1) -> tuple:
    """Return a random matrix in CSR with a bias, the same one each time; zeros come in blocks of ``block`` inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    mask = torch.rand(out_features, math.ceil(in_features / block), generator=generator) < density
    mask = mask.repeat_interleave(block, 1)[:, :in_features]
    matrix = *mask_to_csr(mask, weight[mask]), torch.randn(out_features, generator=generator)
    return tuple(tensor.to(device) for tensor in matrix)


def quantize_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 numbers [n] and scales float32 [count] for values [n] in the rows [n] of ``count`` rows.

    A value is its number times its row's scale, to within half a scale; a row of zeros has the scale 1. Raises
    ``ValueError`` for values that are not finite.
    """
    if not values.isfinite().all():
        raise ValueError("weights must be finite to be rounded to eight bits (got NaN or infinity)")
    largest = torch.zeros(count).scatter_reduce(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, largest / LEVELS, 1.0)
    return (values / scale[rows]).round().to(torch.int8), scale


def quantize_matrix(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 numbers and scales [rows] for a matrix [rows, columns]; see ``quantize_rows``."""
    rows = torch.arange(len(weight)).repeat_interleave(weight.shape[1])
    numbers, scale = quantize_rows(weight.flatten(), rows, len(weight))
    return numbers.view(weight.shape), scale


def round_csr(matrix: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return a matrix in CSR rounded to eight bits, without the weights that became zero, and its scales [out]."""
    values, columns, starts, bias = matrix
    rows = row_numbers(starts)
    numbers, scale = quantize_rows(values, rows, len(bias))
    left = numbers != 0
    counts = torch.zeros_like(starts)
    counts[1:] = torch.bincount(rows[left], minlength=len(bias)).cumsum(0)
    return ((numbers * scale[rows])[left], columns[left], counts, bias), scale
