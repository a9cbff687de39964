"""The measurements count the right things; none of these tests depends on the speed of the machine."""

import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import tiny_model
from torch import nn

from nbhelpers import measurement
from nbhelpers.sparse import convert_gpt2_to_sparse


def test_functions_take_turns_in_a_shuffled_order(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])

    def function(name, seconds):
        def run():
            order.append(name)
            # Round i takes i seconds more.
            clock[0] += seconds + len(order[4:]) // 4

        return run

    functions = {name: function(name, seconds) for name, seconds in zip("abcd", (1, 10, 100, 1000), strict=True)}
    table = measurement.compare_latency(functions, repeats=20, warmup=1)
    assert order[:4] == list("abcd")
    rounds = [order[i : i + 4] for i in range(4, 84, 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len(Counter(turn[0] for turn in rounds)) == 4 and len(set(map(tuple, rounds))) > 4
    assert list(table.columns) == ["name", "median_ms", "low_ms", "high_ms"]
    assert table["name"].tolist() == list("abcd")
    for name, seconds in zip("abcd", (1, 10, 100, 1000), strict=True):
        times = table.attrs["times"][name]
        # The i-th time is from round i, in which each function's place in the order adds at most one round.
        assert [round(t / 1000) - seconds - i in (0, 1) for i, t in enumerate(times)] == [True] * 20
    first_orders = list(rounds)
    del order[:]
    measurement.compare_latency(functions, repeats=20, warmup=1)
    assert [order[i : i + 4] for i in range(4, 84, 4)] == first_orders, "the same order each time"
    with pytest.raises(ValueError, match=r"must be at least 1 \(got 4 and 0\)"):
        measurement.compare_latency(functions, repeats=0)


def test_nothing_is_recorded_for_gradients():
    modes = []
    measurement.compare_latency({"a": lambda: modes.append(torch.is_inference_mode_enabled())}, repeats=1)
    measurement.peak_memory(lambda: modes.append(torch.is_inference_mode_enabled()))
    assert len(modes) > 2 and all(modes)


def test_speedups_are_medians_of_rounds():
    # Round by round the ratios are 2, 4 and 1: their median is 2, while the ratio of the medians would be 4.
    table = measurement.speedups({"dense": [2.0, 8.0, 4.0], "sparse": [1.0, 2.0, 4.0]})
    assert table["speedup"].tolist() == [1.0, 2.0]
    assert table.loc[1, ["speedup_low", "speedup_high"]].tolist() == [1.5, 3.0]


def allocate():
    first = torch.ones(1000)  # 4,000 bytes
    second = torch.ones(500)  # 2,000 more
    del first
    return second, torch.ones(250)  # 1,000, after 4,000 were freed


@pytest.mark.parametrize("gpu", [False, True])
def test_peak_memory_counts_what_is_held_at_one_time_on_the_device_of_the_call(gpu, monkeypatch):
    # A machine whose GPU is in use by something else.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: pytest.fail("counted on the GPU"))
    assert [measurement.peak_memory(allocate) for _ in range(2)] == [6000] * 2
    assert measurement.peak_memory(lambda: None) == 0


def test_the_peak_of_a_model_is_counted_on_its_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(measurement, "peak_memory", lambda _, device: asked.append(device.type) or 0)
    monkeypatch.setattr(
        measurement,
        "compare_speed",
        lambda functions, _: measurement.pd.DataFrame(
            {"name": list(functions), "median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0}
        ),
    )
    models = {"cpu": tiny_model(), "elsewhere": tiny_model().to("meta")}
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    measurement.measure_inference_efficiency(models, [batch], repeats=1)
    assert asked == ["cpu", "meta"]


def test_bytes_in_memory_and_on_disk(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.append(model[0])
    assert measurement.tensor_bytes(model) == 4 * (12 + 4 + 8 + 8) + 8  # BatchNorm counts its batches in an int64
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert measurement.file_bytes(tmp_path) == 8


def test_models_are_measured_on_the_same_batches():
    dense = tiny_model()
    models = {"dense": dense, "sparse": convert_gpt2_to_sparse(dense, "numba")}
    ids = torch.randint(1, 20, (4, 16))
    batches = [{"input_ids": ids[:n], "attention_mask": torch.ones_like(ids[:n])} for n in (1, 4)]
    table = measurement.measure_inference_efficiency(models, batches, repeats=3)
    latency = ["latency_ms", "latency_low_ms", "latency_high_ms"]
    assert [*table] == ["model", *latency, "speedup", "speedup_low", "speedup_high", "peak_memory_bytes"]
    assert table["model"].tolist() == ["dense", "sparse"]
    assert table["speedup"][0] == 1 and (table.select_dtypes("number") > 0).all().all()
    for name, peak in zip(table["model"], table["peak_memory_bytes"], strict=True):
        activations = measurement.peak_memory(lambda name=name: models[name](**batches[1]))
        assert peak == measurement.tensor_bytes(models[name]) + activations
    with pytest.raises(ValueError, match="`batches` must have at least one batch"):
        measurement.measure_inference_efficiency(models, [], repeats=1)


def test_the_peak_of_a_process_is_recorded_also_when_its_memory_was_freed():
    """Of a process of its own: the tests' own has freed memory that a new block may take."""
    script = "input(); block = bytearray(b'x') * 100_000_000; print('held', flush=True); input(); del block; input()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **options) as process:
        with measurement.PeakMemory(lambda: measurement.memory_of_tree(process.pid), 0.002) as memory:
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "held\n"
            time.sleep(0.5)
            process.stdin.write("\n")
            process.stdin.flush()
        # The interpreter may still be starting when the first measurement is taken.
        assert 95e6 < memory.peak - memory.before < 150e6
        process.stdin.write("\n")
    assert measurement.memory_of_tree(process.pid) == 0
