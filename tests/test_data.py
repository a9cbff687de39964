"""Splitting, tokenising and batching of reviews."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import numbered_reviews, profile_of, write_csv
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from nbhelpers import data
from nbhelpers.data import BucketBatches, IMDbDataset, load_reviews, tokenize, truncate
from nbhelpers.models import load_tokenizer
from nbhelpers.profiles import get_profile
from nbhelpers.reading import clean_text

ROWS = [(f"{word} review number {i}", word) for i in range(60) for word in ("neg", "pos")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(get_profile("smoke"))


def numbers(split: Dataset, label: int) -> list[int]:
    return [int(text.split()[-1]) for text, y in zip(split["text"], split["label"], strict=True) if y == label]


# --- splits ---


def test_splits_are_contiguous_blocks_of_each_class_with_a_guard_gap_between_them(tmp_path):
    path = write_csv(tmp_path, numbered_reviews(600))
    splits = load_reviews(profile_of(path, validation_size=100, test_size=200))
    for label in (0, 1):
        train, validation, test = (numbers(splits[name], label) for name in ("train", "validation", "test"))
        # By hand: 600 a class. Test takes the last 100, a guard of 600 // 50 = 12 falls away, 488 are left; validation
        # takes the last 50 of those, a guard of 488 // 50 = 9 falls away, 429 are left.
        assert test == list(range(500, 600))
        assert validation == list(range(438, 488))
        assert train == list(range(429))


def test_unequal_classes_keep_their_share_in_every_block(tmp_path):
    table = pd.concat([numbered_reviews(100), numbered_reviews(400).query("label == 'pos'")]).drop_duplicates()
    path = write_csv(tmp_path, table)
    splits = load_reviews(profile_of(path, validation_size=50, test_size=100))
    assert np.mean(splits["test"]["label"]) == pytest.approx(0.8, abs=0.01)
    assert np.mean(splits["validation"]["label"]) == pytest.approx(0.8, abs=0.03)


def test_no_text_is_in_two_splits_or_twice_in_one(tmp_path):
    table = numbered_reviews(300)
    first, last = table["text"][table["label"] == "pos"].iloc[[0, -1]]
    planted = table.copy()
    positive = planted.index[planted["label"] == "pos"]
    # One text early (train), in the middle (validation) and last (test), told apart only by markup and letter case.
    planted.loc[positive[5], "text"] = last.upper() + "<br />"
    planted.loc[positive[255], "text"] = last.replace(" ", "  ")
    planted.loc[positive[6], "text"] = first
    # And one that contradicts itself: the same words, the other label.
    planted.loc[planted.index[planted["label"] == "neg"][7], "text"] = last
    path = write_csv(tmp_path, planted)
    splits = load_reviews(profile_of(path, validation_size=60, test_size=60))
    assert 255 not in numbers(splits["validation"], 1)
    keys = [text.casefold() for name in splits for text in splits[name]["text"]]
    assert len(keys) == len(set(keys))
    assert keys.count(last.casefold()) == 1
    assert last in splits["test"]["text"], "the test keeps its own copy"


def test_the_seed_draws_the_training_reviews_and_never_moves_validation_or_test(tmp_path):
    path = write_csv(tmp_path, numbered_reviews(200))
    profile = profile_of(path, train_size=60, validation_size=40, test_size=40)
    one, again, other = load_reviews(profile, 1), load_reviews(profile, 1), load_reviews(profile, 2)
    assert one["train"].num_rows == 60
    assert sum(one["train"]["label"]) == 30
    assert one["train"]["text"][:] == again["train"]["text"][:]
    assert set(one["train"]["text"]) != set(other["train"]["text"])
    for name in ("validation", "test"):
        assert one[name]["text"][:] == other[name]["text"][:]


def test_splits_have_the_columns_of_the_contract(tmp_path):
    splits = load_reviews(profile_of(write_csv(tmp_path, numbered_reviews(100))))
    assert list(splits) == ["train", "validation", "test"]
    for part in splits.values():
        assert part.column_names == ["text", "label"]
        assert part.features["label"].dtype == "int64"
        assert set(part["label"]) == {0, 1}


def test_a_test_part_that_leaks_keeps_its_rows_and_train_and_validation_lose_them(tmp_path):
    leaking = [ROWS[i] for i in (0, 1, 50, 51, 118, 119)]  # from the train and from the validation reviews
    fresh = [(f"{word} and new {i}", word) for i in range(12) for word in ("neg", "pos")]
    test = [*fresh, *fresh[:8], *((text.upper(), label) for text, label in leaking)]
    write_csv(tmp_path, pd.DataFrame(ROWS, columns=["text", "label"]), "train.csv")
    write_csv(tmp_path, pd.DataFrame(test, columns=["text", "label"]), "test.csv")
    splits = load_reviews(profile_of(tmp_path, test_size=999))
    found = {name: [text.casefold() for text in part["text"]] for name, part in splits.items()}
    assert sorted(found["test"]) == sorted(text for text, _ in [*fresh, *leaking]), "each once"
    assert not {text for text, _ in leaking} & {*found["train"], *found["validation"]}
    assert len(found["validation"]) == 16 - 2 and len(found["train"]) >= 90


# --- reviews without labels ---


def test_transfer_reviews_are_what_training_leaves_out_then_what_the_source_has_without_labels(tmp_path):
    for word in ("neg", "pos"):
        (tmp_path / "train" / word).mkdir(parents=True)
        for i in range(60):
            (tmp_path / "train" / word / f"{i}_1.txt").write_text(f"{word} review number {i}")
    (tmp_path / "train" / "unsup").mkdir()
    for i, text in enumerate(
        ["unseen <br />A", "Unseen a", "unseen B", "NEG review number 0", "pos review number 59", " "]
    ):
        (tmp_path / "train" / "unsup" / f"{i}_0.txt").write_text(text)
    profile = profile_of(tmp_path, train_size=20, validation_size=16, test_size=24, transfer_size=1000)
    splits, every = load_reviews(profile, seed=1), load_reviews(profile_of(tmp_path, test_size=24))
    left = set(every["train"]["text"]) - set(splits["train"]["text"])
    found = data.load_transfer(profile, seed=1)
    texts = found["text"][:]
    assert set(texts[: len(left)]) == left and len(left) > 40
    rest = {text.casefold() for text in texts[len(left) :]}
    # In another letter case it is the same text, and what stands in the test part is left out.
    assert rest == {"unseen a", "unseen b"} and len(texts) == len(left) + 2
    assert set(found["label"]) == {data.UNLABELLED}
    assert data.load_transfer(profile, seed=1)["text"][:] == texts
    assert data.load_transfer(profile, seed=2)["text"][:] != texts
    few = profile_of(tmp_path, train_size=20, validation_size=16, test_size=24, transfer_size=7)
    assert data.load_transfer(few, seed=1)["text"][:] == texts[:7]


def test_where_all_reviews_are_trained_on_none_are_left_for_the_teacher():
    assert len(data.load_transfer(get_profile("smoke", train_size=0, transfer_size=10))) == 0


# --- tokenising ---


@pytest.mark.parametrize("head_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 7])
def test_truncate_keeps_head_and_tail_and_exactly_max_tokens(max_tokens, head_share):
    ids = list(range(100))
    kept = truncate(ids, max_tokens, head_share)
    head = round(max_tokens * head_share)
    assert len(kept) == max_tokens
    assert kept[:head] == ids[:head]
    assert kept[head:] == ids[100 - (max_tokens - head) :]


def test_truncate_leaves_short_reviews_alone():
    assert truncate([3, 1, 2], 3, 0.5) == [3, 1, 2]


@pytest.mark.parametrize("text", ["<|pad|>", "good <|pad|> film<|endoftext|>", "<|endoftext|><|endoftext|>"])
def test_a_text_that_spells_a_special_token_never_becomes_one(tokenizer, text):
    assert set(tokenizer(text)["input_ids"]) & set(tokenizer.all_special_ids), "a plain encoding has special tokens"
    (ids,) = tokenize([text], tokenizer, get_profile("smoke"))
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text, "byte-level BPE loses nothing"


def test_an_empty_text_still_gets_a_token(tokenizer):
    assert [len(ids) for ids in tokenize(["", clean_text(" <br /> ")], tokenizer, get_profile("smoke"))] == [1, 1]
    assert tokenize([], tokenizer, get_profile("smoke")) == []


@pytest.mark.parametrize(
    "text", ["so good a film, " * 12_000, "x" * 150_000, "caf\u00e9 " + "\U0001f600" * 90_000 + " end"]
)
def test_the_tokens_of_a_very_long_review_are_those_of_its_whole_text(tokenizer, text):
    profile = get_profile("smoke", max_tokens=30)
    whole = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    assert len(text) > 2 * 1000 * 30 and len(whole) > 3000
    assert tokenize([text.strip()], tokenizer, profile) == [truncate(whole, 30, profile.head_share)]


def test_cleaned_texts_are_truncated_to_head_and_tail(tokenizer):
    profile = get_profile("smoke", max_tokens=20, head_share=0.5)
    long = "Not good.<br /><br />" * 20 + "The end was great."
    ids, short = tokenize([clean_text(long), "fine"], tokenizer, profile)
    assert len(ids) == 20
    assert "<br" not in tokenizer.decode(ids)
    assert tokenizer.decode(ids).startswith("Not good. Not good.")
    assert tokenizer.decode(ids).endswith("The end was great.")
    assert tokenizer.decode(short) == "fine"


def test_a_dataset_item_holds_ids_and_label_and_the_teachers_row_once_there_is_one(tokenizer):
    profile = get_profile("smoke")
    reviews = Dataset.from_dict({"text": ["good", "bad film"], "label": [1, 0]})
    dataset = IMDbDataset(reviews, tokenizer, profile)
    assert len(dataset) == 2
    assert dataset[1] == {"input_ids": tokenize(["bad film"], tokenizer, profile)[0], "label": 0}
    dataset.teacher_logits = [torch.ones(1, 2), torch.full((2, 2), 3.0)]
    assert dataset[1]["teacher_logits"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_load_validation_dataset_is_the_tokenised_validation_split(tokenizer, tmp_path):
    profile = profile_of(write_csv(tmp_path, numbered_reviews(60)))
    dataset = data.load_validation_dataset(profile, tokenizer)
    split = load_reviews(profile)["validation"]
    assert dataset.labels.tolist() == list(split["label"])
    assert dataset.input_ids == tokenize(list(split["text"]), tokenizer, profile)
    assert max(map(len, dataset.input_ids)) <= profile.max_tokens


# --- batches ---


@pytest.mark.parametrize(("count", "size"), [(1, 4), (97, 4)])
def test_bucket_batches_cover_every_review_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 50, count).tolist()
    batches = BucketBatches(lengths, size, seed=3)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(i for batch in found for i in batch) == list(range(count))
    assert max(map(len, found)) <= size


def test_bucket_batches_come_in_a_new_order_each_epoch_that_the_seed_determines():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    batches, same, other = (BucketBatches(lengths, 8, seed) for seed in (0, 0, 1))
    first = list(batches)
    assert list(same) == first != list(other)
    batches.set_epoch(1)
    assert sorted(map(sorted, batches)) != sorted(map(sorted, first)), "other batches, not only another order of them"
    same.set_epoch(1)
    assert list(batches) == list(same)


def test_bucket_batches_need_far_less_padding_than_random_ones():
    lengths = np.random.default_rng(0).integers(1, 300, 800)
    bucketed = sum(len(batch) * lengths[batch].max() for batch in BucketBatches(lengths.tolist(), 8, 0))
    random = sum(8 * part.max() for part in np.random.default_rng(1).permutation(lengths).reshape(-1, 8))
    assert bucketed < 1.1 * lengths.sum() < random


def test_a_loader_pads_on_the_right_and_keeps_rows_together(tokenizer):
    rows = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
    dataset = IMDbDataset.__new__(IMDbDataset)
    dataset.input_ids, dataset.labels = rows, np.array([0, 1, 0, 1, 1])
    dataset.teacher_logits = [torch.full((len(row), 2), i) for i, row in enumerate(rows)]
    seen = []
    for batch in data.make_loader(dataset, 2, pad_token_id=1, seed=0):
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        for ids, label, teacher in zip(batch["input_ids"], batch["labels"], batch["teacher_logits"], strict=True):
            index = int(teacher[0, 0])
            padding = len(ids) - len(rows[index])
            assert teacher.tolist() == [[index] * 2] * len(rows[index]) + [[0, 0]] * padding
            assert ids.tolist() == rows[index] + [1] * (len(ids) - len(rows[index]))
            assert label == dataset.labels[index]
            seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_evaluation_batches_run_from_short_to_long_and_name_their_rows():
    rows = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
    batches = [(indices.tolist(), ids.tolist()) for indices, ids in data.evaluation_batches(rows, 2, 0)]
    assert batches == [
        ([1, 2], [[8, 0], [9, 10]]),
        ([4, 0], [[15, 16, 0], [5, 6, 7]]),
        ([3], [[11, 12, 13, 14]]),
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_does_not_change_logits(family):
    torch.manual_seed(0)
    shared = {"vocab_size": 30, "pad_token_id": 1, "num_labels": 2, "initializer_range": 0.2}
    if family == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **shared))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2, **shared))
    model.eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 30, length).tolist() for length in (3, 20, 9, 1)]
    with torch.inference_mode():
        together = model(input_ids=data.pad(rows, 1)).logits
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    # float32 sums of at most 24 terms of order one, taken in another order: a few 1e-7.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 1e-3, "logits that are all alike would show nothing"
