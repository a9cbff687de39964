"""GPT-2 for sequence classification on sparse matrices: inference only, and only what the logits depend on.

A batch of reviews is padded to the longest one. Here only the real tokens are computed: they are packed one after the
other in a [tokens, features] matrix, and each review attends to itself. In the last block only the last token of each
review is computed, since nothing reads the others except as its keys and values. The names of modules and parameters
are those of ``transformers``.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.pytorch_utils import Conv1D

from nbhelpers.sparse import kernels
from nbhelpers.sparse.compaction import compact_blocks
from nbhelpers.sparse.embeddings import shape_embeddings
from nbhelpers.sparse.layers import Float32Inference, SparseLinear

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of the function that the kernel has built in


def kept_heads(config: GPT2Config) -> list[int]:
    """Return how many attention heads each block has."""
    return getattr(config, "kept_heads", None) or [config.num_attention_heads] * config.num_hidden_layers


def kept_neurons(config: GPT2Config) -> list[int]:
    """Return how many MLP neurons each block has."""
    return (
        getattr(config, "kept_neurons", None) or [config.n_inner or 4 * config.hidden_size] * config.num_hidden_layers
    )


class Packing:
    """The positions of the real tokens of a right-padded batch: lengths [reviews] of rows ``width`` wide."""

    def __init__(self, lengths: torch.Tensor, width: int):
        self.lengths, self.counts = lengths, lengths.tolist()
        self.index = (torch.arange(width, device=lengths.device) < lengths[:, None]).flatten().nonzero()[:, 0]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Return [tokens] from [reviews, width]."""
        return padded.flatten()[self.index]

    def last(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the last token of each review: [reviews, features]."""
        return packed[self.lengths.cumsum(0) - 1]


class SparseGPT2Attention(Float32Inference):
    """Causal self-attention; its two projections are sparse."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.heads, self.scale = kept_heads(config)[layer], 1.0
        if config.scale_attn_weights:
            self.scale = size**-0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = SparseLinear(width, 3 * self.heads * size)
        self.c_proj = SparseLinear(self.heads * size, width)

    def forward(self, x: torch.Tensor, packing: Packing, last: bool = False) -> torch.Tensor:
        """Return [tokens, width] from x [tokens, width], or [reviews, width] for the last tokens only."""
        qkv = self.c_attn(x).view(len(x), 3, self.heads, -1)
        return self.c_proj(torch.cat([self.attend(review, last) for review in qkv.split(packing.counts)]))

    def attend(self, qkv: torch.Tensor, last: bool) -> torch.Tensor:
        """Return [tokens, heads * size] from one review's [tokens, 3, heads, size], or [1, ...] for its last token."""
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
        q = q[:, :, -1:] if last else q
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not last, scale=self.scale)
        return mixed[0].transpose(0, 1).flatten(1)


class SparseGPT2MLP(Float32Inference):
    """Two sparse layers with an activation between; one call of the kernel where it runs both layers and GELU."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width, inner = config.hidden_size, kept_neurons(config)[layer]
        self.activation = config.activation_function
        self.c_fc = SparseLinear(width, inner)
        self.c_proj = SparseLinear(inner, width)

    @property
    def fused(self) -> bool:
        """True where one call of the kernel computes both layers."""
        return self.activation in TANH_GELU and self.c_fc.backend == self.c_proj.backend == "numba"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [tokens, width] from x [tokens, width]."""
        self.refuse_training(x)
        if self.fused:
            return kernels.multiply(x, self.c_proj.csr(), self.c_fc.csr())
        if self.activation in TANH_GELU:
            return self.c_proj(self.c_fc(x, gelu=True))
        return self.c_proj(ACT2FN[self.activation](self.c_fc(x)))


