"""One training loop over Accelerate, for fine-tuning, recovery and distillation.

Several processes share each batch where torchrun or ``accelerate launch`` starts them (``distributed``). A batch is
computed in micro-batches: ``accumulation`` of them per process.
"""

import contextlib
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel

from nbhelpers.data import IMDbDataset, make_loader
from nbhelpers.models import BLOCK_WEIGHT, blocks
from nbhelpers.profiles import Profile
from nbhelpers.system.progress import progress
from nbhelpers.training import distributed
from nbhelpers.training.checkpoints import Checkpoints, TrainingState
from nbhelpers.training.precision import faster_in_bfloat16, mixed_precision


@dataclass(frozen=True)
class Recipe:
    """How to train: ``steps`` optimizer steps if given, otherwise ``epochs`` passes over the data."""

    learning_rate: float
    batch_size: int
    epochs: int = 1
    steps: int | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "auto"
    prefix_share: float = 0.0
    accumulation: int = 1


def recipe_for(profile: Profile, purpose: str) -> Recipe:
    """Return a profile's recipe to ``"finetune"``, ``"recover"`` (with the first of its rates) or ``"distill"``."""
    names = ("weight_decay", "warmup_share", "max_grad_norm", "precision", "accumulation", "prefix_share")
    shared = {name: getattr(profile, name) for name in names}
    if purpose == "finetune":
        return Recipe(
            profile.learning_rate, profile.batch_size, profile.epochs, layer_decay=profile.layer_decay, **shared
        )
    if purpose == "recover":
        rate = profile.recovery_learning_rates[0]
        return Recipe(rate, profile.batch_size, **shared)
    return Recipe(profile.distill_learning_rate, profile.distill_batch_size, profile.distill_epochs, **shared)


def parameter_groups(model: PreTrainedModel, recipe: Recipe) -> list[dict]:
    """Return AdamW's groups: weight decay for matrices only, a learning rate that falls from head to embeddings.

    A parameter of block l (of L) gets ``learning_rate * layer_decay ** (L - l)``, the embeddings the exponent L + 1
    (Howard and Ruder, 2018).
    """
    depth, groups = len(blocks(model)), {}
    for name, parameter in model.named_parameters():
        match = BLOCK_WEIGHT.search(name.rsplit(".", 1)[0] + ".weight")
        in_embeddings = any(word in name for word in ("wte", "wpe", "embed"))
        below = depth - int(match[1]) if match else depth + 1 if in_embeddings else 0
        decay = recipe.weight_decay if parameter.ndim >= 2 else 0.0
        group = {"params": [], "lr": recipe.learning_rate * recipe.layer_decay**below, "weight_decay": decay}
        groups.setdefault((below, decay), group)["params"].append(parameter)
    return list(groups.values())


def warmup_and_decay(steps: int, warmup_share: float) -> Callable[[int], float]:
    """Return a function of the step: the learning rate's factor, which rises to 1, then falls to nearly 0, linearly."""
    warmup = min(math.ceil(steps * warmup_share), steps - 1)
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)


def make_accelerator(precision: str) -> Accelerator:
    """Return an accelerator of this precision, also where an earlier one of this process had another."""
    precision = distributed.broadcast(mixed_precision(precision))
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


def hidden_states(model: nn.Module, batch: dict) -> tuple[torch.Tensor, ...]:
    """Return the embeddings and the output of each block: [reviews, length, width] each."""
    return model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states


def head_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [reviews, length, classes] of the last hidden states, float32."""
    # Among several processes the model is wrapped; the head inside is the same.
    return getattr(model, "module", model).score(hidden).float()


def token_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the logits [reviews, length, classes] of every token: the classification that each prefix would get."""
    return head_logits(model, hidden_states(model, batch)[-1])


def token_weights(lengths: torch.Tensor, width: int, prefix_share: float) -> torch.Tensor:
    """Return what each token of right-padded reviews counts in a loss: [reviews, width], a sum of 1 per review.

    A review's label also holds for its beginnings, the less so the shorter they are: ``prefix_share`` goes to all
    tokens, token t of n in proportion to t / n ("linear gain", Dai and Le, 2015), the rest to the last one.
    """
    position = torch.arange(1, width + 1, device=lengths.device) / lengths[:, None]
    gain = position * (position <= 1)  # 0 for padding
    return prefix_share * gain / gain.sum(1, keepdim=True) + (1 - prefix_share) * (position == 1)


