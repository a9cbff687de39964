"""Reading and cleaning of reviews from files, folders and the Hub, and errors in one line."""

import datasets
import pandas as pd
import pytest
from conftest import numbered_reviews, profile_of, write_csv
from datasets import Dataset, DatasetDict

from nbhelpers.data import check_data, load_reviews
from nbhelpers.reading import DataError, clean_text, read_labelled, read_movie_reviews, read_unlabelled

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
    table = read_movie_reviews()
    assert len(table) == 25_000
    assert table["label"].value_counts().to_dict() == {0: 12_500, 1: 12_500}
    raw = table["text"].iloc[:2000]
    assert raw.str.contains("<br />").any()
    assert not raw.map(clean_text).str.contains("<br|&quot;|\0", regex=True).any()


# --- sources ---


@pytest.mark.parametrize(
    ("negative", "positive"), [("neg", "pos"), ("negative", "positive"), (" Negative ", "POS"), (0, 1)]
)
def test_labels_may_be_words_or_numbers(tmp_path, negative, positive):
    table = numbered_reviews(5)
    table["label"] = table["label"].map({"neg": negative, "pos": positive})
    table = read_labelled(profile_of(write_csv(tmp_path, table)))
    assert table["label"].tolist() == [0, 1] * 5
    assert table["text"].str.startswith("pos").tolist() == [False, True] * 5


def test_a_parquet_file_reads_like_a_csv(tmp_path):
    table = numbered_reviews(5)
    table.to_parquet(tmp_path / "reviews.parquet")
    from_parquet = read_labelled(profile_of(tmp_path / "reviews.parquet"))
    from_csv = read_labelled(profile_of(write_csv(tmp_path, table)))
    pd.testing.assert_frame_equal(from_parquet, from_csv, check_dtype=False)


def test_empty_reviews_are_left_out(tmp_path):
    table = numbered_reviews(3)
    table.loc[0, "text"], table.loc[3, "text"] = "<br /><br />", None
    assert len(read_labelled(profile_of(write_csv(tmp_path, table)))) == 4


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
    table = read_labelled(profile_of(acl_imdb))
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
    assert [int(t.split()[-1]) for t in smaller["test"]["text"][-15:]] == list(range(25, 40))


def test_a_folder_of_train_and_test_files_is_read(tmp_path):
    write_csv(tmp_path, numbered_reviews(60), "train.csv")
    other = numbered_reviews(20)
    other["text"] = "other " + other["text"]
    other.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    splits = load_reviews(profile_of(tmp_path, validation_size=20, test_size=1000))
    assert splits["test"].num_rows == 40
    assert all(text.startswith("other") for text in splits["test"]["text"])


def test_the_hub_is_asked_for_the_pinned_revision_and_its_unlabelled_part_is_read_apart(monkeypatch):
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
    assert read_unlabelled(profile_of("someone/reviews", data_revision="abc123"))["text"].tolist() == ["none"]
    del parts["unsupervised"]
    assert read_unlabelled(profile_of("someone/reviews")).empty


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
        check_data(profile_of(path, test_size=999 if "test.csv" in files else 24))
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
        check_data(profile_of(source))
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
        check_data(profile_of("a/b"))
    assert len(str(error.value).splitlines()) == 1


def test_odd_texts_are_read_as_they_are(tmp_path):
    texts = ['He said "no",\nand <br />left &amp; rightly', "NA", "null", "None", "nul\0byte", "long " * 40_000 + "end"]
    write_csv(tmp_path, pd.DataFrame({"text": texts, "label": [" NegaTive ", "POS"] * 3}))
    table = read_labelled(profile_of(tmp_path / "reviews.csv"))
    assert table["text"].tolist() == [clean_text(text) for text in texts]
    assert table["label"].tolist() == [0, 1] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_the_ends_of_lines_change_nothing(tmp_path, encoding, newline):
    path = write_files(tmp_path, csv_file((PLAIN.replace("\n", newline) + newline).encode(encoding)))
    assert [*read_labelled(profile_of(path))["text"]] == [text for text, _ in ROWS]
    folder = write_files(tmp_path / "acl", acl(encoding))
    assert read_labelled(profile_of(folder))["text"][0] == "neg caf\u00e9 0"
