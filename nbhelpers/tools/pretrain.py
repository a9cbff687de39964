"""Make ``nbhelpers/pretrained/``: pre-train a small GPT-2 as a language model on unlabelled reviews.

One command re-creates the checkpoint, on a CPU or a GPU; started again, it continues from its last checkpoint:

    python -m nbhelpers.tools.pretrain --texts unsupervised.parquet --work .artifacts/pretrain

Its defaults are the recipe of what ships: minutes on a GPU, a night on two cores. On a CPU, two processes of one
thread each are faster than one process of two threads (1.4 times as many tokens per second on two cores), because in a
model this small threads wait for each other. The processes share every batch:

    ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 -m nbhelpers.tools.pretrain --texts unsupervised.parquet

The recipe: byte-level BPE; reviews packed into full windows (no padding); Muon for the block matrices and AdamW for
the rest; warm-up, a constant learning rate, and a linear decay over the last fifth of the tokens.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from nbhelpers.models import MINI
from nbhelpers.reading import clean_text, read_movie_reviews
from nbhelpers.study.forgetting import bits_per_byte, encode
from nbhelpers.system.files import replace_folder
from nbhelpers.system.machine import processor
from nbhelpers.training import mixed_precision
from nbhelpers.training.checkpoints import load_optimizer_tensors, optimizer_tensors

CONTEXT = 512
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>"]
HELD_OUT = 200  # labelled reviews, evenly spaced, on which bits per byte are reported
CHECK_EVERY = 20  # steps between two checks that the loss is finite
DECAY = 0.2  # share of the tokens over which the learning rate falls to zero


class FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer's logits, computed one chunk of tokens at a time.

    hidden [n, d], weight [V, d], targets [n]. The [n, V] logits never exist at once: both gradients are computed in
    the forward pass while a chunk's logits are in a CPU's cache, which nearly doubles its training speed; on a GPU
    chunks are large.
    """

    CHUNK, CHUNK_ON_GPU = 256, 16384  # tokens

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        low = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunk = FusedCrossEntropy.CHUNK_ON_GPU if hidden.is_cuda else FusedCrossEntropy.CHUNK
        for i in range(0, len(targets), chunk):
            h, t = hidden[i : i + chunk], targets[i : i + chunk]
            logits = (h @ low.T).float()
            logsumexp = logits.logsumexp(-1, keepdim=True)
            loss += (logsumexp - logits.gather(1, t[:, None])).sum()
            slope = logits.sub_(logsumexp).exp_()
            slope[torch.arange(len(t), device=t.device), t] -= 1
            slope = slope.to(hidden.dtype)
            grad_hidden[i : i + chunk] = slope @ low
            grad_weight += slope.T @ h
        ctx.save_for_backward(grad_hidden / len(targets), grad_weight / len(targets))
        return loss / len(targets)

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream.to(grad_hidden.dtype), grad_weight * upstream, None


def language_model_loss(model, ids: torch.Tensor, low_precision: torch.dtype, transformer=None) -> torch.Tensor:
    """Return the mean next-token cross-entropy in nats of windows ids [batch, length].

    transformer: the model's own, compiled.
    """
    transformer = model.transformer if transformer is None else transformer
    hidden = transformer(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1).to(low_precision)
    with torch.autocast(ids.device.type, enabled=False):
        return FusedCrossEntropy.apply(hidden, model.lm_head.weight, ids[:, 1:].flatten())


def read_texts(path: str | Path) -> list[str]:
    """Return cleaned, distinct texts of a parquet file (column ``text``) or of a text file (one review per line).

    Every text that is also among the labelled reviews is left out, so that no validation or test split leaks.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        texts = pd.read_parquet(path, columns=["text"])["text"]
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    labelled = {clean_text(text) for text in read_movie_reviews()["text"]}
    return [text for text in dict.fromkeys(map(clean_text, texts)) if text and text not in labelled]


def held_out_texts() -> list[str]:
    """Return the reviews on which bits per byte are reported: evenly spaced labelled ones, never pre-trained on."""
    reviews = read_movie_reviews()["text"]
    return [clean_text(text) for text in reviews[:: len(reviews) // HELD_OUT][:HELD_OUT]]


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> GPT2TokenizerFast:
    """Train a byte-level BPE, lossless on any bytes, with separate end-of-text and padding tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, special_tokens=SPECIAL_TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[0],
        unk_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[1],
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def windows(encoded: list[np.ndarray], epoch: int, seed: int) -> np.ndarray:
    """Return one epoch of windows [n, CONTEXT]: the texts in a new random order, end to end, cut without padding."""
    order = np.random.default_rng((seed, epoch)).permutation(len(encoded))
    stream = np.concatenate([encoded[i] for i in order])
    return stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


