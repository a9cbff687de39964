"""Sparse matrices: CSR, bitmaps, and eight-bit rows."""

import torch

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


def random_matrix(out_features: int, in_features: int, density: float, device: str = "cpu") -> tuple:
    """Return a random matrix in CSR with a bias, the same one each time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < density
    matrix = *mask_to_csr(mask, weight[mask]), torch.randn(out_features, generator=generator)
    return tuple(tensor.to(device) for tensor in matrix)


def quantize_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 numbers [n] and scales float32 [count] for values [n] in the rows [n] of ``count`` rows.

    A value is its number times its row's scale, to within half a scale; a row of zeros has the scale 1.
    """
    largest = torch.zeros(count).scatter_reduce(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, largest / LEVELS, 1.0)
    return (values / scale[rows]).round().to(torch.int8), scale
