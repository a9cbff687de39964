"""Reviews -> splits -> token ids -> batches."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, Features, Value
from torch.nn.utils.rnn import pad_sequence

from nbhelpers.profiles import Profile
from nbhelpers.reading import DataError, read_labelled, read_unlabelled
from nbhelpers.system.progress import track

UNLABELLED = -100  # in place of a label: torch's cross-entropy leaves such rows out
SPLITS = ("train", "validation", "test")
# IMDb's makers took at most 30 reviews of a film: a gap that wide at each cut keeps a film on one side.
GUARD = 30
TOKENIZED_AT_ONCE = 500  # reviews between two moves of the progress bar


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


def split_reviews(profile: Profile, seed: int) -> dict[str, pd.DataFrame]:
    """Return the tables of train, validation and test, and "rest", the reviews that ``train_size`` leaves out.

    See ``load_reviews``.
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
    all_left = train = drop_seen(train, test, validation)
    if profile.train_size and profile.train_size < len(train):
        share = profile.train_size / len(train)
        train = train.groupby("label", group_keys=False).sample(frac=share, random_state=seed)
    parts = {"train": train, "validation": validation, "test": test}
    for name, part in parts.items():
        if part["label"].nunique() < 2:
            found = f"{len(part)} reviews of one class only" if len(part) else "no reviews"
            sizes = ", ".join(f"{split}_size {getattr(profile, f'{split}_size')}" for split in SPLITS)
            raise DataError(
                f"the {name} split must have negative and positive reviews (got {found} after removing duplicates); "
                f"give more reviews, or other sizes than {sizes}"
            )
    return parts | {"rest": all_left.drop(train.index)}


def to_dataset(table: pd.DataFrame) -> Dataset:
    """Return a table of reviews as a ``Dataset``: columns text, label, and stars where the table has them."""
    columns = {"text": Value("string"), "label": Value("int64")}
    if "stars" in table:
        columns["stars"] = Value("int64")
    return Dataset.from_pandas(table[list(columns)], features=Features(columns), preserve_index=False)


def load_reviews(profile: Profile, seed: int = 0) -> DatasetDict:
    """Return train, validation and test: columns text, label (0 negative, 1 positive), and stars where all are known.

    Validation and test are contiguous blocks of each class, the same for every seed, so that one film's reviews stay
    on one side; no text is in two splits. The source's own test part, where it has one, is the test split. The seed
    draws ``train_size`` reviews from the others. Raises ``DataError`` when the data are too few.
    """
    parts = split_reviews(profile, seed)
    return DatasetDict({name: to_dataset(parts[name]) for name in SPLITS})


def load_transfer(profile: Profile, seed: int = 0) -> Dataset:
    """Return reviews for a teacher to label, at most ``transfer_size``: columns text, label (all ``UNLABELLED``).

    First the labelled reviews that ``train_size`` leaves out, whose labels are not used, in an order that the seed
    draws; then those that the source has without labels (``read_unlabelled``). None stands in another split.
    """
    parts = split_reviews(profile, seed)
    left = parts["rest"][["text"]].sample(frac=1, random_state=seed)
    without = read_unlabelled(profile).sample(frac=1, random_state=seed)
    found = drop_seen(pd.concat([left, without]), *(parts[name] for name in SPLITS))
    return to_dataset(found.head(profile.transfer_size).assign(label=UNLABELLED))


def check_data(profile: Profile) -> None:
    """Raise ``DataError`` now rather than in the middle of a run."""
    load_reviews(profile, seed=0)


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
