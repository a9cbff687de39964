"""How many threads a training takes; what is measured is faked, so that no test depends on a clock."""

import pytest
import torch
from conftest import tiny_model

from nbhelpers.training import Recipe, timing


@pytest.mark.parametrize(("alone", "together", "threads"), [(1.0, 0.5, 4), (1.0, 0.8, 1), (1.0, 3.0, 1)])
def test_all_cores_train_where_that_is_clearly_faster_and_one_otherwise(monkeypatch, alone, together, threads):
    seen = []

    def timed(seconds, step):
        seen.append(torch.get_num_threads())
        return alone if seen[-1] == 1 else together

    monkeypatch.setattr(timing, "timed", timed)
    monkeypatch.setattr(timing, "cores", lambda: 4)
    assert timing.fastest_threads(tiny_model(), Recipe(1e-3, 2, precision="no"), 8) == threads
    assert seen == [1, 4] and torch.get_num_threads() == 1


def test_the_measured_step_trains_a_copy():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = timing.training_step(model, Recipe(1e-2, 2, precision="no"), 8)
    step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_time_is_the_median_without_the_first_call(monkeypatch):
    clock = iter([0, 10, 11, 11, 20, 22, 22, 30, 33, 33, 99])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.timed(25, lambda: calls.append(1)) == 2
    assert len(calls) == 4
