"""A linear layer without its pruned weights: they are not stored, read or multiplied."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nbhelpers.sparse import kernels
from nbhelpers.sparse.engines import ENGINES, choose_backend
from nbhelpers.sparse.formats import quantize_rows, row_numbers, to_csr, to_weight

BACKENDS = ("auto", "numba", "torch_csr", "dense")
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

    The buffers are ``values`` float32 [nnz], ``columns`` int32 [nnz], ``starts`` int32 [out + 1] (CSR) and ``bias``
    [out]; with the backend "dense" they are ``weight`` [out, in] and ``bias``. ``backend`` is the engine that runs.
    After ``quantize``, values are whole multiples of their row's ``scale`` [out]. The constructor makes a layer without
    any weights left.
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

        Weights equal to zero (0.0 or -0.0) are dropped. backend: "numba", "torch_csr", "dense", or "auto" for the one
        that is fastest on this machine for this shape and density with ``tokens`` (see ``choose_backend``).
        Raises ``TypeError`` for another module and ``ValueError`` for an unknown backend.
        """
        if not isinstance(module, Conv1D | nn.Linear):
            raise TypeError(f"`module` must be a Conv1D or nn.Linear (got {type(module).__name__})")
        weight = module.weight.detach().to(torch.float32, copy=True)
        weight = (weight.t() if isinstance(module, Conv1D) else weight).contiguous()
        bias = module.bias.detach().to(torch.float32, copy=True) if module.bias is not None else None
        return cls.from_csr(*to_csr(weight), bias, weight.shape[1], backend, tokens)

    @classmethod
    def from_csr(cls, values, columns, starts, bias, in_features: int, backend="auto", tokens=TYPICAL_TOKENS):
        """Return the same from a matrix in CSR; bias may be None."""
        bias = values.new_zeros(len(starts) - 1) if bias is None else bias
        matrix, shape = (values, columns, starts, bias), (len(bias), in_features)
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)} (got {backend!r})")
        if backend == "auto":
            density = len(values) / max(1, shape[0] * shape[1])
            backend = choose_backend(*shape, round(density, 1 if density > 0.1 else 2), tokens, str(values.device))
        layer = cls(in_features, shape[0])
        layer.backend, layer.bias = backend, bias
        if backend == "dense":
            del layer.values, layer.columns, layer.starts
            layer.register_buffer("weight", to_weight(matrix, in_features))
        else:
            layer.values, layer.columns, layer.starts = values, columns, starts
        return layer.eval()

    def csr(self) -> tuple[torch.Tensor, ...]:
        """Return (values, columns, starts, bias), for any backend."""
        if self.backend == "dense":
            return *to_csr(self.weight), self.bias
        return self.values, self.columns, self.starts, self.bias

    def quantize(self) -> None:
        """Round the weights that are left to eight bits and a scale per row; they are still multiplied in float32."""
        values, columns, starts, bias = self.csr()
        rows = row_numbers(starts)
        numbers, self.scale = quantize_rows(values, rows, self.out_features)
        rounded = numbers * self.scale[rows]
        if self.backend == "dense":
            self.weight = to_weight((rounded, columns, starts, bias), self.in_features)
        else:
            self.values = rounded

    @property
    def nonzeros(self) -> int:
        """The number of weights that are left."""
        return len(self.values) if self.backend != "dense" else int(torch.count_nonzero(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]. Raises ``RuntimeError`` in training and ``ValueError`` for another width."""
        self.refuse_training(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"`x` must have {self.in_features} features in its last dimension (got {list(x.shape)})")
        rows = x.reshape(x.shape[:-1].numel(), self.in_features).to(torch.float32)
        if self.backend == "dense":
            y = kernels.dense(rows, self.weight, self.bias)
        else:
            y = ENGINES[self.backend](rows, self.csr())
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
