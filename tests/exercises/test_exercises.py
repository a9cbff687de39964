"""The checks of the exercises, on answers that are right, missing, typically wrong, and of every other kind."""

import dataclasses
import inspect
import math
import random
import re
from collections.abc import Callable

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from scipy import stats

from nbhelpers import criteria, evaluation, exercises, masks, models, selection
from nbhelpers.exercises import __main__, checking
from nbhelpers.sparse import convert_to_sparse
from nbhelpers.training.observers import calibrate

CHECKS = {name: check for name, check in vars(exercises).items() if name.startswith("check_")}


@dataclasses.dataclass
class Case:
    """A check with what it takes, right answers, and wrong ones with a word that the hint has to say."""

    context: tuple
    right: list
    wrong: list[tuple[object, str]]
    secrets: list[str] = dataclasses.field(default_factory=list)


def written(value: float) -> list[str]:
    """A number as somebody might print it: with two to five digits, and as a percentage."""
    texts = {f"{x:.{digits}g}" for x in (value, 100 * value) for digits in (3, 4, 5)}
    texts |= {f"{x:.{digits}f}" for x in (value, 100 * value) for digits in (2, 3, 4)}
    return [text for text in texts if float(text) not in (0, 1) and len(text.strip("0.")) > 1]


def of_number(context: tuple, right: float, wrong: list[tuple[object, str]]) -> Case:
    """A case whose answer is a number."""
    rights = [right, np.float64(right), torch.tensor(right, dtype=torch.float64)]
    return Case(context, rights, [*wrong, ([right, right], "number")], written(right))


# --- what the checks are asked about ---

RNG = np.random.default_rng(0)
RIGHT_A, RIGHT_B = RNG.random(400) < 0.8, RNG.random(400) < 0.7
TEXTS = [" ".join(random.Random(i).sample(list("abcdefghijklmnopqrstuvw"), 20)) + " Zoo zoo." for i in range(8)]


