"""The heavy computations of the notebooks, each a function that leaves an artefact and finds it again."""

import argparse
import copy
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nbhelpers import criteria, masks
from nbhelpers.data import DataError, IMDbDataset, load_reviews, pad
from nbhelpers.evaluation import evaluate_accuracy, evaluate_model, mcnemar, predict_logits
from nbhelpers.measurement import measure_inference_efficiency
from nbhelpers.models import (
    ModelError,
    check_model,
    create_model,
    create_student,
    load_tokenizer,
    prunable_weights,
    save_dense,
    source_fingerprint,
    structures,
)
from nbhelpers.profiles import Profile, ProfileError, get_profile, parse_overrides
from nbhelpers.sparse import convert_gpt2_to_sparse, count_actual_params, save_sparse
from nbhelpers.statistics import FirstOrderMovement, GradientMagnitude, calibrate
from nbhelpers.training import Recipe, distillation_loss, recipe_for, train
from nbhelpers.workspace import TENSORS, Run, WorkspaceError, fingerprint, maker_of, open_run, save_tensors

DATA_FIELDS = ("data", "data_revision", "train_size", "validation_size", "test_size", "max_tokens", "head_share")
MODEL_FIELDS = ("model", "model_revision", "dropout")
TRAIN_FIELDS = ("weight_decay", "warmup_share", "max_grad_norm", "precision")
FINETUNE_FIELDS = (*TRAIN_FIELDS, "batch_size", "epochs", "learning_rate", "layer_decay", "prefix_share")
RECOVERY_FIELDS = (*TRAIN_FIELDS, "batch_size", "recovery_steps", "recovery_learning_rate", "prefix_share")


PRUNED_FROM = ("fine_tuned", *(f"scores_{criterion}" for criterion in criteria.CRITERIA))
GRADUAL_SHARE = 0.7  # of the recovery steps, those over which gradual pruning reaches its sparsity


def pick(profile: Profile, *fields: str, **extra) -> dict:
    """Some fields of a profile as the settings of an artefact."""
    return {field: getattr(profile, field) for field in fields} | extra


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


def validator(run: Run):
    """A function(model) -> validation accuracy, for ``train``."""
    return lambda model: evaluate_accuracy(model, dataset(run, "validation"), run.profile.eval_batch_size)


