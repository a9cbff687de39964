"""What was forgotten: tables against hand counts and loops over pairs, language models against their originals."""

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest, mannwhitneyu
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from nbhelpers.models import ModelError
from nbhelpers.sparse import convert_gpt2_to_sparse
from nbhelpers.study import forgetting
from nbhelpers.study.forgetting import (
    as_language_model,
    associations,
    bits_per_byte,
    describe_reviews,
    forgotten_by_group,
    most_forgotten,
    other_domain_texts,
    shorten,
)

GROUP_COLUMNS = ["feature", "group", "reviews", "dense_right", "forgotten"]
GROUP_COLUMNS += ["forgotten_low", "forgotten_high", "learned"]


# --- what is known of a review ---


def test_a_review_is_described_by_length_confidence_words_and_stars():
    texts = [
        "Not good. I don't know why NO one, nobody, ever laughed; it can’t be the cast.",
        "Although slow, it works, but the notable knot was nothing instead.",
        "Fine.",
    ]
    logits = np.array([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]], dtype=np.float32)
    table = describe_reviews(texts, [20, 15, 2], logits, stars=[2, 7, 10])
    assert table.columns.tolist() == ["tokens", "confidence", "negations", "contrasts", "stars"]
    assert table["tokens"].tolist() == [20, 15, 2]
    # By hand: not, don't, no, nobody, can't; nothing, but neither notable nor knot.
    assert table["negations"].tolist() == [5, 1, 0]
    # although, but, instead.
    assert table["contrasts"].tolist() == [0, 3, 0]
    assert table["stars"].tolist() == [2, 7, 10]
    for i in range(3):
        larger = [math.exp(max(row[i])) / sum(math.exp(x) for x in row[i]) for row in logits.tolist()]
        assert table.loc[i, "confidence"] == pytest.approx(sum(larger) / 2)
    assert describe_reviews(texts, [20, 15, 2], logits)["stars"].isna().all()


def test_words_that_negate_or_contrast_are_counted():
    for words, feature in (
        ("never nor Neither none cannot hardly isn't WON'T", "negations"),
        ("However though yet despite except nevertheless while whereas", "contrasts"),
    ):
        texts = [f"It is, {word}, good" for word in words.split()]
        assert describe_reviews(texts, [5] * 8, np.zeros((1, 8, 2)))[feature].tolist() == [1] * 8


# --- how much, by group ---


def features_of(n: int, **columns) -> pd.DataFrame:
    plain = {"tokens": 10, "confidence": 0.9, "negations": 0, "contrasts": 0, "stars": math.nan}
    return pd.DataFrame({name: columns.get(name, [value] * n) for name, value in plain.items()})


