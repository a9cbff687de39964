"""Panel of notebook 04: measured latency."""

import functools
from collections.abc import Callable

import pandas as pd

from nbhelpers.measurement import compare_speed
from nbhelpers.report.panels.shared import blank, draw_ring, explore, slider
from nbhelpers.report.style import COLORS, in_percent
from nbhelpers.sparse import convert_to_sparse
from nbhelpers.study import conversion, inputs, pruning
from nbhelpers.training.timing import with_threads
from nbhelpers.workspace import Run


class LatencyPanel:
    """The measured speed at a sparsity, a batch size and a number of threads, next to the dense model.

    table: columns sparsity, batch, threads, latency_ms and speedup with _low and _high, dense_ms. measure(sparsity=,
    batch=, threads=) -> such a row, measured now.
    """

    def __init__(self, table: pd.DataFrame, measure: Callable[..., dict]):
        self.table, self.measure, self.measured_now = table, measure, {}
        choices = {name: sorted(table[name].unique().tolist()) for name in ("sparsity", "batch", "threads")}
        middle = choices["batch"][len(choices["batch"]) // 2]
        self.controls = {
            "sparsity": slider("removed", choices["sparsity"], choices["sparsity"][-2:][0], "{:.0%}".format),
            "batch": slider("batch", choices["batch"], middle, str),
            "threads": slider("threads", choices["threads"], choices["threads"][-1], str),
        }
        self.actions = {"measure now": self.measure_now}
        self.figure, self.title, (self.curve, self.bars) = blank(2, 3.6, width_ratios=(1.5, 1))
        self.draw()

    def draw(self) -> None:
        self.lines = {}
        for key, part in self.table.sort_values("sparsity").groupby(["batch", "threads"]):
            (line,) = self.curve.plot(part["sparsity"], part["speedup"], marker="o", ms=4, color=COLORS["sparse"])
            band = self.curve.fill_between(
                part["sparsity"], part["speedup_low"], part["speedup_high"], color=COLORS["sparse"], lw=0
            )
            self.lines[key] = line, band
        self.ring = draw_ring(self.curve)
        (self.star,) = self.curve.plot([], [], "*", color=COLORS["merged"], markersize=12, zorder=6)
        self.curve.axhline(1, color=COLORS["dense"], linestyle="--")
        self.curve.set(
            xlabel="share of block weights removed",
            ylabel="speed, dense = 1",
            ylim=(0, 1.2 * self.table["speedup"].max()),
        )
        self.curve.set_title("pale: other batches and threads; band: quartiles")
        in_percent(self.curve.xaxis)
        self.pair = self.bars.barh([0, 1], [1, 1], color=[COLORS["dense"], COLORS["sparse"]])
        (self.spread,) = self.bars.plot([], [], color=COLORS["compact"], linewidth=3)
        self.bars.set_yticks([0, 1], ["dense", "sparse"])
        self.bars.set(xlabel="milliseconds a batch", title="time of a batch")
        self.bars.invert_yaxis()

    def measure_now(self, **position) -> None:
        self.measured_now[tuple(position.values())] = self.measure(**position)

    def update(self, sparsity: float, batch: int, threads: int) -> None:
        for key, (line, band) in self.lines.items():
            line.set_alpha(1.0 if key == (batch, threads) else 0.15)
            band.set_alpha(0.2 if key == (batch, threads) else 0)
        position = (sparsity, batch, threads)
        row = self.table.set_index(["sparsity", "batch", "threads"]).loc[position]
        self.ring.set_data([sparsity], [row["speedup"]])
        now = self.measured_now.get(position)
        self.star.set_data(*([[sparsity], [now["speedup"]]] if now else [[], []]))
        self.pair[0].set_width(row["dense_ms"])
        self.pair[1].set_width(row["latency_ms"])
        self.spread.set_data([row["latency_low_ms"], row["latency_high_ms"]], [1, 1])
        self.bars.set_xlim(0, 1.1 * max(row["dense_ms"], row["latency_high_ms"]))
        sliders = f"{sparsity:.0%} removed, batch of {batch}, {threads} thread{'s' * (threads > 1)}"
        self.title.set_text(
            f"{sliders}: {row['latency_ms']:.1f} ms instead of {row['dense_ms']:.1f}, "
            + f"{row['speedup']:.2f} times as fast"
            + (f"; measured now {now['speedup']:.2f}" if now else "")
        )


def latency_panel(run: Run) -> None:
    """Show sliders over the latencies of notebook 04, and a button that measures a position once more."""
    table = run.load_table("latency")
    dense = table[table["model"] == "dense"].set_index(["batch", "threads"])["latency_ms"].rename("dense_ms")
    table = table[table["model"] != "dense"].join(dense, on=["batch", "threads"])

    @functools.cache
    def models(sparsity: float) -> dict:
        dense = run.load_model("fine_tuned")
        if not sparsity:
            return {"dense": dense, "sparse": convert_to_sparse(dense, backend="dense")}
        return {
            "dense": dense,
            "sparse": convert_to_sparse(pruning.prune_model(run, conversion.masks_of(run, sparsity))),
        }

    def measure(sparsity: float, batch: int, threads: int) -> dict:
        ids = inputs.latency_batch(run, batch)
        with with_threads(threads):
            functions = {name: functools.partial(model, **ids) for name, model in models(sparsity).items()}
            return compare_speed(functions, run.profile.latency_repeats).iloc[-1].to_dict()

    explore(LatencyPanel(table, measure))
