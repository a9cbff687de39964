"""Panels: in JupyterLab a figure with sliders; under papermill, in HTML and on paper the same figure, at one position.

A panel has a ``figure``, ``controls`` (a widget a name) and ``update(**values)``, which moves what the figure shows. It
redraws artists that are there already: making a figure anew at every move would take longer than a slider may lag.
"""

import base64
import functools
import io
import os
import time
from collections.abc import Callable, Iterable

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import expit, rel_entr

from nbhelpers import experiments, masks, pruning
from nbhelpers.criteria import votes_needed
from nbhelpers.evaluation import wilson_interval
from nbhelpers.measurement import compare_speed, with_threads
from nbhelpers.models import LABEL_NAMES, position, predict_logits, prunable_weights
from nbhelpers.plots import COLORS, color, label
from nbhelpers.progress import track
from nbhelpers.sparse import convert_to_sparse
from nbhelpers.style import in_percent
from nbhelpers.workspace import Run

MOST_WEIGHTS = 2_000_000  # of a larger model, a sample of this size follows the sliders
BATCH_TOKENS, MOST_REVIEWS = 2000, 40  # of the small validation batch: what two cores judge in a tenth of a second
AHEAD = 6.0  # seconds that a panel may take, before it is shown, to find out what its sliders will ask for


def can_be_moved() -> bool:
    """Whether somebody may sit in front of this notebook: not where the pipeline runs it."""
    return "NBHELPERS_BATCH" not in os.environ


# --- showing ---