def scores_of(seed: int, *shapes: tuple[int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": (i + 1.0) * torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}


SHAPES = ((8, 10), (10, 12))
SCORES = scores_of(0, *SHAPES)
THREE = {name: scores_of(seed, *SHAPES) for seed, name in enumerate(("magnitude", "movement", "gradient"))}
SIGNED = {name: score - score.mean() for name, score in SCORES.items()}


def shuffle(text: str) -> str:
    words = text.split()
    return " ".join(random.Random(len(text)).sample(words, len(words)))


def parameters_left() -> Case:
    wrong = [(0.36, "gone"), (0.1, "block weights"), (0.04, "never pruned"), (640, "divide"), (64.0, "percentage")]
    return of_number((1000, 400, 0.9), 0.64, wrong)


def fooling_review() -> Case:
    def predict(texts):
        return np.array([0.9 if "good" in text else 0.1 for text in texts])

    trick = ("They say it is a good film. They are mistaken.", "negative")
    wrong = [
        (("A good film it was. A good one.", "positive"), "same as you"),
        (("Good.", "negative"), "two sentences"),
        ("A good film. It is not.", "pair"),
        ((trick[0], "bad"), "positive"),
    ]
    return Case((predict,), [trick, list(trick)], wrong)


def disagreements() -> Case:
    only_a, only_b = int((RIGHT_A & ~RIGHT_B).sum()), int((~RIGHT_A & RIGHT_B).sum())
    wrong = [(only_a - only_b, "net"), (only_a, "one direction"), ((only_a + only_b) / 400, "share")]
    wrong += [(int((RIGHT_A & RIGHT_B).sum()), "both get right"), (only_a + only_b + 1, "too large")]
    return of_number((RIGHT_A, RIGHT_B), only_a + only_b, wrong)


def shuffled() -> Case:
    wrong = [(lambda text: "".join(random.Random(0).sample(text, len(text))), "letters")]
    wrong += [(lambda text: " ".join(random.Random(0).choices(text.split(), k=len(text.split()))), "twice")]
    wrong += [(lambda text: random.shuffle(text.split()), "returns nothing")]
    wrong += [(lambda text: random.Random(0).sample(text.split(), 21), "join"), (lambda text: text, "old one")]
    wrong += [(lambda text: " ".join(sorted(text.split())), "alphabet")]
    wrong += [(lambda text: " ".join(text.split()[::-1]), "backwards")]
    wrong += [(lambda text: " ".join(text.split()[10:] + text.split()[:10]), "neighbours")]
    wrong += [(lambda text: " ".join(set(text.lower().split())), "lost"), (lambda text: 1 / 0, "ZeroDivisionError")]
    return Case((TEXTS,), [shuffle], wrong)


def heads_only() -> Case:
    model, generator = tiny_model(), np.random.default_rng(0)
    rows = [generator.integers(1, 20, size=12).tolist() for _ in range(200)]

    def says(cut):
        return evaluation.predict_logits(model, [cut(row) for row in rows]).argmax(1)

    heads, ends, both = says(lambda row: row[:4]), says(lambda row: row[-4:]), says(lambda row: row[:3] + row[-1:])
    # Labels that tell the three ways to cut apart.
    labels = np.where(ends != both, ends, heads)
    labels[:40] = 1 - labels[:40]
    right = (heads == labels).mean()
    wrong = [((ends == labels).mean(), "ends"), ((both == labels).mean(), "trained"), (1 - right, "wrong answers")]
    return of_number((model, rows, labels, 4, 0.75), right, [*wrong, (100 * right, "percentage"), (0.99, "too large")])


def least_overlap() -> Case:
    wrong = [(0.7, "share of all"), (0.85, "independent"), (0.15, "kept"), (0, "miss each other"), (82.4, "percentage")]
    return of_number((0.85,), 0.7 / 0.85, wrong)


def majority_by_chance() -> Case:
    wrong = [(0.7**3, "all three"), (0.49, "two given"), (0.441, "exactly two"), (0.973, "at least one")]
    return of_number((0.7,), 0.784, [*wrong, (78.4, "percentage")])


def threshold() -> Case:
    flat = torch.cat([score.flatten() for score in SCORES.values()]).sort().values
    each = [score.flatten().sort().values[round(0.8 * score.numel()) - 1].item() for score in SCORES.values()]
    wrong = [(flat[39].item(), "other end"), (float(np.mean(each)), "one threshold per matrix"), (0.8, "share itself")]
    wrong += [(0.8 * flat[-1].item(), "largest"), (2.5, "too large"), (0.01, "too small")]
    return Case((SCORES, 0.8), [flat[159].item(), np.quantile(flat, 0.8)], wrong, written(flat[159].item()))


def product() -> Case:
    statistics = {
        "mean_abs_gradient": THREE["gradient"],
        "calibration_gradient": THREE["movement"],
        "pretrained": SCORES,
    }

    def times(weights, gradients):
        return {name: weights[name] * gradients[name] for name in weights}

    absolute = {name: w.abs() for name, w in SIGNED.items()}
    right = times(absolute, THREE["gradient"])
    wrong = [(times(SIGNED, THREE["gradient"]), "sign"), (times(absolute, THREE["movement"]), "calibration")]
    wrong += [(times(SCORES, THREE["gradient"]), "before fine-tuning"), (times(right, right), "square")]
    wrong += [(absolute, "magnitude alone"), ({"layer.0": right["layer.0"]}, "names")]
    wrong += [({name: score.t() for name, score in right.items()}, "shape")]
    return Case((SIGNED, statistics), [right], wrong)


def layer_masks() -> Case:
    right = selection.select(SCORES, 0.9, scope="layer")
    inverted = {name: ~mask for name, mask in right.items()}
    highest = selection.select({name: -score for name, score in SCORES.items()}, 0.9, scope="layer")
    unsorted = {name: mask.flip(0) for name, mask in right.items()}
    wrong = [(selection.select(SCORES, 0.9), "not one threshold for all"), (inverted, "swapped"), (highest, "highest")]
    wrong += [(unsorted, "not those"), (selection.select(SCORES, 0.5), "too few")]
    wrong += [({name: mask.float() * 2 for name, mask in right.items()}, "True")]
    return Case((SCORES, 0.9), [right, {name: mask.int() for name, mask in right.items()}], wrong)


def mask() -> Case:
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    right = selection.select({"w": weights.abs()}, 0.6)["w"]
    rows = torch.stack([selection.select({"w": row.abs()[None]}, 0.6)["w"][0] for row in weights])
    wrong = [(~right, "swapped"), (selection.select({"w": -weights.abs()}, 0.6)["w"], "largest")]
    wrong += [(selection.select({"w": weights}, 0.6)["w"], "signs"), (rows, "every row")]
    wrong += [(selection.select({"w": weights.abs()}, 0.8)["w"], "too many"), (weights * right, "weights themselves")]
    wrong += [(right[:4], "shape")]
    return Case((weights, 0.6), [right, right.tolist(), right.numpy(), right.float()], wrong)


def halfway() -> Case:
    wrong = [(0.7, "linear"), (0.3 ** (1 / 3), "still to come"), (0.973, "turn it round"), (33.1, "percentage")]
    return of_number((0.7,), 1 - 0.3 ** (1 / 3), wrong)


def against_control() -> Case:
    wrong = [(-6.5, "extra steps"), (3.5, "sign"), (-0.035, "hundredth"), (-3.0, "did to the dense")]
    wrong += [(81.5, "accuracy")]
    return of_number((0.815, 0.85, 0.88), -3.5, [*wrong, (0, "too large")])


def merges_overlap() -> Case:
    a, b = (selection.select(criteria.merge_scores(THREE, how), 0.6) for how in ("all", "mean_rank"))
    a, b = (torch.cat([~mask.flatten() for mask in part.values()]) for part in (a, b))
    both, either, neither = int((a & b).sum()), int((a | b).sum()), int((~a & ~b).sum())
    wrong = [(neither / 80, "kept"), (both / either, "Jaccard"), (both / 200, "all weights")]
    wrong += [(1 - both / 120, "not drop")]
    return of_number((THREE, 0.6), both / 120, [*wrong, ((both + neither) / 200, "both keep")])


def taylor() -> Case:
    model, generator = tiny_model(), np.random.default_rng(1)
    rows, labels = [generator.integers(1, 20, size=6).tolist() for _ in range(8)], [0, 1] * 4
    weights = {name: weight.detach() for name, weight in models.prunable_weights(model).items()}
    seen = calibrate(model, rows, labels)
    right = criteria.taylor(weights, seen)
    batch = {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}
    torch.nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]).backward()
    cancelled = {n: w.detach().abs() * w.grad.abs() for n, w in models.prunable_weights(model).items()}
    wrong = [
        ({name: 8 * score for name, score in right.items()}, "sum"),
        (seen["calibration_gradient"], "|w| is missing"),
        (criteria.fisher(weights, seen), "Fisher"),
        (cancelled, "cancelled"),
        (criteria.taylor(weights, calibrate(model, rows[:4], labels[:4])), "other reviews"),
    ]
    return Case((model, rows, labels), [right], wrong)


