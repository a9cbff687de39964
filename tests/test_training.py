"""The training loop, what it observes, how it keeps masks, its losses, and its command."""

import copy
import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers.data import IMDbDataset, make_loader
from nbhelpers.distillation import distillation_loss
from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.masks import MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.pipeline import grid
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import fine_tuning, inputs
from nbhelpers.training import Recipe, classification_loss, mixed_precision, parameter_groups, recipe_for, train
from nbhelpers.training.checkpoints import load_optimizer_tensors, optimizer_tensors
from nbhelpers.training.observers import GradientMagnitude
from nbhelpers.workspace import open_run

RECIPE = Recipe(learning_rate=1e-2, batch_size=8, epochs=2, precision="no")


pytestmark = pytest.mark.usefixtures("alone")


def toy_data(count: int = 40) -> IMDbDataset:
    """Random ids; label 1 where token 5 stands, label 0 where token 6 does, never both: separable, not trivial."""
    rng, data = np.random.default_rng(0), IMDbDataset.__new__(IMDbDataset)
    data.labels = np.arange(count) % 2
    data.input_ids = []
    for label in data.labels:
        row = rng.integers(7, 20, rng.integers(3, 10))
        row[rng.integers(len(row))] = 5 if label else 6
        data.input_ids.append(row.tolist())
    return data


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class Recorder(torch.optim.AdamW):
    """AdamW that notes what it is given: the gradients' norm and the learning rate of each group."""

    made = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norms, self.rates, self.gradients = [], [], []
        Recorder.made = self

    def step(self, *args, **kwargs):
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        self.gradients.append(gradients)
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step(*args, **kwargs)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return Recorder


# --- the loop ---


def test_a_separable_problem_is_learnt():
    model, data = tiny_model(), toy_data()
    before = evaluate_accuracy(model, data)
    history = train(model, data, dataclasses.replace(RECIPE, epochs=12))
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert evaluate_accuracy(model, data) >= 0.95 > before


def test_history_has_an_entry_an_epoch_and_training_stops_at_the_steps_asked_for(recorder):
    history = train(tiny_model(), toy_data(40), dataclasses.replace(RECIPE, epochs=3))
    assert [(entry["epoch"], entry["steps"]) for entry in history] == [(1, 5), (2, 10), (3, 15)]
    history = train(tiny_model(), toy_data(40), dataclasses.replace(RECIPE, steps=7))
    assert [entry["steps"] for entry in history] == [5, 7]
    assert len(recorder.made.norms) == 7
    assert all(math.isfinite(entry["loss"]) and entry["seconds"] >= 0 for entry in history)


def test_the_loss_of_an_epoch_is_the_mean_of_its_batches():
    losses = []

    def noting(model, batch):
        losses.append(torch.nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]))
        return losses[-1]

    history = train(tiny_model(), toy_data(), RECIPE, loss_function=noting)
    values = [loss.item() for loss in losses]
    assert [entry["loss"] for entry in history] == pytest.approx([np.mean(values[:5]), np.mean(values[5:])], rel=1e-6)
    assert [entry["losses"] for entry in history] == [values[:5], values[5:]]


def test_gradients_are_clipped_to_the_recipes_norm(recorder):
    train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, max_grad_norm=1e9))
    free = recorder.made.norms
    limit = 0.5 * min(free)
    train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, max_grad_norm=limit))
    # The first batch is the same, and so is its direction; clip_grad_norm_ divides by norm + 1e-6.
    assert recorder.made.norms[0] == pytest.approx(limit, rel=1e-4)
    assert max(recorder.made.norms) <= limit * (1 + 1e-5)


def test_the_learning_rate_warms_up_and_decays_to_zero_linearly(recorder):
    recipe = dataclasses.replace(RECIPE, epochs=4, warmup_share=0.2, layer_decay=0.5)
    train(tiny_model(), toy_data(40), recipe)
    # 20 steps, 4 of them warm-up.
    # No step is wasted on a learning rate of zero.
    expected = [(step + 1) / 5 if step < 4 else (20 - step) / 16 for step in range(20)]
    rates = np.array(recorder.made.rates)
    head = rates[:, np.argmax(rates[4])]
    assert head == pytest.approx([1e-2 * factor for factor in expected])
    lowest = rates[:, np.argmin(rates[4])]
    assert lowest == pytest.approx(head * 0.5**3), "the decay by depth holds along the whole schedule"