def blank(columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure that belongs to no backend and its axes [columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def picture(figure: Figure) -> bytes:
    """A figure as PNG, for a screen: fast rather than small."""
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def explore(panel) -> None:
    """Show a panel: with its controls where they can be moved, and as a picture everywhere else."""

    def values() -> dict:
        return {name: control.value for name, control in panel.controls.items()}

    if can_be_moved() and hasattr(panel, "prepare"):
        panel.prepare()
    panel.update(**values())
    image = widgets.Image(value=picture(panel.figure), format="png", layout={"max_width": "100%"})
    # What was laid out once stays where it is: to lay it out again takes as long as to draw it.
    panel.figure.set_layout_engine("none")
    shown = {"image/png": base64.b64encode(image.value).decode(), "text/plain": panel.__doc__.splitlines()[0]}
    if can_be_moved():

        def moved(_) -> None:
            panel.update(**values())
            image.value = picture(panel.figure)

        for control in panel.controls.values():
            control.observe(moved, names="value")
        buttons = [button_of(text, action, values, moved) for text, action in getattr(panel, "actions", {}).items()]
        row = widgets.HBox([*panel.controls.values(), *buttons], layout={"flex_flow": "row wrap"})
        # Both in one output: who cannot show a widget shows the picture.
        shown |= widgets.VBox([row, image])._repr_mimebundle_()
    display(shown, raw=True)


def button_of(text: str, action: Callable, values: Callable[[], dict], moved: Callable) -> widgets.Button:
    """A button that does action(**values), can not be pressed meanwhile, and has the figure redrawn."""
    button = widgets.Button(description=text, layout={"width": "auto"})

    def clicked(_) -> None:
        button.disabled = True
        try:
            action(**values())
            moved(None)
        finally:
            button.disabled = False

    button.on_click(clicked)
    return button


def slider(description: str, options: Iterable, value, spell: Callable[[object], str]) -> widgets.SelectionSlider:
    """A slider over values that were measured, and only these."""
    return widgets.SelectionSlider(options=[(spell(o), o) for o in options], value=value, description=description)


def share_slider(description: str, value: float) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value,
        min=0,
        max=0.99,
        step=0.01,
        description=description,
        readout_format=".0%",
        style={"description_width": "6em"},
    )


class Heatmap:
    """A table drawn as coloured cells with their numbers, which can be given other values."""

    def __init__(self, ax, table: pd.DataFrame, spell: str = "{:.0%}"):
        self.spell, shape = spell, table.shape
        self.image = ax.imshow(np.zeros(shape), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        places = [(x, y) for y in range(shape[0]) for x in range(shape[1])]
        self.texts = [ax.text(x, y, "", ha="center", va="center", fontsize="small") for x, y in places]
        ax.set_xticks(range(shape[1]), [str(name) for name in table.columns], rotation=30, ha="right")
        ax.set_yticks(range(shape[0]), [str(name) for name in table.index])
        ax.grid(False)

    def set(self, values: np.ndarray) -> None:
        self.image.set_data(values)
        for text, value in zip(self.texts, np.ravel(values), strict=True):
            text.set(
                text="" if np.isnan(value) else self.spell.format(value), color="black" if value > 0.6 else "white"
            )


# --- 02: thresholds and merges ---


def ranks(values: np.ndarray) -> np.ndarray:
    """The share of values below the middle of each value, float32 [n]: round(q * n) of them are below q.

    Of equals the first ones are the lower, as in ``masks.select``.
    """
    found = np.empty(len(values), np.float32)
    found[np.argsort(values, kind="stable")] = (np.arange(len(values)) + 0.5) / len(values)
    return found


def independent(quantiles: list[float], merge: str) -> float:
    """The share that a merge would flag if the criteria had nothing to do with each other."""
    counts = np.ones(1)
    for q in quantiles:
        counts = np.convolve(counts, [1 - q, q])  # how likely 0, 1, 2 ... of them flag a weight
    return float(counts[votes_needed(len(quantiles))[merge] :].sum())


class CriteriaPanel:
    """Which weights are flagged, as each criterion's threshold moves.

    scores: {criterion: {parameter name: score}}. Of more than ``MOST_WEIGHTS`` weights, a random sample is followed.
    """

    def __init__(self, scores: dict, share: float):
        self.names, parameters = list(scores), list(scores[next(iter(scores))])
        self.rows = self.sample({name: scores[self.names[0]][name].numel() for name in parameters})
        self.sizes = np.array([len(rows) for rows in self.rows.values()])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.ranks = {c: ranks(self.flat(tensors)) for c, tensors in scores.items()}
        self.mean_rank = ranks(sum(self.ranks.values()))
        self.cells = pd.DataFrame([position(name) for name in parameters], columns=["layer", "module"])
        self.controls = {c: share_slider(c, share) for c in self.names}
        self.controls["merge"] = widgets.Dropdown(options=["all", "majority", "any", "mean_rank"], description="merge")
        self.draw()

    def sample(self, counts: dict[str, int]) -> dict[str, np.ndarray]:
        """Of each matrix, the places of the weights that are followed: all of them, or a fixed random sample."""
        keep = min(1.0, MOST_WEIGHTS / sum(counts.values()))
        rng = np.random.default_rng(0)
        return {n: np.sort(rng.choice(k, max(1, round(keep * k)), replace=False)) for n, k in counts.items()}

    def flat(self, tensors: dict) -> np.ndarray:
        return np.concatenate([tensors[name].flatten().numpy()[rows] for name, rows in self.rows.items()])

    def draw(self) -> None:
        self.figure, (bars, kept, shared) = blank(3, 11, 3.6, width_ratios=(1.1, 1.2, 1.1))
        names = [*self.names, "merged"]
        self.bars = bars.barh(range(len(names)), np.zeros(len(names)), color=[color(name) for name in names])
        self.numbers = [bars.text(0, y, "", va="center", fontsize="small") for y in range(len(names))]
        (self.expected,) = bars.plot([], [], "|", color=COLORS["dense"], markersize=22, markeredgewidth=2)
        bars.set_yticks(range(len(names)), [label(name) for name in names])
        bars.set(xlim=(0, 1.18), xlabel="share flagged")
        bars.invert_yaxis()
        in_percent(bars.xaxis)
        table = self.cells.assign(value=0.0).pivot(index="layer", columns="module", values="value")
        self.kept = Heatmap(kept, table)
        kept.set(title="kept of each matrix", ylabel="layer")
        square = pd.DataFrame(0.0, self.names, self.names)
        self.shared = Heatmap(shared, square)
        shared.set_title("of the row, flagged by the column", fontsize="medium")
        self.title = self.figure.suptitle("", x=0.01, ha="left", fontsize="medium")

    def update(self, merge: str, **quantiles: float) -> None:
        flags = {c: self.ranks[c] < quantiles[c] for c in self.names}
        if merge == "mean_rank":
            merged = self.mean_rank < np.mean(list(quantiles.values()))
        else:
            merged = sum(flag.view(np.uint8) for flag in flags.values()) >= votes_needed(len(flags))[merge]
        shares = [flag.mean() for flag in (*flags.values(), merged)]
        for bar, number, share in zip(self.bars, self.numbers, shares, strict=True):
            bar.set_width(share)
            number.set(x=share + 0.02, text=f"{share:.1%}")
        dropped = np.add.reduceat(merged, self.starts, dtype=np.int64) / self.sizes
        kept = self.cells.assign(value=1 - dropped).pivot(index="layer", columns="module", values="value")
        self.kept.set(kept.to_numpy())
        overlap = [[(a & b).sum() / max(1, a.sum()) for b in flags.values()] for a in flags.values()]
        self.shared.set(np.array(overlap))
        text = f"{merge.replace('_', ' ')}: {shares[-1]:.1%} of the weights are flagged"
        if merge == "mean_rank":
            self.expected.set_data([], [])
        else:
            chance = independent(list(quantiles.values()), merge)
            self.expected.set_data([chance], [len(flags)])
            text += f"; criteria that had nothing in common would flag {chance:.1%}"
        self.title.set_text(text)


def criteria_panel(run: Run) -> None:
    """A slider a criterion and a choice of merge: flagged share, kept weights by matrix, and overlap follow."""
    explore(CriteriaPanel(pruning.score_weights(run), run.profile.main_sparsity))


# --- 03: pruning, review by review ---


def small_batch(run: Run) -> np.ndarray:
    """Row numbers of some validation reviews, drawn once: ``BATCH_TOKENS`` of them, and at least eight reviews."""
    rows = experiments.dataset(run, "validation").input_ids
    order = np.random.default_rng(0).permutation(len(rows))[:MOST_REVIEWS]
    tokens = np.cumsum([len(rows[i]) for i in order])
    return order[: max(8, int((tokens <= BATCH_TOKENS).sum()))]


class SparsityPanel:
    """What each review of a small batch makes of it when weights go, and when training goes on.

    run: one whose notebook 03 has been run. Answers are kept: a position costs its time once, and a small model
    is asked for all of them before the first move.
    """

    def __init__(self, run: Run):
        self.run, self.rows = run, small_batch(run)
        data = experiments.dataset(run, "validation")
        self.ids, self.labels = [data.input_ids[i] for i in self.rows], data.labels[self.rows]
        self.model = run.load_model("fine_tuned")
        self.whole = {name: weight.detach().clone() for name, weight in prunable_weights(self.model).items()}
        self.scores = functools.cache(lambda criterion: pruning.scores_of(run, criterion))
        self.dense, self.answers = self.chances(self.model), {}
        curves = run.load_table("curves")
        self.curves = curves[(curves["split"] == "validation") & curves["criterion"].isin(pruning.MAIN)]
        main = run.profile.main_sparsity
        every = sorted(self.curves["sparsity"].unique())
        self.controls = {
            "criterion": widgets.Dropdown(options=pruning.MAIN, value="merged", description="criterion"),
            "stage": widgets.ToggleButtons(options=["pruned", "recovered"], style={"button_width": "8em"}),
            "sparsity": slider("removed", every, main, "{:.0%}".format),
        }
        self.draw()

    def chances(self, model) -> np.ndarray:
        """P(the right label) of each review."""
        logits = predict_logits(model, self.ids, len(self.ids))
        return experiments.probabilities(logits)[np.arange(len(self.labels)), self.labels]

    def answer(self, *place) -> np.ndarray:
        """What ``ask`` has found at a position, asked once."""
        if place not in self.answers:
            self.answers[place] = self.ask(*place)
        return self.answers[place]

    def ask(self, criterion: str, stage: str, sparsity: float) -> np.ndarray:
        """P(the right label) of each review by the model at a position."""
        if stage == "recovered":
            return self.chances(self.run.load_model(experiments.model_name(stage, criterion, sparsity)))
        weights = prunable_weights(self.model)
        for name, kept in masks.select(self.scores(criterion), sparsity).items():
            weights[name].data.copy_(self.whole[name] * kept)
        return self.chances(self.model)

    def prepare(self) -> None:
        """Ask for as many positions ahead as there is time for, those of the criterion that is shown first."""
        there = self.curves[["criterion", "stage", "sparsity"]].drop_duplicates()
        first = there["criterion"] == self.controls["criterion"].value
        begun = time.monotonic()
        for key in track(
            list(pd.concat([there[first], there[~first]]).itertuples(index=False, name=None)), "asking ahead"
        ):
            if time.monotonic() - begun < AHEAD:
                self.answer(*key)

    def draw(self) -> None:
        self.figure, (curve, dots) = blank(2, 10.5, 3.8)
        self.lines = {}
        for (criterion, stage), part in self.curves.groupby(["criterion", "stage"], sort=False):
            mean = part.groupby("sparsity")["accuracy"].mean()
            style = {"pruned": "--", "recovered": "-"}[stage]
            (self.lines[criterion, stage],) = curve.plot(
                mean.index, mean, style, color=color(criterion), marker="o", ms=4
            )
        (self.here,) = curve.plot([], [], "o", color=COLORS["dense"], markersize=13, markerfacecolor="none", zorder=5)
        curve.set(xlabel="share of block weights removed", ylabel="accuracy, all validation reviews")
        curve.set_title("dashed: pruned, solid: recovered")
        for axis in (curve.xaxis, curve.yaxis):
            in_percent(axis)
        dots.axhspan(0, 0.5, xmin=0.5, color=COLORS["sparse"], alpha=0.08)
        dots.axhspan(0.5, 1, xmax=0.5, color=COLORS["gradient"], alpha=0.08)
        dots.text(0.98, 0.03, "forgotten", ha="right", color=COLORS["sparse"])
        dots.text(0.02, 0.97, "learned", va="top", color=COLORS["gradient"])
        self.dots = dots.scatter(self.dense, self.dense, s=36, zorder=3)
        dots.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="P(right) by the dense model", ylabel="P(right) by this one"
        )
        dots.set_title("each dot is a review")
        self.title = self.figure.suptitle("", x=0.01, ha="left", fontsize="medium")

    def update(self, criterion: str, stage: str, sparsity: float) -> None:
        there = self.curves[(self.curves["criterion"] == criterion) & (self.curves["stage"] == stage)]
        known = there.groupby("sparsity")["accuracy"].mean()
        for (name, at), line in self.lines.items():
            line.set_alpha(1.0 if (name, at) == (criterion, stage) else 0.25)
        if sparsity not in known.index:
            self.here.set_data([], [])
            self.title.set_text(f"{label(criterion)} was not {stage} at {sparsity:.0%}: move the slider")
            return
        now = self.answer(criterion, stage, sparsity)
        self.here.set_data([sparsity], [known[sparsity]])
        self.dots.set_offsets(np.stack([self.dense, now], 1))
        changed = np.where((self.dense > 0.5) & (now <= 0.5), 1, np.where((self.dense <= 0.5) & (now > 0.5), 2, 0))
        self.dots.set_color(np.array([COLORS["baseline"], COLORS["sparse"], COLORS["gradient"]])[changed])
        low, high = wilson_interval(now > 0.5)
        right, dense = (now > 0.5).sum(), (self.dense > 0.5).sum()
        self.title.set_text(
            f"{label(criterion)}, {stage}, {sparsity:.0%} removed: {right} of these {len(now)} reviews right "
            f"({low:.0%} to {high:.0%}), the dense model {dense}; of all {known[sparsity]:.1%}"
        )


def sparsity_panel(run: Run) -> None:
    """A slider over the sparsities of the stored scores and models: which reviews of a small batch stay right."""
    explore(SparsityPanel(run))


# --- 04: measured latency ---


class LatencyPanel:
    """What was measured of a sparsity, a batch size and a number of threads, beside the dense model.

    table: columns sparsity, batch, threads, latency_ms and speedup with _low and _high, dense_ms. measure(sparsity=,
    batch=, threads=) -> such a row, measured now.
    """

    def __init__(self, table: pd.DataFrame, measure: Callable[..., dict] | None = None):
        self.table, self.measure, self.now = table, measure, {}
        choices = {name: sorted(table[name].unique().tolist()) for name in ("sparsity", "batch", "threads")}
        middle = choices["batch"][len(choices["batch"]) // 2]
        self.controls = {
            "sparsity": slider("removed", choices["sparsity"], choices["sparsity"][-2:][0], "{:.0%}".format),
            "batch": slider("batch", choices["batch"], middle, str),
            "threads": slider("threads", choices["threads"], choices["threads"][-1], str),
        }
        self.actions = {"measure now": self.measure_now} if measure else {}
        self.figure, (self.curve, self.bars) = blank(2, 10.5, 3.6, width_ratios=(1.5, 1))
        self.title = self.figure.suptitle("", x=0.01, ha="left", fontsize="medium")
        self.draw()

    def draw(self) -> None:
        self.lines = {}
        for key, part in self.table.sort_values("sparsity").groupby(["batch", "threads"]):
            (line,) = self.curve.plot(part["sparsity"], part["speedup"], marker="o", ms=4, color=COLORS["sparse"])
            band = self.curve.fill_between(
                part["sparsity"], part["speedup_low"], part["speedup_high"], color=COLORS["sparse"], lw=0
            )
            self.lines[key] = line, band
        (self.here,) = self.curve.plot(
            [], [], "o", color=COLORS["dense"], markersize=13, markerfacecolor="none", zorder=5
        )
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

    def measure_now(self, **where) -> None:
        self.now[tuple(where.values())] = self.measure(**where)

    def update(self, sparsity: float, batch: int, threads: int) -> None:
        for key, (line, band) in self.lines.items():
            line.set_alpha(1.0 if key == (batch, threads) else 0.15)
            band.set_alpha(0.2 if key == (batch, threads) else 0)
        at = self.table[["sparsity", "batch", "threads"]].eq((sparsity, batch, threads)).all(axis=1)
        row = self.table[at].iloc[0]
        self.here.set_data([sparsity], [row["speedup"]])
        now = self.now.get((sparsity, batch, threads))
        self.star.set_data(*([[sparsity], [now["speedup"]]] if now else [[], []]))
        self.pair[0].set_width(row["dense_ms"])
        self.pair[1].set_width(row["latency_ms"])
        self.spread.set_data([row["latency_low_ms"], row["latency_high_ms"]], [1, 1])
        self.bars.set_xlim(0, 1.1 * max(row["dense_ms"], row["latency_high_ms"]))
        where = f"{sparsity:.0%} removed, batch of {batch}, {threads} thread{'s' * (threads > 1)}"
        self.title.set_text(
            f"{where}: {row['latency_ms']:.1f} ms instead of {row['dense_ms']:.1f}, {row['speedup']:.2f} times as fast"
            + (f"; measured now {now['speedup']:.2f}" if now else "")
        )


def latency_panel(run: Run) -> None:
    """Sliders over what notebook 04 has measured, and a button that measures a position once more."""
    table = run.load_table("latency")
    dense = table[table["model"] == "dense"].set_index(["batch", "threads"])["latency_ms"].rename("dense_ms")
    table = table[table["model"] != "dense"].join(dense, on=["batch", "threads"])

    @functools.cache
    def models(sparsity: float) -> dict:
        dense = run.load_model("fine_tuned")
        if not sparsity:
            return {"dense": dense, "sparse": convert_to_sparse(dense, backend="dense")}
        return {"dense": dense, "sparse": convert_to_sparse(pruning.prune_model(run, pruning.masks_of(run, sparsity)))}

    def measure(sparsity: float, batch: int, threads: int) -> dict:
        ids = experiments.latency_batch(run, batch)
        with with_threads(threads):
            functions = {name: functools.partial(model, **ids) for name, model in models(sparsity).items()}
            return compare_speed(functions, run.profile.latency_repeats).iloc[-1].to_dict()

    explore(LatencyPanel(table, measure))


# --- 05: softened probabilities ---


class TemperaturePanel:
    """What a temperature does to the probabilities of one review, and to what a student is asked for.

    logits: {"teacher": [n, 2], and of students}; texts and labels [n]. Of the reviews, nine are offered: those between
    the teacher's worst and its best, and those on which teacher and student differ most.
    """

    T = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)

    def __init__(self, logits: dict[str, np.ndarray], texts: list[str], labels: np.ndarray):
        self.logits, self.texts, self.labels = logits, texts, labels
        teacher, *students = (values[:, 1] - values[:, 0] for values in logits.values())
        spread = np.argsort(teacher)[np.linspace(0, len(teacher) - 1, 6).astype(int)]
        apart = np.argsort(-np.abs(teacher - students[0]))[:3] if students else []
        rows = list(dict.fromkeys(map(int, [*spread, *apart])))
        self.controls = {
            "review": widgets.Dropdown(
                options=[(self.name_of(i), i) for i in rows], value=rows[-1], description="review"
            ),
            "temperature": slider("T", self.T, 4, "{:g}".format),
        }
        self.draw()

    def name_of(self, i: int) -> str:
        return f"{LABEL_NAMES[int(self.labels[i])]}: {' '.join(self.texts[i].split())[:60]}..."

    def draw(self) -> None:
        self.figure, (bars, curve) = blank(2, 10.5, 3.4)
        names, shades = list(self.logits), [COLORS["dense"], COLORS["student"], COLORS["magnitude"]]
        self.bars = bars.barh(range(len(names)), np.zeros(len(names)), color=shades)
        self.numbers = [bars.text(0, y, "", va="center") for y in range(len(names))]
        bars.axvline(0.5, color=COLORS["baseline"], linestyle="--")
        bars.set_yticks(range(len(names)), [label(name) for name in names])
        bars.set(xlim=(0, 1.2), xlabel="P(positive) at T")
        bars.invert_yaxis()
        self.grid = np.linspace(self.T[0], self.T[-1], 80)
        self.lines = [
            curve.plot([], [], color=shade, label=label(n))[0] for n, shade in zip(names, shades, strict=False)
        ]
        self.here = curve.axvline(1, color=COLORS["merged"])
        curve.axhline(0.5, color=COLORS["baseline"], linestyle="--")
        curve.set(xlim=(1, self.T[-1]), ylim=(0, 1), xlabel="temperature T", ylabel="P(positive)")
        self.title = self.figure.suptitle("", x=0.01, ha="left", fontsize="medium")

    def update(self, review: int, temperature: float) -> None:
        at = {name: experiments.probabilities(values[review], temperature) for name, values in self.logits.items()}
        for bar, number, p in zip(self.bars, self.numbers, at.values(), strict=True):
            bar.set_width(p[1])
            number.set(x=p[1] + 0.02, text=f"{p[1]:.3f}")
        for line, values in zip(self.lines, self.logits.values(), strict=True):
            line.set_data(self.grid, expit((values[review, 1] - values[review, 0]) / self.grid))
        self.here.set_xdata([temperature, temperature])
        teacher, *students = at.values()
        text = f"{self.name_of(review)}\nat T = {temperature:g} the teacher says {teacher[1]:.1%} positive"
        if students:
            loss = temperature**2 * rel_entr(teacher, students[0]).sum()
            text += f"; T² KL(teacher, student) = {loss:.3f}"
        self.title.set_text(text)


def temperature_panel(run: Run) -> None:
    """A chosen review and T: the softened probabilities of the teacher and of the best student."""
    students = run.load_table("students")
    best = students.loc[students["accuracy"].idxmax(), "model"]
    part = experiments.reviews_of(run.profile, run.seed)["validation"]
    models = {"teacher": "fine_tuned", "student": best}
    logits = {shown: experiments.split_logits(run, name, "validation") for shown, name in models.items()}
    explore(TemperaturePanel(logits, part["text"][:], np.array(part["label"][:])))
