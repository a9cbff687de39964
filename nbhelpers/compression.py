"""Everything at once, in notebook 05: a student, pruned, with a low-rank embedding, in int8."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch

from nbhelpers import criteria, masks
from nbhelpers.checkpoints import checkpoints_of
from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.experiments import (
    TRAIN_FIELDS,
    best_scan,
    compressed_names,
    dataset,
    model_bytes,
    on_device,
    pick,
    teacher_data_and_loss,
    validation_accuracy,
    validator,
    write_history,
)
from nbhelpers.models import load_config, prunable_weights
from nbhelpers.pruning import calibration_rows
from nbhelpers.sparse import convert_to_sparse, factorize_embedding, quantize, save_sparse
from nbhelpers.statistics import calibrate
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import Run

ACCEPTED = 0.01  # of accuracy: what a small model may cost
BEFORE = "before_int8.json"  # beside the compressed model: what it was before it was rounded


def weight_bytes(model) -> int:
    """Bytes of the weights of a sparse model on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(path.stat().st_size for path in save_sparse(model, folder).glob("*.safetensors"))


def depth(run: Run, name: str) -> int:
    """How many layers a model of the run has."""
    return load_config(run.folder(name)).num_hidden_layers


def taylor_masks(run: Run, model, sparsity: float) -> dict[str, torch.Tensor]:
    """Masks by |w * g|, the score that asks for no training: a pass over some training reviews is enough."""
    observed = calibrate(model, *calibration_rows(run, run.profile.calibration_reviews))
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return masks.select(criteria.COMPARATORS["taylor"](weights, observed), sparsity)


def compress_student(run: Run, layers: int) -> pd.DataFrame:
    """Artefact ``compressed_<layers>``: what is left when every means of these notebooks is used, one on the other.

    The distilled student of so many layers loses the profile's ``main_sparsity`` of its block weights, and its token
    embedding becomes one of rank ``embedding_rank``. So it learns from the labels and the teacher once more, for
    ``compress_epochs``; then it is converted to sparse execution and rounded to int8. Returns a row a step: model,
    layers, step, accuracy (validation), file_bytes.
    """
    name, student, (alpha, temperature) = f"compressed_{layers}", f"student_distilled_{layers}", best_scan(run)

    def build(folder: Path):
        model = on_device(run, student)
        keeper = masks.MaskKeeper(model, taylor_masks(run, model, run.profile.main_sparsity))
        factorize_embedding(model, run.profile.embedding_rank)
        data, loss = teacher_data_and_loss(run, alpha, temperature)
        options = {"mask_keeper": keeper, "validate": validator(run), "loss_function": loss}
        options |= {"checkpoints": checkpoints_of(folder), "description": name.replace("_", " ")}
        times = {"learning_rate": run.profile.compress_learning_rate, "epochs": run.profile.compress_epochs}
        recipe = dataclasses.replace(recipe_for(run.profile, "distill"), **times)
        history = train(model, data, recipe, seed=run.seed, **options)
        sparse = convert_to_sparse(model.cpu())
        # In float32, as a sparse model always is.
        judged = evaluate_accuracy(sparse, dataset(run, "validation"), run.profile.eval_batch_size)
        before = ("pruned, low-rank embedding", judged, weight_bytes(sparse))
        (folder / BEFORE).write_text(json.dumps(before), encoding="utf-8")
        save_sparse(quantize(sparse), folder)
        write_history(folder, history)

    settings = pick(run.profile, *TRAIN_FIELDS, "compress_epochs", "compress_learning_rate", "distill_batch_size")
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
    """``compress_student`` at every depth of the profile, under a row of the fine-tuned model."""
    dense = {"model": "fine_tuned", "layers": depth(run, "fine_tuned"), "step": "fine-tuned"}
    dense |= {"accuracy": validation_accuracy(run, "fine_tuned"), "file_bytes": model_bytes(run, "fine_tuned")}
    return pd.concat(
        [pd.DataFrame([dense]), *(compress_student(run, layers) for layers in run.profile.student_layers)],
        ignore_index=True,
    )


def best_compressed(run: Run) -> str:
    """The smallest compressed model that loses at most ``ACCEPTED`` on validation, or, without one, the best."""
    dense = validation_accuracy(run, "fine_tuned")
    accuracy = {name: validation_accuracy(run, name) for name in compressed_names(run.profile)}
    good = [name for name in accuracy if accuracy[name] >= dense - ACCEPTED]
    return min(good, key=lambda name: model_bytes(run, name)) if good else max(accuracy, key=accuracy.get)
