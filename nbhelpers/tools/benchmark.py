"""Compare the sparse engines, mask selection and the training loop with what PyTorch and transformers offer.

    python -m nbhelpers.tools.benchmark layers     each engine on the matrices of GPT-2 and of the mini model
    python -m nbhelpers.tools.benchmark models     whole models of these shapes with random weights
    python -m nbhelpers.tools.benchmark machine    this machine's limits
    python -m nbhelpers.tools.benchmark selection  scores, thresholds and masks of GPT-2's block weights
    python -m nbhelpers.tools.benchmark training   our training loop and our evaluation against transformers.Trainer's

``layers`` and ``models`` run on one thread and on all of torch's, or on each number in ``--threads``. Engines that this
machine does not have are left out. ``models`` includes ONNX Runtime, in float32 and int8, where it is installed (pip
install onnxruntime onnx onnxscript).
"""

import argparse
import copy
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils import prune
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from nbhelpers.criteria import merge_scores
from nbhelpers.data import IMDbDataset, load_reviews
from nbhelpers.evaluation import predict_logits
from nbhelpers.masks import apply_masks
from nbhelpers.measurement import by_model, compare_latency, compare_speed, peak_memory, speedups
from nbhelpers.models import MINI, load_tokenizer, prunable_layers, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.sparse import blocks, convert_gpt2_to_sparse, int8
from nbhelpers.sparse.formats import BLOCK
from nbhelpers.sparse.speed import SPARSITIES, TOKENS, compare_engines, machine_limits
from nbhelpers.system.machine import versions
from nbhelpers.training import Recipe, mixed_precision, train
from nbhelpers.training.timing import with_threads

MODELS = {"gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}}
SHIPPED = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
MODELS["mini"] = {key: SHIPPED[key] for key in MODELS["gpt2"]}
# Our rows of the table of whole models: the weights and the engine of each.
PACKED = {
    "dense, packed": ("dense", "dense"),
    "int8, packed": ("dense", "int8"),
    "sparse": ("sparse", "numba"),
    "sparse, int8": ("sparse", "int8_blocks"),
    "blocks, int8": ("blocks", "int8_blocks"),
}


def block_matrices(width: int) -> tuple[tuple[int, int], ...]:
    """Return (in, out) of the four matrices of a GPT-2 block."""
    return (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)


def random_gpt2(shape: str, sparsity: float, block: int = 1) -> GPT2ForSequenceClassification:
    """Return a GPT-2 of a shape in ``MODELS`` with random weights, a share of each block matrix set to zero.

    block: neighbouring inputs of one output that are set to zero together; one block of a matrix may be cut.
    """
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**MODELS[shape], pad_token_id=0)).eval()
    shapes = {name: weight.shape for name, weight in prunable_weights(model).items()}  # [in, out]
    scores = {name: torch.rand(n // block, m).repeat_interleave(block, 0) for name, (n, m) in shapes.items()}
    return apply_masks(model, select(scores, sparsity, scope="layer"))


# --- whole models ---


class LastLogits(nn.Module):
    """A GPT-2 classifier of reviews without padding, from whose ids it computes the logits [reviews, labels]."""

    def __init__(self, model: GPT2ForSequenceClassification):
        super().__init__()
        self.body, self.score = model.transformer, model.score

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(input_ids, use_cache=False).last_hidden_state[:, -1])


def export_onnx(model: GPT2ForSequenceClassification, ids: torch.Tensor, folder: str) -> dict[str, Path]:
    """Write a model in float32 and in int8 for ONNX Runtime: {name: file}, none where it is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError as error:
        print(f"ONNX Runtime is left out ({error}): pip install onnxruntime onnx onnxscript")
        return {}
    exact, rounded = (Path(folder) / f"{kind}.onnx" for kind in ("float32", "int8"))
    torch.onnx.export(LastLogits(model).eval(), (ids,), exact, input_names=["input_ids"], dynamo=True, verbose=False)
    quantize_onnx(exact, rounded, 4 * model.config.n_layer)
    return {"ONNX Runtime": exact, "ONNX Runtime, int8": rounded}


def quantize_onnx(exact: Path, rounded: Path, products: int) -> None:
    """Write an ONNX model with its products in int8; raise ``RuntimeError`` if fewer than ``products`` become so."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript import ir

    # As in our engines, the embeddings stay in float32.
    quantize_dynamic(exact, rounded, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    found = sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in ir.load(rounded).graph)
    if found < products:
        raise RuntimeError(f"ONNX Runtime must quantize at least {products} matrix products (got {found})")


def onnx_session(path: Path, ids: torch.Tensor) -> Callable[[], np.ndarray]:
    """Return the function that runs an ONNX model on as many threads as torch has."""
    import onnxruntime

    options, inputs = onnxruntime.SessionOptions(), {"input_ids": ids.numpy()}
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would slow the next engine
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)[0]


