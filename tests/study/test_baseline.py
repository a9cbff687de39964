"""TF-IDF with logistic regression: tuned and fitted on the training reviews, computed once."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
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
    for name in ("tfidf", "tfidf_taught"):
        with pytest.raises(WorkspaceError, match=rf"{name} is not registered for the test reviews"):
            baseline.tfidf_logits(run, "test", name)
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


# --- taught by the fine-tuned model ---


def test_the_taught_one_minimises_the_cross_entropy_with_the_fine_tuned_models_probabilities(study, alone):
    run, chosen = study.run, choices.read_choice(study.run, "tfidf")
    texts, unseen = (inputs.reviews_of(run.profile, 0)[split]["text"][:] for split in ("train", "validation"))
    vectorizer = TfidfVectorizer(ngram_range=(1, chosen["words"]), min_df=2, sublinear_tf=True)
    features, positive = vectorizer.fit_transform(texts).toarray(), run.predict("fine_tuned", texts).astype(float)

    def loss(parameters):
        weights, scores = parameters[:-1], features @ parameters[:-1] + parameters[-1]
        errors = expit(scores) - positive
        value = (np.logaddexp(0, scores) - positive * scores).sum() + weights @ weights / (2 * chosen["c"])
        return value, np.append(features.T @ errors + weights / chosen["c"], errors.sum())

    best = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).x
    expected = expit(vectorizer.transform(unseen) @ best[:-1] + best[-1])
    found = predictions.probabilities(baseline.tfidf_logits(run, "validation", "tfidf_taught"))[:, 1]
    # The teacher's logits are stored in float16, and scikit-learn stops at a gradient of 1e-4.
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - predictions.probabilities(baseline.tfidf_logits(run, "validation"))[:, 1]).max() > 0.05


def test_fitted_to_certain_probabilities_it_is_the_one_of_the_labels():
    texts = ["good film", "bad film", "good cast", "bad plot", "good plot", "dull film", "dull cast", "good fun"] * 2
    labels = np.array([1, 0, 1, 0, 1, 0, 0, 1] * 2)
    pipelines = [make_pipeline(baseline.make_vectorizer(1), baseline.make_classifier(10.0)) for _ in range(2)]
    taught = baseline.fit_to_probabilities(pipelines[0], texts, labels.astype(float)).predict_proba(texts)
    # The same minimum from another sum: the solver stops at a gradient of 1e-4.
    np.testing.assert_allclose(taught, pipelines[1].fit(texts, labels).predict_proba(texts), atol=1e-3)


def test_the_file_of_a_counting_model_holds_its_words_weights_and_frequencies():
    texts = ["caf\u00e9 film", "caf\u00e9 plot", "film plot"]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [0, 1, 1])
    model = baseline.CountingModel(pipeline, texts[:2])
    lines = "caf\u00e9\nfilm\nplot\n".encode()
    assert model.file_bytes() == len(lines + model.weights.numpy().tobytes() + model.idf.numpy().tobytes()) == 16 + 24
    np.testing.assert_array_equal(model(input_ids=None), pipeline.predict_proba(texts[:2]))