def test_one_seed_gives_equal_weights_twice_and_another_seed_others():
    def trained(seed):
        model = tiny_model(dropout=0.2)
        torch.seed()  # what was drawn before the training must not matter
        train(model, toy_data(), RECIPE, seed=seed)
        return weights_of(model)

    one = trained(1)
    assert_same_weights(one, trained(1))
    other = trained(2)
    assert not any(torch.equal(one[name], other[name]) for name in prunable_weights(tiny_model()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(value):
    calls = []

    def breaking(model, batch):
        calls.append(1)
        loss = model(input_ids=batch["input_ids"]).logits.square().mean()
        return loss * value if len(calls) == 3 else loss

    with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step 3: lower the learning rate"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=breaking)


def test_the_weights_of_the_best_validation_are_left_in_the_model():
    seen, scores = [], iter([0.5, 0.9, 0.9, 0.7])

    def validate(model):
        assert not model.training
        seen.append(weights_of(model))
        return next(scores)

    model = tiny_model(dropout=0.2)
    history = train(model, toy_data(), dataclasses.replace(RECIPE, epochs=4), validate=validate)
    assert [entry["accuracy"] for entry in history] == [0.5, 0.9, 0.9, 0.7]
    assert_same_weights(weights_of(model), seen[1])
    assert not torch.equal(seen[1]["score.weight"], seen[3]["score.weight"])
    assert not model.training


def test_validating_does_not_change_the_training():
    def trained(**options):
        model = tiny_model()
        train(model, toy_data(), RECIPE, **options)
        return weights_of(model)

    rising = iter([0.1, 0.2])
    assert_same_weights(trained(), trained(validate=lambda model: next(rising)))


def test_bf16_training_keeps_float32_weights_and_leaves_a_plain_float32_model():
    model, data = tiny_model(), toy_data()
    train(model, data, dataclasses.replace(RECIPE, precision="bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = tiny_model(seed=9)
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([data.input_ids[0]])
    # Equal bits: an autocast left around the forward pass would differ in the third digit.
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_mixed_precision_takes_a_wish_and_decides_itself_otherwise():
    assert [mixed_precision(wish) for wish in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    assert mixed_precision() in ("no", "bf16")
    assert mixed_precision() == mixed_precision(), "once decided, a process stays with it"


def test_a_recipe_takes_the_profiles_fields_of_its_purpose():
    profile = get_profile(
        "quick",
        learning_rate=1e-3,
        recovery_learning_rates=(2e-3, 9e-3),
        distill_learning_rate=3e-3,
        batch_size=4,
        distill_batch_size=5,
        epochs=6,
        distill_epochs=7,
        recovery_steps=8,
        layer_decay=0.9,
        weight_decay=0.02,
        warmup_share=0.3,
        max_grad_norm=2.0,
        precision="no",
        prefix_share=0.25,
    )
    shared = {"weight_decay": 0.02, "warmup_share": 0.3, "max_grad_norm": 2.0, "precision": "no"}
    assert recipe_for(profile, "finetune") == Recipe(1e-3, 4, epochs=6, layer_decay=0.9, prefix_share=0.25, **shared)
    assert recipe_for(profile, "recover") == Recipe(2e-3, 4, steps=8, prefix_share=0.25, **shared)
    assert recipe_for(profile, "distill") == Recipe(3e-3, 5, epochs=7, **shared)


# --- the loss ---


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_last_tokens_and_a_share_of_every_prefixs(share):
    """Against the model asked about each prefix by itself, in the words of the formula."""
    model, reviews, labels = tiny_model(), [[5, 6, 7, 8], [9, 4], [3]], [1, 0, 1]
    ids = torch.zeros(3, 4, dtype=torch.long) + model.config.pad_token_id
    for i, review in enumerate(reviews):
        ids[i, : len(review)] = torch.tensor(review)
    batch = {"input_ids": ids, "labels": torch.tensor(labels), "lengths": torch.tensor([4, 2, 1])}
    expected = 0.0
    with torch.no_grad():
        for review, label in zip(reviews, labels, strict=True):
            n = len(review)
            losses = [
                -model(torch.tensor([review[:t]])).logits.log_softmax(-1)[0, label].item() for t in range(1, n + 1)
            ]
            gains = [t / n for t in range(1, n + 1)]
            on_the_way = sum(g * loss for g, loss in zip(gains, losses, strict=True)) / sum(gains)
            expected += ((1 - share) * losses[-1] + share * on_the_way) / 3
        assert classification_loss(model, batch, share).item() == pytest.approx(expected, rel=1e-4)


def test_a_recipes_prefix_share_reaches_the_training():
    losses = [train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, prefix_share=s))[0]["loss"] for s in (0, 1)]
    assert losses[0] != losses[1]


# --- masks held ---


class LateKeeper:
    """Lets the optimizer gather momentum on all weights first, then prunes and holds: the hard case."""

    def __init__(self, model, sparsity: float, start: int):
        self.model, self.sparsity, self.start, self.step, self.keeper = model, sparsity, start, 0, None
        self.revived = []

    def mask_gradients(self):
        if self.step == self.start:
            scores = {name: weight.detach().abs() for name, weight in prunable_weights(self.model).items()}
            self.keeper = MaskKeeper(self.model, select(scores, self.sparsity))
        if self.keeper:
            self.keeper.mask_gradients()

    def apply(self):
        if self.keeper:
            self.keeper.apply()
            self.revived.append(self.keeper.revived())
        self.step += 1


def test_no_pruned_weight_revives_even_with_momentum_from_before_the_pruning():
    model = tiny_model()
    keeper = LateKeeper(model, 0.8, start=6)
    train(model, toy_data(), dataclasses.replace(RECIPE, epochs=4, weight_decay=0.1), mask_keeper=keeper)
    assert keeper.revived == [0] * 14
    weights, masks = prunable_weights(model), keeper.keeper.masks
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.8 * total)
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in weights.items())


def test_momentum_would_revive_pruned_weights_without_the_keeper():
    # The reason for the keeper, and the proof that the test above can fail.
    model, data = tiny_model(), toy_data()
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE))

    def step(keeper=None, hold=False):
        batch = next(iter(make_loader(data, 8, 0, seed=0)))
        torch.nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]).backward()
        if keeper:
            keeper.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if hold:
            keeper.apply()

    for _ in range(3):
        step()
    keeper = MaskKeeper(model, select({n: w.detach().abs() for n, w in prunable_weights(model).items()}, 0.5))
    assert keeper.revived() == 0
    step(keeper)
    assert keeper.revived() > 100, "masked gradients alone do not hold the masks"
    step(keeper, hold=True)
    assert keeper.revived() == 0


