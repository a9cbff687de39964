"""Choices as results: decided once, on validation, read ever after; and no reader trains."""

import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.study import baseline, cells, choices, comparison, fine_tuning, recovery, students
from nbhelpers.workspace import WorkspaceError, open_run

READERS = {
    "score": ("03", choices.best_score),
    "rate_pruned": ("03", lambda run: choices.recovery_rate(run, "pruned")),
    "distillation": ("05", choices.distillation_scales),
    "compressed": ("05", choices.best_compressed),
    "tfidf": ("01", lambda run: choices.read_choice(run, "tfidf")),
}
CANDIDATES = pd.DataFrame({"criterion": ["random", "taylor", "wanda"], "accuracy": [0.6, 1 / 3 + 0.4, 1 / 3 + 0.4]})


@pytest.fixture
def run(workspace):
    return open_run(get_profile("smoke"))


@pytest.mark.parametrize("name", READERS)
def test_reading_before_deciding_names_the_notebook(run, name):
    notebook, read = READERS[name]
    with pytest.raises(WorkspaceError, match=rf"choice_{name} is missing .* run notebook {notebook}"):
        read(run)


@pytest.mark.parametrize(
    "call", [comparison.compared_models, comparison.budget_names, recovery.budget_arms, recovery.recover_in_parts]
)
def test_what_rests_on_a_choice_names_the_notebook_as_well(run, call):
    with pytest.raises(WorkspaceError, match=r"choice_\w+ is missing .* run notebook 03"):
        call(run)


def test_the_first_of_the_best_is_chosen_and_kept(run):
    assert choices.decide(run, "score", CANDIDATES, "03")["criterion"] == "taylor"
    assert choices.read_choice(run, "score") == {"criterion": "taylor", "accuracy": 1 / 3 + 0.4}
    assert choices.best_score(run) == "taylor"
    first = run.artifact("choice_score")
    assert (first["made_by"], first["kind"]) == ("03", "data")
    choices.decide(run, "score", CANDIDATES, "03")
    assert run.artifact("choice_score") == first, "the same candidates: the same artefact"
    choices.decide(run, "score", CANDIDATES.assign(accuracy=[0.6, 0.7, 0.8]), "03")
    assert choices.best_score(run) == "wanda"
    assert run.artifact("choice_score")["fingerprint"] != first["fingerprint"]


def test_another_rule_than_the_best_accuracy_may_choose(run):
    assert choices.decide(run, "score", CANDIDATES, "03", best=0)["criterion"] == "random"
    assert choices.best_score(run) == "random"


def test_no_reader_trains(study, monkeypatch):
    def never(*_, **__):
        pytest.fail("a model was trained")

    for module in (recovery, students, fine_tuning):
        monkeypatch.setattr(module, "train", never)
    monkeypatch.setattr(baseline, "make_classifier", never)
    for name, (_, read) in READERS.items():
        if name != "tfidf":
            assert read(study.run) is not None
    assert study.best in study.run.profile.scores
    assert f"sparse_{study.best}_90" in comparison.compared_models(study.run)
    assert len(recovery.recovered_names(study.run)) == 10
    assert cells.phases(study.run)
    for name, call in (
        ("pruned", lambda run: recovery.recover_model(run, "merged", 0.9)),
        ("control", recovery.train_control),
    ):
        with pytest.raises(WorkspaceError, match=rf"choice_rate_{name} is missing .* run notebook 03"):
            call(open_run(study.run.profile, 2))
