"""What the benchmarks compute; never how fast this machine is."""

import copy
import sys

import numpy as np
import pytest
import torch

from nbhelpers.data import IMDbDataset, load_reviews
from nbhelpers.models import load_tokenizer, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import blocks, int8
from nbhelpers.tools import benchmark
from nbhelpers.training import Recipe, train


@pytest.fixture
def shape(monkeypatch):
    """Make "mini" a shape of a few weights, without dropout, in float32."""

    def use(**sizes):
        rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 32}
        monkeypatch.setitem(benchmark.MODELS, "mini", shape | rates | sizes)
        monkeypatch.setattr(benchmark, "mixed_precision", lambda: "no")

    use()
    return use


def test_random_models_are_pruned_to_the_sparsity_in_single_weights_or_in_blocks(shape):
    single, in_blocks = (prunable_weights(benchmark.random_gpt2("mini", 0.75, block)) for block in (1, 4))
    for weights in (single, in_blocks):
        assert all((weight == 0).sum() == 0.75 * weight.numel() for weight in weights.values())
    for name, weight in in_blocks.items():  # [in, out]
        fours = (weight.view(-1, 4, weight.shape[1]) != 0).sum(1)
        assert ((fours == 0) | (fours == 4)).all() and not torch.equal(weight, single[name]), name


def test_whole_models_are_compared_on_equal_terms(shape, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    table = benchmark.compare_models("mini", 0.5, reviews=2, length=6, threads=(1, 2), repeats=2)
    missing = [name for name, engine in (("int8", int8), ("int8_blocks", blocks)) if not engine.is_available()]
    ours = [name for name, (_, engine) in benchmark.PACKED.items() if engine not in missing]
    assert table["model"].tolist() == 2 * ["dense", *ours]
    assert table["threads"].tolist() == [1] * (1 + len(ours)) + [2] * (1 + len(ours))
    assert (table[table["model"] == "dense"][["speedup", "logit_error"]] == [1, 0]).all().all()
    in_int8 = table["model"].str.contains("int8")
    assert (table["logit_error"][~in_int8] < 1e-4).all() and table["logit_error"][in_int8].between(1e-5, 0.2).all()
    assert "pip install onnxruntime" in capsys.readouterr().out
    assert torch.get_num_threads() == 1

    monkeypatch.setattr(int8, "is_available", lambda: False)
    table = benchmark.compare_models("mini", 0.5, reviews=2, length=6, repeats=1)
    assert table["model"].tolist() == ["dense", "dense, packed", "sparse"]


def test_onnx_runtime_computes_the_same_model_in_float32_and_with_all_products_in_int8(shape, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, ids = benchmark.random_gpt2("mini", 0.0), torch.randint(1, 20, (2, 6))
    files = benchmark.export_onnx(model, ids, str(tmp_path))
    functions = {name: benchmark.onnx_session(path, ids) for name, path in files.items()}
    exact, rounded = benchmark.logit_errors(functions, {"dense": model}, ids)
    assert exact < 1e-4 and 1e-5 < rounded < 0.2
    with pytest.raises(RuntimeError, match=r"at least 10 matrix products \(got 9\)"):
        benchmark.quantize_onnx(files["ONNX Runtime"], tmp_path / "more.onnx", 10)
    with pytest.raises(RuntimeError, match=r"must be at most 0\.001"):
        benchmark.logit_errors({"ONNX Runtime": functions["ONNX Runtime, int8"]}, {"dense": model}, ids)


def test_both_selections_drop_the_same_weights_and_ours_holds_the_scores_of_one_matrix_at_a_time(shape):
    shape(n_layer=6, n_embd=64)
    model = benchmark.random_gpt2("mini", 0.0)
    ours = benchmark.select_by_magnitude(model, 0.7)
    theirs = benchmark.select_by_torch(copy.deepcopy(model), 0.7)
    assert all(torch.equal(ours[name], theirs[name].bool()) for name in ours)
    table = benchmark.compare_selection("mini", 0.7, 1).set_index("engine")
    largest, weights = 4 * 64 * 64, table.loc["ours", "weights"]
    assert (table["dropped"] == round(0.7 * weights)).all() and table.loc["ours", "times_ours"] == 1
    # A mask is one byte per weight; the largest matrix's scores exist twice for a moment, and a bool of each.
    assert weights <= table.loc["ours", "extra_bytes"] < weights + 3 * 4 * largest
    assert table.loc["torch", "extra_bytes"] > 5 * table.loc["ours", "extra_bytes"]


# --- training ---


def test_a_step_of_our_loop_is_a_step_of_transformers_trainer(shape, alone, tmp_path):
    shape(vocab_size=8192)
    profile = get_profile("smoke", train_size=6, max_tokens=20)
    tokenizer, model = load_tokenizer(profile), benchmark.random_gpt2("mini", 0.0)
    data = IMDbDataset(load_reviews(profile)["train"], tokenizer, profile)
    # One batch of all reviews, so that the order does not matter; Adam's first step does not know its betas.
    recipe = Recipe(1e-2, len(data), steps=1, warmup_share=0.0, precision="no")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    train(ours, data, recipe)
    benchmark.trainer_for(theirs, data, recipe, tokenizer, str(tmp_path), "random").train()
    for (name, mine), other, start in zip(
        ours.named_parameters(), theirs.parameters(), model.parameters(), strict=True
    ):
        moved = (other.detach() - start.detach()).abs() > 0.009  # where the gradient is more than rounding
        assert moved.any() or "attn.c_attn.bias" in name, name
        torch.testing.assert_close(mine.detach()[moved], other.detach()[moved], rtol=0, atol=1e-4)


def test_training_and_prediction_are_timed_against_the_trainer(shape, alone):
    shape(vocab_size=8192)
    table = benchmark.compare_training("mini", 2, 20, steps=2, repeats=1)
    assert table[["task", "name"]].apply(tuple, axis=1).tolist() == [
        ("train", "ours"),
        ("train", "trainer"),
        ("train", "trainer, grouped"),
        ("predict", "ours"),
        ("predict", "trainer"),
    ]
    assert (table["reviews"] == 4).all() and (table["seconds"] > 0).all()
    ratio = table["seconds"] / table.groupby("task")["seconds"].transform("first")
    np.testing.assert_allclose(table["speedup"], ratio, rtol=1e-6)