def test_pruned_weights_do_not_count_in_the_norm_that_is_clipped(recorder):
    model = tiny_model()
    masks = select({n: w.detach().abs() for n, w in prunable_weights(model).items()}, 0.9)
    train(model, toy_data(), dataclasses.replace(RECIPE, max_grad_norm=1e-3), mask_keeper=MaskKeeper(model, masks))
    # Were the gradients of pruned weights clipped first and dropped then, less than the limit would be left.
    assert recorder.made.norms == pytest.approx([1e-3] * 10, rel=2e-3)
    order = [p for group in recorder.made.param_groups for p in group["params"]]
    for name, weight in prunable_weights(model).items():
        place = next(i for i, p in enumerate(order) if p is weight)
        for gradients in recorder.made.gradients:
            assert not gradients[place][~masks[name]].any()


def test_unpruned_weights_learn_on():
    model = tiny_model()
    masks = select({n: w.detach().abs() for n, w in prunable_weights(model).items()}, 0.5)
    before = weights_of(model)
    train(model, toy_data(), RECIPE, mask_keeper=MaskKeeper(model, masks))
    for name, weight in prunable_weights(model).items():
        assert (weight[masks[name]] != before[name][masks[name]]).float().mean() > 0.99
        assert not weight[~masks[name]].any()


# --- what is observed ---


