"""One training loop over Accelerate; fine-tuning, recovery and distillation are its uses.

Several processes share each batch where torchrun or ``accelerate launch`` starts them (``distributed``).
"""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable
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
from nbhelpers.training.checkpoints import Checkpoints, Standing
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
    """The recipe of a profile's ``"finetune"``, ``"recover"`` (with the first of its rates) or ``"distill"``."""
    names = ("weight_decay", "warmup_share", "max_grad_norm", "precision", "accumulation")
    shared = {name: getattr(profile, name) for name in names}
    labels = {"prefix_share": profile.prefix_share, **shared}
    if purpose == "finetune":
        return Recipe(
            profile.learning_rate, profile.batch_size, profile.epochs, layer_decay=profile.layer_decay, **labels
        )
    if purpose == "recover":
        rate = profile.recovery_learning_rates[0]
        return Recipe(rate, profile.batch_size, steps=profile.recovery_steps, **labels)
    return Recipe(profile.distill_learning_rate, profile.distill_batch_size, profile.distill_epochs, **shared)


def parameter_groups(model: PreTrainedModel, recipe: Recipe) -> list[dict]:
    """AdamW's groups: weight decay for matrices only, and a learning rate that falls from the head to the embeddings.

    A parameter of block l (of L) gets ``learning_rate * layer_decay ** (L - l)``, the embeddings the exponent L + 1
    (Howard and Ruder, 2018).
    """
    depth, groups = len(blocks(model)), {}
    for name, parameter in model.named_parameters():
        match = BLOCK_WEIGHT.search(name.rsplit(".", 1)[0] + ".weight")
        in_embeddings = any(part in name for part in ("wte", "wpe", "embed"))
        below = depth - int(match[1]) if match else depth + 1 if in_embeddings else 0
        decay = recipe.weight_decay if parameter.ndim >= 2 else 0.0
        group = {"params": [], "lr": recipe.learning_rate * recipe.layer_decay**below, "weight_decay": decay}
        groups.setdefault((below, decay), group)["params"].append(parameter)
    return list(groups.values())


def warmup_and_decay(steps: int, warmup_share: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear up to 1 over the warm-up, then linear down to nearly 0."""
    warmup = min(math.ceil(steps * warmup_share), steps - 1)
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)


def make_accelerator(wish: str) -> Accelerator:
    """An accelerator of the wished precision, also where an earlier one of this process had another."""
    precision = distributed.broadcast(mixed_precision(wish))
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


def classification_loss(model: nn.Module, batch: dict, prefix_share: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the labels at the last token; a share of it at every token on the way.

    The verdict on a review holds for its beginnings too, the less so the shorter they are: token t of n counts t / n
    ("linear gain", Dai and Le, 2015). A model that needs an opinion at every token learns more from each review.
    """
    output = model(input_ids=batch["input_ids"], output_hidden_states=prefix_share > 0)
    last = nn.functional.cross_entropy(output.logits, batch["labels"])
    if not prefix_share:
        return last
    # Among several processes the model is wrapped; the head inside is the same.
    logits = getattr(model, "module", model).score(output.hidden_states[-1]).float()
    reviews, length = batch["input_ids"].shape
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].repeat_interleave(length), reduction="none"
    ).view(reviews, length)
    read = torch.arange(1, length + 1, device=losses.device) / batch["lengths"][:, None]
    gain = read * (read <= 1)
    on_the_way = ((losses * gain).sum(1) / gain.sum(1)).mean()
    return (1 - prefix_share) * last + prefix_share * on_the_way


def part_of(batch: dict, part: int, parts: int) -> tuple[dict, float]:
    """Every ``parts``-th review of a batch, from the number ``part`` on, and their share of the batch.

    Where fewer reviews than parts are left, a part without any gets the first review with the share 0.
    """
    reviews = len(batch["labels"])
    rows = slice(part, None, parts) if part < reviews else slice(1)
    mine = {key: value[rows] for key, value in batch.items()}
    mine["input_ids"] = mine["input_ids"][:, : mine["lengths"].max()]
    return mine, len(mine["labels"]) / reviews if part < reviews else 0.0


def backward_in_parts(model, batch: dict, loss_function: Callable, accelerator: Accelerator, accumulation: int):
    """Add the gradient of the mean loss of a batch to the parameters, whoever computes which part of it.

    Each process takes every n-th review, ``accumulation`` parts of them one after the other. Parts weigh by their
    reviews, so that the sum is the gradient of the whole batch, whatever the number of processes and parts. Returns
    this process's share of the loss, a scalar.
    """
    mine, parts = torch.zeros((), device=accelerator.device), accelerator.num_processes * accumulation
    for i in range(accumulation):
        part, share = part_of(batch, i * accelerator.num_processes + accelerator.process_index, parts)
        # Gradients travel between processes once a batch, with the last part.
        last = i == accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = loss_function(model, send_to_device(part, accelerator.device)) * share
            # Between processes gradients are averaged; a sum is what is wanted.
            accelerator.backward(loss * accelerator.num_processes)
        mine += loss.detach()
    return mine