def test_shares_by_group_are_those_counted_by_hand():
    # Two seeds, six reviews; stars 1, 1, 1, 9, 9 and one unknown.
    dense = np.array([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1]], dtype=bool)
    compressed = np.array([[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=bool)
    features = features_of(6, stars=[1, 1, 1, 9, 9, math.nan], negations=[0, 1, 2, 3, 6, 40])
    table = forgotten_by_group(features, dense, compressed).set_index(["feature", "group"])
    assert table.reset_index().columns.tolist() == GROUP_COLUMNS
    assert table.index.tolist() == [
        ("all", "all"),
        ("tokens", "10"),
        ("confidence", "90.0–90.0"),
        *[("negations", group) for group in ("0", "1–2", "3", "6–40")],
        ("contrasts", "0"),
        ("stars", "1"),
        ("stars", "9"),
    ]
    # Eight of twelve answers are right; seed 0 loses review 0, seed 1 loses 3, 4 and 5. Two of four are gained.
    everything = table.loc[("all", "all")]
    assert everything[["reviews", "dense_right", "forgotten", "learned"]].tolist() == [6, 8 / 12, 4 / 8, 2 / 4]
    assert table.loc[("stars", "1"), ["reviews", "dense_right", "forgotten"]].tolist() == [3, 3 / 6, 1 / 3]
    assert table.loc[("stars", "9"), ["reviews", "forgotten", "learned"]].tolist() == [2, 2 / 3, 0]
    assert table.loc[("negations", "1–2"), ["reviews", "forgotten", "learned"]].tolist() == [2, 0, 2 / 3]
    assert table.loc[("negations", "6–40"), "reviews"] == 2
    assert (table["forgotten_low"] <= table["forgotten"]).all()
    assert (table["forgotten"] <= table["forgotten_high"]).all()


def test_quartiles_hold_a_quarter_each_and_equal_values_stay_together():
    rng = np.random.default_rng(0)
    right = np.ones((1, 40), dtype=bool)
    features = features_of(40, tokens=rng.permutation(np.arange(1, 41)), confidence=[0.99] * 35 + [0.6] * 5)
    table = forgotten_by_group(features, right, right)
    tokens = table[table["feature"] == "tokens"]
    assert tokens["group"].tolist() == ["1–10", "11–20", "21–30", "31–40"]
    assert tokens["reviews"].tolist() == [10] * 4
    # Every quartile of these confidences is 99 %: what lies at most there is one group.
    assert table.loc[table["feature"] == "confidence", "reviews"].tolist() == [40]
    alike = forgotten_by_group(features_of(8, confidence=np.linspace(0.99999, 1, 8)), right[:, :8], right[:, :8])
    confidence = alike[alike["feature"] == "confidence"]
    assert confidence["group"].tolist() == ["100.0–100.0"] * 4, "groups that print alike stay apart"
    assert confidence["reviews"].tolist() == [2] * 4


def test_a_group_in_which_the_dense_model_is_never_right_is_left_out_and_unknown_stars_are_no_group():
    dense = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=bool)
    table = forgotten_by_group(features_of(4, negations=[0, 0, 7, 8]), dense, ~dense)
    assert table.loc[table["feature"] == "negations", "group"].tolist() == ["0"]
    assert "stars" not in set(table["feature"])
    assert table.drop(columns="learned").notna().all(axis=None)
    # Among the reviews without negations no answer was wrong: there is nothing of which a share could be learned.
    assert math.isnan(table.loc[table["feature"] == "negations", "learned"].item())
    never = forgotten_by_group(features_of(4), np.zeros((2, 4), dtype=bool), dense)
    assert never.empty
    assert never.columns.tolist() == GROUP_COLUMNS


def test_the_interval_is_a_bootstrap_over_reviews_and_not_over_answers():
    rng = np.random.default_rng(1)
    # Three seeds that agree: treated as independent answers the interval would be narrower by a factor of 1.7.
    dense = np.repeat(rng.random((1, 400)) < 0.9, 3, axis=0)
    compressed = np.repeat(rng.random((1, 400)) < 0.8, 3, axis=0)
    dense[0, :40], compressed[1, 40:80] = True, False
    table = forgotten_by_group(features_of(400), dense, compressed)
    shares = []
    for _ in range(4000):
        rows = rng.integers(400, size=400)
        shares.append((dense & ~compressed)[:, rows].sum() / dense[:, rows].sum())
    low, high = np.percentile(shares, [2.5, 97.5])
    # Both are percentiles of some thousand random draws: their own error is about 0.002.
    assert table.loc[0, ["forgotten_low", "forgotten_high"]].tolist() == pytest.approx([low, high], abs=0.006)
    assert high - low > 0.06


def test_a_share_of_nothing_or_everything_has_the_interval_of_as_many_reviews():
    right = np.ones((3, 30), dtype=bool)
    right[:, :5] = False
    for compressed, hits in ((right, 0), (~right, 25)):
        row = forgotten_by_group(features_of(30), right, compressed).loc[0]
        expected = binomtest(hits, 25).proportion_ci(method="wilson")
        assert [row["forgotten_low"], row["forgotten_high"]] == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize(
    ("dense", "compressed"),
    [
        (np.ones((2, 3), dtype=bool), np.ones((1, 3), dtype=bool)),
        (np.ones((2, 4), dtype=bool), np.ones((2, 4), dtype=bool)),
        (np.ones(3, dtype=bool), np.ones(3, dtype=bool)),
        (np.ones((2, 3)), np.ones((2, 3))),
    ],
)
def test_arrays_that_do_not_fit_are_refused(dense, compressed):
    for function in (forgotten_by_group, associations):
        with pytest.raises(ValueError, match=r"must be bool arrays \[seeds, 3\]"):
            function(features_of(3), dense, compressed)


# --- what goes with being forgotten ---


def test_associations_are_shares_of_pairs_among_the_reviews_that_most_dense_seeds_get_right():
    rng = np.random.default_rng(0)
    n = 60
    features = features_of(
        n,
        tokens=rng.integers(10, 30, n),
        confidence=rng.random(n),
        negations=rng.integers(0, 4, n),
        stars=np.where(rng.random(n) < 0.5, math.nan, rng.integers(1, 11, n)),
    )
    dense, compressed = rng.random((3, n)) < 0.8, rng.random((3, n)) < 0.6
    gone, kept = [], []
    for i in range(n):
        if dense[:, i].sum() >= 2:
            lost = sum(dense[s, i] and not compressed[s, i] for s in range(3))
            (gone if lost > dense[:, i].sum() / 2 else kept).append(i)
    assert len(gone) > 10
    assert len(kept) > 10
    table = associations(features, dense, compressed)
    assert table.columns.tolist() == ["feature", "forgotten", "kept", "effect", "p_value", "p_adjusted"]
    assert table["feature"].tolist() == list(features)
    for row in table.itertuples():
        values = features[row.feature]
        a, b = ([values[i] for i in rows if not math.isnan(values[i])] for rows in (gone, kept))
        assert (row.forgotten, row.kept) == (len(a), len(b))
        pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
        assert row.effect == pytest.approx(sum(pairs) / len(pairs))
        assert row.p_value == pytest.approx(mannwhitneyu(a, b, alternative="two-sided").pvalue)
    # Every review has as many words that contrast: no association, and no evidence of any.
    assert table.loc[table["feature"] == "contrasts", ["effect", "p_value"]].to_numpy().tolist() == [[0.5, 1.0]]
    ordered = sorted(table["p_value"])
    stepped = [min(1.0, max((5 - j) * ordered[j] for j in range(i + 1))) for i in range(5)]
    assert sorted(table["p_adjusted"]) == pytest.approx(stepped)


def test_a_feature_that_decides_what_is_forgotten_has_an_effect_of_one_or_zero():
    dense = np.ones((1, 40), dtype=bool)
    compressed = np.arange(40)[None] < 30
    features = features_of(40, tokens=np.arange(40), confidence=np.linspace(1, 0.5, 40))
    table = associations(features, dense, compressed).set_index("feature")
    assert table.loc[["tokens", "confidence"], "effect"].tolist() == [1.0, 0.0]
    assert (table.loc[["tokens", "confidence"], "p_adjusted"] < 0.001).all()
    assert "stars" not in table.index, "unknown throughout"
    nothing = associations(features, dense, dense)
    assert nothing.empty and "p_adjusted" in nothing
    assert forgetting.strongest(nothing).startswith("Too few")
    assert "with tokens: in 100%" in forgetting.strongest(table.reset_index())


def test_half_of_the_seeds_are_not_most_of_them():
    dense = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    compressed = np.array([[0, 0, 1, 0], [0, 1, 1, 0]], dtype=bool)
    table = associations(features_of(4), dense, compressed)
    # Review 0 is lost by both seeds, review 1 by one of two; review 3 was right in one of two only.
    assert set(zip(table["forgotten"], table["kept"], strict=True)) == {(1, 2)}


# --- which ones ---


def logits_of(right: list[list[float]], labels: list[int]) -> np.ndarray:
    """Logits [seeds, n, 2] for given probabilities of the right class."""
    logits = np.zeros((len(right), len(labels), 2), dtype=np.float32)
    for s, row in enumerate(right):
        for i, (p, label) in enumerate(zip(row, labels, strict=True)):
            logits[s, i, label] = math.log(p / (1 - p))
    return logits


def test_the_most_forgotten_reviews_fell_most_of_those_that_most_seeds_forgot():
    labels = [1, 0, 1, 0, 1]
    texts = [f"review {i}" for i in range(5)]
    dense = logits_of([[0.9, 0.8, 0.9, 0.6, 0.4], [0.9, 0.8, 0.9, 0.7, 0.4], [0.9, 0.9, 0.9, 0.8, 0.4]], labels)
    # Review 0 falls most but one seed forgets it; 1 and 3 are forgotten by two and three; 4 was never right.
    fallen = [[0.01, 0.3, 0.8, 0.1, 0.01], [0.51, 0.4, 0.8, 0.2, 0.01], [0.51, 0.9, 0.8, 0.3, 0.01]]
    table = most_forgotten(texts, np.array(labels), dense, logits_of(fallen, labels), 10)
    assert table.columns.tolist() == ["review", "label", "dense", "compressed", "forgotten_by", "text"]
    assert table["review"].tolist() == [3, 1]
    assert table["label"].tolist() == [0, 0]
    assert table["forgotten_by"].tolist() == [3, 2]
    assert table["dense"].tolist() == pytest.approx([0.7, 2.5 / 3])
    assert table["compressed"].tolist() == pytest.approx([0.2, 1.6 / 3])
    assert table["text"].tolist() == ["review 3", "review 1"]
    assert most_forgotten(texts, labels, dense, logits_of(fallen, labels), 1)["review"].tolist() == [3]
    assert most_forgotten(texts, labels, dense, dense, 3).empty


def test_a_long_text_keeps_its_ends_in_whole_words():
    words = [f"word{i}" for i in range(200)]
    short = shorten(" ".join(words))
    head, tail = short.split(" … ")
    assert 250 < len(short) <= 303
    assert head.split() == words[: len(head.split())]
    assert tail.split() == words[-len(tail.split()) :]
    assert abs(len(head) - len(tail)) < 20
    assert shorten("as it is") == "as it is"


# --- the language model ---


def tiny_language_model(vocabulary: int = 40) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, bos_token_id=0, eos_token_id=0)).eval()