class Careless(masks.MaskKeeper):
    def mask_gradients(self):
        pass


class Forgetful(Careless):
    def apply(self):
        pass


class Zealous(masks.MaskKeeper):
    def mask_gradients(self):
        for weight in self.weights.values():
            weight.grad.zero_()


class Broken(masks.MaskKeeper):
    def mask_gradients(self, how):
        pass


def keeper() -> Case:
    wrong = [(masks.MaskKeeper, "override"), (Forgetful, "not zero"), (Zealous, "kept weights"), (Broken, "TypeError")]
    wrong += [(masks.MaskKeeper(tiny_model(), {}), "not an object"), (dict, "inherits")]
    return Case((), [Careless], wrong)


def break_even() -> Case:
    return of_number((4, 8), 2 / 3, [(1 / 3, "kept"), (0.5, "32-bit"), (66.7, "percentage"), (0.9, "too large")])


def csr() -> Case:
    matrix = torch.tensor([[0, 3.0, 0, 8], [0, 0, 0, 0], [6, 0, 0, 0]])
    right = [0, 2, 2, 3], [1, 3, 0], [3.0, 8.0, 6.0]
    _, columns, values = right
    wrong = [(([0, 0, 2], columns, values), "COO"), (([2, 0, 1], columns, values), "add them up")]
    wrong += [(([0, 2, 2], columns, values), "one start more"), (([0, 1, 2, 2, 3], [2, 0, 0], [6, 3, 8]), "CSC")]
    wrong += [((columns, right[0], values), "another order"), ((right[0], [2, 4, 1], values), "from 0")]
    wrong += [((right[0], columns, [0, 3, 0, 8]), "not zero"), ((right[0], columns, [8, 3, 6]), "order of the rows")]
    wrong += [(([0, 2, 3, 3], columns, values), "empty row"), ((torch.tensor(1), columns, values), "list")]
    tensors = tuple(torch.tensor(part) for part in right)
    return Case((matrix,), [right, list(right), tensors], wrong, [str(right[0]), str(columns), "2, 2"])


