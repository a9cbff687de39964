"""Search the settings of fine-tuning, and measure how much pre-training gains with few or many labels.

    python -m nbhelpers.tools.search trials --profile quick --count 16 --set validation_size=5000
    python -m nbhelpers.tools.search labels --profile thorough --trials quick --counts 6000 0

``trials``: random search on validation reviews, the same draws for the pretrained model and for random weights of
the same shape; writes reports/settings/<profile>.csv. ``labels``: the best settings of each, from the profile's trials
or another's, fine-tuned on so many labelled reviews (0 is all), against TF-IDF on the test reviews; writes
reports/settings/labels.csv and a figure. What is computed is kept: the same command continues where it was stopped.
"""

import argparse
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from scipy.stats import loguniform
from sklearn.metrics import log_loss
from sklearn.model_selection import ParameterSampler

from nbhelpers.evaluation import over_seeds, paired_difference, wilson_interval
from nbhelpers.models import create_model, source_fingerprint
from nbhelpers.pipeline.grid import CLEAR_ERRORS, GridError, add_run, in_parallel, keep_quiet, open_checked
from nbhelpers.profiles import Profile
from nbhelpers.report.style import axes, color, in_percent, label, name_lines
from nbhelpers.study.baseline import tfidf_right
from nbhelpers.study.fine_tuning import fine_tune, finetuning_settings
from nbhelpers.study.inputs import dataset, reviews_of, runs_of
from nbhelpers.study.predictions import answers_right, open_test, probabilities, split_logits
from nbhelpers.system.files import write_text
from nbhelpers.system.machine import computed_on
from nbhelpers.workspace import Run, WorkspaceError, open_run, root

# The settings that are drawn; all others are the profile's.
SPACE = {
    "learning_rate": loguniform(3e-5, 1e-3),
    "layer_decay": [0.7, 0.85, 1.0],
    "epochs": [1, 2, 3],
    "dropout": [0.0, 0.1, 0.2],
    "prefix_share": [0.0, 0.3, 0.6],
    "head_share": [0.0, 0.3, 0.5],
}
STARTS = ("pretrained", "from_scratch")


def tables() -> Path:
    """Return the folder of the tables that this module writes."""
    return root() / "reports" / "settings"


def draws(profile: Profile, count: int) -> list[dict]:
    """Return the settings to try: the profile's own, then random ones from ``SPACE``; more draws begin with the same.

    In random search each draw tries a new value of every setting, in a grid not (Bergstra and Bengio, 2012).
    """
    drawn = [{name: getattr(profile, name) for name in SPACE}]
    for settings in ParameterSampler(SPACE, count - 1, random_state=0) if count > 1 else []:
        drawn.append(settings | {"learning_rate": float(f"{settings['learning_rate']:.2g}")})
    return drawn


def fit(run: Run, start: str) -> None:
    """Make the artefact named after one of ``STARTS``: a model fine-tuned from it with the run's settings."""

    def build(target):
        model = create_model(run.profile, run.seed, pretrained=start == "pretrained")
        title = f"{run.profile.name}, {start}"
        history = fine_tune(run, model, target, title)
        print(f"{title}: {max(entry['accuracy'] for entry in history):.1%} on validation", flush=True)

    settings = finetuning_settings(run) | {"start": start, "weights": source_fingerprint(run.profile)}
    run.cached(start, settings, build, kind="dense", made_by="01")


def fit_all(cells: list[tuple[Run, str]], jobs: int) -> None:
    """Call ``fit`` for pairs of a run and a start, ``jobs`` at a time."""
    list(in_parallel(fit, cells, jobs, cells[0][0].profile.precision))


def variant(run: Run, name: str, **settings) -> Run:
    """Return a run with other settings, in folders of its own."""
    profile = dataclasses.replace(run.profile, name=f"{run.profile.name}-{name}", **settings)
    return open_run(profile, run.seed)


def minutes(run: Run, name: str) -> float:
    """Return how long an artefact took to build."""
    return run.artifact(name)["seconds"] / 60


def search(run: Run, count: int, jobs: int = 1) -> pd.DataFrame:
    """Run a random search on validation reviews; return one row per trial and start.

    Columns: start, trial (0 is the profile as it is), the settings of ``SPACE``, accuracy with Wilson's interval and
    log_loss (nats) on the validation reviews, n (their number), labels, max_tokens, minutes.
    """
    trials = [
        (settings, variant(run, f"trial-{i}", **settings)) for i, settings in enumerate(draws(run.profile, count))
    ]
    fit_all([(trial, start) for _, trial in trials for start in STARTS], jobs)
    rows = []
    for number, (settings, trial) in enumerate(trials):
        for start in STARTS:
            right, logits = answers_right(trial, start, "validation"), split_logits(trial, start, "validation")
            low, high = wilson_interval(right)
            row = {"start": start, "trial": number, **settings}
            row |= {"accuracy": right.mean(), "accuracy_low": low, "accuracy_high": high, "n": len(right)}
            row["log_loss"] = log_loss(dataset(trial, "validation").labels, probabilities(logits), labels=[0, 1])
            row |= {"labels": len(dataset(trial, "train")), "max_tokens": run.profile.max_tokens}
            rows.append(row | {"minutes": minutes(trial, start)})
    table = pd.DataFrame(rows)
    write_text(tables() / f"{run.profile.name}.csv", table.to_csv(index=False))
    return table