def tiny_llama(kind, tied: bool):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(LlamaConfig(**sizes, vocab_size=40, initializer_range=0.2, tie_word_embeddings=tied)).eval()


IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))


def classifier_of(model, kind, folder):
    """A classifier with a language model's body, made as users make it."""
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, num_labels=2, pad_token_id=1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_comes_back_out_of_the_classifier_that_was_made_of_it(tmp_path, family):
    model = tiny_language_model() if family == "gpt2" else tiny_llama(LlamaForCausalLM, tied=True)
    kind = GPT2ForSequenceClassification if family == "gpt2" else LlamaForSequenceClassification
    classifier = classifier_of(model, kind, tmp_path).train()
    found = as_language_model(classifier)
    assert type(found) is type(model)
    assert not found.training
    assert classifier.training
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    with torch.inference_mode():
        assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_the_language_model_has_the_classifiers_weights_and_shares_no_memory_with_it(tmp_path):
    classifier = classifier_of(tiny_language_model(), GPT2ForSequenceClassification, tmp_path)
    with torch.no_grad():
        classifier.transformer.h[1].mlp.c_fc.weight[:, ::2] = 0
    found, before = as_language_model(classifier), copy.deepcopy(classifier.state_dict())
    with torch.inference_mode():
        body = classifier.transformer(IDS).last_hidden_state
        assert torch.allclose(found(IDS).logits, body @ classifier.transformer.wte.weight.T, atol=1e-5)
    found.config.n_layer = 7
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert classifier.config.n_layer == 2


