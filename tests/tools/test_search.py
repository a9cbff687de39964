"""The search for settings: what is drawn, what the tables say, and that nothing is chosen on test reviews."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import fresh_accelerate
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

from nbhelpers.evaluation import mcnemar, predict_logits
from nbhelpers.profiles import get_profile
from nbhelpers.study.inputs import dataset
from nbhelpers.tools import search
from nbhelpers.workspace import WorkspaceError, open_run

SMALL = {"train_size": 16, "precision": "no", "seeds": 1, "learning_rate": 1e-2}


def open_small():
    return open_run(get_profile("smoke", **SMALL))


def test_draws_begin_with_the_profile_lie_within_the_space_and_go_on_with_the_same():
    profile = get_profile("quick")
    drawn = search.draws(profile, 40)
    assert drawn[0] == {name: getattr(profile, name) for name in search.SPACE}
    assert drawn[:3] == search.draws(profile, 3) and search.draws(profile, 1) == drawn[:1]
    assert len({json.dumps(settings) for settings in drawn}) == 40
    for settings in drawn[1:]:
        assert 3e-5 <= settings["learning_rate"] <= 1e-3
        assert all(settings[name] in search.SPACE[name] for name in set(search.SPACE) - {"learning_rate"})
        assert get_profile("quick", **settings).learning_rate == settings["learning_rate"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of two trials in a workspace of its own: the root, the run and the table."""
    root = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("NBHELPERS_ROOT", str(root))
        run = open_small()
        return root, run, search.search(run, 2)


def test_search_evaluates_each_trial_on_validation_and_a_second_search_finds_what_is_there(searched, monkeypatch):
    root, run, table = searched
    monkeypatch.setenv("NBHELPERS_ROOT", str(root))
    assert table[["trial", "start"]].values.tolist() == [[i, s] for i in (0, 1) for s in search.STARTS]
    for row in table.to_dict("records"):
        settings = {name: type(getattr(run.profile, name))(row[name]) for name in search.SPACE}
        trial = search.variant(run, f"trial-{row['trial']}", **settings)
        part = dataset(trial, "validation")
        logits = predict_logits(trial.load_model(row["start"]), part.input_ids)
        assert row["accuracy"] == accuracy_score(part.labels, logits.argmax(1))
        loss = -log_softmax(logits.astype(float), axis=1)[np.arange(len(part)), part.labels].mean()
        assert row["log_loss"] == pytest.approx(loss, rel=1e-4)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert (row["n"], row["labels"], row["max_tokens"]) == (16, 16, 32)
    assert pd.read_csv(search.tables() / "smoke.csv").shape == table.shape
    assert not list(root.glob("**/test_part.json"))
    monkeypatch.setattr(search, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(search.search(run, 2), table)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        search.search(run, 3)


@pytest.mark.usefixtures("alone")
def test_labels_are_compared_with_tfidf_on_the_same_test_reviews(searched, monkeypatch):
    root, run, _ = searched
    monkeypatch.setenv("NBHELPERS_ROOT", str(root))
    table = search.compare_labels(run, [16])
    assert table["labels"].tolist() == [16] * 3 and set(table["max_tokens"]) == {32}
    assert table["model"].tolist() == ["tfidf", *search.STARTS]
    right = {}
    for row in table.to_dict("records"):
        study = search.variant(run, f"labels-16-{row['model']}", train_size=16)
        predicted = study.load_tensors(f"logits_{row['model']}_test")["logits"].numpy().argmax(1)
        right[row["model"]] = predicted == dataset(study, "test").labels
        assert row["accuracy"] == right[row["model"]].mean()
        assert row["difference"] == pytest.approx(row["accuracy"] - right["tfidf"].mean())
        assert row["p_value"] == pytest.approx(mcnemar(right[row["model"]], right["tfidf"]))
        assert (row["n"], row["seeds"]) == (24, 1)
    assert (search.tables() / "labels.png").stat().st_size > 10_000


def test_best_settings_are_those_of_the_best_accuracy_of_a_start(workspace):
    run = open_small()
    shared = {name: getattr(run.profile, name) for name in search.SPACE}
    rows = [
        shared | {"start": "pretrained", "accuracy": 0.7, "epochs": 1},
        shared | {"start": "pretrained", "accuracy": 0.8, "epochs": 3},
        shared | {"start": "from_scratch", "accuracy": 0.9, "epochs": 2},
    ]
    search.tables().mkdir(parents=True)
    pd.DataFrame(rows).to_csv(search.tables() / "smoke.csv", index=False)
    best = search.best_settings(run.profile, "pretrained")
    assert best == shared | {"epochs": 3} and isinstance(best["epochs"], int)
    assert search.best_settings(get_profile("quick"), "from_scratch", "smoke")["epochs"] == 2
    with pytest.raises(WorkspaceError, match=r"thorough\.csv is missing: .*tools\.search trials --profile thorough"):
        search.best_settings(run.profile, "pretrained", "thorough")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trials", "--count", "0"], "--count and --jobs must be at least 1"),
        (["trials", "--profile", "quik"], "quik"),
        (["labels", "--profile", "smoke", "--trials", "quick"], "quick.csv is missing"),
    ],
)
def test_bad_input_is_refused(workspace, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["search", *arguments])
    with pytest.raises(SystemExit) as ended:
        search.main()
    assert message in f"{ended.value} {capsys.readouterr().err}"