def speedup() -> Case:
    wrong = [(5.0, "nothing else"), (3.5, "share of a speed-up"), (3.8, "averaged"), (0.44, "time that is left")]
    return of_number((0.7, 5.0), 1 / 0.44, [*wrong, (1 / 0.3, "limit"), (9, "too large")])


def bitmap_bytes() -> Case:
    layers = [(8000, 1000), (24000, 3000)]
    wrong = [(4000 + 4 * 28000, "gone"), (32000 + 16000, "byte for each bit"), (16000, "values alone")]
    wrong += [(4000, "bitmap alone"), (32000, "CSR"), (0.02, "megabytes"), (160000, "bits"), (128000, "dense")]
    return of_number((layers,), 20000, wrong)


def masked_model() -> torch.nn.Module:
    model = tiny_model()
    score = {name: weight.detach().abs() for name, weight in models.prunable_weights(model).items()}
    return masks.apply_masks(model, selection.select(score, 0.6))


def backend() -> Case:
    masked = masked_model()
    wrong = [(convert_to_sparse(masked, "dense"), "dense"), (masked, "no sparse layer"), ("torch_csr", "model")]
    wrong += [(convert_to_sparse(tiny_model(seed=1), "torch_csr"), "logits")]
    return Case((masked, "torch_csr"), [convert_to_sparse(masked, "torch_csr")], wrong)


def head_masks() -> Case:
    model = tiny_model()
    # Heads before neurons, so that both are chosen where both are asked for.
    score = {n: w.detach().abs() * (0.1 if "attn" in n else 1) for n, w in models.prunable_weights(model).items()}
    structures = models.structures(model)
    heads, neurons = structures[::2], structures[1::2]
    right = masks.select_structures(score, heads, 1 / 3)
    wrong = [
        (masks.select_structures(score, neurons, 1 / 3), "neurons alone"),
        (masks.select_structures(score, structures, 1 / 3), "both among"),
        (selection.select(score, 1 / 3), "single weights"),
        ({name: ~mask for name, mask in right.items()}, "swapped"),
        (masks.select_structures(score, heads, 0), "other heads"),
        (masks.select_structures(score, neurons, 0.5), "MLP"),
    ]
    return Case((score, structures, 1 / 3), [right], wrong)


def softened() -> Case:
    def positive(x):
        return 1 / (1 + math.exp(-x))

    wrong = [(positive(3), "T = 1"), (positive(12), "sharper"), (1 - positive(0.75), "other class")]
    wrong += [(positive(3) / 4, "sum to one"), (positive(0.5), "other logit"), (67.9, "percentage")]
    return of_number(((-1.0, 2.0), 4.0), positive(0.75), wrong)


def eight_bits() -> Case:
    right = [26, -2, 127, -51]
    wrong = [([26, -2, 128, -51], "not 128"), ([52, -4, 255, -102], "not 255"), ([25, -1, 127, -50], "cut off")]
    wrong += [([26, 2, 127, 51], "signs"), ([26, -2, 127, -52], "in proportion"), ([25.75, -2, 127, -51], "whole")]
    wrong += [([26, -2, 127], "4 numbers")]
    return Case(([0.515, -0.035, 2.54, -1.015],), [right, np.array(right), torch.tensor(right)], wrong)