def average_gradients(model, accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes, all of them in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Return the factor of the learning rate: warm-up, plateau, linear decay; progress in [0, 1]."""
    return min(1.0, progress / warmup + 1e-3, (1 - progress) / DECAY)


def make_optimizers(model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the block matrices and AdamW for all other parameters."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def save_checkpoint(folder: Path, model, optimizers, tokens: int, step: int) -> None:
    """Write weights, optimizer states and position beside the last checkpoint, then rename them over it."""
    with replace_folder(folder) as partial:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, partial / "model.safetensors")
        for i, optimizer in enumerate(optimizers):
            save_file(optimizer_tensors(optimizer), partial / f"optimizer{i}.safetensors")
        (partial / "state.json").write_text(json.dumps({"tokens": tokens, "step": step}))


def load_checkpoint(folder: Path, model, optimizers) -> tuple[int, int]:
    """Restore what ``save_checkpoint`` wrote; return tokens seen and steps done."""
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for i, optimizer in enumerate(optimizers):
        load_optimizer_tensors(optimizer, load_file(folder / f"optimizer{i}.safetensors"))
    state = json.loads((folder / "state.json").read_text())
    return state["tokens"], state["step"]


def pretrain(args) -> None:
    """Train the tokenizer and the model, or continue from the checkpoint in ``args.work``; then export."""
    work, budget, per_step = Path(args.work), int(args.tokens), args.batch * CONTEXT
    precision = mixed_precision()
    accelerator = Accelerator(mixed_precision=precision)
    low_precision = torch.bfloat16 if precision == "bf16" else torch.float32
    main, processes = accelerator.is_main_process, accelerator.num_processes
    if args.batch % processes:
        raise SystemExit(f"error: --batch must be a multiple of the {processes} processes (got {args.batch})")
    texts = read_texts(args.texts)
    with accelerator.main_process_first():
        tokenizer = make_tokenizer(texts, args)
    encoded = encode(tokenizer, texts)
    total = sum(map(len, encoded))
    if total < per_step:
        raise SystemExit(f"error: {args.texts} must hold at least one batch of {per_step:,} tokens (got {total:,})")

    torch.manual_seed(args.seed)
    model = make_model(tokenizer, args).to(accelerator.device)
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    peaks, tokens, step = [optimizer.param_groups[0]["lr"] for optimizer in optimizers], 0, 0
    if (work / "latest" / "state.json").exists():
        tokens, step = load_checkpoint(work / "latest", model, optimizers)
        accelerator.print(f"continuing at step {step:,}, {tokens / 1e6:.1f}M tokens", flush=True)
    accelerator.print(
        f"{len(texts):,} texts, {total:,} tokens, {(budget - tokens) / total:.2f} epochs ahead, "
        f"{processes} process(es), precision {precision}",
        flush=True,
    )

    held_out = held_out_texts()
    # Compiling merges many small operations into few kernels: on a GPU that pays off within a minute.
    transformer = torch.compile(model.transformer) if accelerator.device.type == "cuda" else model.transformer
    started, started_at, saved, reported = time.time(), tokens, time.time(), time.time()
    per_epoch = total // CONTEXT // args.batch * args.batch
    epoch, data = -1, None
    model.train()
    while tokens < budget:
        position = step * args.batch
        if position // per_epoch != epoch:
            epoch = position // per_epoch
            data = windows(encoded, epoch, args.seed)
        rows = data[position % per_epoch : position % per_epoch + args.batch][accelerator.process_index :: processes]
        ids = torch.as_tensor(rows, dtype=torch.long, device=accelerator.device)
        with accelerator.autocast():
            loss = language_model_loss(model, ids, low_precision, transformer)
        loss.backward()
        finished = tokens + per_step >= budget
        save_now = main and (time.time() - saved > 60 * args.save_minutes or finished)
        # Reading a loss waits for the GPU, so it is checked now and then, and before weights are kept.
        if (step % CHECK_EVERY == 0 or save_now) and not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}: lower --muon-lr or --adam-lr")
        average_gradients(model, accelerator)
        clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(tokens / budget, args.warmup)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        tokens, step = tokens + per_step, step + 1
        if main and (time.time() - reported > 60 or finished):
            reported = time.time()
            speed = (tokens - started_at) / (reported - started)
            print(
                f"step {step:,}  {tokens / 1e6:.2f}M tokens  loss {loss.item():.3f}  {speed:,.0f} tokens/s  "
                f"{(budget - tokens) / speed / 60:.0f} min left",
                flush=True,
            )
        if save_now:
            saved = time.time()
            save_checkpoint(work / "latest", model, optimizers, tokens, step)
            model.eval()
            print(f"held-out bits per byte {bits_per_byte(model, tokenizer, held_out):.4f}", flush=True)
            model.train()
    if main:
        export(model, tokenizer, Path(args.out), tokens, total, args)


def make_tokenizer(texts: list[str], args) -> GPT2TokenizerFast:
    """Return the tokenizer of an earlier start, or train one."""
    folder = Path(args.work) / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(texts, args.vocabulary, folder)
    return GPT2TokenizerFast.from_pretrained(folder)


def make_model(tokenizer, args) -> GPT2LMHeadModel:
    """Return a model of random weights, float32."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 64,
        # The same function as gelu_new, as one kernel instead of eight.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{name: args.dropout for name in DROPOUTS},
    )
    return GPT2LMHeadModel(config)