def backward_within_memory(model, batch: dict, loss_function: Callable, accelerator: Accelerator, accumulation: int):
    """``backward_in_parts``, and again in twice as many parts, once, where the memory is too small.

    Returns the share of the loss and the number of parts that fits. Raises ``MemoryError`` where it still does not, or
    where other processes would have to do the same.
    """
    parts = (accumulation, 2 * accumulation) if accelerator.num_processes == 1 else (accumulation,)
    for attempt in parts:
        try:
            return backward_in_parts(model, batch, loss_function, accelerator, attempt), attempt
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        model.zero_grad()
        if attempt != parts[-1]:
            print(f"no memory for {len(batch['labels'])} reviews in {attempt} parts: in {2 * attempt} from here on")
    raise MemoryError(
        f"{len(batch['labels'])} reviews do not fit into memory in {parts[-1]} parts: "
        f"set accumulation to {2 * parts[-1]} or more, or max_tokens or batch_size lower"
    )


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
    """Train a model in place, on ``processes.device()``, and leave the weights of its best validation in it.

    loss_function(model, batch) -> mean over the batch's reviews, ``classification_loss`` if none is given; observers
    see the model after each backward pass, before clipping, with the gradient of the whole batch; mask_keeper keeps
    pruned weights at zero; validate(model) -> accuracy, asked at the end of each epoch. Returns one dict an epoch:
    epoch, steps, loss (mean), losses (each step's), step_seconds (mean), accuracy, seconds (validation included).
    checkpoints: where to keep the state of the training from time to time, and to go on from. Of several processes
    each computes its share of every batch; dropout aside, they train as one would. Raises ``FloatingPointError`` when
    the loss is not finite, and ``MemoryError`` when a batch does not fit.
    """
    torch.manual_seed(seed + distributed.rank())
    loss_function = loss_function or functools.partial(classification_loss, prefix_share=recipe.prefix_share)
    # Reviews are padded on the right and attention is causal: no real token sees padding, so no mask is passed.
    loader = make_loader(data, recipe.batch_size, model.config.pad_token_id, seed)
    sampler, accelerator = loader.batch_sampler, make_accelerator(recipe.precision)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.98), fused=True)
    bare = model.to(accelerator.device)
    model, optimizer = accelerator.prepare(bare, optimizer)
    per_epoch = len(loader)
    steps = recipe.steps or recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay(steps, recipe.warmup_share))

    in_parts, parts = recipe.accumulation, [*observers, *([mask_keeper] if mask_keeper else [])]
    at = checkpoints.restore(bare, optimizer, parts) if checkpoints else Standing()
    schedule.last_epoch = at.step
    with progress(steps, description, done=at.step) as bar:
        for epoch in range(len(at.history), math.ceil(steps / per_epoch)):
            sampler.set_epoch(epoch, skip=len(at.losses))
            model.train()
            started = time.time() - at.seconds
            with faster_in_bfloat16(bare, accelerator.mixed_precision, training=True):
                for batch in loader:
                    loss, in_parts = backward_within_memory(model, batch, loss_function, accelerator, in_parts)
                    if not torch.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss is {loss.item()} at step {at.step + 1}: lower the learning rate"
                        )
                    for observer in observers:
                        observer.after_backward()
                    if mask_keeper:
                        mask_keeper.mask_gradients()
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    if mask_keeper:
                        mask_keeper.apply()
                    at.losses.append(loss)
                    at.step += 1
                    bar.update()
                    if at.step == steps or len(at.losses) == per_epoch:
                        break
                    if checkpoints and checkpoints.due():
                        at.seconds = time.time() - started
                        checkpoints.save(at, bare, optimizer, parts)
            losses = distributed.all_reduce(torch.stack(at.losses)).tolist()
            entry = {"epoch": epoch + 1, "steps": at.step, "loss": sum(losses) / len(losses), "losses": losses}
            entry["step_seconds"] = (time.time() - started) / len(losses)
            if validate:
                entry["accuracy"] = validate(bare.eval())
                if at.best is None or entry["accuracy"] > at.best[0]:
                    at.best = entry["accuracy"], copy.deepcopy(bare.state_dict())
            at.history.append(entry | {"seconds": time.time() - started})
            at.losses, at.seconds = [], 0.0
            if checkpoints and checkpoints.due():
                checkpoints.save(at, bare, optimizer, parts)
    if at.best:
        bare.load_state_dict(at.best[1])
    # Without this the model would keep Accelerate's autocast around its forward pass.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    return at.history
