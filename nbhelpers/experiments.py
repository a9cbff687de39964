"""The heavy computations of the notebooks, each a function that leaves an artefact and finds it again."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nbhelpers import processes
from nbhelpers.checkpoints import checkpoints_of
from nbhelpers.data import IMDbDataset, load_reviews, pad
from nbhelpers.evaluation import evaluate_accuracy, predict_logits
from nbhelpers.masks import FlaggedSets
from nbhelpers.models import create_model, create_student, load_tokenizer, save_dense, source_fingerprint
from nbhelpers.profiles import Profile
from nbhelpers.progress import progress
from nbhelpers.statistics import FirstOrderMovement, GradientMagnitude
from nbhelpers.training import Recipe, distillation_loss, mixed_precision, recipe_for, train
from nbhelpers.workspace import (
    COMPUTING,
    TENSORS,
    Run,
    WorkspaceError,
    code_fingerprint,
    fingerprint,
    open_run,
    save_tensors,
    write_text,
)

DATA_FIELDS = ("data", "data_revision", "train_size", "validation_size", "test_size", "max_tokens", "head_share")
MODEL_FIELDS = ("model", "model_revision", "dropout")
TRAIN_FIELDS = ("weight_decay", "warmup_share", "max_grad_norm", "precision")
FINETUNE_FIELDS = (*TRAIN_FIELDS, "batch_size", "epochs", "learning_rate", "layer_decay", "prefix_share")
FLAGGED = "flagged.safetensors"  # beside the fine-tuned weights: what each criterion flagged along the way


def pick(profile: Profile, *fields: str, **extra) -> dict:
    """Some fields of a profile as the settings of an artefact."""
    return {field: getattr(profile, field) for field in fields} | extra


def runs_of(run: Run) -> list[Run]:
    """The runs of all seeds of a profile, from the run's own upwards; reports are written for the first."""
    return [open_run(run.profile, run.seed + i) for i in range(run.profile.seeds)]


@functools.lru_cache(maxsize=8)
def reviews_of(profile: Profile, seed: int):
    """``load_reviews``, once a process."""
    return load_reviews(profile, seed)


@functools.lru_cache(maxsize=8)
def reviews_fingerprint(run: Run, split: str) -> str:
    """A hash of a split's texts and labels: what is computed from it is computed anew when they change."""
    part = reviews_of(run.profile, run.seed)[split]
    return fingerprint([part["text"][:], part["label"][:]])


@functools.lru_cache(maxsize=8)
def dataset(run: Run, split: str) -> IMDbDataset:
    """The tokenised reviews of a split of this run, once a process."""
    return IMDbDataset(reviews_of(run.profile, run.seed)[split], load_tokenizer(run.profile), run.profile)


def judging(run: Run) -> dict:
    """How ``predict_logits`` judges the dense models of a run: as many reviews at a time, in the precision of training.

    In bfloat16, where the machine is faster at it, a model is judged in half the time, and logits differ by about 0.01.
    """
    return {
        "batch_size": run.profile.eval_batch_size,
        "precision": processes.agree(mixed_precision(run.profile.precision)),
    }


def validator(run: Run):
    """A function(model) -> validation accuracy, for ``train``."""
    return lambda model: evaluate_accuracy(model, dataset(run, "validation"), **judging(run))


def on_device(run: Run, name: str) -> torch.nn.Module:
    """A model of this run on the device that computes; a sparse one stays on the CPU, for which its kernels are."""
    return run.load_model(name) if is_sparse(run, name) else run.load_model(name).to(processes.device())


def is_sparse(run: Run, name: str) -> bool:
    return run.artifact(name)["kind"] == "sparse"


