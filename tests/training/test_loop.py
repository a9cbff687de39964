"""The training loop: its steps against plain torch, what it keeps, its loss, its micro-batches, its optimizer."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from nbhelpers.data import IMDbDataset, make_loader
from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.masks import MaskKeeper
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.training import Recipe, classification_loss, recipe_for, train
from nbhelpers.training.loop import accumulate_gradients, make_accelerator, micro_batch, parameter_groups
from nbhelpers.training.observers import GradientMagnitude

RECIPE = Recipe(learning_rate=1e-2, batch_size=8, epochs=2, precision="no")

pytestmark = pytest.mark.usefixtures("alone")


def toy_data(count: int = 40) -> IMDbDataset:
    """Random ids; label 1 where token 5 occurs, label 0 where token 6 does, never both: separable, not trivial."""
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


def magnitudes(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


class Recorder(torch.optim.AdamW):
    """AdamW that records the gradients, their norm and the learning rate of each group at every step."""

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
    history = train(model, data, dataclasses.replace(RECIPE, epochs=12))
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert evaluate_accuracy(model, data) >= 0.95


def test_history_has_an_entry_per_epoch_with_the_loss_of_each_step_and_training_stops_at_the_steps_asked_for():
    losses = []

    def recording(model, batch):
        losses.append(torch.nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]))
        return losses[-1]

    history = train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, steps=7), loss_function=recording)
    values = [loss.item() for loss in losses]
    assert [(entry["epoch"], entry["steps"]) for entry in history] == [(1, 5), (2, 7)]
    assert [entry["losses"] for entry in history] == [values[:5], values[5:]]
    assert [entry["loss"] for entry in history] == pytest.approx([np.mean(values[:5]), np.mean(values[5:])])
    assert all(entry["seconds"] >= 0 and entry["step_seconds"] >= 0 for entry in history)


def test_three_steps_and_the_observed_gradient_are_those_of_plain_torch():
    recipe = dataclasses.replace(RECIPE, steps=3, batch_size=8, warmup_share=0.4, weight_decay=0.1, max_grad_norm=0.05)
    model, data = tiny_model().double(), toy_data(40)
    reference = copy.deepcopy(model)
    observer = GradientMagnitude(model)
    train(model, data, recipe, seed=4, observers=(observer,))

    # AdamW, clipping and the schedule (two steps of warm-up) by hand.
    parameters = dict(reference.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    sums = {name: 0 for name in prunable_weights(reference)}
    reference.train()
    for batch, factor in zip(make_loader(data, 8, 0, seed=4), (1 / 3, 2 / 3, 1.0), strict=False):
        logits = reference(input_ids=batch["input_ids"]).logits
        loss = -logits.log_softmax(-1)[torch.arange(len(logits)), batch["labels"]].mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm > 0.05, "clipping must matter here"
        sums = {name: total + gradients[name].abs() for name, total in sums.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name] * min(1.0, 0.05 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
    found = observer.mean()
    assert observer.steps == 3 and list(found) == list(sums)
    for name, total in sums.items():
        # The model computes in float64; the observer rounds three times to float32, 6e-8 each.
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), total / 3, rtol=1e-6, atol=1e-12)


def test_the_learning_rate_warms_up_and_decays_linearly_and_gradients_are_clipped_to_the_recipes_norm(recorder):
    recipe = dataclasses.replace(RECIPE, epochs=4, warmup_share=0.2, layer_decay=0.5, max_grad_norm=0.01)
    train(tiny_model(), toy_data(40), recipe)
    # 20 steps, 4 of them warm-up; no step has a learning rate of zero.
    expected = [(step + 1) / 5 if step < 4 else (20 - step) / 16 for step in range(20)]
    rates = np.array(recorder.made.rates)
    head, lowest = rates[:, np.argmax(rates[4])], rates[:, np.argmin(rates[4])]
    assert head == pytest.approx([1e-2 * factor for factor in expected])
    assert lowest == pytest.approx(head * 0.5**3), "the decay by depth holds along the whole schedule"
    # clip_grad_norm_ divides by norm + 1e-6, which is 1e-4 of the limit.
    assert recorder.made.norms == pytest.approx([0.01] * 20, rel=2e-4)


def test_one_seed_gives_equal_weights_twice_and_another_seed_others():
    def trained(seed):
        model = tiny_model(dropout=0.2)
        torch.seed()  # what was drawn before the training must not matter
        train(model, toy_data(), RECIPE, seed=seed)
        return weights_of(model)

    first, other = trained(1), trained(2)
    assert_same_weights(first, trained(1))
    assert not any(torch.equal(first[name], other[name]) for name in prunable_weights(tiny_model()))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    calls = []

    def breaking(model, batch):
        calls.append(1)
        loss = model(input_ids=batch["input_ids"]).logits.square().mean()
        return loss * math.inf if len(calls) == 3 else loss

    with pytest.raises(FloatingPointError, match=r"the loss is inf at step 3: lower the learning rate"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=breaking)


def test_the_weights_of_the_best_validation_are_left_in_the_model_and_validating_changes_nothing_else():
    seen, scores = [], iter([0.5, 0.9, 0.9, 0.7])

    def validate(model):
        assert not model.training
        seen.append(weights_of(model))
        return next(scores)

    model, plain, recipe = tiny_model(dropout=0.2), tiny_model(dropout=0.2), dataclasses.replace(RECIPE, epochs=4)
    history = train(model, toy_data(), recipe, validate=validate)
    assert [entry["accuracy"] for entry in history] == [0.5, 0.9, 0.9, 0.7]
    assert_same_weights(weights_of(model), seen[1])
    assert not torch.equal(seen[1]["score.weight"], seen[3]["score.weight"])
    assert not model.training
    train(plain, toy_data(), recipe)
    assert_same_weights(weights_of(plain), seen[3])


def test_bf16_training_keeps_float32_weights_and_leaves_a_plain_float32_model():
    model, data = tiny_model(), toy_data()
    train(model, data, dataclasses.replace(RECIPE, precision="bf16", steps=3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = tiny_model(seed=9)
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([data.input_ids[0]])
    # Equal bits: an autocast left around the forward pass would differ in the third digit.
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


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
        layer_decay=0.9,
        weight_decay=0.02,
        warmup_share=0.3,
        max_grad_norm=2.0,
        precision="no",
        prefix_share=0.25,
        accumulation=2,
    )
    shared = {"weight_decay": 0.02, "warmup_share": 0.3, "max_grad_norm": 2.0, "precision": "no", "accumulation": 2}
    assert recipe_for(profile, "finetune") == Recipe(1e-3, 4, epochs=6, layer_decay=0.9, prefix_share=0.25, **shared)
    assert recipe_for(profile, "recover") == Recipe(2e-3, 4, prefix_share=0.25, **shared)
    assert recipe_for(profile, "distill") == Recipe(3e-3, 5, epochs=7, prefix_share=0.25, **shared)


# --- masks ---


class LateKeeper:
    """Lets the optimizer gather momentum on all weights first, then prunes and holds: the hard case."""

    def __init__(self, model, sparsity: float, start: int):
        self.model, self.sparsity, self.start, self.step, self.keeper = model, sparsity, start, 0, None
        self.revived = []

    def mask_gradients(self):
        if self.step == self.start:
            self.keeper = MaskKeeper(self.model, select(magnitudes(self.model), self.sparsity))
        if self.keeper:
            self.keeper.mask_gradients()

    def apply(self):
        if self.keeper:
            self.revived.append(self.keeper.revived())
            self.keeper.apply()
            self.revived.append(self.keeper.revived())
        self.step += 1


def test_momentum_would_revive_pruned_weights_and_the_keeper_does_not_let_it():
    model = tiny_model()
    late = LateKeeper(model, 0.8, start=6)
    train(model, toy_data(), dataclasses.replace(RECIPE, epochs=4, weight_decay=0.1), mask_keeper=late)
    assert late.revived[0] > 100, "without apply, masked gradients alone do not hold the masks"
    assert late.revived[1::2] == [0] * 14
    weights = prunable_weights(model)
    dropped = sum(int((weight == 0).sum()) for weight in weights.values())
    assert dropped == round(0.8 * sum(weight.numel() for weight in weights.values()))
    assert all(torch.equal(weight != 0, late.keeper.masks[name]) for name, weight in weights.items())


def test_pruned_weights_do_not_count_in_the_norm_that_is_clipped_and_all_others_learn(recorder):
    model = tiny_model()
    masks, before = select(magnitudes(model), 0.5), weights_of(model)
    train(model, toy_data(), dataclasses.replace(RECIPE, max_grad_norm=1e-3), mask_keeper=MaskKeeper(model, masks))
    # If gradients of pruned weights were clipped first and masked then, less than the limit would be left.
    assert recorder.made.norms == pytest.approx([1e-3] * 10, rel=2e-3)
    order = [id(p) for group in recorder.made.param_groups for p in group["params"]]
    for name, weight in prunable_weights(model).items():
        assert not any(gradients[order.index(id(weight))][~masks[name]].any() for gradients in recorder.made.gradients)
        assert (weight[masks[name]] != before[name][masks[name]]).float().mean() > 0.99
        assert not weight[~masks[name]].any()


# --- the loss ---


def test_the_loss_is_the_last_tokens_and_a_share_of_every_prefixs():
    """Compare with the model called on each prefix by itself."""
    model, reviews, labels = tiny_model(), [[5, 6, 7, 8], [9, 4], [3]], [1, 0, 1]
    ids = torch.zeros(3, 4, dtype=torch.long) + model.config.pad_token_id
    for i, review in enumerate(reviews):
        ids[i, : len(review)] = torch.tensor(review)
    batch = {"input_ids": ids, "labels": torch.tensor(labels), "lengths": torch.tensor([4, 2, 1])}
    last = prefixes = 0.0
    with torch.no_grad():
        for review, label in zip(reviews, labels, strict=True):
            n = len(review)
            cuts = [torch.tensor([review[:t]]) for t in range(1, n + 1)]
            losses = [-model(cut).logits.log_softmax(-1)[0, label].item() for cut in cuts]
            last += losses[-1] / 3
            gains = [t / n for t in range(1, n + 1)]
            prefixes += sum(g * loss for g, loss in zip(gains, losses, strict=True)) / sum(gains) / 3
        for share in (0.0, 0.3, 1.0):
            expected = (1 - share) * last + share * prefixes
            assert classification_loss(model, batch, share).item() == pytest.approx(expected, rel=1e-4)
    losses = [
        train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, prefix_share=share, steps=1))[0]["loss"]
        for share in (0.0, 1.0)
    ]
    assert losses[0] != losses[1], "a recipe's share reaches the loss"


# --- micro-batches ---


def toy_batch(reviews=5):
    lengths = torch.tensor([9, 4, 7, 2, 5][:reviews])
    ids = torch.randint(1, 20, (reviews, 9), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(9) >= lengths[:, None]] = 0
    return {"input_ids": ids, "lengths": lengths, "labels": torch.tensor([0, 1, 1, 0, 1][:reviews])}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_micro_batches_hold_every_review_once_and_their_shares_add_up_to_one(count):
    batch = toy_batch()
    found = [micro_batch(batch, i, count) for i in range(count)]
    assert sum(share for _, share in found) == pytest.approx(1)
    rows = [tuple(row[row != 0].tolist()) for micro, share in found if share for row in micro["input_ids"]]
    assert sorted(rows) == sorted(tuple(row[row != 0].tolist()) for row in batch["input_ids"])
    assert all(micro["input_ids"].shape[1] == micro["lengths"].max() for micro, _ in found)


@pytest.mark.parametrize("prefix_share", [0.0, 0.5])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(toy_model, prefix_share):
    # float64, so that the order of a sum changes nothing but the last of 16 digits.
    model, batch = toy_model.double(), toy_batch()

    def loss_function(model, micro):
        return classification_loss(model, micro, prefix_share).double()

    loss = loss_function(model, batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for accumulation in (1, 2, 7):
        model.zero_grad()
        found = accumulate_gradients(model, batch, loss_function, make_accelerator("no"), accumulation)
        assert found == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            # The prefix loss is computed from float32 logits in either case.
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-8)


def hungry(limit, reviews_seen):
    """Return a loss for which there is memory for at most ``limit`` reviews at a time."""

    def loss(model, batch):
        reviews_seen.append(len(batch["labels"]))
        if len(batch["labels"]) > limit:
            # torch's message on a CPU
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return classification_loss(model, batch)

    return loss


def test_a_batch_that_does_not_fit_is_computed_in_micro_batches(capsys):
    seen = []
    whole = train(tiny_model(), toy_data(), dataclasses.replace(RECIPE, steps=1))
    split = train(tiny_model(), toy_data(), RECIPE, loss_function=hungry(4, seen))
    assert capsys.readouterr().out == "out of memory for 8 reviews with accumulation=1: going on with 2\n"
    assert seen == [8] + [4] * 20
    # Only the first loss: later ones depend on steps, in which Adam amplifies the rounding of tiny gradients.
    assert split[0]["losses"][0] == pytest.approx(whole[0]["losses"][0], rel=1e-5)


def test_a_batch_that_never_fits_is_an_error_that_says_what_to_set_and_other_errors_are_raised_as_they_are():
    with pytest.raises(MemoryError, match="8 reviews with accumulation=2: set accumulation to 4 or more"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=hungry(1, []))

    def broken(model, batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(tiny_model(), toy_data(), RECIPE, loss_function=broken)


# --- the optimizer's groups ---


def test_every_parameter_is_in_one_group_with_the_learning_rate_of_its_depth():
    model = tiny_model(layers=3)
    groups = parameter_groups(model, Recipe(1.0, 8, layer_decay=0.5, weight_decay=0.01))
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    rates = {"wte": 0.0625, "wpe": 0.0625, "h.0.": 0.125, "h.1.": 0.25, "h.2.": 0.5, "ln_f": 1.0, "score": 1.0}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == next(rate for word, rate in rates.items() if word in name), name
        matrix = name.endswith(".weight") and "ln_" not in name
        assert group["weight_decay"] == (0.01 if matrix else 0.0), name
    assert {group["lr"] for group in parameter_groups(model, RECIPE)} == {1e-2}, "without layer_decay"


def test_a_llama_has_the_same_groups():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=20, pad_token_id=0, num_labels=2))
    groups = parameter_groups(model, Recipe(1.0, 8, layer_decay=0.5, weight_decay=0.01))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["model.embed_tokens.weight"] == (0.125, 0.01)
    assert by_name["model.layers.0.self_attn.k_proj.weight"] == (0.25, 0.01)
    assert by_name["model.layers.0.input_layernorm.weight"] == (0.25, 0.0)
    assert by_name["model.layers.1.mlp.down_proj.weight"] == (0.5, 0.01)
    assert by_name["model.norm.weight"] == (1.0, 0.0)
    assert by_name["score.weight"] == (1.0, 0.01)
