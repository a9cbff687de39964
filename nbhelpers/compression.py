"""Everything at once, in notebook 05: the shallowest student, pruned, with a low-rank embedding, in int8."""

import json
import tempfile
from pathlib import Path

import pandas as pd
import torch

from nbhelpers import criteria, masks
from nbhelpers.checkpoints import checkpoints_of
from nbhelpers.experiments import (
    TRAIN_FIELDS,
    best_scan,
    compressed_name,
    model_bytes,
    on_device,
    pick,
    teacher_data_and_loss,
    validation_accuracy,
    validator,
    write_history,
)
from nbhelpers.models import prunable_weights
from nbhelpers.pruning import calibration_rows
from nbhelpers.sparse import convert_to_sparse, factorize_embedding, quantize, save_sparse
from nbhelpers.statistics import calibrate
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import Run

STEPS = "steps.json"  # beside the compressed model: what each step left


def weight_bytes(model) -> int:
    """Bytes of the weights of a sparse model on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(path.stat().st_size for path in save_sparse(model, folder).glob("*.safetensors"))


def taylor_masks(run: Run, model, sparsity: float) -> dict[str, torch.Tensor]:
    """Masks by |w * g|, the score that asks for no training: a pass over some training reviews is enough."""
    observed = calibrate(model, *calibration_rows(run, run.profile.calibration_reviews))
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    return masks.select(criteria.COMPARATORS["taylor"](weights, observed), sparsity)


def compress_student(run: Run) -> pd.DataFrame:
    """Artefact ``compressed_<layers>``: what is left when every means of these notebooks is used, one on the other.

    The shallowest distilled student loses the profile's ``main_sparsity`` of its block weights, and its token embedding
    becomes one of rank ``embedding_rank``. So it learns from the labels and the teacher once more, as long as it did as
    a student; then it is converted to sparse execution and rounded to eight bits. Returns a row a step: step, accuracy
    (validation), file_bytes.
    """
    name, layers = compressed_name(run.profile), min(run.profile.student_layers)
    student, (alpha, temperature) = f"student_distilled_{layers}", best_scan(run)

    def build(folder: Path):
        model, accuracy = on_device(run, student), validator(run)
        keeper = masks.MaskKeeper(model, taylor_masks(run, model, run.profile.main_sparsity))
        factorize_embedding(model, run.profile.embedding_rank)
        data, loss = teacher_data_and_loss(run, alpha, temperature)
        options = {"mask_keeper": keeper, "validate": accuracy, "loss_function": loss}
        options |= {"checkpoints": checkpoints_of(folder), "description": name.replace("_", " ")}
        history = train(model, data, recipe_for(run.profile, "distill"), seed=run.seed, **options)
        sparse = convert_to_sparse(model.cpu())
        steps = [("pruned, low-rank embedding", accuracy(sparse), weight_bytes(sparse))]
        save_sparse(quantize(sparse), folder)
        write_history(folder, history)
        steps.append(("int8", accuracy(sparse), weight_bytes(sparse)))
        (folder / STEPS).write_text(json.dumps(steps), encoding="utf-8")

    settings = pick(run.profile, *TRAIN_FIELDS, "distill_epochs", "distill_learning_rate", "distill_batch_size")
    settings |= pick(run.profile, "main_sparsity", "embedding_rank", "calibration_reviews", seed=run.seed)
    settings |= {"alpha": alpha, "temperature": temperature, "score": "taylor"}
    run.cached(name, settings, build, (student, "fine_tuned"), kind="sparse", made_by="05")
    before = [
        (what, validation_accuracy(run, of), model_bytes(run, of))
        for what, of in (("fine-tuned", "fine_tuned"), ("distilled", student))
    ]
    after = json.loads((run.folder(name) / STEPS).read_text(encoding="utf-8"))
    return pd.DataFrame([*before, *after], columns=["step", "accuracy", "file_bytes"])