def write_history(folder: Path, history: list[dict]) -> None:
    (folder / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")


def save_trained(model, history: list[dict], folder: Path) -> None:
    save_dense(model, folder)
    write_history(folder, history)


def read_history(run: Run, name: str) -> pd.DataFrame:
    """The learning curve of a model: epoch, steps, loss, losses (each step's), accuracy (validation), seconds."""
    return pd.DataFrame(json.loads((run.folder(name) / "history.json").read_text(encoding="utf-8")))


# --- 01: fine-tuning ---


def tfidf_baseline(train_texts: list[str], labels: list[int]):
    """TF-IDF of words and word pairs with logistic regression, the line to beat; fitted on the training reviews."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000)).fit(train_texts, labels)


@functools.lru_cache(maxsize=4)
def fitted_tfidf(run: Run):
    """``tfidf_baseline`` on the training reviews of a run, once a process."""
    train_part = reviews_of(run.profile, run.seed)["train"]
    with progress(None, "fitting TF-IDF with logistic regression"):
        return tfidf_baseline(train_part["text"][:], train_part["label"][:])


def save_pretrained_model(run: Run) -> Path:
    """Artefact ``pretrained``: the model before fine-tuning, its head still random."""

    def build(folder):
        save_dense(create_model(run.profile, run.seed), folder)

    settings = pick(run.profile, *MODEL_FIELDS, seed=run.seed, weights=source_fingerprint(run.profile))
    return run.cached("pretrained", settings, build, kind="dense", made_by="01")


def finetuning_settings(run: Run) -> dict:
    """What a fine-tuned model depends on beside its first weights."""
    reviews = {"reviews": reviews_fingerprint(run, "train"), "chosen": reviews_fingerprint(run, "validation")}
    return pick(run.profile, *DATA_FIELDS, *FINETUNE_FIELDS, seed=run.seed) | reviews


def fine_tune(run: Run, model, folder: Path, description: str, observers: tuple = ()) -> list[dict]:
    """Train a model by the profile's recipe, into the folder of the artefact being built; returns the history."""
    history = train(
        model,
        dataset(run, "train"),
        recipe_for(run.profile, "finetune"),
        seed=run.seed,
        observers=observers,
        validate=validator(run),
        checkpoints=checkpoints_of(folder),
        description=description,
    )
    save_trained(model, history, folder)
    return history


def finetune_model(run: Run) -> pd.DataFrame:
    """Artefact ``fine_tuned``: the model after fine-tuning, with what was observed of every prunable weight.

    Returns the learning curve. Makes ``pretrained`` first.
    """
    save_pretrained_model(run)

    def build(folder):
        model = on_device(run, "pretrained")
        observed = {"mean_abs_gradient": GradientMagnitude(model), "first_order_movement": FirstOrderMovement(model)}
        flagged = FlaggedSets(observed["mean_abs_gradient"], run.profile.main_sparsity)
        fine_tune(run, model, folder, "fine-tuning", (flagged, *observed.values()))
        save_statistics(folder, {key: observer.mean() for key, observer in observed.items()})
        save_file(flagged.tensors(), folder / FLAGGED)

    settings = finetuning_settings(run) | pick(run.profile, "main_sparsity")
    run.cached("fine_tuned", settings, build, ("pretrained",), kind="dense", made_by="01")
    return read_history(run, "fine_tuned")


def flagged_along_the_way(run: Run) -> dict[str, torch.Tensor]:
    """What each criterion flagged along fine-tuning, at the main sparsity: of ``masks.FlaggedSets.tensors``."""
    return load_file(run.folder("fine_tuned") / FLAGGED)


def save_statistics(folder: Path, statistics: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write {statistic: {parameter name: tensor}}, as ``load_statistics`` reads it."""
    save_tensors(folder, {f"{key}/{name}": t for key, tensors in statistics.items() for name, t in tensors.items()})


def load_statistics(run: Run, artefact: str) -> dict[str, dict[str, torch.Tensor]]:
    """The statistics of an artefact: {statistic: {parameter name: tensor}}."""
    found = {}
    for key, tensor in run.load_tensors(artefact).items():
        statistic, name = key.split("/", 1)
        found.setdefault(statistic, {})[name] = tensor
    return found


def model_name(stage: str, criterion: str, sparsity: float) -> str:
    """``recovered_magnitude_90`` and the like; tenths of a percent are kept where there are any."""
    return f"{stage}_{criterion}_{f'{100 * sparsity:g}'.replace('.', 'p')}"


def validation_accuracy(run: Run, name: str) -> float:
    """A model's accuracy on the validation reviews."""
    return float(answers_right(run, name, "validation").mean())


# --- 05: distillation ---


def teacher_data_and_loss(run: Run, alpha: float, temperature: float) -> tuple[IMDbDataset, Callable]:
    """The training reviews with the fine-tuned model's logits, and the loss that uses them (``distillation_loss``)."""
    data = copy.copy(dataset(run, "train"))
    data.teacher_logits = train_logits(run)

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return distillation_loss(batch["teacher_logits"], logits, batch["labels"], alpha, temperature)

    return data, loss


def distil_student(
    run: Run, name: str, layers: int, alpha: float, temperature: float, from_teacher: bool = True, steps: int = 0
) -> pd.DataFrame:
    """Artefact ``student_<name>``: a shallower model trained on the labels and the teacher's logits.

    alpha = 1 leaves the teacher out; steps = 0 trains for the profile's ``distill_epochs``. Returns the learning curve.
    """

    def build(folder):
        data, loss = teacher_data_and_loss(run, alpha, temperature)
        student = create_student(run.load_model("fine_tuned"), layers, run.seed, from_teacher)
        recipe = recipe_for(run.profile, "distill")
        if steps:
            recipe = Recipe(**{**vars(recipe), "steps": steps})
        history = train(
            student,
            data,
            recipe,
            seed=run.seed,
            loss_function=loss,
            validate=validator(run),
            checkpoints=checkpoints_of(folder),
            description=f"student {name}",
        )
        save_trained(student, history, folder)

    settings = pick(run.profile, *TRAIN_FIELDS, "distill_epochs", "distill_learning_rate", "distill_batch_size")
    settings |= {"layers": layers, "alpha": alpha, "temperature": temperature, "from_teacher": from_teacher}
    settings |= {"steps": steps, "seed": run.seed}
    # The students of a scan are data, not models of the run: they are trained for a few steps only.
    kind = "data" if steps else "dense"
    run.cached(f"student_{name}", settings, build, ("fine_tuned",), kind=kind, made_by="05")
    return read_history(run, f"student_{name}")


def train_logits(run: Run) -> np.ndarray:
    """The fine-tuned model's logits on the training reviews, in eval mode: computed once for all students."""
    return split_logits(run, "fine_tuned", "train")


# --- predictions, once a model and split ---


def test_studies(run: Run) -> tuple[str, dict]:
    """The key of this study (settings and code), and what the test reviews judged by study: {key: models, reasons}."""
    path = run.artifacts / "test_part.json"
    studies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = fingerprint([asdict(run.profile), code_fingerprint(*COMPUTING), reviews_fingerprint(run, "test")])
    return key, {key: {"models": [], "reasons": []}} | studies


def test_record(run: Run) -> dict:
    """What is on record of the test reviews: models and reasons of this study, and how many studies they judged."""
    key, studies = test_studies(run)
    return studies[key] | {"studies": len(studies)}


def open_test(run: Run, names: list[str], again: str = "") -> dict:
    """Declare the models that are judged on the test reviews; only these get an answer from them.

    Called once, at the end: whoever looks, adds a model and looks again has chosen on the test part. So a second call
    that adds models under the same settings raises ``WorkspaceError`` unless ``again`` says why; the reasons are kept.
    Returns the record: models, reasons, and how many studies (settings or code) the same reviews have judged.
    """
    key, studies = test_studies(run)
    models = studies[key]["models"]
    added = [name for name in names if name not in models]
    if models and added and not again:
        raise WorkspaceError(
            f"the test reviews have judged {len(models)} models of this run, and {', '.join(added[:5])} "
            "would be chosen with their answers in view: choose on validation, or give open_test again='the reason'"
        )
    models += added
    studies[key]["reasons"] += [again] if again else []
    if processes.is_main():
        write_text(run.artifacts / "test_part.json", json.dumps(studies, indent=1) + "\n")
    processes.wait()
    return test_record(run)


def split_logits(run: Run, name: str, split: str) -> np.ndarray:
    """Artefact ``logits_<model>_<split>``: the logits [n, 2] of a model, or of "tfidf", on a split, computed once.

    On "test" only for models that ``open_test`` has declared.
    """
    if split == "test" and name not in test_record(run)["models"]:
        raise WorkspaceError(
            f"{name} is not declared for the test reviews, which answer once, in notebook 06 "
            "(experiments.open_test): use validation until then"
        )

    def build(folder):
        if name == "tfidf":
            logits = fitted_tfidf(run).predict_log_proba(reviews_of(run.profile, run.seed)[split]["text"][:])
        else:
            # A sparse engine computes in float32.
            how = judging(run) | ({"precision": "no"} if is_sparse(run, name) else {})
            logits = predict_logits(on_device(run, name), dataset(run, split).input_ids, **how)
        save_tensors(folder, {"logits": torch.from_numpy(logits)})

    artefact = f"logits_{name}_{split}"
    settings = pick(run.profile, "max_tokens", "head_share", "precision", reviews=reviews_fingerprint(run, split))
    if name == "tfidf":
        settings |= {"fitted_on": reviews_fingerprint(run, "train")}
    run.cached(artefact, settings, build, () if name == "tfidf" else (name,))
    return run.load_tensors(artefact)["logits"].numpy()


def answers_right(run: Run, name: str, split: str) -> np.ndarray:
    """Which reviews of a split a model gets right: bool [n]."""
    return split_logits(run, name, split).argmax(1) == dataset(run, split).labels


def right_over_seeds(run: Run, name: str, split: str) -> np.ndarray:
    """Which reviews of a split a model gets right: bool [seeds, n], for a model that every seed has."""
    return np.stack([answers_right(one, name, split) for one in runs_of(run)])


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """P(class) [n, classes] of logits, softened by a temperature."""
    return softmax(logits / temperature, axis=-1)


def model_bytes(run: Run, name: str) -> int:
    """Bytes of a model's weight files; statistics and records that lie beside them do not count."""
    files = run.folder(name).glob("*.safetensors")
    return sum(path.stat().st_size for path in files if path.name not in (TENSORS, FLAGGED))


def latency_batch(run: Run, size: int) -> dict[str, torch.Tensor]:
    """A batch of real test reviews for timing: evenly spaced over the lengths, right-padded."""
    rows = sorted(dataset(run, "test").input_ids, key=len)
    chosen = [rows[int((i + 0.5) * len(rows) / size)] for i in range(size)]
    return {"input_ids": pad(chosen, load_tokenizer(run.profile).pad_token_id)}


def scan_trials(profile: Profile) -> list[tuple[float, float]]:
    """Alphas and temperatures that the scan tries, each with each."""
    return [(alpha, t) for alpha in profile.alphas for t in profile.temperatures]


def scan_student(run: Run, alpha: float, temperature: float) -> dict:
    """One short student of the scan: its alpha, temperature and validation accuracy."""
    name, layers = f"scan_{alpha:g}_{temperature:g}".replace(".", "p"), run.profile.student_layers[0]
    curve = distil_student(run, name, layers, alpha, temperature, steps=run.profile.scan_steps)
    return {"alpha": alpha, "temperature": temperature, "accuracy": curve["accuracy"].max()}


def scan_distillation(run: Run) -> pd.DataFrame:
    """Short students over temperature and alpha: a row each with validation accuracy. Choose the best for the rest."""
    return pd.DataFrame([scan_student(run, *trial) for trial in scan_trials(run.profile)])


def student_variants(profile: Profile) -> list[tuple[str, int]]:
    """Which students a profile trains: the controls at the first depth only, a distilled one at every depth."""
    first, *others = profile.student_layers
    controls = [(variant, first) for variant in ("distilled", "labels_only", "distilled_random")]
    return controls + [("distilled", layers) for layers in others]


def compressed_names(profile: Profile) -> list[str]:
    """The artefacts of the students with everything done to them (``compression.compress_student``)."""
    return [f"compressed_{layers}" for layers in profile.student_layers]


def student_names(profile: Profile) -> list[str]:
    """The artefacts of the models that notebook 05 makes."""
    students = [f"student_{variant}_{layers}" for variant, layers in student_variants(profile)]
    return [*students, *compressed_names(profile)]


def best_scan(run: Run) -> tuple[float, float]:
    """Alpha and temperature with the best validation accuracy in the scan."""
    scan = scan_distillation(run)
    return tuple(float(value) for value in scan.loc[scan["accuracy"].idxmax(), ["alpha", "temperature"]])


def distil_variant(run: Run, variant: str, layers: int, alpha: float, temperature: float) -> dict:
    """One of ``student_variants`` at an alpha and a temperature: what it is, and its validation accuracy."""
    alpha, from_teacher = 1.0 if variant == "labels_only" else alpha, variant != "distilled_random"
    curve = distil_student(run, f"{variant}_{layers}", layers, alpha, temperature, from_teacher)
    row = {"model": f"student_{variant}_{layers}", "layers": layers, "alpha": alpha, "from_teacher": from_teacher}
    return row | {"temperature": temperature, "accuracy": curve["accuracy"].max()}


def distil_all(run: Run) -> pd.DataFrame:
    """Every student of a profile at the scan's best temperature and alpha: a row a student."""
    best = best_scan(run)
    return pd.DataFrame([distil_variant(run, *variant, *best) for variant in student_variants(run.profile)])
