"""Pre-training: the fused loss, the windows, resuming, and the checkpoint that ships.

Two processes are compared with one in ``tests/training/test_distributed.py``.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nbhelpers import models, reading
from nbhelpers.study.forgetting import bits_per_byte
from nbhelpers.tools import pretrain
from nbhelpers.tools.pretrain import FusedCrossEntropy, learning_rate_factor, windows

pytestmark = pytest.mark.usefixtures("alone")


# --- the fused loss ---


# One token, less than a chunk, exactly one, one more than one, several and a rest.
@pytest.mark.parametrize("count", [1, 100, 256, 257, 700])
def test_the_fused_loss_and_both_gradients_equal_cross_entropy(count):
    generator = torch.Generator().manual_seed(count)
    hidden, weight = torch.randn(count, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (count,), generator=generator)
    h, w, expected_h, expected_w = (x.clone().requires_grad_() for x in (hidden, weight, hidden, weight))
    loss = FusedCrossEntropy.apply(h, w, targets)
    expected = torch.nn.functional.cross_entropy(expected_h.double() @ expected_w.double().T, targets)
    # Not 1, so that a backward pass that forgets what comes from above is found out.
    (3 * loss).backward()
    (3 * expected).backward()
    # float32 against float64: logits of up to 15 are off by 6e-8 of themselves, and sums of 700 terms by little more.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, reference in ((h.grad, expected_h.grad), (w.grad, expected_w.grad)):
        assert (found - reference).abs().max() < 1e-4 * reference.abs().max()


def test_the_fused_loss_stays_near_in_bfloat16_with_float32_gradients_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (300,), generator=generator)
    h, w = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    loss = FusedCrossEntropy.apply(h, w, targets)
    loss.backward()
    # The same rounded inputs in float32. bfloat16 keeps 8 bits: each number is off by at most 0.4 %, a sum by less.
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
    # float32, sums of at most 60 terms in another order: as in tests/training/test_distributed.py.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).abs().max() < 2e-4 * expected.abs().max(), name


# --- windows, schedule and optimizers ---


def test_windows_are_the_shuffled_stream_cut_without_padding(monkeypatch):
    monkeypatch.setattr(pretrain, "CONTEXT", 8)
    rng, start, encoded = np.random.default_rng(0), 1, []
    for length in rng.integers(1, 12, 30):
        # Every token occurs once, so that order and coverage can be read off.
        encoded.append(np.array([0, *range(start, start + length)], dtype=np.int32))
        start += length
    total, by_first = sum(map(len, encoded)), {row[1]: row.tolist() for row in encoded}
    found = windows(encoded, epoch=0, seed=0)
    assert found.shape == (total // 8, 8)
    texts = np.split(found.ravel(), np.flatnonzero(found.ravel() == 0)[1:])
    for text in texts[:-1]:
        assert text.tolist() == by_first.pop(text[1]), "whole texts, none twice; only the last may be cut"
    assert np.array_equal(found, windows(encoded, 0, 0))
    assert not np.array_equal(found, windows(encoded, 0, 1))
    assert not np.array_equal(found, windows(encoded, 1, 0))


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    factors = [learning_rate_factor(i / 1000, warmup=0.01) for i in range(1001)]
    assert factors[0] == pytest.approx(1e-3) and factors[5] == pytest.approx(0.5, abs=2e-3)
    assert factors[10:801] == pytest.approx([1.0] * 791, abs=1e-12)
    # A straight line from 1 at 80 % to 0 at the end.
    assert factors[801:] == pytest.approx([(1000 - i) / 200 for i in range(801, 1001)])


def test_muon_takes_the_block_matrices_and_adamw_every_other_parameter_once():
    model = tiny_language_model()
    muon, adamw = pretrain.make_optimizers(model, 0.02, 0.002)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [names[id(p)] for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(names.values())
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {f"transformer.h.0.{p}.weight" for p in parts}


# --- texts and tokenizer ---

LABELLED = pd.DataFrame({"text": [f"Labelled review number {i}.<br />Fine." for i in range(210)]})


@pytest.fixture
def few_labelled(monkeypatch):
    monkeypatch.setattr(pretrain, "read_movie_reviews", lambda: LABELLED)


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_texts_are_cleaned_distinct_and_none_of_them_is_labelled(few_labelled, tmp_path, kind):
    lines = ["One &amp; only.", "Labelled review number 7. Fine.", "", "Two.<br />Three.", "One & only."]
    path = tmp_path / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pd.DataFrame({"text": [line or " " for line in lines]}).to_parquet(path)
    assert pretrain.read_texts(path) == ["One & only.", "Two. Three."]


def test_held_out_texts_are_two_hundred_cleaned_ones_evenly_spaced():
    texts, everything = pretrain.held_out_texts(), reading.read_movie_reviews()["text"]
    assert len(texts) == len(set(texts)) == pretrain.HELD_OUT == 200
    assert texts[3] == reading.clean_text(everything[375])
    assert texts[-1] == reading.clean_text(everything[199 * 125])


def test_the_tokenizer_is_lossless_on_any_text_and_has_separate_special_tokens(tokenizer, corpus):
    assert len(tokenizer) == 320
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    for text in [corpus[0], "\u4f60\u597d\tnever  seen\n\U0001f600 <|pad|>", " leading", "don 't , stop ."]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not {0, 1} & set(ids)


# --- the whole, interrupted and resumed ---


@pytest.fixture
def start(few_labelled, monkeypatch, tmp_path, corpus):
    """A function that pre-trains in a folder: windows of 32 tokens, a few texts, float32, no bits per byte."""
    monkeypatch.setattr(pretrain, "CONTEXT", 32)
    monkeypatch.setattr(pretrain, "mixed_precision", lambda: "no")
    monkeypatch.setattr(pretrain, "bits_per_byte", lambda *_: 1.0)
    (tmp_path / "corpus.txt").write_text("\n".join(corpus[:8]), encoding="utf-8")

    def run(name, tokens=640, batch=2):
        folder = tmp_path / name
        words = f"--texts {tmp_path}/corpus.txt --work {folder}/work --out {folder}/out --tokens {tokens} --width 64"
        words += f" --layers 1 --vocabulary 300 --batch {batch} --dropout 0 --warmup 0.01 --save-minutes 0"
        pretrain.pretrain(pretrain.make_parser().parse_args(words.split()))
        return folder

    return run


def test_an_interrupted_run_goes_on_to_the_weights_of_an_unbroken_one(start, monkeypatch, tmp_path, capsys):
    whole, calls = start("whole"), []

    def failing(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    # Ten steps in all, over more than one epoch of the corpus; after the third checkpoint the machine goes down.
    monkeypatch.setattr(pretrain, "bits_per_byte", failing)
    with pytest.raises(KeyboardInterrupt):
        start("broken")
    state = json.loads((tmp_path / "broken" / "work" / "latest" / "state.json").read_text())
    assert state == {"tokens": 3 * 2 * 32, "step": 3}
    assert not (tmp_path / "broken" / "out").exists(), "nothing is exported before the end"
    broken = start("broken")
    assert len(calls) == 3 + 7 + 1, "seven steps more and the export, none again"
    start("broken")
    assert "continuing at step 10" in capsys.readouterr().out
    assert len(calls) == 3 + 7 + 1 + 1, "a finished run only exports"
    for file in ("work/latest/model.safetensors", "out/model.safetensors"):
        first, second = load_file(whole / file), load_file(broken / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_training_learns_and_exports_half_precision_with_a_model_card(start, corpus):
    folder = start("run", tokens=64 * 40)
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.dtype == torch.float16
    trained = bits_per_byte(model.float().eval(), tokenizer, corpus[:8])
    torch.manual_seed(0)
    random = bits_per_byte(GPT2LMHeadModel(model.config).float().eval(), tokenizer, corpus[:8])
    # Forty steps on eight sentences of one pattern: far below random weights, which know nothing.
    assert trained < 0.6 * random
    assert not list((folder / "work").glob("*.partial"))
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    facts = json.loads((folder / "out" / "facts.json").read_text())
    assert facts["tokens_seen"] == 64 * 40 and facts["recipe"]["muon_lr"] == 0.02
    assert f"{facts['held_out_bits_per_byte']:.4f} on 200 labelled reviews" in card
    assert f"({facts['epochs']:.2f} epochs)" in card and "{" not in card, "every number is filled in"


def test_a_batch_that_the_processes_cannot_share_and_too_few_texts_are_refused(start, monkeypatch):
    with pytest.raises(SystemExit, match="must hold at least one batch of 32,000 tokens"):
        start("run", batch=1000)
    monkeypatch.setattr(pretrain.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(SystemExit, match=r"--batch must be a multiple of the 2 processes \(got 3\)"):
        start("run", batch=3)


# --- what ships ---


def test_the_shipped_checkpoint_is_what_its_facts_say_and_needs_the_bits_per_byte_that_they_claim():
    tokenizer = AutoTokenizer.from_pretrained(models.MINI)
    model = AutoModelForCausalLM.from_pretrained(models.MINI, dtype=torch.float32).eval()
    facts = json.loads((models.MINI / "facts.json").read_text())
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(tokenizer) == model.config.vocab_size == facts["recipe"]["vocabulary"]
    assert (model.config.n_layer, model.config.n_embd) == (facts["recipe"]["layers"], facts["recipe"]["width"])
    assert model.config.n_positions == pretrain.CONTEXT
    assert [tokenizer.eos_token, tokenizer.pad_token] == pretrain.SPECIAL_TOKENS
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert facts["held_out_reviews"] == pretrain.HELD_OUT
    # The card quotes the weights after rounding to float16; what is left is the order of float32 sums.
    found = bits_per_byte(model, tokenizer, pretrain.held_out_texts())
    assert found == pytest.approx(facts["held_out_bits_per_byte"], abs=0.002)