def lost_reviews() -> Case:
    right = np.flatnonzero(RIGHT_A & ~RIGHT_B)
    wrong = [(np.flatnonzero(~RIGHT_A & RIGHT_B), "student gets right"), (np.flatnonzero(~RIGHT_B), "all errors")]
    wrong += [(np.flatnonzero(RIGHT_A != RIGHT_B), "either way"), (RIGHT_A & ~RIGHT_B, "flatnonzero")]
    wrong += [(right[:5], "missing"), (right[None], "each item")]
    return Case((RIGHT_A, RIGHT_B), [right, right.tolist(), set(right[::-1].tolist()), torch.tensor(right)], wrong)


def soft_loss() -> Case:
    teacher, student = torch.tensor([[2.0, -2], [-1, 1], [0.5, 0]]), torch.tensor([[0.5, 0.2], [1, -0.3], [0, 0.4]])
    logs = [(logits / 3).log_softmax(-1) for logits in (teacher, student)]

    def kl(target, given, how="batchmean"):
        return torch.nn.functional.kl_div(given, target, reduction=how, log_target=True).item()

    right = 9 * kl(*logs)
    wrong = [(right / 9, "T squared is missing"), (right / 3, "not T"), (9 * kl(*logs, "mean"), "default mean")]
    wrong += [(9 * kl(*logs, "sum"), "sum"), (9 * kl(*logs[::-1]), "other way round"), (right / math.log(2), "bits")]
    return of_number((teacher, student, 3.0), right, [*wrong, (-right, "never negative")])


def first_blocks() -> Case:
    teacher = tiny_model(layers=4)

    def student(*chosen, outside=True):
        made = tiny_model(layers=len(chosen), seed=1)
        for block, i in zip(made.transformer.h, chosen, strict=True):
            block.load_state_dict(teacher.transformer.h[i].state_dict())
        if outside:
            state = {n: v for n, v in teacher.state_dict().items() if ".h." not in n}
            made.load_state_dict(state, strict=False)
        return made

    wrong = [(models.create_student(teacher, 2), "not its first"), (student(2, 3), "last"), (student(0), "fewer")]
    wrong += [(student(0, 1, outside=False), "embeddings"), (tiny_model(seed=1), "none of the teacher's")]
    wrong += [(torch.nn.Linear(2, 2), "no blocks"), (teacher.state_dict(), "model")]
    return Case((teacher, 2), [student(0, 1)], wrong)


def hidden_loss() -> Case:
    def places(student, lengths):
        return torch.arange(student.shape[1]) < lengths[:, None]

    def right(s, t, n):
        return (s - t).square()[places(s, n)].mean()

    wrong = [
        (lambda s, t, n: (s - t).square().mean(), "padding"),
        (lambda s, t, n: ((s - t).square() * places(s, n)[..., None]).mean(), "still divides"),
        (lambda s, t, n: (s - t).square()[places(s, n)].sum(), "sum"),
        (lambda s, t, n: (s - t).abs()[places(s, n)].mean(), "absolute"),
        (
            lambda s, t, n: torch.stack([(s[i, :k] - t[i, :k]).square().mean() for i, k in enumerate(n)]).mean(),
            "same weight",
        ),
        (lambda s, t, n: right(s.detach(), t, n), "gradient"),
        (lambda s, t, n: right(s, t, n).item(), "tensor"),
        (lambda s, t: 0, "TypeError"),
    ]
    return Case((), [right], wrong)


def overlapping() -> Case:
    rows = [("dense", 0.83, 0.81, 0.85, 1.0), ("a", 0.80, 0.78, 0.82, 0.01), ("b", 0.82, 0.80, 0.84, 0.40)]
    rows += [("c", 0.70, 0.68, 0.72, 0.0001), ("d", 0.86, 0.84, 0.88, 0.03)]
    table = pd.DataFrame(rows, columns=["model", "accuracy", "accuracy_low", "accuracy_high", "p_value"])
    wrong = [
        (["a", "c", "d"], "not all of their intervals"),
        (["b"], "not below"),
        (["a", "b", "d"], "not all of their p"),
    ]
    wrong += [(["a", "d", "dense"], "compared with"), (["c"], "do not overlap"), (["a"], "missing")]
    return Case((table, "dense"), [["a", "d"], ("d", "a"), pd.Series(["a", "d"])], [*wrong, ([0, 3], "names")])


