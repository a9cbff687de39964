"""What the benchmarks compute; never how fast this machine is."""

import copy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers.data import IMDbDataset, load_reviews
from nbhelpers.models import load_tokenizer, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import formats, speed
from nbhelpers.tools import benchmark
from nbhelpers.training import Recipe, train


def test_engines_agree_with_each_other():
    engines = speed.sparse_engines(formats.random_matrix(30, 20, 0.2), torch.randn(10, 20))
    expected = engines["dense"]()
    for run in engines.values():
        torch.testing.assert_close(torch.as_tensor(run()), expected, rtol=1e-4, atol=1e-4)


def test_the_table_of_engines_counts_useful_work_and_the_least_traffic():
    table = speed.compare_engines([(20, 30)], sparsities=[0.5, 0.9], tokens=[4], repeats=2)
    assert len(table) == 2 * len(speed.sparse_engines(formats.random_matrix(30, 20, 0.2), torch.randn(10, 20)))
    assert table.notna().all().all()
    assert (table[table.name == "dense"].speedup == 1).all()
    for sparsity, part in table.groupby("sparsity"):
        left = int(torch.count_nonzero(formats.to_weight(formats.random_matrix(30, 20, 1 - sparsity), 20)))
        activations = 4 * (4 * 20 + 4 * 30)
        for _, row in part.iterrows():
            weights = 4 * 20 * 30 if row["name"] == "dense" else 8 * left
            assert row["intensity"] == pytest.approx(2 * left * 4 / (weights + activations))
            assert row["gflops"] * row["median_ms"] * 1e6 == pytest.approx(2 * left * 4)
    few = speed.compare_engines([(20, 30)], [0.5], [4], 1, engines=("dense", "torch_csr"))
    assert few["name"].tolist() == ["dense", "torch_csr"]


def test_the_break_even_lies_where_the_straight_line_crosses_one():
    rows = []
    for shape, speeds in (((8, 4), (0.5, 0.8, 1.2)), ((4, 4), (1.1, 2, 3)), ((4, 8), (0.2, 0.3, 0.9))):
        for sparsity, speed in zip((0.5, 0.6, 0.7), speeds, strict=True):
            where = {"in": shape[0], "out": shape[1], "tokens": 16, "sparsity": sparsity}
            rows += [where | {"name": "numba", "speedup": speed}, where | {"name": "torch_csr", "speedup": 9.0}]
    table = speed.break_even(pd.DataFrame(rows).sample(frac=1, random_state=0))
    found = table.set_index(["in", "out"])["sparsity"]
    assert found[(8, 4)] == pytest.approx(0.65)
    assert found[(4, 4)] == 0.5, "already at the first sparsity that was measured"
    assert np.isnan(found[(4, 8)])


def test_the_machines_limits_are_positive_numbers():
    limits = speed.machine_limits()
    assert set(limits) == {"dense_gflops", "memory_gbs", "cache_gbs"}
    assert all(value > 0 for value in limits.values())
    assert torch.get_num_threads() == 1, "as conftest.py has set it: numba has not changed torch's number of threads"


def test_a_random_model_has_the_sparsity_it_was_asked_for_in_every_matrix(monkeypatch):
    monkeypatch.setitem(benchmark.MODELS, "small", {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40})
    model = benchmark.random_gpt2("small", 0.75)
    assert all((w == 0).sum() == 0.75 * w.numel() for w in prunable_weights(model).values())


def test_whole_models_are_compared_on_equal_terms(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.MODELS, "small", {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    table = benchmark.compare_models("small", 0.5, reviews=2, length=6, repeats=2)
    assert table["model"].tolist() == ["dense", "dense, packed", "sparse", "torch_csr"]
    assert table["speedup"][0] == 1
    assert "pip install onnxruntime" in capsys.readouterr().out


def test_both_ways_of_selecting_drop_the_same_number_of_the_same_weights(monkeypatch):
    tiny = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    monkeypatch.setitem(benchmark.MODELS, "mini", tiny)
    model = benchmark.random_gpt2("mini", 0.0)
    ours, theirs = benchmark.select_by_magnitude(model, 0.7), benchmark.select_by_torch(model, 0.7)
    assert all(torch.equal(ours[name], theirs[name].bool()) for name in ours)
    table = benchmark.compare_selection("mini", 0.7, 2).set_index("engine")
    assert (table["dropped"] == round(0.7 * table["weights"].iloc[0])).all()
    assert table.loc["ours", "times_ours"] == 1


def test_selection_holds_the_scores_of_one_matrix_at_a_time(monkeypatch):
    tiny = {"n_layer": 6, "n_embd": 64, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    monkeypatch.setitem(benchmark.MODELS, "mini", tiny)
    table = benchmark.compare_selection("mini", 0.7, 1).set_index("engine")
    largest, weights = 4 * 64 * 64, table.loc["ours", "weights"]
    # A mask is a byte a weight; the largest matrix's scores are there twice for a moment, and a bool of each.
    assert weights <= table.loc["ours", "extra_bytes"] < weights + 3 * 4 * largest
    assert table.loc["torch", "extra_bytes"] > 5 * table.loc["ours", "extra_bytes"]


# --- training ---


@pytest.fixture
def tiny_shape(monkeypatch):
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 8192, "n_positions": 32}
    monkeypatch.setitem(benchmark.MODELS, "mini", shape | rates)
    monkeypatch.setattr(benchmark, "mixed_precision", lambda: "no")


def test_a_step_of_our_loop_is_a_step_of_transformers_trainer(tiny_shape, alone, tmp_path):
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


def test_training_and_prediction_are_timed_against_the_trainer(tiny_shape, alone):
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