def test_the_observer_gives_the_mean_absolute_batch_gradient_before_clipping():
    recipe = dataclasses.replace(RECIPE, steps=3, batch_size=8, warmup_share=0.4, weight_decay=0.1, max_grad_norm=0.05)
    model, data = tiny_model().double(), toy_data(40)
    reference = copy.deepcopy(model)
    observer = GradientMagnitude(model)
    train(model, data, recipe, seed=4, observers=(observer,))

    # The same three steps in plain torch: AdamW, clipping and the schedule (two steps of warm-up) by hand.
    parameters = list(reference.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    sums = {name: 0 for name in prunable_weights(reference)}
    reference.train()
    for batch, factor in zip(make_loader(data, 8, 0, seed=4), (1 / 3, 2 / 3, 1.0), strict=False):
        logits = reference(input_ids=batch["input_ids"]).logits
        loss = -logits.log_softmax(-1)[torch.arange(len(logits)), batch["labels"]].mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > 0.05, "clipping must matter here"
        for name, parameter in zip(dict(reference.named_parameters()), gradients, strict=True):
            if name in sums:
                sums[name] = sums[name] + parameter.abs()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, 0.05 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
    assert observer.steps == 3
    found = observer.mean()
    assert list(found) == list(sums)
    for name, total in sums.items():
        # The model computes in float64; the observer rounds three times to float32, 6e-8 each.
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), total / 3, rtol=1e-6, atol=1e-12)


def test_the_observer_refuses_a_mean_of_nothing():
    with pytest.raises(RuntimeError, match="no gradient was observed"):
        GradientMagnitude(tiny_model()).mean()


def test_observing_does_not_change_the_training():
    one, other = tiny_model(), tiny_model()
    train(one, toy_data(), RECIPE)
    train(other, toy_data(), RECIPE, observers=(GradientMagnitude(other),))
    assert_same_weights(weights_of(one), weights_of(other))


# --- distillation ---


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_the_distillation_loss_is_its_formula(alpha, t):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 6, 3)) * 2
    labels = np.array([0, 1, 2, 0, 1, 2])
    p, q = log_softmax(teacher / t, axis=1), log_softmax(student / t, axis=1)
    cross_entropy = -np.mean(log_softmax(student, axis=1)[np.arange(6), labels])
    kl = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
    expected = alpha * cross_entropy + (1 - alpha) * t**2 * kl
    found = distillation_loss(*map(torch.from_numpy, (teacher, student, labels)), alpha, t)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_a_student_that_agrees_with_its_teacher_has_no_soft_loss(t):
    logits = torch.randn(5, 2, dtype=torch.float64)
    # Equal up to a constant a row is equal: softmax does not see it.
    assert distillation_loss(logits + 3.0, logits, torch.zeros(5, dtype=torch.long), 0.0, t).abs() < 1e-14


def test_the_soft_gradient_keeps_its_scale_as_the_temperature_grows():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 50, 2, dtype=torch.float64, generator=generator) * 0.3
    labels, norms = torch.zeros(50, dtype=torch.long), []
    for t in (1.0, 4.0, 16.0, 64.0):
        logits = student.clone().requires_grad_()
        distillation_loss(teacher, logits, labels, 0.0, t).backward()
        expected = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1)) / 50
        torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-14)
        norms.append(logits.grad.norm().item())
    # Small logits: softmax is near linear already at T = 1. Without T^2 the norms would fall to 1/4096.
    assert norms == pytest.approx([norms[-1]] * 4, rel=0.1)


# --- optimizers ---


def test_every_parameter_is_in_one_group_with_the_learning_rate_of_its_depth():
    model = tiny_model(layers=3)
    recipe = Recipe(1.0, 8, layer_decay=0.5, weight_decay=0.01)
    found = {id(p): group for group in parameter_groups(model, recipe) for p in group["params"]}
    assert sum(len(group["params"]) for group in parameter_groups(model, recipe)) == len(list(model.parameters()))
    rates = {"wte": 0.0625, "wpe": 0.0625, "h.0.": 0.125, "h.1.": 0.25, "h.2.": 0.5, "ln_f": 1.0, "score": 1.0}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == next(rate for part, rate in rates.items() if part in name), name
        matrix = name.endswith(".weight") and "ln_" not in name
        assert group["weight_decay"] == (0.01 if matrix else 0.0), name


