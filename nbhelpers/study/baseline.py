"""TF-IDF with logistic regression: the line that a neural model has to beat, tuned over as many settings."""

import functools
import json

import numpy as np
import pandas as pd
import torch
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from nbhelpers.study.choices import decide, read_choice
from nbhelpers.study.inputs import reviews_fingerprint, reviews_of
from nbhelpers.study.predictions import check_declared
from nbhelpers.study.teacher import taught_dataset, taught_splits, teacher_logits
from nbhelpers.system.progress import progress
from nbhelpers.workspace import Run, WorkspaceError, save_tensors

FOLDS = 5
ROWS = "trials.json"
# Twelve settings, as many as the neural models' trials; the first is the usual one, and wins where others are equal.
TRIALS = [(2, 10.0), *((n, c) for n in (1, 2) for c in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0) if (n, c) != (2, 10.0))]


def make_vectorizer(words: int) -> TfidfVectorizer:
    """Return TF-IDF of single words (1) or of words and word pairs (2) that occur in at least two reviews."""
    return TfidfVectorizer(ngram_range=(1, words), min_df=2, sublinear_tf=True)


def make_classifier(c: float) -> LogisticRegression:
    """Return logistic regression with the inverse regularisation strength c."""
    return LogisticRegression(C=c, max_iter=1000)