def test_models_without_a_next_token_head_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification has no next-token head.*tie_word_embeddings"):
        as_language_model(tiny_llama(LlamaForSequenceClassification, tied=False))
    classifier = classifier_of(tiny_language_model(), GPT2ForSequenceClassification, tmp_path)
    with pytest.raises(ModelError, match=r"must be a model of transformers \(got SparseGPT2For"):
        as_language_model(convert_gpt2_to_sparse(classifier))


# --- bits per byte ---


def test_encoding_puts_end_of_text_in_front_and_nowhere_else(tokenizer, corpus):
    first, second = forgetting.encode(tokenizer, [corpus[0], "spells <|endoftext|> and <|pad|>"])
    for row in (first, second):
        assert row[0] == 0
        assert not {0, 1} & set(row[1:].tolist())
    assert tokenizer.decode(second[1:]) == "spells <|endoftext|> and <|pad|>"


def test_bits_per_byte_is_the_code_length_over_the_bytes_it_covers(tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(forgetting, "CONTEXT", 12)
    model, texts = tiny_language_model(len(tokenizer)), [*corpus[:3], "ok"]
    bits, size, cut = 0.0, 0, 0
    for text in texts:
        ids = [0, *tokenizer(text)["input_ids"]]
        cut += len(ids) > 12
        ids = ids[:12]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
        for place in range(1, len(ids)):
            row = logits[place - 1]
            probability = np.exp(row[ids[place]] - row.max()) / np.exp(row - row.max()).sum()
            bits -= math.log2(probability)
        # The bytes that the tokens stand for: in byte-level BPE one character of a token is one byte.
        size += sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids[1:]))
    assert 0 < cut < len(texts), "texts beyond the context and within it"
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(bits / size, rel=1e-5)


