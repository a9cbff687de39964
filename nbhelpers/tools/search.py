"""Where the settings of fine-tuning come from, and what pre-training is worth at how many labels.

    python -m nbhelpers.tools.search trials --profile quick --count 16 --set validation_size=5000
    python -m nbhelpers.tools.search labels --profile thorough --trials quick --counts 6000 0

``trials``: random search on validation reviews, the same draws for the pretrained model and for random weights of
the same shape; leaves reports/settings/<profile>.csv. ``labels``: the best settings of each, of the profile's trials or
of another's, fine-tuned on so many labelled reviews (0 is all), against TF-IDF on the test reviews; leaves
reports/settings/labels.csv and a figure. What is computed is kept: the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

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
from nbhelpers.study.fine_tuning import fine_tune, finetuning_settings
from nbhelpers.study.inputs import dataset, reviews_of, runs_of
from nbhelpers.study.predictions import answers_right, open_test, probabilities, right_over_seeds, split_logits
from nbhelpers.system.files import write_text
from nbhelpers.system.machine import computed_on
from nbhelpers.workspace import Run, WorkspaceError, open_run, root

# What is drawn from; all else stays as the profile has it.
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
    """The folder of the tables that this module writes."""
    return root() / "reports" / "settings"


def draws(profile: Profile, count: int) -> list[dict]:
    """The settings to try: the profile's own, then random ones from ``SPACE``, the same for the same count or more.

    Random rather than a grid: each draw tries a new value of every setting (Bergstra and Bengio, 2012).
    """
    drawn = [{name: getattr(profile, name) for name in SPACE}]
    for settings in ParameterSampler(SPACE, count - 1, random_state=0) if count > 1 else []:
        drawn.append(settings | {"learning_rate": float(f"{settings['learning_rate']:.2g}")})
    return drawn


def fit(run: Run, start: str) -> None:
    """Artefact of the name of its start: a model fine-tuned with the run's settings, from one of ``STARTS``."""

    def build(target):
        model = create_model(run.profile, run.seed, pretrained=start == "pretrained")
        title = f"{run.profile.name}, {start}"
        history = fine_tune(run, model, target, title)
        print(f"{title}: {max(entry['accuracy'] for entry in history):.1%} on validation", flush=True)

    settings = finetuning_settings(run) | {"start": start, "weights": source_fingerprint(run.profile)}
    run.cached(start, settings, build, kind="dense", made_by="01")


def fit_all(cells: list[tuple[Run, str]], jobs: int) -> None:
    """Call ``fit`` for pairs of a run and a start, so many at a time."""
    list(in_parallel(fit, cells, jobs, cells[0][0].profile.precision))


def variant(run: Run, name: str, **settings) -> Run:
    """A run with other settings, in folders of its own."""
    profile = dataclasses.replace(run.profile, name=f"{run.profile.name}-{name}", **settings)
    return open_run(profile, run.seed)


def minutes(run: Run, name: str) -> float:
    return run.artifact(name)["seconds"] / 60


def search(run: Run, count: int, jobs: int = 1) -> pd.DataFrame:
    """Random search on validation: a row a trial and start.

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
            rows.append({"start": start, "trial": number, **settings, "accuracy": right.mean()})
            rows[-1] |= {"accuracy_low": low, "accuracy_high": high, "n": len(right)}
            rows[-1] |= {
                "log_loss": log_loss(dataset(trial, "validation").labels, probabilities(logits), labels=[0, 1])
            }
            rows[-1] |= {"labels": len(dataset(trial, "train")), "max_tokens": run.profile.max_tokens}
            rows[-1] |= {"minutes": minutes(trial, start)}
    table = pd.DataFrame(rows)
    write_text(tables() / f"{run.profile.name}.csv", table.to_csv(index=False))
    return table


def best_settings(profile: Profile, start: str, trials: str = "") -> dict:
    """The settings with the best validation accuracy of a start, of the trials of a profile: by default its own.

    Raises ``WorkspaceError`` before ``search``.
    """
    name = trials or profile.name
    path = tables() / f"{name}.csv"
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing: python -m nbhelpers.tools.search trials --profile {name} makes it")
    table = pd.read_csv(path)
    rows = table[table["start"] == start]
    best = rows.loc[rows["accuracy"].idxmax(), list(SPACE)].to_dict()
    return {name: type(getattr(profile, name))(value) for name, value in best.items()}


def compare_labels(run: Run, counts: list[int], jobs: int = 1, trials: str = "") -> pd.DataFrame:
    """The best settings of each start, fine-tuned on so many labels (0 is all), against TF-IDF on the test reviews.

    trials: of which profile the settings are taken, by default of the run's own.
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
    fit_all([(one, model) for _, model, study in studies if model in STARTS for one in runs_of(study)], jobs)
    rows, lines = [], {}
    for count, model, study in studies:
        for one in runs_of(study):
            open_test(one, [model])
        right = right_over_seeds(study, model, "test")
        found = paired_difference(right, lines.setdefault(count, right))
        labels, tokens = len(reviews_of(study.profile, run.seed)["train"]), run.profile.max_tokens
        rows.append({"labels": labels, "max_tokens": tokens, "model": model, **over_seeds(right)})
        trained = model in STARTS
        rows[-1] |= {"minutes": minutes(study, model) if trained else None}
        rows[-1] |= {"device": computed_on(study.artifact(model)) if trained else None}
        rows[-1] |= {"difference": found["difference"], "difference_low": found["low"]}
        rows[-1] |= {"difference_high": found["high"], "p_value": found["p_value"], "n": found["n"]}
    table = pd.DataFrame(rows)
    write_text(tables() / "labels.csv", table.to_csv(index=False))
    labels_figure(table).savefig(tables() / "labels.png")
    return table


def labels_figure(table: pd.DataFrame) -> Figure:
    """Test accuracy over the number of labelled reviews, a line a model, with intervals."""
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
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.tools.search", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["trials", "labels"])
    add_run(parser)
    parser.add_argument("--count", type=int, default=16, help="trials: how many, the profile's own settings first")
    parser.add_argument("--counts", type=int, nargs="+", default=[1500, 6000, 0], help="labels: 0 is all")
    parser.add_argument("--trials", default="", metavar="PROFILE", help="labels: whose trials (default its own)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="fine-tunings at a time (default 1)")
    options = parser.parse_args()
    os.environ.setdefault("NBHELPERS_BATCH", "1")
    try:
        if min(options.count, options.jobs) < 1 or min(options.counts) < 0:
            parser.error("--count and --jobs take at least 1, --counts numbers of reviews, or 0 for all")
        if not sys.stderr.isatty():
            keep_quiet()
        run = open_checked(options)
        if options.what == "trials":
            table = search(run, options.count, options.jobs)
        else:
            table = compare_labels(run, options.counts, options.jobs, options.trials)
        print(table.round(4).to_string(index=False))
    except (*CLEAR_ERRORS, GridError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
