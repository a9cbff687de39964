"""TF-IDF with logistic regression: tuned and fitted on the training reviews, computed once."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from nbhelpers import workspace as workspace_module
from nbhelpers.profiles import get_profile
from nbhelpers.study import baseline, choices, inputs, predictions
from nbhelpers.system.code import PACKAGE, code_fingerprint
from nbhelpers.workspace import WorkspaceError, open_run

TRIALS = [(2, 10.0), (1, 0.3), (2, 0.3)]


@pytest.fixture
def run(workspace, monkeypatch):
    monkeypatch.setattr(baseline, "TRIALS", TRIALS)
    baseline.fit_tfidf.cache_clear()
    return open_run(get_profile("smoke"))


def test_every_setting_is_tried_once_and_the_usual_one_first():
    assert baseline.TRIALS[0] == (2, 10.0)
    assert len(set(baseline.TRIALS)) == len(baseline.TRIALS) == 12


def test_it_learns_words_and_word_pairs():
    texts = ["not good at all", "not good really", "good at all", "good really"] * 3
    vectorizer = baseline.make_vectorizer(2)
    classifier = baseline.make_classifier(10.0).fit(vectorizer.fit_transform(texts), [0, 0, 1, 1] * 3)
    assert classifier.predict(vectorizer.transform(["not good", "good"])).tolist() == [0, 1]
    assert "not good" in vectorizer.vocabulary_ and "not good" not in baseline.make_vectorizer(1).fit(texts).vocabulary_


def test_the_logits_are_those_of_the_setting_that_is_best_in_cross_validation(run):
    parts = inputs.reviews_of(run.profile, run.seed)
    texts, labels = parts["train"]["text"][:], parts["train"]["label"][:]
    folds = StratifiedKFold(baseline.FOLDS, shuffle=True, random_state=0)
    fitted, accuracy = {}, []
    for words, c in TRIALS:
        vectorizer = TfidfVectorizer(ngram_range=(1, words), min_df=2, sublinear_tf=True)
        model = make_pipeline(vectorizer, LogisticRegression(C=c, max_iter=1000))
        accuracy.append((cross_val_predict(model, texts, labels, cv=folds) == np.array(labels)).mean())
        fitted[words, c] = model.fit(texts, labels).predict_proba(parts["validation"]["text"][:])
    found = predictions.probabilities(baseline.tfidf_logits(run, "validation"))
    chosen = choices.read_choice(run, "tfidf")
    assert chosen["accuracy"] == max(accuracy)
    # Two runs of the same solver, which stops at a tolerance of 1e-4.
    np.testing.assert_allclose(found, fitted[chosen["words"], chosen["c"]], atol=1e-3)
    truth = np.array(parts["validation"]["label"])
    assert (baseline.tfidf_right(run, "validation") == (found.argmax(1) == truth)).all()


def test_a_class_with_one_training_review_is_a_clear_error(run, monkeypatch):
    one = {"train": {"text": ["good", "bad", "fine"], "label": [1, 0, 1]}}
    monkeypatch.setattr(baseline, "reviews_of", lambda *_: one)
    with pytest.raises(WorkspaceError, match=r"at least two training reviews per class \(got one\)"):
        baseline.tune_tfidf(run)


def test_a_second_process_finds_the_trials(run, monkeypatch):
    chosen = baseline.tune_tfidf(run)
    monkeypatch.setattr(baseline, "cross_validate", lambda *_: pytest.fail("tuned again"))
    assert baseline.tune_tfidf(run).to_dict() == chosen.to_dict()


def test_the_test_reviews_are_used_only_after_tfidf_was_registered(run):
    with pytest.raises(WorkspaceError, match="tfidf is not registered for the test reviews"):
        baseline.tfidf_logits(run, "test")
    predictions.open_test(run, ["tfidf"])
    assert baseline.tfidf_logits(run, "test").shape == (24, 2)


def test_a_changed_constant_fits_it_anew_and_nothing_else_does(run, tmp_path, monkeypatch):
    fits, fit = [], baseline.fit_tfidf
    monkeypatch.setattr(baseline, "fit_tfidf", lambda run: fits.append(run) or fit(run))

    def ask():
        baseline.tfidf_logits(run, "validation")
        return len(fits)

    assert (ask(), ask()) == (1, 1)
    # What a process finds in which one number of baseline.py is another.
    copy = tmp_path / "copy" / "nbhelpers"
    for path in PACKAGE.rglob("*.py"):
        (copy / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        changed = text.replace("max_iter=1000", "max_iter=999") if path.name == "baseline.py" else text
        (copy / path.relative_to(PACKAGE)).write_text(changed, encoding="utf-8")
    monkeypatch.setattr(workspace_module, "code_fingerprint", lambda *names: code_fingerprint(*names, package=copy))
    assert (ask(), ask()) == (2, 2)
