"""What all tests share: no hub, a workspace of their own, one thread, and one study on the smallest profile."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before anything imports transformers, datasets or matplotlib.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["NBHELPERS_BATCH"] = "1"
os.environ.pop("NBHELPERS_FORCE", None)
WORKSPACE = tempfile.TemporaryDirectory(prefix="nbhelpers-tests-")
os.environ["NBHELPERS_ROOT"] = WORKSPACE.name

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from filelock import FileLock  # noqa: E402

PROJECT = Path(__file__).parent.parent

# One: beside other work on the machine, a second thread mostly waits for the first and spins.
torch.set_num_threads(1)

# A process that a shell starts in the background ignores Ctrl-C, and so would all processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace for one test alone: the folder that holds its .artifacts and reports."""
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def fresh_accelerate():
    """One thread, and a precision that nothing before has chosen: Accelerate keeps one a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def in_two_processes(command, ends_well=True, **environment):
    """What a Python command printed that two processes ran together; fails where they ended otherwise than expected."""
    # Not forked: a process that has used its threads cannot be forked safely.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)} | environment
    done = subprocess.run([*launcher, *command], env=variables, capture_output=True, text=True, timeout=240)
    assert (done.returncode == 0) == ends_well, done.stderr
    return done.stdout


def tiny_model(dropout: float = 0.0, layers: int = 2, seed: int = 0):
    """A GPT-2 classifier of some thousand random weights."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(**sizes, **rates, pad_token_id=0, num_labels=2, use_cache=False, initializer_range=0.1)
    return GPT2ForSequenceClassification(config).eval()


@pytest.fixture
def toy_model():
    """A ``tiny_model`` without dropout."""
    return tiny_model()


def literal_means(values, resamples=20_000):
    """Means of an array [seeds, n] with resampled reviews and seeds, by index, as the bootstrap is defined."""
    values, rng = np.asarray(values, float), np.random.default_rng(9)
    seeds, n = values.shape
    return [values[rng.integers(seeds, size=seeds)][:, rng.integers(n, size=n)].mean() for _ in range(resamples)]


def assert_percentiles(found, reference):
    """Percentiles of RESAMPLES resamples agree with those of many more, within their Monte Carlo error.

    The standard error of a sample's p-quantile is sqrt(p (1 - p) / n) over the density there; the density is estimated
    from the reference, between the quantiles one standard error away. Four of them are allowed.
    """
    from nbhelpers.evaluation import RESAMPLES

    for value, p in zip(found, (0.025, 0.975), strict=True):
        error = np.sqrt(p * (1 - p) / RESAMPLES)
        low, high = np.quantile(reference, [p - 4 * error, p + 4 * error])
        assert low - 1e-12 <= value <= high + 1e-12


@pytest.fixture
def alone():
    """For a test that trains: it chooses its precision, and what it chose is gone after it."""
    with fresh_accelerate():
        yield


# float32, so that a second computation gives the same bits; steps large enough for weights and predictions to change.
STUDY = {"precision": "no", "learning_rate": 1e-2, "distill_learning_rate": 5e-3, "comparators": ("wanda", "sparsegpt")}
STUDY |= {"recovery_learning_rates": (1e-4, 1e-2), "recovery_sparsities": (0.5, 0.9)}


def once_per_suite(tmp_path_factory, name, make):
    """Return a folder that ``make(folder)`` has filled, once for all workers of pytest-xdist; the others wait."""
    # A worker's own folder lies in the one that all workers of a suite share.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".complete").exists():
            make(folder)
            folder.with_suffix(".complete").touch()
    return folder


def compute_study(root):
    """Compute what the notebooks compute, on the smallest profile with two seeds, in a workspace."""
    from nbhelpers.profiles import get_profile
    from nbhelpers.study import comparison, conversion, fine_tuning, inputs, pruning, recovery, students
    from nbhelpers.study.choices import best_score
    from nbhelpers.workspace import open_run

    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("NBHELPERS_ROOT", str(root))
        run = open_run(get_profile("smoke", **STUDY), 0)
        for seed_run in inputs.runs_of(run):
            fine_tuning.finetune_model(seed_run)
        recovery.recover_all(run)
        recovery.recover_in_parts(run)
        run.save_table("budget", recovery.budget_curve(run))
        students.distil_all(run)
        students.compress_all(run)
        best = best_score(run)
        conversion.sparsify(run, best, 0.9)
        conversion.compact_model(run, best, 0.5)
        conversion.block_model(run, best, 0.9)
        for name in conversion.int8_sources(run, best):
            conversion.to_int8(run, name)
        run.save_table("curves", pd.concat([pruning.pruned_curves(run), recovery.recovered_curves(run)]))
        comparison.open_test_part(run)
        run.save_table("comparison", comparison.comparison_table(run, comparison.rows_of(run)))


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory):
    """A copy of the study that is computed once per suite, for all tests of one worker."""
    from nbhelpers.profiles import get_profile
    from nbhelpers.study import inputs
    from nbhelpers.study.choices import best_score
    from nbhelpers.workspace import open_run

    root = tmp_path_factory.mktemp("study")
    shutil.copytree(once_per_suite(tmp_path_factory, "study", compute_study), root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(root))
        run = open_run(get_profile("smoke", **STUDY), 0)
        models = [seed_run.models() for seed_run in inputs.runs_of(run)]
        return SimpleNamespace(root=root, run=run, models=models, best=best_score(run))


@pytest.fixture
def study(finished_study, monkeypatch):
    """The finished study as the workspace of one test: root, run, best score, models of each seed."""
    monkeypatch.setenv("NBHELPERS_ROOT", str(finished_study.root))
    return finished_study


@pytest.fixture(scope="session")
def corpus():
    """Sixty short texts, enough to train a tokenizer on."""
    return [
        f"Review {i}: the {adjective} film had a {noun} that I {verb}, and caf\u00e9 scenes \U0001f3ac too."
        for i, (adjective, noun, verb) in enumerate(
            (a, n, v)
            for a in ("good", "bad", "slow", "funny", "dull")
            for n in ("plot", "cast", "score", "scene")
            for v in ("liked", "hated", "forgot")
        )
    ]


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    """A byte-level BPE of 320 tokens, trained on the corpus."""
    from nbhelpers.tools.pretrain import train_tokenizer

    return train_tokenizer(corpus, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, the machine's own; tests that need it are skipped where there is none."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: looked for {', '.join(names)}")
    with sync_playwright() as playwright:
        # Without its sandbox: in a container, as root, Chromium does not start with it.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def numbered_reviews(per_class: int) -> pd.DataFrame:
    """Reviews that name their class and number, so that their texts show a split's order."""
    rows = [(f"{word} review number {i}", word) for i in range(per_class) for word in ("neg", "pos")]
    return pd.DataFrame(rows, columns=["text", "label"])


def write_csv(folder, table: pd.DataFrame, name: str = "reviews.csv"):
    table.to_csv(folder / name, index=False)
    return folder / name


def profile_of(path, **overrides):
    from nbhelpers.profiles import get_profile

    return get_profile("smoke", **{"data": str(path), "train_size": 0} | overrides)
