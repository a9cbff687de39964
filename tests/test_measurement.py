"""What measurement counts; never how fast this machine is."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from nbhelpers import measurement
from nbhelpers.sparse import convert_gpt2_to_sparse


def test_functions_take_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    table = measurement.compare_latency(functions, repeats=3, warmup=1)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert list(table.columns) == ["name", "median_ms", "low_ms", "high_ms"]
    assert {name: len(times) for name, times in table.attrs["times"].items()} == {"a": 3, "b": 3}
    assert ((table.low_ms <= table.median_ms) & (table.median_ms <= table.high_ms)).all()
    with pytest.raises(ValueError, match="at least 1"):
        measurement.compare_latency(functions, repeats=0)


def test_nothing_is_recorded_for_gradients():
    modes = []
    measurement.compare_latency({"a": lambda: modes.append(torch.is_inference_mode_enabled())}, repeats=1)
    measurement.peak_memory(lambda: modes.append(torch.is_inference_mode_enabled()))
    assert all(modes)


def test_speedups_are_medians_of_rounds():
    # Round by round the ratios are 2, 4 and 1: their median is 2, while the ratio of the medians would be 4.
    table = measurement.speedups({"dense": [2.0, 8.0, 4.0], "sparse": [1.0, 2.0, 4.0]})
    assert table.speedup.tolist() == [1.0, 2.0]
    assert table.loc[1, ["speedup_low", "speedup_high"]].tolist() == [1.5, 3.0]
    against = measurement.speedups({"dense": [2.0], "sparse": [1.0]}, baseline="sparse")
    assert against.speedup.tolist() == [0.5, 1.0]


def test_peak_memory_counts_what_is_held_at_one_time():
    def call():
        first = torch.ones(1000)  # 4,000 bytes
        second = torch.ones(500)  # 2,000 more
        del first
        return second, torch.ones(250)  # 1,000, after 4,000 were given back

    assert [measurement.peak_memory(call) for _ in range(3)] == [6000] * 3
    assert measurement.peak_memory(lambda: None) == 0


def test_bytes_in_memory_and_on_disk(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.append(model[0])
    assert measurement.tensor_bytes(model) == 4 * (12 + 4 + 8 + 8) + 8  # BatchNorm counts its batches in an int64
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert measurement.file_bytes(tmp_path) == 8


def test_models_are_measured_on_the_same_batches():
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, **tokens)
    dense = GPT2ForSequenceClassification(config)
    for block in dense.transformer.h:
        block.mlp.c_fc.weight.data[:, 3:] = 0
    models = {"dense": dense, "sparse": convert_gpt2_to_sparse(dense, "numba")}
    ids = torch.randint(1, 50, (4, 16))
    batches = [{"input_ids": ids[:n], "attention_mask": torch.ones_like(ids[:n])} for n in (1, 4)]
    table = measurement.measure_inference_efficiency(models, batches, repeats=3)
    assert list(table.columns) == [
        "model", "latency_ms", "latency_low_ms", "latency_high_ms",
        "speedup", "speedup_low", "speedup_high", "peak_memory_bytes",
    ]  # fmt: skip
    assert table.model.tolist() == ["dense", "sparse"]
    assert table.speedup[0] == 1 and (table.select_dtypes("number") > 0).all().all()
    for name, peak in zip(table.model, table.peak_memory_bytes, strict=True):
        activations = measurement.peak_memory(lambda name=name: models[name](**batches[1]))
        assert peak == measurement.tensor_bytes(models[name]) + activations
    with pytest.raises(ValueError, match="no batches"):
        measurement.measure_inference_efficiency(models, [], repeats=1)


def test_the_peak_of_a_process_is_seen_also_when_its_memory_was_freed_again():
    with measurement.PeakMemory(measurement.own_memory, 0.002) as memory:
        block = np.ones(12_500_000)  # 100 MB
        time.sleep(0.05)
        del block
    assert 90e6 < memory.peak - memory.before < 200e6