def classification_loss(model: nn.Module, batch: dict, prefix_share: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy of the labels at the last token, with a share of it computed at every token.

    A model that has to predict at every token learns more from each review; see ``token_weights``.
    """
    if not prefix_share:
        return nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    logits = token_logits(model, batch)
    weights = token_weights(batch["lengths"], logits.shape[1], prefix_share)
    labels = batch["labels"][:, None].expand(weights.shape)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view(weights.shape) * weights).sum(1).mean()


def micro_batch(batch: dict, index: int, count: int) -> tuple[dict, float]:
    """Return micro-batch number ``index`` of ``count``, every ``count``-th review, and its share of the batch.

    Where a batch has fewer reviews than micro-batches, one that would be empty holds the first review, with share 0.
    """
    reviews = len(batch["labels"])
    rows = slice(index, None, count) if index < reviews else slice(1)
    micro = {key: value[rows] for key, value in batch.items()}
    for key in micro.keys() & {"input_ids", "teacher_logits"}:
        micro[key] = micro[key][:, : micro["lengths"].max()]
    return micro, len(micro["labels"]) / reviews if index < reviews else 0.0


def accumulate_gradients(model, batch: dict, loss_function: Callable, accelerator: Accelerator, accumulation: int):
    """Add the gradient of the mean loss of a whole batch to the parameters, in micro-batches.

    Micro-batches are weighted by their reviews, so the sum is the same for any number of processes and micro-batches.
    Returns this process's share of the loss, a scalar.
    """
    total, processes = torch.zeros((), device=accelerator.device), accelerator.num_processes
    for i in range(accumulation):
        micro, share = micro_batch(batch, i * processes + accelerator.process_index, processes * accumulation)
        # Gradients travel between processes once per batch, with the last micro-batch.
        with contextlib.nullcontext() if i == accumulation - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = loss_function(model, send_to_device(micro, accelerator.device)) * share
            # Accelerate averages gradients over processes; the shares need their sum.
            accelerator.backward(loss * processes)
        total += loss.detach()
    return total


class Stepper:
    """Makes optimizer steps: computes a batch's gradient, shows it to the observers, clips it and applies it.

    ``bare`` is the model itself, ``model`` what Accelerate wraps around it.
    """

    def __init__(self, model, recipe: Recipe, steps: int, loss_function: Callable, observers: tuple, mask_keeper):
        self.loss_function, self.observers, self.mask_keeper = loss_function, observers, mask_keeper
        self.accelerator, self.accumulation = make_accelerator(recipe.precision), recipe.accumulation
        self.max_grad_norm = recipe.max_grad_norm
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.98), fused=True)
        self.bare = model.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        factor = warmup_and_decay(steps, recipe.warmup_share)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        # What a checkpoint has to store.
        self.stored = (self.bare, self.optimizer, [*observers, *([mask_keeper] if mask_keeper else [])])

    def step(self, batch: dict) -> torch.Tensor:
        """Make one step on a batch; return this process's share of the loss. Raises ``FloatingPointError``."""
        loss = self.backward(batch)
        if not torch.isfinite(loss):
            step = self.schedule.last_epoch + 1
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
        for observer in self.observers:
            observer.after_backward()
        if self.mask_keeper:
            self.mask_keeper.mask_gradients()
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.mask_keeper:
            self.mask_keeper.apply()
        return loss

    def backward(self, batch: dict, retry: bool = True) -> torch.Tensor:
        """Call ``accumulate_gradients``, and where memory is too small, once more with twice the micro-batches.

        Raises ``MemoryError`` where it still is, or where other processes would have to do the same.
        """
        try:
            return accumulate_gradients(self.model, batch, self.loss_function, self.accelerator, self.accumulation)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        self.model.zero_grad()
        message = f"out of memory for {len(batch['labels'])} reviews with accumulation={self.accumulation}"
        if not retry or self.accelerator.num_processes > 1:
            advice = f"set accumulation to {2 * self.accumulation} or more, or lower max_tokens or batch_size"
            raise MemoryError(f"{message}: {advice}")
        self.accumulation *= 2
        print(f"{message}: going on with {self.accumulation}")
        return self.backward(batch, retry=False)

    def run(self, loader, steps: int) -> Iterator[torch.Tensor]:
        """Make so many steps in training mode, and yield each one's share of the loss."""
        self.model.train()
        with faster_in_bfloat16(self.bare, self.accelerator.mixed_precision, training=True):
            for batch in itertools.islice(loader, steps):
                yield self.step(batch)

    def restore(self, checkpoints: Checkpoints) -> TrainingState:
        """Return the state that the newest checkpoint stored, after the model and all else were set to it."""
        state = checkpoints.restore(*self.stored)
        self.schedule.last_epoch = state.step
        return state

    def finish(self) -> None:
        """Hand the model back as it came, without Accelerate's autocast around its forward pass, in eval mode."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()


def finish_epoch(state: TrainingState, model: nn.Module, validate: Callable | None, started: float, sampler) -> None:
    """Append an epoch to the history, and keep its weights where its validation is the best so far."""
    losses = distributed.all_reduce(torch.stack(state.losses)).tolist()
    entry = {"epoch": len(state.history) + 1, "steps": state.step, "loss": sum(losses) / len(losses), "losses": losses}
    entry["tokens"] = sampler.tokens(len(losses))
    entry["step_seconds"] = (time.time() - started) / len(losses)
    if validate:
        entry["accuracy"] = validate(model.eval())
        if state.best is None or entry["accuracy"] > state.best[0]:
            state.best = entry["accuracy"], copy.deepcopy(model.state_dict())
    state.history.append(entry | {"seconds": time.time() - started})
    state.losses, state.seconds = [], 0.0


def train(
    model: PreTrainedModel,
    data: IMDbDataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    loss_function: Callable | None = None,
    observers: tuple = (),
    mask_keeper=None,
    validate: Callable[[nn.Module], float] | None = None,
    checkpoints: Checkpoints | None = None,
    description: str = "training",
) -> list[dict]:
    """Train a model in place, on ``distributed.device()``, and leave the weights of its best validation in it.

    loss_function(model, batch) -> mean over the batch's reviews, by default ``classification_loss``; observers see the
    model after each backward pass, with the gradient of the whole batch before clipping; mask_keeper keeps pruned
    weights at zero; validate(model) -> accuracy, called at the end of each epoch; checkpoints: where the state is
    stored from time to time, and from where an interrupted training continues. Returns one dict per epoch: epoch,
    steps (so far), tokens (of this epoch, without padding), loss (mean), losses (one per step), step_seconds (mean),
    accuracy, seconds (with validation). Several processes share every batch; dropout aside, they train as one would.
    Raises ``FloatingPointError`` when the loss is not finite, and ``MemoryError`` when a batch does not fit.
    """
    torch.manual_seed(seed + distributed.rank())
    # Reviews are padded on the right and attention is causal: no real token sees padding, so no mask is passed.
    loader = make_loader(data, recipe.batch_size, model.config.pad_token_id, seed)
    steps = recipe.steps or recipe.epochs * len(loader)
    loss_function = loss_function or functools.partial(classification_loss, prefix_share=recipe.prefix_share)
    stepper = Stepper(model, recipe, steps, loss_function, observers, mask_keeper)
    state = stepper.restore(checkpoints) if checkpoints else TrainingState()

    def save_if_due() -> None:
        if checkpoints and checkpoints.due():
            checkpoints.save(state, *stepper.stored)

    with progress(steps, description, done=state.step) as bar:
        while state.step < steps:
            end_of_epoch = min(steps, state.step - len(state.losses) + len(loader))
            loader.batch_sampler.set_epoch(len(state.history), skip=len(state.losses))
            started = time.time() - state.seconds
            for loss in stepper.run(loader, end_of_epoch - state.step):
                state.losses.append(loss)
                state.step += 1
                bar.update()
                if state.step < end_of_epoch:
                    state.seconds = time.time() - started
                    save_if_due()
            finish_epoch(state, stepper.bare, validate, started, loader.batch_sampler)
            save_if_due()
    if state.best:
        stepper.bare.load_state_dict(state.best[1])
    stepper.finish()
    return state.history