def logits_of(model: nn.Module, ids: torch.Tensor) -> np.ndarray:
    """Return a model's logits [reviews, labels] for reviews without padding."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()


@torch.inference_mode()
def logit_errors(functions: dict[str, Callable[[], np.ndarray]], weights: dict[str, nn.Module], ids) -> list[float]:
    """Return each engine's largest difference from the logits of its weights in ``transformers``, over the largest one.

    Raises ``RuntimeError`` where ONNX Runtime's float32 logits differ.
    """
    exact, errors = {name: logits_of(model, ids) for name, model in weights.items()}, {}
    for name, function in functions.items():
        expected = exact[PACKED.get(name, ("dense",))[0]]
        errors[name] = abs(function() - expected).max() / abs(expected).max()
    if errors.get("ONNX Runtime", 0) > 1e-3:
        raise RuntimeError(f"ONNX Runtime's logit error must be at most 0.001 (got {errors['ONNX Runtime']:.3g})")
    return list(errors.values())


def compare_models(shape: str, sparsity: float, reviews: int, length: int, threads=(1,), repeats=7) -> pd.DataFrame:
    """Time a random model of a shape on reviews without padding, by each engine, on each number of threads.

    "dense" is the model of ``transformers``; "packed" is ours, which computes only what the logits depend on, as do the
    models that are pruned to a sparsity in single weights ("sparse") or in blocks of 1x4 ("blocks"). ONNX Runtime
    computes the unpruned model. Columns: model, latency_ms, latency_low_ms, latency_high_ms, speedup, speedup_low,
    speedup_high (over "dense"), logit_error (see ``logit_errors``), threads.
    """
    weights = {"dense": random_gpt2(shape, 0.0), "sparse": random_gpt2(shape, sparsity)}
    weights["blocks"] = random_gpt2(shape, sparsity, BLOCK)
    missing = [name for name, engine in (("int8", int8), ("int8_blocks", blocks)) if not engine.is_available()]
    packed = {name: parts for name, parts in PACKED.items() if parts[1] not in missing}
    engines, tables = {"dense": weights["dense"]}, []
    engines |= {name: convert_gpt2_to_sparse(weights[kind], backend) for name, (kind, backend) in packed.items()}
    ids = torch.randint(1, MODELS[shape]["vocab_size"], (reviews, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        files = export_onnx(weights["dense"], ids, folder)
        for count in threads:
            with with_threads(count):
                functions = {name: partial(logits_of, model, ids) for name, model in engines.items()}
                functions |= {name: onnx_session(path, ids) for name, path in files.items()}
                about = {"logit_error": logit_errors(functions, weights, ids), "threads": count}
                tables.append(by_model(compare_speed(functions, repeats)).assign(**about))
    return pd.concat(tables, ignore_index=True)


# --- selection ---


class Magnitudes(Mapping):
    """The scores of magnitude pruning, |w| of every block weight; each matrix is computed when it is read."""

    def __init__(self, model: nn.Module):
        self.weights = prunable_weights(model)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name].detach().abs()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def select_by_magnitude(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks that keep the largest |w|."""
    return select(Magnitudes(model), sparsity)


