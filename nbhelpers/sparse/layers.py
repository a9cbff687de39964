"""A linear layer without its pruned weights: they are not stored, read or multiplied."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbhelpers.sparse import blocks, int8
from nbhelpers.sparse.engines import EIGHT_BITS, ENGINES, check_int8_engine, choose_backend
from nbhelpers.sparse.formats import densities, round_csr, to_csr, to_weight

# The buffers in which each engine holds a matrix.
CSR = ("values", "columns", "starts")
BUFFERS = {"numba": CSR, "torch_csr": CSR, "dense": ("weight",)}
BUFFERS |= {"int8": ("packed",), "int8_blocks": (*CSR, "begins")}
BACKENDS = ("auto", *BUFFERS)
TYPICAL_TOKENS = 1024  # about eight reviews, for the measurements of "auto"


class Float32Inference(nn.Module):
    """The base of the sparse modules: they compute in float32 and cannot be trained."""

    def _apply(self, function, recurse=True):
        if function(torch.empty(0)).dtype != torch.float32:
            raise TypeError(f"{type(self).__name__} must stay in float32: convert a model after its own .to(dtype)")
        return super()._apply(function, recurse)

    def refuse_training(self, x: torch.Tensor | None = None) -> None:
        """Raise ``RuntimeError`` where a gradient would be expected."""
        if torch.is_grad_enabled() and (self.training or (x is not None and x.requires_grad)):
            raise RuntimeError(
                f"{type(self).__name__} is for inference: call .eval(), and run it without gradients; "
                "train the masked dense model and convert it afterwards"
            )


class SparseLinear(Float32Inference):
    """``y = x @ W.T + bias`` with W[out, in] sparse, made by ``SparseLinear.from_dense``.

    ``backend`` is the engine that runs, and decides which buffers hold the matrix:
    "numba", "torch_csr"    values float32 [nnz], columns int32 [nnz], starts int32 [out + 1] (CSR)
    "dense"                 weight float32 [out, in]
    "int8"                  packed int8, in oneDNN's layout (see ``int8``)
    "int8_blocks"           values, columns, starts, begins of blocks of four weights (see ``blocks``)
    All have ``bias`` [out]. A layer in eight bits has ``scale`` [out] as well: its weights are whole multiples of it.
    The two int8 engines round the activations to eight bits, too; the other three multiply in float32. The constructor
    makes a layer without any weights left.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features, self.backend = in_features, out_features, "torch_csr"
        self.register_buffer("values", torch.zeros(0))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("starts", torch.zeros(out_features + 1, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("scale", None)

    @classmethod
    def from_dense(cls, module: nn.Module, backend: str = "auto", tokens: int = TYPICAL_TOKENS) -> "SparseLinear":
        """Return the sparse layer that computes the same as a ``Conv1D`` (weight [in, out]) or ``nn.Linear``.

        Weights equal to zero (0.0 or -0.0) are dropped. backend: an engine, or "auto" for the one that is fastest on
        this machine for this shape and density with ``tokens`` (see ``choose_backend``), all of which are exact up to
        float rounding. "int8" and "int8_blocks" round weights and activations to eight bits.
        Raises ``TypeError`` for another module, ``ValueError`` for an unknown backend, and ``RuntimeError`` for an int8
        engine that does not run here.
        """
        if not isinstance(module, Conv1D | nn.Linear):
            raise TypeError(f"`module` must be a Conv1D or nn.Linear (got {type(module).__name__})")
        weight = module.weight.detach().to(torch.float32, copy=True)
        weight = (weight.t() if isinstance(module, Conv1D) else weight).contiguous()
        bias = module.bias.detach().to(torch.float32, copy=True) if module.bias is not None else None
        return cls.from_csr(*to_csr(weight), bias, weight.shape[1], backend, tokens)

    @classmethod
    def from_csr(
        cls, values, columns, starts, bias, in_features: int, backend="auto", tokens=TYPICAL_TOKENS, scale=None
    ):
        """Return the same from a matrix in CSR; bias may be None.

        scale: float32 [out], where the values are whole multiples of their row's scale, at most 127 times. The int8
        engines are then among those that "auto" chooses from.
        """
        bias = values.new_zeros(len(starts) - 1) if bias is None else bias
        matrix, shape = (values, columns, starts, bias), (len(bias), in_features)
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)} (got {backend!r})")
        if backend in EIGHT_BITS:
            check_int8_engine(backend, values.device.type)
            matrix, scale = round_csr(matrix) if scale is None else (matrix, scale)
        if backend == "auto":
            device = str(values.device)
            backend = choose_backend(*shape, *densities(matrix, in_features), tokens, device, scale is not None)
        layer = cls(in_features, shape[0])
        layer.backend, layer.bias, layer.scale = backend, bias, scale
        layer.set_matrix(matrix)
        return layer.eval()

    def set_matrix(self, matrix: tuple[torch.Tensor, ...]) -> None:
        """Hold a matrix in CSR as the backend needs it."""
        names = BUFFERS[self.backend]
        if self.backend == "dense":
            tensors = [to_weight(matrix, self.in_features)]
        elif self.backend in EIGHT_BITS:
            numbers = (to_weight(matrix, self.in_features) / self.scale[:, None]).round().to(torch.int8)
            tensors = [int8.pack(numbers)] if self.backend == "int8" else blocks.to_blocks(numbers)
        else:
            tensors = matrix[:3]
        del self.values, self.columns, self.starts
        for name, tensor in zip(names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def matrix(self) -> tuple[torch.Tensor, ...]:
        """Return the buffers that hold the matrix."""
        return tuple(getattr(self, name) for name in BUFFERS[self.backend])

    def csr(self) -> tuple[torch.Tensor, ...]:
        """Return (values, columns, starts, bias), for any backend."""
        if self.backend == "dense":
            return *to_csr(self.weight), self.bias
        if self.backend in EIGHT_BITS:
            if self.backend == "int8":
                numbers = int8.unpack(self.packed, self.in_features)
            else:
                numbers = blocks.from_blocks(self.values, self.columns, self.starts, self.in_features)
            return *to_csr(numbers * self.scale[:, None]), self.bias
        return self.values, self.columns, self.starts, self.bias

    def with_backend(self, backend: str, eight_bits: bool = False) -> "SparseLinear":
        """Return the same layer for another engine; with ``eight_bits`` its weights are rounded to eight bits first."""
        matrix, scale = self.csr(), self.scale
        if eight_bits and scale is None:
            matrix, scale = round_csr(matrix)
        return SparseLinear.from_csr(*matrix, self.in_features, backend, scale=scale)

    def __deepcopy__(self, memo) -> "SparseLinear":
        """Return a copy; oneDNN's layout cannot be copied, so the layer is made again."""
        scale = self.scale if self.scale is None else self.scale.clone()
        return SparseLinear.from_csr(*(t.clone() for t in self.csr()), self.in_features, self.backend, scale=scale)

    @property
    def nonzeros(self) -> int:
        """The number of weights that are left."""
        return int(torch.count_nonzero(self.weight)) if self.backend == "dense" else len(self.csr()[0])

    def forward(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return [..., out] from x [..., in]; gelu: whether GELU, in its tanh form, follows.

        Raises ``RuntimeError`` in training and ``ValueError`` for another width.
        """
        self.refuse_training(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"`x` must have {self.in_features} features in its last dimension (got {list(x.shape)})")
        rows = x.reshape(x.shape[:-1].numel(), self.in_features).to(torch.float32)
        if self.backend in EIGHT_BITS:
            engine = int8 if self.backend == "int8" else blocks
            y = engine.multiply(rows, (*self.matrix(), self.scale, self.bias), gelu)
        else:
            y = ENGINES[self.backend](rows, (*self.matrix(), self.bias))
            y = F.gelu(y, approximate="tanh") if gelu else y
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        share = self.nonzeros / max(1, self.in_features * self.out_features)
        return f"{self.in_features} -> {self.out_features}, {share:.1%} of the weights left, backend={self.backend}"


def sparse_names(model: nn.Module) -> list[str]:
    """Return the names of a model's sparse layers."""
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def sparse_layers(model: nn.Module) -> list[SparseLinear]:
    """Return a model's sparse layers."""
    return [model.get_submodule(name) for name in sparse_names(model)]


def engines_of(model: nn.Module) -> dict[str, int]:
    """Return how many of a model's sparse layers run on each engine."""
    return dict(Counter(layer.backend for layer in sparse_layers(model)).most_common())
