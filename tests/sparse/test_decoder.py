"""Other decoders than GPT-2: their sparse forms have the logits of the masked models; a Llama through all stages."""

import pytest
import torch
from sparse_models import LLAMA, masked_llama, prune
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from nbhelpers import criteria
from nbhelpers.models import MINI, check_model, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import convert_to_sparse, count_actual_params, save_sparse
from nbhelpers.study import comparison, conversion, fine_tuning, recovery, students
from nbhelpers.study.choices import best_score
from nbhelpers.training.observers import GradientMagnitude, calibrate
from nbhelpers.workspace import open_run

# q and o are 16 x 16, k and v 16 x 8 (two groups of heads), and three of the MLP 16 x 24.
PRUNABLE = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
IDS = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]])


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    """A pruned model with RMSNorm, grouped-query attention, a gated MLP; Llama without any bias, Qwen2 with some."""
    if request.param == "llama":
        return masked_llama()
    torch.manual_seed(0)
    found = Qwen2ForSequenceClassification(Qwen2Config(**LLAMA, num_labels=2)).eval()
    for name, parameter in found.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return prune(found)


@torch.inference_mode()
def test_the_sparse_model_gives_the_logits_of_the_masked_one(model):
    expected = model(input_ids=IDS).logits
    for backend in ("auto", "torch_csr", "dense"):
        sparse = convert_to_sparse(model, backend)
        torch.testing.assert_close(sparse(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad, "the original is left as it was"


def test_parameters_are_counted_against_the_whole_architecture(model):
    total = sum(parameter.numel() for parameter in model.parameters())
    gone = round(0.8 * PRUNABLE)
    expected = {"total": total, "active": total - gone, "prunable": PRUNABLE, "encoder_sparsity": gone / PRUNABLE}
    assert count_actual_params(model) == pytest.approx(expected)
    assert count_actual_params(convert_to_sparse(model, "torch_csr")) == pytest.approx(expected)


def test_statistics_and_every_score_cover_every_prunable_weight(model):
    statistics = calibrate(model, [[5, 6, 7], [8, 9]], [0, 1])
    observer = GradientMagnitude(model)
    nn.functional.cross_entropy(model(input_ids=IDS).logits, torch.tensor([0, 1])).backward()
    observer.after_backward()
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    statistics |= {"pretrained": weights, "mean_abs_gradient": observer.mean(), "first_order_movement": weights}
    for name, score in (criteria.CRITERIA | criteria.COMPARATORS).items():
        scores = score(weights, statistics)
        assert {n: s.shape for n, s in scores.items()} == {n: w.shape for n, w in weights.items()}, name
    wanda = criteria.wanda(weights, statistics)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(wanda.sort(dim=1).values[0], torch.arange(16) / 16), "ranked within each output row"


def test_a_model_that_is_no_decoder_is_refused_with_the_reason():
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=20, **small))
    with pytest.raises(
        TypeError, match=r"must have layers that can be pruned \(BertForSequenceClassification has none\)"
    ):
        convert_to_sparse(encoder)
    with pytest.raises(TypeError, match="convert_to_sparse"):
        save_sparse(encoder, "nowhere")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama language model and a tokenizer in a folder, as the Hub provides them."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    torch.manual_seed(0)
    shape = LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    LlamaForCausalLM(LlamaConfig(**shape | ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_llama_goes_through_every_stage(llama_folder, workspace, alone):
    fields = {"seeds": 1, "sparsities": (0.9,), "recovery_learning_rates": (1e-3,), "precision": "no"}
    fields |= {"comparators": ()}
    run = open_run(get_profile("smoke", model=str(llama_folder), **fields))
    check_model(run.profile)
    fine_tuning.finetune_model(run)
    recovered = recovery.recover_all(run)
    assert recovered["revived"].sum() == 0 and len(recovered) == 5
    best = best_score(run)
    recovery.recover_in_parts(run)
    assert "structured" not in set(recovery.budget_curve(run)["model"].str.partition("_")[0])
    conversion.sparsify(run, best, 0.9)
    students.distil_all(run)
    assert students.compress_all(run)["file_bytes"].is_monotonic_decreasing
    assert recovery.structured_sparsities(run) == (), "heads and neurons are removed from a GPT-2 only"
    conversion.block_model(run, best, 0.9)
    assert conversion.int8_sources(run, best) == ["fine_tuned", f"blocks_{best}_90"]
    rounded = conversion.compare_int8(run, conversion.int8_sources(run, best))
    assert (rounded["largest_logit_difference"] > 0).all()
    comparison.open_test_part(run)
    table = comparison.comparison_table(run, comparison.rows_of(run)).set_index("model")
    sparse, masked = table.loc[f"sparse_{best}_90"], table.loc[f"recovered_{best}_90"]
    assert sparse["accuracy"] == masked["accuracy"]
    assert sparse["active_parameters"] == masked["active_parameters"] < table.loc["fine_tuned", "active_parameters"]
    assert sparse["encoder_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert type(run.load_model("fine_tuned")).__name__ == "LlamaForSequenceClassification"
    assert run.predict(f"sparse_{best}_90", ["A film to forget."]) == pytest.approx(
        run.predict(f"recovered_{best}_90", ["A film to forget."]), abs=1e-4
    )