def bits() -> Case:
    wrong = [(0.8, "natural"), (0.8 * math.log(2), "wrong side"), (3.2 / math.log(2), "each token")]
    wrong += [
        (3.2 * 4 / math.log(2), "less than a token"),
        (3.2 / math.log(10) / 4, "base 10"),
        (math.exp(3.2), "perplex"),
    ]
    return of_number((3.2, 4.0), 3.2 / math.log(2) / 4, wrong)


def mcnemar() -> Case:
    right = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    unpaired = stats.chi2_contingency([[89, 11], [82, 18]], correction=False).pvalue
    wrong = [(right / 2, "one-sided"), (math.comb(11, 2) / 2**11, "this split alone"), (unpaired, "unpaired")]
    wrong += [(stats.chi2.sf(49 / 11, 1), "exact"), (stats.chi2.sf(36 / 11, 1), "exact")]
    return of_number((9, 2, 80, 9), right, [*wrong, (0.5, "too large")])


def holm() -> Case:
    p = [0.03, 0.001, 0.04, 0.012]
    right = [0.06, 0.004, 0.06, 0.036]
    wrong = [([0.12, 0.004, 0.16, 0.048], "Bonferroni"), (sorted(right), "sorted")]
    wrong += [([0.06, 0.004, 0.04, 0.036], "smaller than the one before"), ([0.04, 0.004, 0.04, 0.024], "Benjamini")]
    wrong += [([0.09, 0.001, 0.16, 0.024], "wrong way round"), (p, "as they came")]
    wrong += [([0.06, 0.004, 0.07, 0.036], "number 3"), (right[:3], "4 numbers")]
    return Case((p,), [right, np.array(right), tuple(right)], wrong, ["0.06", "0.004", "0.036"])


def reviews_needed() -> Case:
    alpha, beta = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    right = (alpha + beta) ** 2 * 0.06 / 0.005**2
    wrong = [
        (alpha**2 * 0.06 / 0.005**2, "power"),
        ((stats.norm.ppf(0.95) + beta) ** 2 * 0.06 / 0.005**2, "one-sided"),
        ((alpha + beta) ** 2 * 0.06 / 0.5**2, "points"),
        ((alpha + beta) ** 2 / 0.005**2, "disagreements is missing"),
        (right * 0.005, "squared"),
    ]
    return of_number((0.06, 0.005, 0.8, 0.05), right, wrong)


def bootstrap() -> Case:
    # Two models that agree on most reviews, so that a paired interval is a good deal narrower.
    b = np.where(np.random.default_rng(5).random(400) < 0.08, ~RIGHT_A, RIGHT_A)

    def interval(seed, low=2.5, paired=True):
        draw = np.random.default_rng(seed)
        rows = draw.integers(400, size=(4000, 400))
        others = rows if paired else draw.integers(400, size=(4000, 400))
        return np.percentile(RIGHT_A[rows].mean(1) - b[others].mean(1), [low, 100 - low])

    right = interval(1)
    wrong = [(-right[::-1], "second model minus"), (interval(1, paired=False), "apart"), (interval(1, 5), "90 %")]
    wrong += [(100 * right, "points"), (right[::-1], "high comes first"), ((-0.5, 0.5), "too wide")]
    wrong += [((0, 0), "too narrow")]
    wrong += [([*right, 0], "2 numbers")]
    return Case((RIGHT_A, b), [right, tuple(right), interval(2)], wrong, [*written(right[0]), *written(right[1])])


