"""The sparse GPT-2 against the transformers model with the same (masked) weights."""

import pytest
import torch
import torch.nn.functional as F
from sparse_models import BACKENDS, SMALL, masked_gpt2, reviews
from transformers import GPT2Config, GPT2LMHeadModel

from nbhelpers.sparse import convert_gpt2_to_sparse, count_actual_params
from nbhelpers.sparse.gpt2 import SparseGPT2MLP

OPTIONS = [
    {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "relu", "n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "num_labels": 3},
]


def assert_same_logits(found, expected):
    # float32 sums of up to 64 terms in another order, through two blocks.
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_sparse_model_gives_the_dense_logits(backend):
    model = masked_gpt2()
    sparse = convert_gpt2_to_sparse(model, backend)
    for lengths in ([24], [9, 9], [5, 24, 1, 17]):
        batch = reviews(lengths)
        expected = model(**batch)
        assert_same_logits(sparse(**batch), expected)
        assert_same_logits(sparse(batch["input_ids"]), expected)


@torch.inference_mode()
@pytest.mark.parametrize("options", OPTIONS)
def test_configurations_are_followed(options):
    model, batch = masked_gpt2(**options), reviews([20, 7, 13])
    assert_same_logits(convert_gpt2_to_sparse(model, "numba")(**batch), model(**batch))


@torch.inference_mode()
def test_in_the_last_block_only_the_last_tokens_are_computed():
    sparse, seen = convert_gpt2_to_sparse(masked_gpt2(), "numba"), []
    for block in sparse.transformer.h:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    sparse(**reviews((9, 4, 1)))
    assert seen == [9 + 4 + 1, 3]


@torch.inference_mode()
def test_padding_changes_nothing():
    sparse, batch = convert_gpt2_to_sparse(masked_gpt2(), "numba"), reviews([11, 6])
    wide = {name: F.pad(tensor, (0, 9)) for name, tensor in batch.items()}
    other_ids = {**wide, "input_ids": wide["input_ids"] + 7 * (1 - wide["attention_mask"])}
    alone = [sparse(ids[None, :n]).logits[0] for ids, n in zip(batch["input_ids"], (11, 6), strict=True)]
    for padded in (batch, wide, other_ids):
        torch.testing.assert_close(sparse(**padded).logits, torch.stack(alone), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_last_token_is_found_as_transformers_does():
    ids = torch.tensor([[5, 0, 6, 7, 0], [8, 9, 0, 0, 0], [0, 0, 0, 0, 0]])
    model = masked_gpt2()
    sparse = convert_gpt2_to_sparse(model, "numba")
    assert_same_logits(sparse(ids), model(ids))
    model.config.pad_token_id = sparse.config.pad_token_id = None
    assert_same_logits(sparse(ids[:1]), model(ids[:1]))
    with pytest.raises(ValueError, match="pad_token_id"):
        sparse(ids)
    with pytest.raises(ValueError, match="must be padded on the right"):
        sparse(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 3))


def test_other_models_training_and_other_types_are_refused():
    with pytest.raises(TypeError, match="got GPT2LMHeadModel"):
        convert_gpt2_to_sparse(GPT2LMHeadModel(GPT2Config(**SMALL)))
    sparse = convert_gpt2_to_sparse(masked_gpt2(), "dense")
    with pytest.raises(RuntimeError, match="for inference"):
        sparse.train()(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="must stay in float32"):
        sparse.half()
    assert sparse.transformer.wte.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


@torch.inference_mode()
def test_the_fused_mlp_refuses_tensors_of_another_device():
    mlp = convert_gpt2_to_sparse(masked_gpt2(), "numba").transformer.h[0].mlp
    assert isinstance(mlp, SparseGPT2MLP) and mlp.fused
    with pytest.raises(RuntimeError, match=r"all tensors on the CPU \(got cpu, meta\)"):
        mlp(torch.ones(3, 16, device="meta"))
    with pytest.raises(RuntimeError, match=r"all tensors on the CPU \(got meta\)"):
        mlp.to("meta")(torch.ones(3, 16, device="meta"))


def test_parameters_are_counted_alike_in_both_forms():
    model = masked_gpt2(density=0.5)  # no neuron is without any weight
    blocks = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    prunable = sum(p.numel() for p in blocks)
    zeros = sum(int((p == 0).sum()) for p in blocks)
    total = sum(p.numel() for p in model.parameters())
    expected = {"total": total, "active": total - zeros, "prunable": prunable, "encoder_sparsity": zeros / prunable}
    for counted in (model, *(convert_gpt2_to_sparse(model, backend) for backend in BACKENDS)):
        assert count_actual_params(counted) == pytest.approx(expected)