def write_history(folder: Path, history: list[dict]) -> None:
    (folder / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")


def read_history(run: Run, name: str) -> pd.DataFrame:
    """The learning curve of a model: epoch, steps, loss, losses (each step's), accuracy (validation), seconds."""
    return pd.DataFrame(json.loads((run.folder(name) / "history.json").read_text(encoding="utf-8")))


# --- 01: fine-tuning ---


def tfidf_baseline(train_texts: list[str], labels: list[int]):
    """TF-IDF of words and word pairs with logistic regression, the line to beat; fitted on the training reviews."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000)).fit(train_texts, labels)


def save_pretrained_model(run: Run) -> Path:
    """Artefact ``pretrained``: the model before fine-tuning, its head still random."""

    def build(folder):
        save_dense(create_model(run.profile, run.seed), folder)

    settings = pick(run.profile, *MODEL_FIELDS, seed=run.seed, weights=source_fingerprint(run.profile))
    return run.cached("pretrained", settings, build, kind="dense", made_by="01")


def finetune_model(run: Run) -> pd.DataFrame:
    """Artefact ``fine_tuned``: the model after fine-tuning, with what was observed of every prunable weight.

    Returns the learning curve. Makes ``pretrained`` first.
    """
    save_pretrained_model(run)

    def build(folder):
        model = run.load_model("pretrained")
        observed = {"mean_abs_gradient": GradientMagnitude(model), "first_order_movement": FirstOrderMovement(model)}
        history = train(
            model,
            dataset(run, "train"),
            recipe_for(run.profile, "finetune"),
            seed=run.seed,
            observers=tuple(observed.values()),
            validate=validator(run),
            description="fine-tuning",
        )
        save_dense(model, folder)
        save_statistics(folder, {key: observer.mean() for key, observer in observed.items()})
        write_history(folder, history)

    settings = pick(run.profile, *DATA_FIELDS, *FINETUNE_FIELDS)
    settings |= {
        "seed": run.seed,
        "reviews": reviews_fingerprint(run, "train"),
        "chosen": reviews_fingerprint(run, "validation"),
    }
    run.cached("fine_tuned", settings, build, ("pretrained",), kind="dense", made_by="01")
    return read_history(run, "fine_tuned")


# --- 02 and 03: scores, masks, recovery ---


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


def calibrate_model(run: Run) -> None:
    """Artefact ``calibration``: what a pass over some training reviews shows of the fine-tuned model."""

    def build(folder):
        data = dataset(run, "train")
        # Evenly spaced, so that both classes are in it.
        chosen = np.linspace(0, len(data) - 1, min(run.profile.calibration_reviews, len(data))).round().astype(int)
        reviews, labels = [data.input_ids[i] for i in chosen], data.labels[chosen].tolist()
        save_statistics(folder, calibrate(run.load_model("fine_tuned"), reviews, labels))

    run.cached("calibration", pick(run.profile, "calibration_reviews"), build, ("fine_tuned",), made_by="02")


def statistics_of(run: Run) -> tuple[dict, dict]:
    """The fine-tuned prunable weights, and the statistics that the criteria and the comparators take."""
    weights = {n: w.detach() for n, w in prunable_weights(run.load_model("fine_tuned")).items()}
    pretrained = {n: w.detach() for n, w in prunable_weights(run.load_model("pretrained")).items()}
    calibrate_model(run)
    return weights, {"pretrained": pretrained} | load_statistics(run, "fine_tuned") | load_statistics(
        run, "calibration"
    )


def score_weights(run: Run, registry: dict = criteria.CRITERIA) -> dict[str, dict[str, torch.Tensor]]:
    """Artefacts ``scores_<criterion>``; returns {criterion: {parameter name: score}}."""
    found, inputs = {}, ("pretrained", "fine_tuned", "calibration")
    calibrate_model(run)
    # Read once, and only if a score has to be computed.
    observed = functools.cache(lambda: statistics_of(run))
    for name, criterion in registry.items():

        def build(folder, criterion=criterion):
            save_tensors(folder, criterion(*observed()))

        run.cached(f"scores_{name}", {"criterion": name}, build, inputs, made_by="02")
        found[name] = run.load_tensors(f"scores_{name}")
    return found


def with_merge(scores: dict) -> dict:
    """The criteria's scores and, as ``merged``, the one of their unanimous agreement."""
    return scores | {"merged": criteria.merge_scores(scores, "all")}


def scores_of(run: Run, criterion: str) -> dict[str, torch.Tensor]:
    """The scores of one criterion, or of ``merged``."""
    scores = score_weights(run)
    return with_merge(scores)[criterion] if criterion == "merged" else scores[criterion]


def model_name(stage: str, criterion: str, sparsity: float) -> str:
    """``recovered_magnitude_90`` and the like; tenths of a percent are kept where there are any."""
    return f"{stage}_{criterion}_{f'{100 * sparsity:g}'.replace('.', 'p')}"


def prune_model(run: Run, masks_: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The fine-tuned model with the masks applied."""
    return masks.apply_masks(run.load_model("fine_tuned"), masks_)


def recover_model(
    run: Run, criterion: str, sparsity: float, chosen: dict[str, torch.Tensor], stage: str = "recovered"
) -> dict:
    """Artefact ``<stage>_<criterion>_<percent>``: pruned, then trained on with its masks held.

    Returns criterion, sparsity (reached), accuracy (validation), and how many pruned weights revived (0).
    """
    name = model_name(stage, criterion, sparsity)

    def build(folder):
        model = run.load_model("fine_tuned")
        keeper = masks.MaskKeeper(model, chosen)
        train_on(run, model, folder, f"recovering {criterion} at {sparsity:.0%}", keeper)
        if keeper.revived():
            raise RuntimeError(f"{keeper.revived()} pruned weights of {name} revived during recovery")

    bits = b"".join(np.packbits(mask.numpy()).tobytes() for mask in chosen.values())
    settings = pick(run.profile, *RECOVERY_FIELDS, masks=hashlib.sha256(bits).hexdigest(), seed=run.seed)
    run.cached(name, settings, build, PRUNED_FROM, kind="dense", made_by=maker_of(name))
    zeros = {n: w != 0 for n, w in prunable_weights(run.load_model(name)).items()}
    return {
        "criterion": criterion,
        "sparsity": masks.sparsity_of(zeros),
        "accuracy": validation_accuracy(run, name),
        "revived": masks.MaskKeeper(run.load_model(name), chosen, apply=False).revived(),
    }


def train_on(run: Run, model, folder: Path, description: str, keeper=None, data=None, loss=None) -> None:
    """A profile's recovery steps, without a choice among checkpoints: the last one counts."""
    options = {"seed": run.seed, "mask_keeper": keeper, "loss_function": loss, "description": description}
    history = train(model, data or dataset(run, "train"), recipe_for(run.profile, "recover"), **options)
    save_dense(model, folder)
    write_history(folder, history)


def train_control(run: Run) -> float:
    """Artefact ``fine_tuned_extra``: the dense model with the same extra steps as every recovery, the fair control.

    Returns its validation accuracy.
    """

    def build(folder):
        train_on(run, run.load_model("fine_tuned"), folder, "dense control")

    settings = pick(run.profile, *RECOVERY_FIELDS, seed=run.seed)
    run.cached("fine_tuned_extra", settings, build, ("fine_tuned",), kind="dense", made_by="03")
    return validation_accuracy(run, "fine_tuned_extra")


def recover_otherwise(run: Run, way: str, criterion: str, sparsity: float) -> str:
    """Artefact ``gradual_<criterion>_<percent>`` or ``taught_...``, with the steps and data order of every recovery.

    "gradual" reaches the sparsity step by step over the first 70 % of the steps; "taught" starts from the pruned model
    and learns from the labels and the dense model's logits in equal parts (T = 2). Returns the artefact's name.
    """
    name = model_name(way, criterion, sparsity)

    def build(folder):
        model, score = run.load_model("fine_tuned"), scores_of(run, criterion)
        what = f"recovering {criterion} at {sparsity:.0%}, {way}"
        if way == "taught":
            keeper = masks.MaskKeeper(model, masks.select(score, sparsity))
            train_on(run, model, folder, what, keeper, *teacher_data_and_loss(run, 0.5, 2.0))
        else:
            steps = round(GRADUAL_SHARE * run.profile.recovery_steps)
            keeper = masks.GradualKeeper(model, lambda: score, sparsity, steps)
            train_on(run, model, folder, what, keeper)
            keeper.finish()

    settings = pick(run.profile, *RECOVERY_FIELDS, sparsity=sparsity, seed=run.seed)
    run.cached(name, settings, build, PRUNED_FROM, kind="dense", made_by="03")
    return name


def validation_accuracy(run: Run, name: str) -> float:
    """A model's accuracy on the validation reviews."""
    return float(answers_right(run, name, "validation").mean())


# --- 04: sparse conversion ---


def best_criterion(run: Run) -> str:
    """The criterion that notebook 03 found best on validation. Raises ``WorkspaceError`` before it has."""
    found = run.results().get("pruning")
    if not found:
        raise WorkspaceError(
            f"the result of pruning is missing from {run.reports}: run notebook 03 "
            f"(./run_all.sh --profile {run.profile.name} --only 03)"
        )
    return found["best_criterion"]


def masks_of(run: Run, sparsity: float) -> dict[str, torch.Tensor]:
    """The best criterion's masks at a sparsity."""
    return masks.select(scores_of(run, best_criterion(run)), sparsity)


def sparsify(
    run: Run, criterion: str, sparsity: float, stage: str = "sparse", source: str = "recovered", backend: str = "auto"
) -> Path:
    """Artefact ``<stage>_<criterion>_<percent>``: the model of the stage ``source``, converted to sparse execution."""
    dense = model_name(source, criterion, sparsity)

    def build(folder):
        save_sparse(convert_gpt2_to_sparse(run.load_model(dense), backend), folder)

    settings = {"criterion": criterion, "sparsity": sparsity, "backend": backend}
    return run.cached(model_name(stage, criterion, sparsity), settings, build, (dense,), kind="sparse", made_by="04")


def structured_masks(run: Run, sparsity: float) -> dict[str, torch.Tensor]:
    """The masks of whole heads and neurons by the best criterion's scores, nearest to a sparsity."""
    scores = scores_of(run, best_criterion(run))
    return masks.select_structures(scores, structures(run.load_model("fine_tuned")), sparsity)


def compact_model(run: Run, sparsity: float) -> dict:
    """Artefacts ``structured_<criterion>_<percent>``, recovered, and ``compact_...``, the same with shrunken matrices.

    Returns the row of ``recover_model``, with the compact model's name as ``model``.
    """
    criterion = best_criterion(run)
    row = recover_model(run, criterion, sparsity, structured_masks(run, sparsity), "structured")
    sparsify(run, criterion, sparsity, "compact", "structured", "dense")
    return {"model": model_name("compact", criterion, sparsity), **row}


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
            description=f"student {name}",
        )
        save_dense(student, folder)
        write_history(folder, history)

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


def split_logits(run: Run, name: str, split: str) -> np.ndarray:
    """Artefact ``logits_<model>_<split>``: a model's logits [n, 2] on a split, computed once."""

    def build(folder):
        logits = predict_logits(run.load_model(name), dataset(run, split).input_ids, run.profile.eval_batch_size)
        save_tensors(folder, {"logits": torch.from_numpy(logits)})

    artefact = f"logits_{name}_{split}"
    settings = pick(run.profile, "max_tokens", "head_share", reviews=reviews_fingerprint(run, split))
    run.cached(artefact, settings, build, (name,))
    return run.load_tensors(artefact)["logits"].numpy()


def answers_right(run: Run, name: str, split: str) -> np.ndarray:
    """Which reviews of a split a model gets right: bool [n]."""
    return split_logits(run, name, split).argmax(1) == dataset(run, split).labels


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """P(class) [n, classes] of logits, softened by a temperature."""
    return softmax(logits / temperature, axis=-1)


# --- 06: comparison ---


def compared_models(run: Run) -> list[str]:
    """The models that notebook 06 compares: dense, control, recovered, sparse, compact, students.

    Raises ``WorkspaceError`` when one is missing.
    """
    run.artifact("fine_tuned")
    main = run.profile.main_sparsity
    recovered = [model_name("recovered", c, main) for c in (*criteria.CRITERIA, "merged")]
    best, converted = best_criterion(run), run.profile.recovery_sparsities
    students = [f"student_{variant}_{layers}" for variant, layers in student_variants(run.profile)]
    sparse = [model_name("sparse", best, sparsity) for sparsity in converted]
    compact = [model_name("compact", best, sparsity) for sparsity in run.profile.structured_sparsities]
    names = ["fine_tuned", "fine_tuned_extra", *recovered, *sparse, *compact, *students]
    for name in names:
        run.artifact(name)
    return names


def model_bytes(run: Run, name: str) -> int:
    """Bytes of a model's weight files; statistics and records that lie beside them do not count."""
    files = run.folder(name).glob("*.safetensors")
    return sum(path.stat().st_size for path in files if path.name != TENSORS)


def latency_batch(run: Run, size: int) -> dict[str, torch.Tensor]:
    """A batch of real test reviews for timing: evenly spaced over the lengths, right-padded."""
    rows = sorted(dataset(run, "test").input_ids, key=len)
    chosen = [rows[int((i + 0.5) * len(rows) / size)] for i in range(size)]
    return {"input_ids": pad(chosen, load_tokenizer(run.profile).pad_token_id)}


def comparison_table(run: Run, names: list[str]) -> pd.DataFrame:
    """One row a model; ``speedup`` and ``p_value`` are against the first."""
    labels = dataset(run, "test").labels
    models = {name: run.load_model(name) for name in names}
    batch = latency_batch(run, run.profile.latency_batches[-1])
    cost = measure_inference_efficiency(models, [batch], run.profile.latency_repeats).set_index("model")
    reference = answers_right(run, names[0], "test")
    rows = []
    for name, model in models.items():
        quality, size = evaluate_model(split_logits(run, name, "test"), labels), count_actual_params(model)
        rows.append(
            {
                "model": name,
                **{
                    key: quality[key]
                    for key in ("accuracy", "accuracy_low", "accuracy_high", "f1", "f1_low", "f1_high")
                },
                "total_parameters": size["total"],
                "active_parameters": size["active"],
                "encoder_sparsity": size["encoder_sparsity"],
                "file_bytes": model_bytes(run, name),
                **cost.loc[name, ["latency_ms", "speedup", "peak_memory_bytes"]].to_dict(),
                "p_value": mcnemar(answers_right(run, name, "test"), reference),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """``python -m nbhelpers.training finetune|recover|distill``: the heavy stages without a notebook."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.training", description=__doc__)
    parser.add_argument("stage", choices=["finetune", "recover", "distill"])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    try:
        overrides = {k: v for pair in arguments.set for k, v in parse_overrides(pair).items()}
        run = open_run(get_profile(arguments.profile, **overrides), arguments.seed)
        check_model(run.profile)
        run.describe()
        reviews_of(run.profile, run.seed)
        if arguments.stage == "finetune":
            print(finetune_model(run).to_string(index=False))
        elif arguments.stage == "recover":
            recover_all(run)
        else:
            distil_all(run)
    except (ProfileError, DataError, ModelError, WorkspaceError) as error:
        sys.exit(f"error: {error}")


def recover_all(run: Run) -> pd.DataFrame:
    """Every recovery of a profile, and the dense control. Returns a row a recovered model, see ``recover_model``."""
    scores = with_merge(score_weights(run))
    train_control(run)
    rows = [
        recover_model(run, criterion, sparsity, masks.select(scores[criterion], sparsity))
        for sparsity in run.profile.recovery_sparsities
        for criterion in scores
    ]
    return pd.DataFrame(rows)


def scan_distillation(run: Run) -> pd.DataFrame:
    """Short students over temperature and alpha: a row each with validation accuracy. Choose the best for the rest."""
    layers, rows = run.profile.student_layers[0], []
    for alpha in run.profile.alphas:
        for t in run.profile.temperatures:
            name = f"scan_{alpha:g}_{t:g}".replace(".", "p")
            curve = distil_student(run, name, layers, alpha, t, steps=run.profile.scan_steps)
            rows.append({"alpha": alpha, "temperature": t, "accuracy": curve["accuracy"].max()})
    return pd.DataFrame(rows)


def student_variants(profile: Profile) -> list[tuple[str, int]]:
    """Which students a profile trains: the controls at the first depth only, a distilled one at every depth."""
    first, *others = profile.student_layers
    controls = [(variant, first) for variant in ("distilled", "labels_only", "distilled_random")]
    return controls + [("distilled", layers) for layers in others]


def distil_all(run: Run) -> pd.DataFrame:
    """Every student of a profile at the scan's best temperature and alpha. Returns a row a student."""
    scan = scan_distillation(run)
    best = scan.loc[scan["accuracy"].idxmax()]
    rows = []
    for variant, layers in student_variants(run.profile):
        alpha = 1.0 if variant == "labels_only" else float(best["alpha"])
        from_teacher = variant != "distilled_random"
        name = f"{variant}_{layers}"
        curve = distil_student(run, name, layers, alpha, float(best["temperature"]), from_teacher)
        rows.append({"model": f"student_{name}", "layers": layers, "alpha": alpha, "from_teacher": from_teacher})
        rows[-1] |= {"temperature": best["temperature"], "accuracy": curve["accuracy"].max()}
    return pd.DataFrame(rows)
