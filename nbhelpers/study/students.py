"""Notebook 05: students of fewer layers, and one that is compressed in every way at once."""

import dataclasses
import functools
import json
import math
import tempfile
from dataclasses import dataclass

import pandas as pd
import torch

from nbhelpers import criteria
from nbhelpers.masks import sparsity_of
from nbhelpers.models import (
    base_config,
    blocks,
    create_student,
    has_structures,
    load_tokenizer,
    prunable_weights,
)
from nbhelpers.profiles import Profile
from nbhelpers.sparse import convert_to_sparse, factorize_embedding, quantize, save_sparse
from nbhelpers.study.artefacts import (
    layer_count,
    model_bytes,
    on_device,
    percent,
    read_history,
    save_trained,
    weight_bytes,
    write_history,
)
from nbhelpers.study.choices import decide, distillation_scales
from nbhelpers.study.inputs import TRAIN_FIELDS, pick, reviews_fingerprint, reviews_of
from nbhelpers.study.predictions import validation_accuracy, validator
from nbhelpers.study.recovery import chooser, gradual_keeper, rescorer
from nbhelpers.study.scoring import calibration_rows
from nbhelpers.study.teacher import taught_splits, teacher_data_and_loss
from nbhelpers.training import distributed, recipe_for, train
from nbhelpers.training.observers import RunningGradient, calibrate
from nbhelpers.training.rounding import RoundedModel
from nbhelpers.workspace import Run

TAUGHT_FIELDS = ("distill_batch_size", "prefix_share")


@dataclass(frozen=True)
class Student:
    """What a student is made of and learns from.

    alpha: the weight of the labels, where 1 leaves the teacher out, and with it the reviews without labels;
    temperature: of the teacher; steps: of the optimizer; layers: how many blocks, 0 for all; width: the share of their
    weights that goes step by step, with whole heads and neurons; start: the model that the blocks come from.
    """

    alpha: float
    temperature: float
    steps: int
    layers: int = 0
    width: float = 0.0
    start: str = "fine_tuned"


def distil_student(run: Run, name: str, student: Student, kind: str = "dense") -> pd.DataFrame:
    """Artefact ``student_<name>``: a smaller model trained on the labels and the teacher's logits.

    kind: "data" for one that is no model of the run. Returns the learning curve.
    """
    splits = taught_splits(run) if student.alpha < 1 else ("train",)

    def build(target):
        data, loss = teacher_data_and_loss(run, student.alpha, student.temperature, splits=splits)
        source = run.load_model(student.start)
        model, keeper = create_student(source, student.layers or len(blocks(source)), run.seed), None
        options = {"loss_function": loss, "checkpoints": target.checkpoints(), "description": f"student {name}"}
        if student.width:
            model.to(distributed.device())
            keeper, observed = taylor_keeper(run, model, student.width, student.steps, "structures")
            options |= {"mask_keeper": keeper, "observers": (observed,)}
        else:  # of a model that is pruned as it is trained, the last epoch counts
            options["validate"] = validator(run)
        recipe = dataclasses.replace(recipe_for(run.profile, "distill"), steps=student.steps)
        history = train(model, data, recipe, seed=run.seed, **options)
        if keeper:
            keeper.finish()
        save_trained(model, history, target.folder)

    settings = pick(run.profile, *TRAIN_FIELDS, "distill_learning_rate", *TAUGHT_FIELDS, seed=run.seed)
    settings |= dataclasses.asdict(student) | transfer_settings(run, splits)
    settings |= pick(run.profile, "calibration_reviews") if student.width else {}
    inputs = tuple(dict.fromkeys((student.start, "fine_tuned")))
    run.cached(f"student_{name}", settings, build, inputs, kind=kind, made_by="05")
    return read_history(run, f"student_{name}")


def transfer_settings(run: Run, splits: tuple[str, ...]) -> dict:
    """Return what the artefact of a student depends on beside the training reviews."""
    return {split: reviews_fingerprint(run, split) for split in splits if split != "train"}


def epoch_steps(run: Run, epochs: int) -> int:
    """Return the optimizer steps of so many passes over all reviews that students learn from."""
    reviews = reviews_of(run.profile, run.seed)
    count = sum(len(reviews[split]) for split in taught_splits(run))
    return epochs * math.ceil(count / run.profile.distill_batch_size)