def select_by_torch(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the same masks by ``torch.nn.utils.prune``, which changes the model."""
    layers = prunable_layers(model)
    pairs = [(layer, "weight") for layer in layers.values()]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=sparsity)
    return {f"{name}.weight": layer.weight_mask for name, layer in layers.items()}


def select_by_merge(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks of a merge of three criteria: |w| and two that are random numbers."""
    weights = prunable_weights(model)
    scores = {i: {name: torch.rand(weight.shape) for name, weight in weights.items()} for i in range(2)}
    scores["magnitude"] = {name: weight.detach().abs() for name, weight in weights.items()}
    return select(merge_scores(scores), sparsity)


def compare_selection(shape: str, sparsity: float, repeats: int) -> pd.DataFrame:
    """Time our selection and PyTorch's in turns on one random model, and a merge of three criteria once.

    Columns: engine, seconds (median), extra_bytes (peak bytes of tensors beyond the model's, with masks and scores),
    dropped (number of weights), shape, weights, times_ours.
    """
    model, times, rows = random_gpt2(shape, 0.0), {}, []
    engines = {"ours": select_by_magnitude, "torch": select_by_torch, "merge": select_by_merge}
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    select_by_magnitude(model, sparsity)  # compiles
    for _ in range(repeats):
        for engine in ("ours", "torch"):
            fresh, started = copy.deepcopy(model), time.perf_counter()
            engines[engine](fresh, sparsity)
            times.setdefault(engine, []).append(time.perf_counter() - started)
            del fresh
    started = time.perf_counter()
    select_by_merge(model, sparsity)
    times["merge"] = [time.perf_counter() - started]
    for engine, function in engines.items():
        extra = peak_memory(partial(function, copy.deepcopy(model), sparsity))
        masks = function(copy.deepcopy(model), sparsity)
        dropped = total - sum(int(mask.sum()) for mask in masks.values())
        rows.append({"engine": engine, "seconds": np.median(times[engine]), "extra_bytes": extra, "dropped": dropped})
        del masks
    table = pd.DataFrame(rows)
    return table.assign(shape=shape, weights=total, times_ours=table["seconds"] / table["seconds"].iloc[0])


# --- training ---


def trainer_for(model: nn.Module, data: IMDbDataset, recipe: Recipe, tokenizer, folder: str, sampling: str) -> Trainer:
    """Return a ``transformers.Trainer`` set up for a recipe, with its own batches and padding."""
    rows = [{"input_ids": ids, "labels": int(label)} for ids, label in zip(data.input_ids, data.labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup_share * recipe.steps),
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy=sampling,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare_training(shape: str, batch_size: int, length: int, steps: int, repeats: int) -> pd.DataFrame:
    """Time training and prediction of the same reviews by our loop and by ``transformers.Trainer``.

    Each trains a fresh copy of one random model with the same batch size, precision, optimizer and number of steps.
    "trainer" draws batches at random, its default; "trainer, grouped" by length. Columns:
    task ("train" or "predict"), name, reviews, tokens (without padding), seconds, seconds_low, seconds_high, speedup,
    speedup_low, speedup_high (of ours over each Trainer; above 1: ours is faster).
    """
    profile = get_profile("thorough", max_tokens=length, train_size=steps * batch_size)
    tokenizer, model = load_tokenizer(profile), random_gpt2(shape, 0.0)
    data = IMDbDataset(load_reviews(profile)["train"].select(range(steps * batch_size)), tokenizer, profile)
    recipe = Recipe(5e-5, batch_size, steps=steps, precision=mixed_precision())
    rows = [{"input_ids": ids} for ids in data.input_ids]

    with tempfile.TemporaryDirectory() as folder:

        def by_trainer(sampling, recipe=recipe):
            return trainer_for(copy.deepcopy(model), data, recipe, tokenizer, folder, sampling)

        def train_ours():
            train(copy.deepcopy(model), data, recipe)

        training = {"ours": train_ours}
        training |= {"trainer": lambda: by_trainer("random").train()}
        training |= {"trainer, grouped": lambda: by_trainer("group_by_length").train()}
        # Both predict in float32, the default of ``predict_logits``.
        predictor = by_trainer("random", dataclasses.replace(recipe, precision="no"))
        predicting = {"ours": lambda: predict_logits(model, data.input_ids, batch_size)}
        predicting |= {"trainer": lambda: predictor.predict(Dataset.from_list(rows))}
        table = []
        for task, functions in (("train", training), ("predict", predicting)):
            # ``compare_latency`` runs in inference mode, which training has to leave.
            timed = {name: torch.inference_mode(False)(function) for name, function in functions.items()}
            times = compare_latency(timed, repeats, warmup=1).attrs["times"]
            for name in times:
                low, median, high = np.percentile(np.array(times[name]) / 1e3, [25, 50, 75])
                ratio = speedups({"baseline": times[name], "ours": times["ours"]}).iloc[1, 1:]
                row = {"task": task, "name": name, "reviews": len(data), "tokens": sum(map(len, data.input_ids))}
                row |= {"seconds": median, "seconds_low": low, "seconds_high": high}
                table.append(row | ratio.to_dict())
    return pd.DataFrame(table)


# --- the command line ---


def layers(options) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and a table for each matrix of each shape and each number of threads."""
    for shape in options.shapes:
        for n_in, n_out in block_matrices(MODELS[shape]["n_embd"]):
            for count in options.threads:
                with with_threads(count):
                    sparsities = options.sparsities or SPARSITIES
                    table = compare_engines([(n_in, n_out)], sparsities, options.tokens, options.repeats)
                yield f"{shape} {n_in} x {n_out}", table.assign(threads=count)


def models(options) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and a table for each sparsity of each shape."""
    for shape in options.shapes:
        for sparsity in options.sparsities or (0.8, 0.9):
            title = f"{shape}, {sparsity:.0%} of the block weights zero, {options.batch} x {options.length} tokens"
            size = (sparsity, options.batch, options.length)
            table = compare_models(shape, *size, options.threads, options.repeats)
            about = {"shape": shape, "sparsity": sparsity, "reviews": options.batch, "length": options.length}
            yield title, table.assign(**about)


def machine(options) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and a table of this machine's limits."""
    yield "this machine", pd.DataFrame([machine_limits()])


def selection(options) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and a table for each sparsity of each shape."""
    for shape in options.shapes:
        for sparsity in options.sparsities or (0.9,):
            yield f"{shape}, {sparsity:.0%} of the block weights", compare_selection(shape, sparsity, options.repeats)


def training(options) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and a table for each shape."""
    for shape in options.shapes:
        table = compare_training(shape, options.batch, options.length, options.steps, options.repeats)
        title = f"{shape}, {options.steps} steps of {options.batch} reviews of at most {options.length} tokens"
        about = {"shape": shape, "batch_size": options.batch, "length": options.length}
        about |= {"precision": mixed_precision(), "device": versions()["device"]}
        yield f"{title}, {mixed_precision()}", table.assign(**about)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.tools.benchmark", description=__doc__.split("\n\n")[0])
    commands = {"layers": layers, "models": models, "machine": machine, "selection": selection, "training": training}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=None)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="layers: rows of the activations")
    parser.add_argument("--batch", type=int, default=8, help="models, training: reviews in a batch")
    parser.add_argument("--length", type=int, default=256, help="models: tokens of each review; training: at most")
    parser.add_argument("--steps", type=int, default=20, help="training: optimizer steps of a pass")
    parser.add_argument("--repeats", type=int, default=9)
    counts = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", nargs="+", type=int, default=counts, help="layers, models: numbers of threads")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    os.environ["NBHELPERS_BATCH"] = "1"  # no progress bars: drawing them takes time
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; speedup: against dense, above 1 is faster")
    tables = []
    for title, table in commands[options.command](options):
        shown = table.drop(columns=["in", "out"], errors="ignore").round(3).to_string(index=False)
        print(f"\n{title}\n{shown}", flush=True)
        tables.append(table)
    if options.csv:
        pd.concat(tables).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
