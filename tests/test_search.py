"""The search for settings: what is drawn, what the tables say, and that nothing is chosen on test reviews."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

from nbhelpers.evaluation import mcnemar, predict_logits
from nbhelpers.models import create_model
from nbhelpers.profiles import get_profile
from nbhelpers.study.inputs import dataset
from nbhelpers.tools import search
from nbhelpers.workspace import WorkspaceError, open_run

SMALL = {"train_size": 16, "precision": "no", "seeds": 1, "learning_rate": 1e-2}


def open_small():
    return open_run(get_profile("smoke", **SMALL))


@pytest.fixture
def searched(workspace, alone):
    """A search of two trials in a workspace of its own: the run and the table."""
    run = open_small()
    return run, search.search(run, 2)


# --- what is drawn ---


def test_the_first_draw_is_the_profile_and_more_draws_begin_with_the_same():
    profile = get_profile("quick")
    drawn = search.draws(profile, 6)
    assert drawn[0] == {name: getattr(profile, name) for name in search.SPACE}
    assert len(drawn) == 6 and drawn[:3] == search.draws(profile, 3) and len({json.dumps(d) for d in drawn}) == 6
    assert search.draws(profile, 1) == drawn[:1]


def test_every_draw_is_a_profile_within_the_space():
    for settings in search.draws(get_profile("quick"), 40)[1:]:
        assert 3e-5 <= settings["learning_rate"] <= 1e-3
        assert all(settings[name] in search.SPACE[name] for name in set(search.SPACE) - {"learning_rate"})
        assert get_profile("quick", **settings).learning_rate == settings["learning_rate"]


# --- the tables ---


def test_search_judges_each_trial_on_validation(searched):
    run, table = searched
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
    assert not list(search.tables().parent.parent.glob("**/test_part.json"))


def test_a_second_search_finds_what_is_there_and_goes_on(searched, monkeypatch):
    run, table = searched
    monkeypatch.setattr(search, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(search.search(run, 2), table)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        search.search(run, 3)


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
    assert search.best_settings(run.profile, "from_scratch")["epochs"] == 2
    assert search.best_settings(get_profile("quick"), "from_scratch", "smoke")["epochs"] == 2
    with pytest.raises(WorkspaceError, match=r"thorough\.csv is missing: .* trials --profile thorough"):
        search.best_settings(run.profile, "pretrained", "thorough")


def test_labels_without_a_search_say_what_is_missing(workspace):
    with pytest.raises(WorkspaceError, match=r"smoke\.csv is missing: python -m nbhelpers\.search trials"):
        search.compare_labels(open_small(), [16])


def test_labels_are_compared_with_tfidf_on_the_same_test_reviews(searched):
    run, _ = searched
    table = search.compare_labels(run, [16, 32])
    assert table["labels"].tolist() == [16] * 3 + [32] * 3 and set(table["max_tokens"]) == {32}
    assert table["model"].tolist() == ["tfidf", *search.STARTS] * 2
    for count, part in table.groupby("labels"):
        right = {}
        for model in part["model"]:
            study = search.variant(run, f"labels-{count}-{model}", train_size=count)
            answers = study.load_tensors(f"logits_{model}_test")["logits"].numpy().argmax(1)
            right[model] = answers == dataset(study, "test").labels
        for row in part.to_dict("records"):
            assert row["accuracy"] == right[row["model"]].mean()
            assert row["difference"] == pytest.approx(row["accuracy"] - right["tfidf"].mean())
            assert row["p_value"] == pytest.approx(mcnemar(right[row["model"]], right["tfidf"]))
            assert (row["n"], row["seeds"]) == (24, 1)
    assert (search.tables() / "labels.png").stat().st_size > 10_000


def test_random_weights_are_another_start_of_the_same_shape():
    profile = get_profile("quick")
    models = [create_model(profile, 0, pretrained=start == "pretrained") for start in search.STARTS]
    first, second = (dict(model.named_parameters()) for model in models)
    assert {n: p.shape for n, p in first.items()} == {n: p.shape for n, p in second.items()}
    assert not first["transformer.wte.weight"].equal(second["transformer.wte.weight"])


# --- the command ---


def test_two_jobs_find_the_same(searched, tmp_path, monkeypatch):
    run, table = searched
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path / "other"))
    again = search.search(run, 2, jobs=2)
    pd.testing.assert_frame_equal(again.drop(columns="minutes"), table.drop(columns="minutes"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trials", "--count", "0"], "--count and --jobs take at least 1"),
        (["labels", "--counts", "-1"], "--counts numbers of reviews, or 0 for all"),
        (["trials", "--profile", "quik"], "no profile 'quik'"),
        (["labels", "--profile", "smoke"], "python -m nbhelpers.search trials --profile smoke makes it"),
        (["labels", "--profile", "smoke", "--trials", "quick"], "quick.csv is missing"),
    ],
)
def test_bad_input_is_refused(workspace, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["search", *arguments])
    with pytest.raises(SystemExit) as ended:
        search.main()
    assert said in f"{ended.value} {capsys.readouterr().err}"
