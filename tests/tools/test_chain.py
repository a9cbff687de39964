"""What the benchmark of the chain measures and counts; never how fast this machine is."""

import pandas as pd
import psutil
import pytest
import torch

from nbhelpers.profiles import get_profile
from nbhelpers.study.work import Rates
from nbhelpers.tools import chain
from nbhelpers.workspace import open_run


def test_every_way_takes_its_turn_in_each_round_and_a_busy_one_has_a_neighbour(workspace, monkeypatch):
    turns = []

    def total_rates(run, processes, threads):
        spinning = any(child.cmdline()[-1:] == [chain.SPIN] for child in psutil.Process().children())
        turns.append((processes, threads, spinning))
        return Rates(100.0 * processes + len(turns), 1000.0)

    monkeypatch.setattr(chain, "total_rates", total_rates)
    monkeypatch.setattr(chain, "cores", lambda: 2)
    table = chain.compare_ways(open_run(get_profile("smoke")), repeats=3)
    ways = [(1, 1), (1, 2), (2, 1)]
    assert turns == 3 * [(p, t, busy) for busy in (False, True) for p, t in ways]
    assert not any(child.cmdline()[-1:] == [chain.SPIN] for child in psutil.Process().children())
    assert len(table) == 12
    trained = table[table["work"] == "tokens trained a second"].set_index(["processes", "threads", "neighbour"])
    assert trained.loc[(1, 1, "quiet"), ["low", "median", "high"]].tolist() == [104, 107, 110], "of turns 1, 7 and 13"


def test_the_rates_of_processes_add_up(workspace, monkeypatch):
    run = open_run(get_profile("smoke"))
    monkeypatch.setattr(chain.grid, "in_parallel", lambda f, arguments, *_: (Rates(2.0, 5.0) for _ in arguments))
    assert chain.total_rates(run, 3, 1) == Rates(6.0, 15.0)


def test_operations_are_those_that_the_profiler_counts(workspace):
    run = open_run(get_profile("smoke"))
    length = round(chain.Amounts(run).review)
    model = chain.create_model(run.profile)
    model.set_attn_implementation("eager")
    ids = torch.full((1, length), 7)
    with torch.profiler.profile(with_flops=True) as profiler, torch.inference_mode():
        model.base_model(ids)
    counted = sum(event.flops for event in profiler.key_averages())
    assert chain.token_operations(run) * length == pytest.approx(counted, rel=0.1)


def test_the_command_prints_and_writes_one_table(workspace, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(chain, "total_rates", lambda *_: Rates(1.0, 2.0))
    monkeypatch.setattr(chain.kernel, "LIBRARIES", ("json",))
    chain.main(["--profile", "smoke", "--repeats", "1", "--csv", str(tmp_path / "chain.csv")])
    table = pd.read_csv(tmp_path / "chain.csv")
    shares = table[table["work"].str.startswith("share")]["median"]
    assert len(shares) == 2 and (shares > 0).all()
    assert {"seconds to start a kernel", "seconds to draw a figure"} <= set(table["work"])
    assert "tokens judged a second" in capsys.readouterr().out
