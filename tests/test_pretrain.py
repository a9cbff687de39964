"""Pre-training: the fused loss, the windows, resuming, and the checkpoint that ships."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nbhelpers import data, models
from nbhelpers.data import read_movie_reviews
from nbhelpers.study.forgetting import bits_per_byte
from nbhelpers.tools import pretrain
from nbhelpers.tools.pretrain import FusedCrossEntropy, learning_rate_factor, windows

pytestmark = pytest.mark.usefixtures("alone")


# --- the fused loss ---


# One token, less than a chunk, exactly one, one more than one, several and a rest.
@pytest.mark.parametrize("count", [1, 100, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_loss_and_both_gradients_equal_cross_entropy(count, dtype):
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 16, generator=generator, dtype=dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    targets = torch.randint(50, (count,), generator=generator)
    found, expected = [], []
    for results, function in ((found, FusedCrossEntropy.apply), (expected, None)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if function is None:
            loss = torch.nn.functional.cross_entropy(h.double() @ w.double().T, targets)
        else:
            loss = function(h, w, targets)
        # Not 1, so that a backward pass that forgets what comes from above is found out.
        (3 * loss).backward()
        results += [loss.detach().double(), h.grad.double(), w.grad.double()]
    assert len(found) == 3
    # Logits are float32 in either case: an error of 6e-8 relative to logits of up to 15.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=2e-6 * float(reference.abs().max()))


def test_the_fused_loss_stays_near_in_bfloat16_with_float32_gradients_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (300,), generator=generator)
    h, w = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    loss = FusedCrossEntropy.apply(h, w, targets)
    loss.backward()
    # The same rounded inputs, then float32; bfloat16 keeps 8 bits: 0.4 % a number.
    plain_h, plain_w = h.detach().float().requires_grad_(), w.detach().bfloat16().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain_h @ plain_w.T, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert w.grad.dtype == torch.float32
    assert (w.grad - plain_w.grad).norm() < 0.02 * plain_w.grad.norm()
    assert (h.grad.float() - plain_h.grad).norm() < 0.02 * plain_h.grad.norm()


def tiny_language_model(vocabulary: int = 40) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **rates, **ends)).eval()


def test_the_language_model_loss_is_that_of_the_library_and_so_are_the_tied_embeddings_gradients():
    model, ids = tiny_language_model(), torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for loss in (pretrain.language_model_loss(model, ids, torch.float32), model(ids, labels=ids).loss):
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    # float32 throughout, sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


# --- windows and schedule ---


def test_windows_are_the_shuffled_stream_cut_without_padding(monkeypatch):
    monkeypatch.setattr(pretrain, "CONTEXT", 8)
    rng, start, encoded = np.random.default_rng(0), 1, []
    for length in rng.integers(1, 12, 30):
        # Every token occurs once, so that order and coverage can be read off.
        encoded.append(np.array([0, *range(start, start + length)], dtype=np.int32))
        start += length
    total = sum(map(len, encoded))
    found = windows(encoded, epoch=0, seed=0)
    assert found.shape == (total // 8, 8)
    stream = found.ravel()
    starts = np.flatnonzero(stream == 0)
    by_first = {row[1]: row for row in encoded}
    seen = []
    for begin, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        whole = by_first[stream[begin + 1]] if begin + 1 < len(stream) else [0]
        part = stream[begin:end]
        assert part.tolist() == list(whole[: len(part)])
        assert len(part) == len(whole) or end == len(stream), "only the last text may be cut"
        seen.append(whole[-1])
    assert len(seen) == len(set(seen))
    assert total - len(stream) < 8
    again, other, later = windows(encoded, 0, 0), windows(encoded, 0, 1), windows(encoded, 1, 0)
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    assert not np.array_equal(found, later)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    factors = [learning_rate_factor(i / 1000, warmup=0.01) for i in range(1001)]
    assert factors[0] == pytest.approx(1e-3)
    assert np.all(np.diff(factors[:11]) > 0)
    assert factors[10:801] == pytest.approx([1.0] * 791, abs=1e-12)
    # A straight line from 1 at 80 % to 0 at the end.
    assert factors[801:] == pytest.approx([(1000 - i) / 200 for i in range(801, 1001)])
    assert factors[5] == pytest.approx(0.5, abs=2e-3)


def test_muon_takes_the_block_matrices_and_adamw_every_other_parameter_once():
    model = tiny_language_model()
    muon, adamw = pretrain.make_optimizers(model, "muon", 0.02, 0.002)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [names[id(p)] for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(names.values())
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert matrices == {
        f"transformer.h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    (alone,) = pretrain.make_optimizers(model, "adamw", 0.02, 0.002)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


# --- texts and tokenizer ---

LABELLED = pd.DataFrame(
    {"text": [f"Labelled review number {i}.<br />Fine." for i in range(210)], "label": [0, 1] * 105}
)


@pytest.fixture
def few_labelled(monkeypatch):
    monkeypatch.setattr(pretrain, "read_movie_reviews", lambda: LABELLED)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_texts_are_cleaned_distinct_and_none_of_them_is_labelled(few_labelled, tmp_path, kind):
    lines = [
        "One &amp; only.",
        "Labelled review number 7. Fine.",
        "",
        "Two.<br />Three.",
        "One & only.",
        LABELLED["text"][9],
    ]
    path = tmp_path / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        table = pd.DataFrame({"text": [line or " " for line in lines]})
        table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    assert pretrain.read_texts(path) == ["One & only.", "Two. Three."]


def test_held_out_texts_are_two_hundred_cleaned_ones_evenly_spaced():
    texts, everything = pretrain.held_out_texts(), read_movie_reviews()["text"]
    assert len(texts) == len(set(texts)) == pretrain.HELD_OUT == 200
    assert texts[3] == data.clean_text(everything[375])
    assert texts[-1] == data.clean_text(everything[199 * 125])


def test_the_tokenizer_is_lossless_on_any_text_and_has_separate_special_tokens(tokenizer, corpus):
    assert len(tokenizer) == 320
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    for text in [corpus[0], "\u4f60\u597d\tnever  seen\n\U0001f600 <|pad|>", " leading", "don 't , stop ."]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not {0, 1} & set(ids)


# --- the whole, interrupted and resumed ---


def arguments(folder, tokens: int = 640, **changes) -> argparse.Namespace:
    values = {
        "texts": folder.parent / "corpus.txt",
        "work": folder / "work",
        "out": folder / "out",
        "start_from": None,
        "tokens": tokens,
        "width": 64,
        "layers": 1,
        "vocabulary": 300,
        "batch": 2,
        "optimizer": "muon",
        "muon_lr": 0.02,
        "adam_lr": 0.002,
        "dropout": 0.0,
        "warmup": 0.01,
        "save_minutes": 0.0,
        "seed": 0,
    }
    return argparse.Namespace(**values | changes)


@pytest.fixture
def small(few_labelled, monkeypatch, tmp_path, corpus):
    """Windows of 32 tokens, a corpus of a few of them, float32, and a measure that costs nothing."""
    monkeypatch.setattr(pretrain, "CONTEXT", 32)
    monkeypatch.setattr(pretrain, "mixed_precision", lambda: "no")
    monkeypatch.setattr(pretrain, "bits_per_byte", lambda *_: 1.0)
    (tmp_path / "corpus.txt").write_text("\n".join(corpus[:8]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_goes_on_to_the_weights_of_an_unbroken_one(small, monkeypatch, optimizer):
    whole, broken = arguments(small / "whole", optimizer=optimizer), arguments(small / "broken", optimizer=optimizer)
    pretrain.pretrain(whole)
    # Ten steps in all, over more than one epoch of the corpus; after the third checkpoint the machine goes down.
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(pretrain, "bits_per_byte", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(broken)
    state = json.loads((broken.work / "latest" / "state.json").read_text())
    assert state == {"tokens": 3 * 2 * 32, "step": 3}
    assert not broken.out.exists(), "nothing is exported before the end"
    pretrain.pretrain(broken)
    assert len(calls) == 3 + 7 + 1, "seven steps more and the export, none again"

    first, second = (load_file(a.work / "latest" / "model.safetensors") for a in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    exported = [AutoModelForCausalLM.from_pretrained(a.out).state_dict() for a in (whole, broken)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())
    facts = json.loads((broken.out / "facts.json").read_text())
    assert facts["tokens_seen"] == 640
    assert 1 < facts["epochs"] < 10
    assert facts["recipe"]["optimizer"] == optimizer


def test_training_learns_keeps_the_plateau_and_exports_half_precision(small, corpus):
    args = arguments(small / "run", tokens=64 * 40)
    pretrain.pretrain(args)
    state = json.loads((args.work / "plateau" / "state.json").read_text())
    assert state == {"tokens": 64 * 32, "step": 32}, "80 % of the tokens"
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out)
    assert model.dtype == torch.float16
    trained = bits_per_byte(model.float().eval(), tokenizer, corpus[:8])
    torch.manual_seed(0)
    random = bits_per_byte(GPT2LMHeadModel(model.config).float().eval(), tokenizer, corpus[:8])
    # Forty steps on eight sentences of one pattern: far below random weights, which know nothing.
    assert trained < 0.6 * random
    assert not list(args.work.glob("*.partial"))
    card = (args.out / "README.md").read_text(encoding="utf-8")
    facts = json.loads((args.out / "facts.json").read_text())
    assert f"{facts['held_out_bits_per_byte']:.4f} on 200 labelled reviews" in card
    assert f"({facts['epochs']:.2f} epochs)" in card
    assert "{" not in card, "every number is filled in"


def test_a_finished_run_started_again_only_exports(small, capsys):
    args = arguments(small / "run", tokens=128)
    pretrain.pretrain(args)
    before = load_file(args.work / "latest" / "model.safetensors")
    pretrain.pretrain(args)
    after = load_file(args.work / "latest" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "going on at step 2" in capsys.readouterr().out


def test_published_weights_are_prolonged_with_their_tokenizer_and_their_place_in_the_texts(small):
    first = arguments(small / "first")
    pretrain.pretrain(first)
    second = arguments(small / "second", tokens=1280, start_from=str(first.out), width=128, muon_lr=1e-9, adam_lr=1e-9)
    pretrain.pretrain(second)
    facts = [json.loads((args.out / "facts.json").read_text()) for args in (first, second)]
    assert (facts[1]["tokens_seen"], facts[1]["started_from"]) == (1280, facts[0])
    assert facts[1]["recipe"]["width"] == 64, "the shape is that of the weights"
    assert not (second.work / "tokenizer").exists()
    assert json.loads((second.work / "plateau" / "state.json").read_text()) == {"tokens": 640 + 512, "step": 18}
    # At a learning rate of nearly nothing the weights stay those that were published.
    weights = [AutoModelForCausalLM.from_pretrained(args.out).state_dict() for args in (first, second)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-6)


def test_a_folder_without_facts_cannot_be_prolonged(small):
    first = arguments(small / "first", tokens=64)
    pretrain.pretrain(first)
    (first.out / "facts.json").unlink()
    with pytest.raises(SystemExit, match=r"facts\.json is missing: --start-from takes"):
        pretrain.pretrain(arguments(small / "second", start_from=str(first.out)))


# What the fixture ``small`` changes, for processes of their own.
PROCESS = """
import argparse, json, sys
from nbhelpers import pretrain
pretrain.CONTEXT, pretrain.mixed_precision, pretrain.bits_per_byte = 32, lambda: "no", lambda *_: 1.0
pretrain.pretrain(argparse.Namespace(**json.loads(sys.argv[1])))
"""


def test_two_processes_share_the_batches_and_reach_the_weights_of_one(small):
    alone, shared = arguments(small / "alone"), arguments(small / "shared")
    pretrain.pretrain(alone)
    (small / "process.py").write_text(PROCESS, encoding="utf-8")
    values = json.dumps(vars(shared), default=str)
    printed = in_two_processes([str(small / "process.py"), values], ACCELERATE_USE_CPU="1")
    assert "2 process(es)" in printed
    weights = [load_file(args.work / "latest" / "model.safetensors") for args in (alone, shared)]
    start = GPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(alone.out).config).state_dict()
    for name, value in weights[0].items():
        moved = (value - start[name]).abs().max()
        # The mean of two halves is summed in another order; Muon and Adam amplify that over ten steps.
        assert (weights[1][name] - value).abs().max() < 0.02 * moved, name


def test_a_batch_that_the_processes_cannot_share_is_refused(small, monkeypatch):
    monkeypatch.setattr(pretrain.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(SystemExit, match="--batch is 3: it takes a multiple of the 2 processes"):
        pretrain.pretrain(arguments(small / "run", batch=3))


# --- what ships ---


@pytest.fixture(scope="module")
def shipped():
    tokenizer = AutoTokenizer.from_pretrained(models.MINI)
    model = AutoModelForCausalLM.from_pretrained(models.MINI, dtype=torch.float32).eval()
    return model, tokenizer, json.loads((models.MINI / "facts.json").read_text())


def test_the_shipped_checkpoint_loads_and_is_what_its_facts_say(shipped):
    model, tokenizer, facts = shipped
    assert isinstance(model, GPT2LMHeadModel)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(tokenizer) == model.config.vocab_size == facts["recipe"]["vocabulary"]
    assert (model.config.n_layer, model.config.n_embd) == (facts["recipe"]["layers"], facts["recipe"]["width"])
    assert model.config.n_positions == pretrain.CONTEXT
    assert [tokenizer.eos_token, tokenizer.pad_token] == pretrain.SPECIAL_TOKENS
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert facts["tokens_seen"] >= facts["recipe"]["tokens"]


def test_the_shipped_checkpoint_needs_the_bits_per_byte_that_its_facts_claim(shipped):
    model, tokenizer, facts = shipped
    assert facts["held_out_reviews"] == pretrain.HELD_OUT
    found = bits_per_byte(model, tokenizer, pretrain.held_out_texts())
    # Machines sum in other orders, which shifts a mean over some 200,000 bytes by far less than this.
    assert found == pytest.approx(facts["held_out_bits_per_byte"], abs=0.002)
    # Raw letters need 8, compressors such as gzip between 2 and 3: a trained model must do better than a coding table.
    assert found < 2.5
