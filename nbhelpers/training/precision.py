"""The precision of training, and faster forms of attention, GELU and dropout for bfloat16 on a CPU."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@functools.cache
def mixed_precision(setting: str = "auto") -> str:
    """Return a precision setting, "auto" as ``"bf16"`` where that is faster than float32, else as ``"no"``.

    On a CPU that is measured, once per process: without AVX512_BF16 or AMX a bfloat16 product can take hundreds of
    times as long as a float32 one. ``NBHELPERS_PRECISION`` holds what another process has measured already.
    """
    if setting != "auto":
        return setting
    if os.environ.get("NBHELPERS_PRECISION") in ("no", "bf16"):
        return os.environ["NBHELPERS_PRECISION"]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    matrices = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {dtype: [] for dtype in matrices}
    # In turns, and the best of many, so that other work on the machine hardly matters.
    for _ in range(20):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            seconds[dtype].append(time.perf_counter() - start)
        if seconds[torch.bfloat16][-1] > 0.05:
            return "no"
    # Only a clear gain counts, so that the choice does not change from run to run on one machine.
    return "bf16" if min(seconds[torch.bfloat16]) < 0.8 * min(seconds[torch.float32]) else "no"


NAME = "products"  # of ``attend`` in transformers' registry
LONGEST = 384  # tokens: for longer texts the fused attention is about as fast, and it keeps no scores in memory


def attend(module: nn.Module, query, key, value, attention_mask, scaling: float | None = None, **options):
    """Compute causal attention, softmax(scaling * q k^T) v, by plain products: [batch, heads, tokens, features] in.

    Returns [batch, tokens, heads, features] and, in place of the weights, None. Texts longer than ``LONGEST``, and
    calls with a mask, dropout or grouped heads, go to PyTorch's fused attention.
    """
    (batch, heads, tokens, features), mask = query.shape, attention_mask
    if tokens > LONGEST or mask is not None or key.shape != query.shape or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    later = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu(1)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=features**-0.5 if scaling is None else scaling)
    mixed = scores.softmax(-1, dtype=query.dtype) @ v
    return mixed.view(batch, heads, tokens, features).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def attention_as_products(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that has the fused attention use ``attend`` within the block."""
    before = model.config._attn_implementation
    if before == "sdpa":
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class BitDropout(nn.Dropout):
    """Dropout with 15 random bits per element: one random number serves four, and drawing them takes most of the time.

    The rate is the nearest multiple of 2^-15.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Set a share p of x to zero and divide the rest by 1 - p; return x itself outside training or where p is 0."""
        if not (self.training and self.p):
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)
        kept = (bits[: x.numel()].view(x.shape) & 0x7FFF) >= round(self.p * 2**15)
        return x * (kept * (1 / (1 - self.p))).to(x.dtype)


@contextlib.contextmanager
def replaced(
    model: nn.Module, kinds: type | tuple[type, ...], make: Callable[[nn.Module], nn.Module]
) -> Iterator[None]:
    """Put make(module) in place of each module of some kinds, without parameters, within the block."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child).train(child.training))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def exact_gelu(model: nn.Module):
    """Let a model compute x * Phi(x) within the block where it has its tanh form, which is slower on a CPU.

    The two differ by less than 0.0005 (Hendrycks and Gimpel, 2016), as much as rounding x to bfloat16 changes either.
    """
    return replaced(model, (GELUTanh, NewGELUActivation), lambda _: nn.GELU())


@contextlib.contextmanager
def faster_in_bfloat16(model: PreTrainedModel, precision: str, training: bool = False) -> Iterator[None]:
    """Let a model that computes in "bf16" on a CPU use the faster forms within the block; leave any other as it is.

    In training these include dropout and attention: the backward pass of the fused one takes several times as long for
    texts of up to a few hundred tokens.
    """
    with contextlib.ExitStack() as stack:
        if precision == "bf16" and model.device.type == "cpu":
            stack.enter_context(exact_gelu(model))
            if training:
                stack.enter_context(attention_as_products(model))
                stack.enter_context(replaced(model, nn.Dropout, lambda dropout: BitDropout(dropout.p)))
        yield