def export(model, tokenizer, folder: Path, tokens: int, total: int, args) -> None:
    """Write the half-precision checkpoint and the facts that its model card quotes."""
    model = model.eval().half().float()
    # The dropout of fine-tuning is a setting of its own.
    model.config.update(dict.fromkeys(DROPOUTS, 0.0))
    measured = bits_per_byte(model, tokenizer, held_out_texts())
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "parameters": model.num_parameters(),
        "tokens_seen": tokens,
        "epochs": tokens / total,
        "held_out_reviews": HELD_OUT,
        "held_out_bits_per_byte": measured,
        "recipe": {key: value for key, value in vars(args).items() if key not in ("texts", "work", "out")},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(facts, model.config))
    print(f"wrote {folder}: held-out bits per byte {measured:.4f}")


CARD = """# Mini GPT-2 for film reviews

A GPT-2 of {parameters:.1f}M parameters ({layers} layers, width {width}, {heads} heads, context {context}, byte-level
BPE of {vocabulary:,} tokens) that ships with the project, so that its notebooks run without a model hub.
`AutoModelForCausalLM` and `AutoTokenizer` load it with `from_pretrained(folder)`; weights are float16.

- **Data**: the 50,000 unlabelled reviews of the Large Movie Review Dataset (Maas et al., ACL 2011), less every text
  that is also among its 25,000 labelled training reviews. The official test part was not available; 269 of its texts
  are known to be among the unlabelled ones too.
- **Recipe**: next-token prediction on packed windows of {context} tokens, {tokens:.1f}M tokens ({epochs:.2f} epochs),
  {batch} windows per step, Muon (learning rate {muon_lr:g}) for block matrices and AdamW ({adam_lr:g}) for the rest,
  warm-up over {warmup:.0%}, constant, linear decay over the last {decay:.0%}, dropout {dropout:g}; on one {device}.
  `facts.json` holds every setting; `python -m nbhelpers.tools.pretrain --texts FILE` with them re-creates it.
- **Held-out bits per byte**: {bits:.4f} on {reviews} labelled reviews that it was not trained on
  (`nbhelpers.study.forgetting.bits_per_byte`).
- **Limits**: it knows English film reviews and nothing else, its own texts are poor, and it has the prejudices of its
  reviewers. It is a specimen to dissect.
- **Licence**: MIT, as the project. The reviews belong to their authors; see the data set's page for its terms.
"""


def model_card(facts: dict, config: GPT2Config) -> str:
    """Return the model card, its numbers taken from the facts of the run."""
    return CARD.format(
        parameters=facts["parameters"] / 1e6,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        context=config.n_positions,
        vocabulary=config.vocab_size,
        tokens=facts["tokens_seen"] / 1e6,
        epochs=facts["epochs"],
        decay=DECAY,
        bits=facts["held_out_bits_per_byte"],
        reviews=facts["held_out_reviews"],
        device=facts["device"],
        **{key: facts["recipe"][key] for key in ("batch", "muon_lr", "adam_lr", "warmup", "dropout")},
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are the recipe of what ships."""
    parser = argparse.ArgumentParser(description="Pre-train the mini GPT-2 on unlabelled reviews.")
    parser.add_argument("--texts", required=True, help="parquet file with a column text, or a text file")
    parser.add_argument(
        "--work", default=".artifacts/pretrain", help="folder of checkpoints, from which a second start continues"
    )
    parser.add_argument("--out", default=str(MINI), help="where the model is written")
    parser.add_argument("--tokens", type=float, default=193.1e6, help="tokens to have seen at the end")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 tokens per step")
    parser.add_argument("--muon-lr", type=float, default=2e-2)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the tokens over which the rate rises")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    pretrain(make_parser().parse_args())