def test_a_text_is_read_as_far_as_the_model_has_positions(tokenizer, corpus, monkeypatch):
    model, text = tiny_language_model(len(tokenizer)), " ".join(corpus[:5])
    assert len(tokenizer(text)["input_ids"]) > 64
    bits = [bits_per_byte(model, tokenizer, [text])]  # of at most 512 tokens
    for context in (64, 63):
        monkeypatch.setattr(forgetting, "CONTEXT", context)
        bits.append(bits_per_byte(model, tokenizer, [text]))
    assert bits[0] == bits[1] != bits[2]


# --- another domain ---


def test_texts_of_another_domain_are_distinct_prose_of_one_or_two_kilobytes_evenly_spaced():
    passages, few = forgetting.reference_passages(), other_domain_texts(8)
    assert len(passages) >= 60, "few topics of the language reference were understood"
    assert len(set(passages)) == len(passages)
    assert all(1000 <= len(text.encode()) <= 2100 for text in passages)
    places = [passages.index(text) for text in few]
    assert len(few) == 8
    assert {b - a for a, b in itertools.pairwise(places)} <= {len(passages) // 8, len(passages) // 8 + 1}
    for text in passages:
        # No line breaks, no underlined headings, no grammar; whole sentences.
        assert "\n" not in text and "  " not in text
        assert not any(mark in text for mark in ("****", "====", "----", "::="))
        assert text.endswith(".")
    assert other_domain_texts(len(passages)) == passages


def test_texts_of_another_domain_do_not_depend_on_the_order_in_which_python_keeps_its_topics(monkeypatch):
    expected = other_domain_texts(20)
    monkeypatch.setattr(forgetting, "topics", dict(reversed(forgetting.topics.items())))
    assert other_domain_texts(20) == expected
    for count in (0, 100_000):
        with pytest.raises(ValueError, match=rf"count must be from 1 to \d+ \(got {count}\)"):
            other_domain_texts(count)
