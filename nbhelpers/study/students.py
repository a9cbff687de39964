"""Notebook 05: students of fewer layers, and one that is compressed in every way at once."""

import dataclasses
import json
import math
import tempfile

import pandas as pd
import torch

from nbhelpers import criteria
from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.models import create_student, prunable_weights
from nbhelpers.profiles import Profile
from nbhelpers.sparse import convert_to_sparse, factorize_embedding, quantize, save_sparse
from nbhelpers.study.artefacts import (
    layer_count,
    model_bytes,
    on_device,
    read_history,
    save_trained,
    weight_bytes,
    write_history,
)
from nbhelpers.study.choices import decide, distillation_scales
from nbhelpers.study.inputs import TRAIN_FIELDS, dataset, pick
from nbhelpers.study.predictions import validation_accuracy, validator
from nbhelpers.study.recovery import chooser, gradual_keeper, rescorer
from nbhelpers.study.scoring import calibration_rows
from nbhelpers.study.teacher import teacher_data_and_loss
from nbhelpers.training import recipe_for, train
from nbhelpers.training.observers import RunningGradient, calibrate
from nbhelpers.training.rounding import RoundedModel
from nbhelpers.workspace import Run

TAUGHT_FIELDS = ("distill_batch_size", "prefix_share")


def distil_student(
    run: Run, name: str, layers: int, alpha: float, temperature: float, start: str, epochs: int = 0, steps: int = 0
) -> pd.DataFrame:
    """Artefact ``student_<name>``: a shallower model trained on the labels and the teacher's logits.

    start: the model whose blocks it starts from; alpha = 1 leaves the teacher out; it is trained for so many epochs, or
    steps. Returns the learning curve.
    """

    def build(target):
        data, loss = teacher_data_and_loss(run, alpha, temperature)
        student = create_student(run.load_model(start), layers, run.seed)
        recipe = dataclasses.replace(recipe_for(run.profile, "distill"), epochs=epochs, steps=steps or None)
        history = train(
            student,
            data,
            recipe,
            seed=run.seed,
            loss_function=loss,
            validate=validator(run),
            checkpoints=target.checkpoints(),
            description=f"student {name}",
        )
        save_trained(student, history, target.folder)

    settings = pick(run.profile, *TRAIN_FIELDS, "distill_learning_rate", *TAUGHT_FIELDS)
    settings |= {"layers": layers, "alpha": alpha, "temperature": temperature}
    settings |= {"epochs": epochs, "steps": steps, "seed": run.seed}
    # The students of a scan are data, not models of the run: they are trained for a few steps only.
    kind, inputs = "data" if steps else "dense", tuple(dict.fromkeys((start, "fine_tuned")))
    run.cached(f"student_{name}", settings, build, inputs, kind=kind, made_by="05")
    return read_history(run, f"student_{name}")


def scan_trials(profile: Profile) -> list[tuple[float, float]]:
    """Return the alphas and temperatures that the scan tries, each with each."""
    return [(alpha, t) for alpha in profile.alphas for t in profile.temperatures]


def scan_student(run: Run, alpha: float, temperature: float) -> dict:
    """Train one short student of the scan; return its alpha, temperature and validation accuracy."""
    name, layers = f"scan_{alpha:g}_{temperature:g}".replace(".", "p"), run.profile.student_layers[0]
    curve = distil_student(run, name, layers, alpha, temperature, "fine_tuned", steps=run.profile.scan_steps)
    return {"alpha": alpha, "temperature": temperature, "accuracy": curve["accuracy"].max()}


def scan_distillation(run: Run) -> pd.DataFrame:
    """Train short students over temperature and alpha, and decide ``choice_distillation``, the best for the rest.

    Returns one row per student, with its validation accuracy.
    """
    table = pd.DataFrame([scan_student(run, *trial) for trial in scan_trials(run.profile)])
    decide(run, "distillation", table, made_by="05")
    return table


def student_variants(profile: Profile) -> list[tuple[str, int]]:
    """Return which students a profile trains: the controls at the first depth only, a distilled one at every depth.

    "labels_only" has no teacher; "direct" starts from the *pretrained* blocks, also without a teacher, and is trained
    for as long as a student and its compression together.
    """
    first, *others = profile.student_layers
    controls = [(variant, first) for variant in ("distilled", "labels_only", "direct")]
    return controls + [("distilled", layers) for layers in others]


def compressed_names(profile: Profile) -> list[str]:
    """Return the names of the students that are compressed in every way (``compress_student``)."""
    return [f"compressed_{layers}" for layers in profile.student_layers]


def student_names(profile: Profile) -> list[str]:
    """Return the names of the models that notebook 05 makes."""
    students = [f"student_{variant}_{layers}" for variant, layers in student_variants(profile)]
    return [*students, *compressed_names(profile)]


def distil_variant(run: Run, variant: str, layers: int, alpha: float, temperature: float) -> dict:
    """Train one of ``student_variants``; return what it is, and its validation accuracy."""
    alpha, direct = alpha if variant == "distilled" else 1.0, variant == "direct"
    epochs = run.profile.distill_epochs + direct * run.profile.compress_epochs
    start = "pretrained" if direct else "fine_tuned"
    curve = distil_student(run, f"{variant}_{layers}", layers, alpha, temperature, start, epochs)
    row = {"model": f"student_{variant}_{layers}", "layers": layers, "start": start, "alpha": alpha}
    row |= {"temperature": temperature, "steps": int(curve["steps"].iloc[-1])}
    return row | {"accuracy": curve["accuracy"].max()}


