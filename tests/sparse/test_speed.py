"""Engines against each other: what is computed and counted; never how fast this machine is."""

import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers.sparse import formats, int8, speed


def test_engines_agree_with_each_other():
    engines = speed.sparse_engines(formats.random_matrix(30, 20, 0.2), torch.randn(10, 20))
    expected = engines["dense"]()
    for name, run in engines.items():
        # A rounded activation is off by up to half its scale, and test_int8.py bounds what that makes.
        error = 0.1 if name.startswith("int8") else 1e-4
        torch.testing.assert_close(torch.as_tensor(run()), expected, rtol=1e-4, atol=error)


def test_the_table_of_engines_counts_useful_work_and_the_least_traffic():
    table = speed.compare_engines([(22, 30)], sparsities=[0.5, 0.9], tokens=[4], repeats=2)
    here = speed.sparse_engines(formats.random_matrix(30, 22, 0.2), torch.randn(10, 22))
    expected = [name for name in speed.COMPARED_ENGINES if name.removesuffix(", 1x4") in here]
    assert table["name"].tolist() == 2 * expected
    assert table.notna().all().all()
    assert (table[table.name == "dense"].speedup == 1).all()
    for sparsity, part in table.groupby("sparsity"):
        single, in_blocks = (formats.random_matrix(30, 22, 1 - sparsity, block=block) for block in (1, 4))
        fours = [formats.to_weight(matrix, 22).split(4, 1) for matrix in (single, in_blocks)]
        used, whole = (sum(int((part != 0).any(1).sum()) for part in parts) for parts in fours)
        assert whole < used
        stored = {"dense": 4 * 22 * 30, "int8": 22 * 30, "int8_blocks": 8 * used, speed.IN_BLOCKS: 8 * whole}
        for _, row in part.iterrows():
            left = len((in_blocks if row["name"] == speed.IN_BLOCKS else single)[0])
            moved = stored.get(row["name"], 8 * left) + 4 * (4 * 22 + 4 * 30)
            assert row["intensity"] == pytest.approx(2 * left * 4 / moved)
            assert row["gflops"] * row["median_ms"] * 1e6 == pytest.approx(2 * left * 4)
    few = speed.compare_engines([(22, 30)], [0.5], [4], 1, engines=("dense", "torch_csr"))
    assert few["name"].tolist() == ["dense", "torch_csr"]


def test_engines_that_the_machine_does_not_have_are_left_out(monkeypatch):
    monkeypatch.setattr(int8, "is_available", lambda: False)
    table = speed.compare_engines([(20, 30)], [0.5], [4], 1)
    assert table["name"].tolist() == ["dense", "numba", "torch_csr", "scipy"]


def test_the_break_even_lies_where_the_straight_line_crosses_one():
    rows = []
    for shape, speeds in (((8, 4), (0.5, 0.8, 1.2)), ((4, 4), (1.1, 2, 3)), ((4, 8), (0.2, 0.3, 0.9))):
        for sparsity, factor in zip((0.5, 0.6, 0.7), speeds, strict=True):
            where = {"in": shape[0], "out": shape[1], "tokens": 16, "sparsity": sparsity}
            for name, value in (("dense", 1), ("int8", 2), ("numba", factor), ("int8_blocks", 2 * factor)):
                rows.append(where | {"name": name, "speedup": value})
    table = speed.break_even(pd.DataFrame(rows).sample(frac=1, random_state=0))
    assert set(zip(table["engine"], table["against"], strict=True)) == {
        (engine, against) for engine in ("numba", "int8_blocks") for against in ("dense", "int8")
    }
    by_pair = {pair: part.set_index(["in", "out"])["sparsity"] for pair, part in table.groupby(["engine", "against"])}
    found = by_pair["numba", "dense"]
    pd.testing.assert_series_equal(by_pair["int8_blocks", "int8"], found)
    assert by_pair["int8_blocks", "dense"][(8, 4)] == 0.5 and by_pair["numba", "int8"][(4, 4)] == pytest.approx(0.6)
    assert found[(8, 4)] == pytest.approx(0.65)
    assert found[(4, 4)] == 0.5, "already at the first sparsity that was measured"
    assert np.isnan(found[(4, 8)])


def test_the_machines_limits_are_positive_numbers():
    limits = speed.machine_limits()
    assert set(limits) - {"int8_gops"} == {"dense_gflops", "memory_gbs", "cache_gbs"}
    assert all(value > 0 for value in limits.values())
    assert torch.get_num_threads() == 1, "as conftest.py has set it: numba has not changed torch's number of threads"
