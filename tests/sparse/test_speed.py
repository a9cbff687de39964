"""Engines against each other: what is computed and counted; never how fast this machine is."""

import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers.sparse import formats, speed


def test_engines_agree_with_each_other():
    engines = speed.sparse_engines(formats.random_matrix(30, 20, 0.2), torch.randn(10, 20))
    expected = engines["dense"]()
    for name, run in engines.items():
        # A rounded activation is off by up to half its scale, and test_int8.py bounds what that makes.
        error = 0.1 if name.startswith("int8") else 1e-4
        torch.testing.assert_close(torch.as_tensor(run()), expected, rtol=1e-4, atol=error)


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
        for sparsity, factor in zip((0.5, 0.6, 0.7), speeds, strict=True):
            where = {"in": shape[0], "out": shape[1], "tokens": 16, "sparsity": sparsity}
            rows += [where | {"name": "numba", "speedup": factor}, where | {"name": "torch_csr", "speedup": 9.0}]
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