def best_settings(profile: Profile, start: str, trials: str = "") -> dict:
    """Return the settings with the best validation accuracy of a start, from a profile's trials (by default its own).

    Raises ``WorkspaceError`` before ``search``.
    """
    name = trials or profile.name
    path = tables() / f"{name}.csv"
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: run python -m nbhelpers.tools.search trials --profile {name}")
    table = pd.read_csv(path)
    rows = table[table["start"] == start]
    best = rows.loc[rows["accuracy"].idxmax(), list(SPACE)].to_dict()
    return {name: type(getattr(profile, name))(value) for name, value in best.items()}


def compare_labels(run: Run, counts: list[int], jobs: int = 1, trials: str = "") -> pd.DataFrame:
    """Fine-tune with each start's best settings on so many labels (0 is all); compare with TF-IDF on test reviews.

    trials: the profile whose trials the settings come from, by default the run's own.
    Columns: labels (in the training part), max_tokens, model, accuracy (mean over seeds; its interval is Wilson's for
    one seed, else the lowest and the highest seed), seeds, minutes and device (of one fine-tuning), difference to
    TF-IDF in accuracy with its 95 % interval and p_value (``evaluation.paired_difference``), n (test reviews).
    """
    studies = []
    for count in counts:
        studies.append((count, "tfidf", variant(run, f"labels-{count}-tfidf", train_size=count)))
        for start in STARTS:
            settings = {"train_size": count, **best_settings(run.profile, start, trials)}
            studies.append((count, start, variant(run, f"labels-{count}-{start}", **settings)))
    fit_all([(seed_run, model) for _, model, study in studies if model in STARTS for seed_run in runs_of(study)], jobs)
    rows, baselines = [], {}
    for count, model, study in studies:
        for seed_run in runs_of(study):
            open_test(seed_run, [model])
        right_of = tfidf_right if model == "tfidf" else partial(answers_right, name=model)
        right = np.stack([right_of(seed_run, split="test") for seed_run in runs_of(study)])
        found = paired_difference(right, baselines.setdefault(count, right))
        labels, trained = len(reviews_of(study.profile, run.seed)["train"]), model in STARTS
        row = {"labels": labels, "max_tokens": run.profile.max_tokens, "model": model, **over_seeds(right)}
        row["minutes"] = minutes(study, model) if trained else None
        row["device"] = computed_on(study.artifact(model)) if trained else None
        row |= {"difference": found["difference"], "difference_low": found["low"], "difference_high": found["high"]}
        rows.append(row | {"p_value": found["p_value"], "n": found["n"]})
    table = pd.DataFrame(rows)
    write_text(tables() / "labels.csv", table.to_csv(index=False))
    labels_figure(table).savefig(tables() / "labels.png")
    return table


def labels_figure(table: pd.DataFrame) -> Figure:
    """Return a plot of test accuracy over the number of labelled reviews, one line per model, with intervals."""
    figure, (ax,) = axes(width=7)
    for model, part in table.sort_values("labels").groupby("model", sort=False):
        shade = {"pretrained": color("dense"), "from_scratch": color("control")}.get(model, color("sparse"))
        ax.plot(part["labels"], part["accuracy"], marker="o", color=shade, label=label(model))
        ax.vlines(part["labels"], part["accuracy_low"], part["accuracy_high"], color=shade, alpha=0.5)
    ax.set(xscale="log", xlabel="labelled reviews to train on", ylabel="test accuracy")
    ax.set_xticks(sorted(set(table["labels"])))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    in_percent(ax.yaxis)
    name_lines(ax)
    return figure


def main() -> None:
    """Run the command line; errors end it with one line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.tools.search", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["trials", "labels"])
    add_run(parser)
    parser.add_argument("--count", type=int, default=16, help="trials: number of trials (default 16)")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[1500, 6000, 0], help="labels: numbers of reviews, 0 for all"
    )
    parser.add_argument("--trials", default="", metavar="PROFILE", help="labels: whose trials (default: its own)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="fine-tunings at a time (default 1)")
    options = parser.parse_args()
    os.environ.setdefault("NBHELPERS_BATCH", "1")
    try:
        if min(options.count, options.jobs) < 1 or min(options.counts) < 0:
            parser.error("--count and --jobs must be at least 1, --counts at least 0")
        if not sys.stderr.isatty():
            keep_quiet()
        run = open_checked(options)
        if options.command == "trials":
            table = search(run, options.count, options.jobs)
        else:
            table = compare_labels(run, options.counts, options.jobs, options.trials)
        print(table.round(4).to_string(index=False))
    except (*CLEAR_ERRORS, GridError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