def scan_trials(profile: Profile) -> list[tuple[float, float]]:
    """Return the alphas and temperatures that the scan tries, each with each."""
    return [(alpha, t) for alpha in profile.alphas for t in profile.temperatures]


def scan_student(run: Run, alpha: float, temperature: float) -> dict:
    """Train one short student of the scan; return its alpha, temperature and validation accuracy."""
    name = f"scan_{alpha:g}_{temperature:g}".replace(".", "p")
    student = Student(alpha, temperature, run.profile.scan_steps, run.profile.student_layers[0])
    curve = distil_student(run, name, student, kind="data")
    return {"alpha": alpha, "temperature": temperature, "accuracy": curve["accuracy"].max()}


def scan_distillation(run: Run) -> pd.DataFrame:
    """Train short students over temperature and alpha, and decide ``choice_distillation``, the best for the rest.

    Returns one row per student, with its validation accuracy.
    """
    table = pd.DataFrame([scan_student(run, *trial) for trial in scan_trials(run.profile)])
    decide(run, "distillation", table, made_by="05")
    return table


@functools.lru_cache(maxsize=8)
def student_shapes(profile: Profile) -> dict[str, dict]:
    """Return what makes students smaller, by names: "2" for two layers, "width_75" for all without 75 % of their width.

    Of the fields of ``Student``. Models without ``structures`` get no narrow students.
    """
    narrow = has_structures(base_config(profile, load_tokenizer(profile)))
    shapes = {str(layers): {"layers": layers} for layers in profile.student_layers}
    return shapes | {f"width_{percent(width)}": {"width": width} for width in profile.student_widths if narrow}


def student_variants(profile: Profile) -> list[tuple[str, str]]:
    """Return which students a profile trains: a distilled one of every shape, the controls of the first shape only.

    "labels_only" has no teacher; "direct" starts from the *pretrained* blocks, also without a teacher, and is trained
    for as long as a student and its compression together.
    """
    first, *others = student_shapes(profile)
    controls = [(variant, first) for variant in ("distilled", "labels_only", "direct")]
    return controls + [("distilled", shape) for shape in others]


def distilled_names(profile: Profile) -> list[str]:
    """Return the names of the distilled students, one of every shape."""
    return [f"student_distilled_{shape}" for shape in student_shapes(profile)]


def compressed_names(profile: Profile) -> list[str]:
    """Return the names of the students that are compressed in every way (``compress_student``)."""
    return [f"compressed_{shape}" for shape in student_shapes(profile)]


def student_names(profile: Profile) -> list[str]:
    """Return the names of the models that notebook 05 makes."""
    students = [f"student_{variant}_{shape}" for variant, shape in student_variants(profile)]
    return [*students, *compressed_names(profile)]


def make_student(run: Run, variant: str, shape: str) -> Student:
    """Return one of ``student_variants``, with alpha and temperature of the scan."""
    alpha, temperature = distillation_scales(run)
    epochs, start = run.profile.distill_epochs, "fine_tuned"
    if variant == "direct":
        epochs, start = epochs + run.profile.compress_epochs, "pretrained"
    alpha = alpha if variant == "distilled" else 1.0
    return Student(alpha, temperature, epoch_steps(run, epochs), start=start, **student_shapes(run.profile)[shape])


def distil_variant(run: Run, variant: str, shape: str) -> dict:
    """Train one of ``student_variants``; return what it is, and its validation accuracy."""
    name, student = f"{variant}_{shape}", make_student(run, variant, shape)
    distil_student(run, name, student)
    name = f"student_{name}"
    row = {"model": name} | dataclasses.asdict(student) | {"layers": layer_count(run, name)}
    return row | {"accuracy": validation_accuracy(run, name)}


def distil_all(run: Run) -> pd.DataFrame:
    """Train every student of a profile at the temperature and alpha of the scan: one row per student."""
    scan_distillation(run)
    return pd.DataFrame([distil_variant(run, *variant) for variant in student_variants(run.profile)])


# --- everything at once ---