MADE_BY = {name: make for name, make in globals().items() if getattr(make, "__annotations__", 0) == {"return": Case}}
CASES: dict[str, Callable[[], Case]] = {f"check_{name}": make for name, make in MADE_BY.items()}
GARBAGE = [None, True, "a text", b"bytes", [], [[1, 2], [3]], {}, {"a": 1}, {1, 2}, object(), object, len, 10**400, 1j]
GARBAGE += [math.nan, [math.nan, math.inf], np.array(["a", "b"]), np.array(1.5 + 2j), np.zeros((2, 0)), range(3)]
GARBAGE += [np.array([None, 1], dtype=object), torch.zeros(2, 3), torch.tensor(True), torch.zeros(3, 3).to_sparse()]
GARBAGE += [pd.DataFrame({"a": [1, 2]}), pd.Series([1.0, 2.0]), (1, 2, 3)]


@pytest.fixture(params=CASES, ids=lambda name: name.removeprefix("check_"))
def asked(request, capsys):
    """A case, and a function(answer) -> (what the check returned, what it printed)."""
    case = CASES[request.param]()
    capsys.readouterr()

    def ask(answer):
        returned = CHECKS[request.param](answer, *case.context)
        return returned, capsys.readouterr().out

    return case, ask


def test_every_check_has_a_case_and_a_docstring():
    assert CASES.keys() == CHECKS.keys()
    assert all(
        inspect.getdoc(check) and next(iter(inspect.signature(check).parameters)) == "answer"
        for check in CHECKS.values()
    )


def test_it_knows_what_is_right_and_what_is_not_answered_yet(asked):
    case, ask = asked
    assert ask(...) == (False, "Not answered yet\n")
    for answer in case.right:
        returned, printed = ask(answer)
        assert returned is True, printed
        assert re.fullmatch(r"Right: .{20,120}\.\n", printed)


def test_it_knows_what_is_wrong_raises_nothing_and_keeps_the_right_answer_to_itself(asked):
    case, ask = asked
    assert len(case.wrong) >= 3
    for answer, word in [*case.wrong, *((answer, "") for answer in GARBAGE)]:
        returned, printed = ask(answer)
        assert returned is False and re.fullmatch(r"Not yet: .{10,}\n", printed), (answer, printed)
        assert word in printed
        assert not [secret for secret in case.secrets if secret in printed], printed


def test_numbers_need_three_digits():
    assert checking.near(0.667, 2 / 3) and checking.near(18_800, 18_837) and checking.near(0, 0)
    assert not checking.near(0.67, 2 / 3) and not checking.near(18_700, 18_837) and not checking.near(0.9, 0.896)


def test_checks_leave_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    exercises.check_keeper(Careless)
    exercises.check_hidden_loss(lambda s, t, n: s.mean())
    assert torch.rand(1) == expected


def test_an_empty_answer_is_right_where_nothing_is_to_be_found(capsys):
    alike = np.array([True, False, True])
    assert exercises.check_lost_reviews([], alike, alike)
    table = pd.DataFrame({"model": ["dense"], "accuracy_low": [0.1], "accuracy_high": [0.2], "p_value": [1.0]})
    assert exercises.check_overlapping([], table, "dense")
    assert exercises.check_disagreements(0, alike, alike)
    assert exercises.check_bootstrap((0, 0), alike, alike)
    assert capsys.readouterr().out.count("Right: ") == 4


# --- how many are right ---


def test_right_answers_are_counted_in_executed_notebooks(tmp_path, capsys):
    def cell(tag, text):
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_code_cell("x", metadata={"tags": [tag]} if tag else {}, outputs=[output])

    said = ["Right: so it is.\n", "Not yet: too large.\n", "a table\nRight: yes.\n", "Not answered yet\n"]
    cells = [cell("exercise", text) for text in said] + [
        cell("solution", "Right: of course.\n"),
        cell("", "Right: no.\n"),
    ]
    path = tmp_path / "ada.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    (tmp_path / "damaged.ipynb").write_text("{")
    __main__.main([str(path), str(tmp_path / "damaged.ipynb"), str(tmp_path / "missing.ipynb")])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 2 of 4 right (1, 3)"
    assert "damaged.ipynb: cannot be read" in second and "missing.ipynb: cannot be read" in third