class SparseGPT2Block(Float32Inference):
    """LayerNorm, attention, LayerNorm, MLP, each pair around a residual connection."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = SparseGPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = SparseGPT2MLP(config, layer)

    def forward(self, x: torch.Tensor, packing: Packing, last: bool = False) -> torch.Tensor:
        """Return [tokens, width] from x [tokens, width], or [reviews, width] for the last tokens only."""
        mixed = self.attn(self.ln_1(x), packing, last)
        x = (packing.last(x) if last else x) + mixed
        return x + self.mlp(self.ln_2(x))


class SparseGPT2Model(Float32Inference):
    """Embeddings, blocks and the last LayerNorm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(SparseGPT2Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return hidden states [reviews, width] of the last real tokens, from input_ids [reviews, length]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.wte(packing.pack(input_ids)) + self.wpe(packing.pack(positions))
        for block in self.h[:-1]:
            x = block(x, packing)
        return self.ln_f(self.h[-1](x, packing, last=True))


class SparseGPT2ForSequenceClassification(Float32Inference):
    """The sparse counterpart of ``GPT2ForSequenceClassification``, made by ``convert_gpt2_to_sparse``."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = SparseGPT2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SequenceClassifierOutputWithPast:
        """Return logits [reviews, labels] from the last real token of each review.

        input_ids: [reviews, length], padded on the right; attention_mask: the same shape, 1 at real tokens. Without
        a mask, reviews end with their last token that is not ``config.pad_token_id``, as in ``transformers``.
        Raises ``ValueError`` when padding is elsewhere or cannot be distinguished from text.
        """
        self.refuse_training()
        lengths = self.lengths(input_ids, attention_mask)
        width = int(lengths.max())
        packing = Packing(lengths, width)
        return SequenceClassifierOutputWithPast(logits=self.score(self.transformer(input_ids[:, :width], packing)))

    def lengths(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the number of tokens [reviews] of each review, at least 1."""
        if attention_mask is not None:
            if (attention_mask.diff(dim=1) > 0).any():
                raise ValueError("reviews must be padded on the right (the attention mask is not)")
            return attention_mask.sum(1).clamp(min=1)
        pad = self.config.pad_token_id
        if pad is None:
            if len(input_ids) > 1:
                raise ValueError("several reviews must come with an attention mask or a config.pad_token_id")
            return torch.full((1,), input_ids.shape[1], device=input_ids.device)
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        return (places * (input_ids != pad)).amax(1).clamp(min=1)


def convert_gpt2_to_sparse(model: nn.Module, backend: str = "auto") -> SparseGPT2ForSequenceClassification:
    """Return the sparse model with the logits of a (masked) ``GPT2ForSequenceClassification``, within float rounding.

    Weights that are zero are dropped, as are heads and neurons that have none left (see ``compaction``); all others are
    copied. backend: see ``SparseLinear.from_dense``. Raises ``TypeError`` for another architecture.
    """
    if not isinstance(model, GPT2ForSequenceClassification) or model.config.add_cross_attention:
        raise TypeError(
            "`model` must be a GPT2ForSequenceClassification without cross-attention "
            f"(got {type(model).__name__}): use convert_to_sparse for other decoders"
        )
    return assemble(model, *compact_blocks(model), backend)


def compact(model: GPT2ForSequenceClassification) -> nn.Module:
    """Return a model with the same logits, without the heads and neurons that pruning left without weights.

    Where every block keeps all heads and equally many neurons, a plain ``GPT2ForSequenceClassification`` with another
    ``n_inner``; otherwise a ``SparseGPT2ForSequenceClassification`` of dense layers, whose blocks may differ.
    """
    layers, heads, neurons = compact_blocks(model)
    if set(heads) != {model.config.num_attention_heads} or len(set(neurons)) > 1:
        return assemble(model, layers, heads, neurons, "dense")
    small = copy.deepcopy(model)
    small.config.n_inner = neurons[0]
    for name, layer in layers.items():
        small.set_submodule(name, layer)
    return small.eval()


def assemble(
    model: GPT2ForSequenceClassification, layers: dict[str, Conv1D], heads: list[int], neurons: list[int], backend: str
) -> SparseGPT2ForSequenceClassification:
    """Return a sparse model from the results of ``compact_blocks`` and the model's other parameters."""
    config = copy.deepcopy(model.config)
    config.kept_heads, config.kept_neurons = heads, neurons
    sparse = skeleton(config)
    for name, layer in layers.items():
        sparse.set_submodule(name, SparseLinear.from_dense(layer, backend))
    state = {k: v.detach().to(torch.float32, copy=True) for k, v in model.state_dict().items()}
    fill(sparse, {name: state[name] for name, _ in sparse.named_parameters()})
    return sparse


def skeleton(config: GPT2Config) -> SparseGPT2ForSequenceClassification:
    """Return a model without storage, to be filled."""
    with torch.device("meta"):
        return shape_embeddings(SparseGPT2ForSequenceClassification(config))


def fill(model: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Set the other parameters of a skeleton whose sparse layers are in place."""
    model.load_state_dict(parameters, strict=False, assign=True)
    model.requires_grad_(False).eval()
