"""Run every stage of the profile gpt2 on a GPT-2 of 124M random weights, a few steps each, without a hub.

    python -m nbhelpers.tools.full_size --csv reports/benchmark/full_size.csv

Writes a checkpoint in the hub's file format and the packaged reviews as an aclImdb folder, runs the six notebooks of
the profile on them in a workspace of its own, and prints the memory and the seconds per step of each. Accuracies mean
nothing here. The tokenizer is that of the model that ships, since GPT-2's own is on the hub.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from transformers import GPT2Config, GPT2LMHeadModel

from nbhelpers.models import load_tokenizer
from nbhelpers.profiles import get_profile
from nbhelpers.reading import read_movie_reviews
from nbhelpers.system.machine import versions
from nbhelpers.tools.benchmark import MODELS

PROJECT = Path(__file__).parents[2]
# A few steps of everything; batch size, learning rates, the token limit and the students' shapes are the profile's.
FEW_STEPS = {
    "train_size": "32",
    "validation_size": "8",
    "test_size": "8",
    "epochs": "1",
    "sparsities": "0.9",
    "recovery_sparsities": "0.9",
    "recovery_epochs": "0.5",
    "recovery_learning_rates": "5e-5",
    "structured_sparsities": "0.5",
    "distill_epochs": "1",
    "temperatures": "2",
    "alphas": "0.5",
    "scan_steps": "2",
    "calibration_reviews": "8",
    "latency_batches": "1,8",
    "latency_repeats": "3",
}
TIMED = {"01": "fine_tuned", "03": "recovered_gradient_90", "05": "student_labels_only_*"}  # whose steps are timed


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write a language model of random weights with a tokenizer, as ``from_pretrained`` loads it."""
    tokenizer = load_tokenizer(get_profile("quick"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**MODELS[shape], **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_reviews(folder: Path, sizes: dict[str, int]) -> None:
    """Write packaged reviews as an aclImdb folder, ``train/pos/0.txt`` and so on; sizes: reviews per part and class."""
    table = read_movie_reviews()
    for label, word in ((0, "neg"), (1, "pos")):
        texts = iter(table.loc[table["label"] == label, "text"])
        for part, size in sizes.items():
            (folder / part / word).mkdir(parents=True)
            for i in range(size):
                (folder / part / word / f"{i}.txt").write_text(next(texts), encoding="utf-8")


def run_notebooks(root: Path, settings: dict[str, str]) -> None:
    """Run all notebooks of the profile in a workspace; raise ``CalledProcessError`` where one fails."""
    words = [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    environment = os.environ | {"NBHELPERS_ROOT": str(root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "nbhelpers.pipeline", "--profile", "gpt2", *words]
    subprocess.run(command, env=environment, check=True)


def measured_cost(root: Path) -> pd.DataFrame:
    """Return one row per notebook: minutes, peak_memory_bytes of its kernel, model and step_seconds where it trains."""
    artifacts, rows = root / ".artifacts" / "gpt2" / "seed-0", []
    for path in sorted((artifacts / "stages").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        row = {"notebook": path.stem, "minutes": record["minutes"], "peak_memory_bytes": record["peak_memory_bytes"]}
        if path.stem[:2] in TIMED:
            (model,) = artifacts.glob(TIMED[path.stem[:2]])
            history = json.loads((model / "history.json").read_text(encoding="utf-8"))
            row |= {"model": model.name, "step_seconds": history[-1]["step_seconds"]}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.tools.full_size", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(MODELS), default="gpt2")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
        root = Path(folder)
        write_checkpoint(root / "model", options.shape)
        write_reviews(root / "aclImdb", {"train": 500, "test": 50})
        places = {"model": str(root / "model"), "data": str(root / "aclImdb")}
        # The small shape, with fewer layers and positions, is for trying this command.
        fewer = {"student_layers": "2,1", "max_tokens": "128"} if options.shape == "mini" else {}
        run_notebooks(root, FEW_STEPS | places | fewer)
        table = measured_cost(root).assign(device=versions()["device"])
    print(table.round(3).to_string(index=False))
    if options.csv:
        table.to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