def cross_validate(texts: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Return one row per setting of ``TRIALS``: words, c, and accuracy, each review counted once.

    Raises ``WorkspaceError`` where a class has a single review.
    """
    folds = min(FOLDS, np.bincount(labels, minlength=2).min())
    if folds < 2:
        raise WorkspaceError("TF-IDF must have at least two training reviews per class (got one): raise train_size")
    right = dict.fromkeys(TRIALS, 0)
    for fitted, held_out in StratifiedKFold(folds, shuffle=True, random_state=0).split(texts, labels):
        for words in dict.fromkeys(words for words, _ in TRIALS):
            vectorizer = make_vectorizer(words)
            features, unseen = vectorizer.fit_transform(texts[fitted]), vectorizer.transform(texts[held_out])
            for c in (c for trial_words, c in TRIALS if trial_words == words):
                predicted = make_classifier(c).fit(features, labels[fitted]).predict(unseen)
                right[words, c] += int((predicted == labels[held_out]).sum())
    return [{"words": words, "c": c, "accuracy": count / len(texts)} for (words, c), count in right.items()]


def tune_tfidf(run: Run) -> pd.Series:
    """Artefact ``trials_tfidf``, and ``choice_tfidf``: the best cross-validated accuracy on the training reviews.

    The validation reviews are too few to tell twelve settings apart.
    """

    def build(target):
        part = reviews_of(run.profile, run.seed)["train"]
        rows = cross_validate(np.array(part["text"][:], dtype=object), np.array(part["label"][:]))
        (target.folder / ROWS).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    run.cached("trials_tfidf", {"train": reviews_fingerprint(run, "train")}, build, made_by="01")
    rows = json.loads((run.folder("trials_tfidf") / ROWS).read_text(encoding="utf-8"))
    return decide(run, "tfidf", pd.DataFrame(rows), made_by="01")


def teacher_labels(run: Run) -> np.ndarray:
    """Return P(positive) [n] that the fine-tuned model gives the reviews that students learn from."""
    logits = taught_dataset(run, taught_splits(run)).teacher_logits
    last = torch.stack([tokens[-1] for tokens in logits]).float()
    return last.softmax(-1)[:, 1].numpy()


def fit_to_probabilities(pipeline: Pipeline, texts: list[str], positive: np.ndarray) -> Pipeline:
    """Fit a pipeline of a vectorizer and logistic regression to P(positive) [n] instead of labels.

    Each review counts twice, as positive with this weight and as negative with the rest: the same as cross-entropy
    with soft labels.
    """
    features = pipeline[0].fit_transform(texts)
    labels, weights = np.repeat([1, 0], len(texts)), np.concatenate([positive, 1 - positive])
    pipeline[1].fit(vstack([features, features]), labels, sample_weight=weights)
    return pipeline


def tuned_pipeline(run: Run) -> Pipeline:
    """Return TF-IDF and logistic regression with the settings that suit the training reviews best, not fitted."""
    tune_tfidf(run)
    chosen = read_choice(run, "tfidf")
    return make_pipeline(make_vectorizer(chosen["words"]), make_classifier(chosen["c"]))


@functools.lru_cache(maxsize=4)
def fit_tfidf(run: Run) -> Pipeline:
    """Tune TF-IDF and logistic regression, and fit them on the training reviews of a run, once per process."""
    part = reviews_of(run.profile, run.seed)["train"]
    with progress(None, "fitting TF-IDF with logistic regression"):
        return tuned_pipeline(run).fit(part["text"][:], part["label"][:])


@functools.lru_cache(maxsize=4)
def fit_taught_tfidf(run: Run) -> Pipeline:
    """Fit TF-IDF and logistic regression to the fine-tuned model's probabilities, once per process."""
    reviews = reviews_of(run.profile, run.seed)
    texts = [text for split in taught_splits(run) for text in reviews[split]["text"]]
    with progress(None, "fitting TF-IDF to the teacher"):
        return fit_to_probabilities(tuned_pipeline(run), texts, teacher_labels(run))


def fit_counting(run: Run, name: str) -> Pipeline:
    """Return a fitted model of ``COUNTING``."""
    return fit_taught_tfidf(run) if name == "tfidf_taught" else fit_tfidf(run)


COUNTING = ("tfidf", "tfidf_taught")  # models that count words: with the labels, and taught by the fine-tuned model


def tfidf_logits(run: Run, split: str, name: str = "tfidf") -> np.ndarray:
    """Artefact ``logits_<name>_<split>``: log-probabilities [n, 2] of a model of ``COUNTING``, computed once.

    On "test" only where ``predictions.open_test`` has declared it.
    """
    check_declared(run, name, split)
    taught = taught_splits(run) if name == "tfidf_taught" else ()

    def build(target):
        logits = fit_counting(run, name).predict_log_proba(reviews_of(run.profile, run.seed)[split]["text"][:])
        save_tensors(target.folder, {"logits": torch.from_numpy(logits)})

    settings = {part: reviews_fingerprint(run, part) for part in ("train", split)}
    for part in taught:
        teacher_logits(run, part)
    inputs = tuple(f"teacher_logits_{part}" for part in taught)
    run.cached(f"logits_{name}_{split}", settings, build, inputs, made_by="01")
    return run.load_tensors(f"logits_{name}_{split}")["logits"].numpy()


def tfidf_right(run: Run, split: str, name: str = "tfidf") -> np.ndarray:
    """Return which reviews of a split a model of ``COUNTING`` gets right: bool [n]."""
    return tfidf_logits(run, split, name).argmax(1) == np.array(reviews_of(run.profile, run.seed)[split]["label"][:])


class CountingModel(nn.Module):
    """TF-IDF with logistic regression as a module, to be timed beside others: it reads texts, not token ids."""

    def __init__(self, pipeline: Pipeline, texts: list[str]):
        super().__init__()
        self.pipeline, self.texts = pipeline, texts
        vectorizer, classifier = pipeline[0], pipeline[1]
        self.register_buffer("weights", torch.from_numpy(classifier.coef_[0]).float())
        self.register_buffer("idf", torch.from_numpy(vectorizer.idf_).float())

    def forward(self, **batch) -> np.ndarray:
        """Return P(class) [texts, 2] of its texts."""
        return self.pipeline.predict_proba(self.texts)

    def file_bytes(self) -> int:
        """Return the bytes of a file with its words, their weights in float32 and their document frequencies."""
        words = self.pipeline[0].get_feature_names_out()
        return sum(len(word.encode()) + 1 for word in words) + 8 * len(words)