def distil_all(run: Run) -> pd.DataFrame:
    """Train every student of a profile at the temperature and alpha of the scan: one row per student."""
    scan_distillation(run)
    scales = distillation_scales(run)
    return pd.DataFrame([distil_variant(run, *variant, *scales) for variant in student_variants(run.profile)])


# --- everything at once ---

ACCEPTED = 0.01  # of accuracy: what a small model may cost
BEFORE = "before_int8.json"  # beside the compressed model: what it was before it was rounded


def taylor_scores(run: Run, model) -> dict[str, torch.Tensor]:
    """Return |w| * mean |gradient| of a model over some training reviews; no training is needed."""
    observed = calibrate(model, *calibration_rows(run, run.profile.calibration_reviews))
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return criteria.COMPARATORS["taylor"](weights, observed)


def compression_keeper(run: Run, model, steps: int):
    """Return the keeper that prunes a student to the main sparsity, by Taylor's scores, and the observer it needs."""
    observed = RunningGradient(model)
    scores = rescorer(model, "taylor", taylor_scores(run, model), observed, {})  # Taylor takes no pretrained weights
    return gradual_keeper(model, scores, run.profile.main_sparsity, steps, 0.0, chooser(model, "weights")), observed


def sparse_bytes(model) -> int:
    """Return the bytes that the weights of a sparse model would take on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return weight_bytes(save_sparse(model, folder))


def compress_student(run: Run, layers: int) -> pd.DataFrame:
    """Artefact ``compressed_<layers>``: what is left when every means of these notebooks is used, one after the other.

    The distilled student of so many layers gets a token embedding of rank ``embedding_rank`` and learns from the labels
    and the teacher for ``compress_epochs`` more. Meanwhile its block weights are pruned to ``main_sparsity`` step by
    step; once that is reached, it computes with weights in eight bits. Then it is converted to sparse execution and
    rounded. Returns one row per step: model, layers, step, accuracy (validation), file_bytes.
    """
    name, student = f"compressed_{layers}", f"student_distilled_{layers}"
    alpha, temperature = distillation_scales(run)

    def build(target):
        model = on_device(run, student)
        data, taught = teacher_data_and_loss(run, alpha, temperature)
        steps = run.profile.compress_epochs * math.ceil(len(data) / run.profile.distill_batch_size)
        keeper, observed = compression_keeper(run, model, steps)
        factorize_embedding(model, run.profile.embedding_rank)

        def loss(model, batch):
            return taught(RoundedModel(model) if keeper.step > keeper.steps else model, batch)

        times = {"learning_rate": run.profile.compress_learning_rate, "steps": steps}
        recipe = dataclasses.replace(recipe_for(run.profile, "distill"), **times)
        options = {"mask_keeper": keeper, "observers": (observed,), "loss_function": loss}
        options |= {"checkpoints": target.checkpoints(), "description": name.replace("_", " ")}
        history = train(model, data, recipe, seed=run.seed, **options)
        keeper.finish()
        sparse = convert_to_sparse(model.cpu())
        accuracy = evaluate_accuracy(sparse, dataset(run, "validation"), **run.inference_options(sparse=True))
        before = ("pruned, low-rank embedding", accuracy, sparse_bytes(sparse))
        (target.folder / BEFORE).write_text(json.dumps(before), encoding="utf-8")
        save_sparse(quantize(sparse), target.folder)
        write_history(target.folder, history)

    settings = pick(run.profile, *TRAIN_FIELDS, "compress_epochs", "compress_learning_rate", *TAUGHT_FIELDS)
    settings |= pick(run.profile, "main_sparsity", "embedding_rank", "calibration_reviews", seed=run.seed)
    settings |= {"alpha": alpha, "temperature": temperature, "score": "taylor"}
    run.cached(name, settings, build, (student, "fine_tuned"), kind="sparse", made_by="05")
    steps = [
        ("distilled", validation_accuracy(run, student), model_bytes(run, student)),
        json.loads((run.folder(name) / BEFORE).read_text(encoding="utf-8")),
        ("int8", validation_accuracy(run, name), model_bytes(run, name)),
    ]
    table = pd.DataFrame(steps, columns=["step", "accuracy", "file_bytes"])
    table.insert(0, "layers", layers)
    table.insert(0, "model", name)
    return table


def compress_all(run: Run) -> pd.DataFrame:
    """Compress a student of every depth of the profile, and decide ``choice_compressed``.

    Returns the rows of ``compress_student``, under a row of the fine-tuned model.
    """
    dense = {"model": "fine_tuned", "layers": layer_count(run, "fine_tuned"), "step": "fine-tuned"}
    dense |= {"accuracy": validation_accuracy(run, "fine_tuned"), "file_bytes": model_bytes(run, "fine_tuned")}
    tables = [compress_student(run, layers) for layers in run.profile.student_layers]
    choose_compressed(run)
    return pd.concat([pd.DataFrame([dense]), *tables], ignore_index=True)


def choose_compressed(run: Run) -> str:
    """Decide ``choice_compressed``: the smallest that loses at most ``ACCEPTED`` on validation, or else the best."""
    names = compressed_names(run.profile)
    rows = [{"model": n, "accuracy": validation_accuracy(run, n), "file_bytes": model_bytes(run, n)} for n in names]
    table = pd.DataFrame(rows)
    good = table[table["accuracy"] >= validation_accuracy(run, "fine_tuned") - ACCEPTED]
    best = None if good.empty else int(good["file_bytes"].idxmin())
    return decide(run, "compressed", table, made_by="05", best=best)["model"]