ACCEPTED = 0.01  # of accuracy: what a small model may cost
BEFORE = "before_int8.json"  # beside the compressed model: what it was before it was rounded


def taylor_scores(run: Run, model) -> dict[str, torch.Tensor]:
    """Return |w| * mean |gradient| of a model over some training reviews; no training is needed."""
    observed = calibrate(model, *calibration_rows(run, run.profile.calibration_reviews))
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return criteria.COMPARATORS["taylor"](weights, observed)


def taylor_keeper(run: Run, model, sparsity: float, steps: int, pattern: str = "weights", first: float = 0.0):
    """Return the keeper that prunes a student step by step by Taylor's scores, and the observer it needs.

    pattern: see ``recovery.chooser``; first: the sparsity at the start.
    """
    observed = RunningGradient(model)
    scores = rescorer(model, "taylor", taylor_scores(run, model), observed, {})  # Taylor takes no pretrained weights
    return gradual_keeper(model, scores, sparsity, steps, first, chooser(model, pattern)), observed


def zero_share(model) -> float:
    """Return the share of a model's block weights that are zero."""
    return sparsity_of({name: weight != 0 for name, weight in prunable_weights(model).items()})


def sparse_bytes(model) -> int:
    """Return the bytes that the weights of a sparse model would take on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return weight_bytes(save_sparse(model, folder))


def compress_student(run: Run, shape: str) -> pd.DataFrame:
    """Artefact ``compressed_<shape>``: what is left when every means of these notebooks is used, one after the other.

    The distilled student of this shape gets a token embedding of rank ``embedding_rank`` and learns from the labels
    and the teacher for ``compress_epochs`` more. Meanwhile its block weights are pruned to ``main_sparsity`` step by
    step; once that is reached, it computes with weights in eight bits. Then it is converted to sparse execution and
    rounded. Returns one row per step: model, layers, step, accuracy (validation), file_bytes.
    """
    name, student = f"compressed_{shape}", f"student_distilled_{shape}"
    alpha, temperature = distillation_scales(run)
    splits = taught_splits(run)

    def build(target):
        model = on_device(run, student)
        data, taught = teacher_data_and_loss(run, alpha, temperature, splits=splits)
        steps = epoch_steps(run, run.profile.compress_epochs)
        keeper, observed = taylor_keeper(run, model, run.profile.main_sparsity, steps, first=zero_share(model))
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
        before = ("pruned, low-rank embedding", validator(run)(sparse), sparse_bytes(sparse))
        (target.folder / BEFORE).write_text(json.dumps(before), encoding="utf-8")
        save_sparse(quantize(sparse), target.folder)
        write_history(target.folder, history)

    settings = pick(run.profile, *TRAIN_FIELDS, "compress_epochs", "compress_learning_rate", *TAUGHT_FIELDS)
    settings |= pick(run.profile, "main_sparsity", "embedding_rank", "calibration_reviews", seed=run.seed)
    settings |= {"alpha": alpha, "temperature": temperature, "score": "taylor"} | transfer_settings(run, splits)
    run.cached(name, settings, build, (student, "fine_tuned"), kind="sparse", made_by="05")
    steps = [
        ("distilled", validation_accuracy(run, student), model_bytes(run, student)),
        json.loads((run.folder(name) / BEFORE).read_text(encoding="utf-8")),
        ("int8", validation_accuracy(run, name), model_bytes(run, name)),
    ]
    table = pd.DataFrame(steps, columns=["step", "accuracy", "file_bytes"])
    table.insert(0, "layers", layer_count(run, student))
    table.insert(0, "model", name)
    return table


def compress_all(run: Run) -> pd.DataFrame:
    """Compress a student of every shape of the profile, and decide ``choice_compressed``.

    Returns the rows of ``compress_student``, under a row of the fine-tuned model.
    """
    dense = {"model": "fine_tuned", "layers": layer_count(run, "fine_tuned"), "step": "fine-tuned"}
    dense |= {"accuracy": validation_accuracy(run, "fine_tuned"), "file_bytes": model_bytes(run, "fine_tuned")}
    tables = [compress_student(run, shape) for shape in student_shapes(run.profile)]
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