def test_a_llama_has_the_same_groups():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=20, pad_token_id=0, num_labels=2))
    groups = parameter_groups(model, Recipe(1.0, 8, layer_decay=0.5, weight_decay=0.01))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["model.embed_tokens.weight"] == (0.125, 0.01)
    assert by_name["model.layers.0.self_attn.k_proj.weight"] == (0.25, 0.01)
    assert by_name["model.layers.0.input_layernorm.weight"] == (0.25, 0.0)
    assert by_name["model.layers.1.mlp.down_proj.weight"] == (0.5, 0.01)
    assert by_name["model.norm.weight"] == (1.0, 0.0)
    assert by_name["score.weight"] == (1.0, 0.01)


def test_without_layer_decay_all_learning_rates_are_one():
    assert {group["lr"] for group in parameter_groups(tiny_model(), RECIPE)} == {1e-2}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_restored_from_safetensors_goes_on_identically(kind, tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=kind == "adamw", dtype=torch.float32)
        if kind == "adamw":
            return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        return model, torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.1)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = build()
    steps(whole, optimizer, range(6))
    first, optimizer = build()
    steps(first, optimizer, range(3))
    save_file(optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    second, optimizer = build()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(optimizer, load_file(tmp_path / "optimizer.safetensors"))
    steps(second, optimizer, range(3, 6))
    assert_same_weights(weights_of(whole), weights_of(second))
    forgetful, optimizer = build()
    forgetful.load_state_dict(first.state_dict())
    steps(forgetful, optimizer, range(3, 6))
    assert not torch.equal(forgetful.weight, whole.weight), "the state matters"


# --- from the command line ---


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *words])
    grid.main_of_training()


def test_the_command_leaves_the_artefacts_of_all_seeds_that_the_notebook_finds(workspace, monkeypatch, capsys):
    command(monkeypatch, "finetune", "--profile", "smoke", "--set", "precision=no")
    assert "accuracy" in capsys.readouterr().out
    monkeypatch.setattr(experiments, "train", lambda *_, **__: pytest.fail("trained again"))
    for run in inputs.runs_of(open_run(get_profile("smoke", precision="no"), 0)):
        fine_tuning.finetune_model(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "nonsense"], "no profile 'nonsense'"),
        (["--set", "epochs=banana"], "epochs is 'banana'"),
        (["--set", "no_such_field=1"], "no field 'no_such_field'"),
        (["--set", "data=/no/such/file.csv"], "'/no/such/file.csv' does not exist"),
        (["--set", "model=/no/such/folder"], "'/no/such/folder' does not exist"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(workspace, monkeypatch, words, message):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "finetune", *(["--profile", "smoke"] if "--profile" not in words else []), *words)
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(workspace.rglob("*"))


# --- memory ---


def hungry(limit, reviews_seen):
    """A loss for which there is memory for at most ``limit`` reviews at a time."""

    def loss(model, batch):
        reviews_seen.append(len(batch["labels"]))
        if len(batch["labels"]) > limit:
            # What torch says on a CPU.
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return classification_loss(model, batch)

    return loss


def test_a_batch_that_does_not_fit_is_computed_in_parts_to_the_same_end(capsys):
    seen = []
    whole = train(tiny_model(), toy_data(), RECIPE)
    parted = train(tiny_model(), toy_data(), RECIPE, loss_function=hungry(4, seen))
    assert capsys.readouterr().out == "no memory for 8 reviews in 1 parts: in 2 from here on\n"
    assert seen == [8] + [4] * 20
    # Weights without a gradient (biases of keys) go where rounding sends them, and change nothing.
    for expected, found in zip(whole, parted, strict=True):
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)


def test_where_even_fewer_fit_the_parts_become_smaller_again():
    seen = []
    train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, accumulation=2), loss_function=hungry(2, seen))
    assert seen == [4] + [2] * 40


def test_a_batch_that_does_not_fit_in_twice_as_many_parts_is_an_error_that_says_what_to_set():
    with pytest.raises(MemoryError, match="8 reviews do not fit into memory in 2 parts: set accumulation to 4 or more"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=hungry(1, []))


def test_another_error_of_the_loss_is_not_taken_for_a_lack_of_memory():
    def broken(model, batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=broken)
