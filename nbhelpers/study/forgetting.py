"""What compression makes a model forget: which reviews, and how much of the language model in its body.

A review is *forgotten* by a seed when the dense model of that seed is right and the compressed one wrong, and
*learned* the other way round. That compression forgets some examples far more than others is Hooker et al.'s (2019).
"""

import copy
import json
import math
import re
from functools import partial
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from scipy.stats import mannwhitneyu
from transformers import AutoModelForCausalLM, PreTrainedModel

from nbhelpers.evaluation import RESAMPLES, holm, wilson_interval
from nbhelpers.models import ModelError, load_tokenizer
from nbhelpers.study.artefacts import model_name
from nbhelpers.study.comparison import LINES
from nbhelpers.study.inputs import reviews_fingerprint, reviews_of, runs_of
from nbhelpers.study.pruning import prune_model, pruned_masks
from nbhelpers.system.progress import track
from nbhelpers.training import distributed
from nbhelpers.workspace import Run

READ = "bits.json"  # what the models of a seed need per byte


def read_as_language_models(run: Run, count: int = 20) -> pd.DataFrame:
    """Artefact ``unlearned``: the bits per byte of each model's body of this seed as a language model.

    On validation reviews and on text of another domain, ``count`` each, or as many as there are reviews; of the
    pretrained model, the fine-tuned one, its control, and for each score the model right after pruning ("pruned_...")
    and the recovered one. Columns: model, domain, seed, bits_per_byte.
    """
    main, scores = run.profile.main_sparsity, run.profile.scores
    recovered = [model_name("recovered", score, main) for score in scores]

    def build(target):
        tokenizer = load_tokenizer(run.profile)
        reviews = reviews_of(run.profile, run.seed)["validation"]["text"][:]
        few = min(count, len(reviews))
        texts = {"reviews": reviews[:: len(reviews) // few][:few], "other": other_domain_texts(few)}
        # One model at a time: a dozen of full size would not fit into every memory.
        models = {name: partial(run.load_model, name) for name in ("pretrained", *LINES, *recovered)}
        masks = {model_name("pruned", score, main): partial(pruned_masks, run, score, main) for score in scores}
        models |= {name: lambda masked=masked: prune_model(run, masked()) for name, masked in masks.items()}
        rows = []
        for name, load in track(models.items(), "reading as language models"):
            body = as_language_model(load().to(distributed.device())).eval()
            for domain, sample in texts.items():
                bits = bits_per_byte(body, tokenizer, sample)
                rows.append({"model": name, "domain": domain, "seed": run.seed, "bits_per_byte": bits})
        (target.folder / READ).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    settings = {"count": count, "main_sparsity": main, "reviews": reviews_fingerprint(run, "validation")}
    scored = tuple(f"scores_{score}" for score in scores)
    run.cached("unlearned", settings, build, ("pretrained", *LINES, *recovered, *scored), made_by="06")
    return pd.DataFrame(json.loads((run.folder("unlearned") / READ).read_text(encoding="utf-8")))


def unlearned(run: Run) -> pd.DataFrame:
    """Return ``read_as_language_models`` of all seeds."""
    return pd.concat([read_as_language_models(seed_run) for seed_run in runs_of(run)], ignore_index=True)


NEGATIONS = re.compile(
    r"\b(?:not|no|never|nothing|nor|neither|none|nobody|nowhere|cannot|hardly|scarcely|barely)\b|n['’]t\b",
    re.IGNORECASE,
)
CONTRASTS = re.compile(
    r"\b(?:but|however|although|though|yet|despite|except|nevertheless|nonetheless|while|whereas|instead)\b",
    re.IGNORECASE,
)
COUNT_CUTS = (1, 3, 6)  # groups of counts: 0, 1 to 2, 3 to 5, 6 and more
PASSAGE = 1000  # characters
EXCERPT = 300  # characters of a review that is shown
CONTEXT = 512  # tokens of a text that are read


# --- which reviews ---


def describe_reviews(
    texts: list[str], lengths: list[int], dense_logits: np.ndarray, stars: list[int] | None = None
) -> pd.DataFrame:
    """Return what is known of each review before compression, one row per review in the order given.

    dense_logits: [seeds, n, classes]. Columns: tokens (``lengths``), confidence (the dense model's larger class
    probability, mean over seeds), negations and contrasts (numbers of such words), stars (NaN where unknown).
    """
    return pd.DataFrame(
        {
            "tokens": np.asarray(lengths),
            "confidence": softmax(dense_logits.astype(float), axis=-1).max(-1).mean(0),
            "negations": [len(NEGATIONS.findall(text)) for text in texts],
            "contrasts": [len(CONTRASTS.findall(text)) for text in texts],
            "stars": np.full(len(texts), np.nan) if stars is None else np.asarray(stars, dtype=float),
        }
    )


def check_shapes(features: pd.DataFrame, dense: np.ndarray, compressed: np.ndarray) -> None:
    """Raise ``ValueError`` unless both arrays are bool [seeds, n] and ``features`` has n rows."""
    expected = (len(dense), len(features))
    if any(array.dtype != bool or array.shape != expected for array in (dense, compressed)):
        raise ValueError(
            f"dense and compressed must be bool arrays [seeds, {len(features)}], as features has {len(features)} rows "
            f"(got {dense.dtype} {dense.shape} and {compressed.dtype} {compressed.shape})"
        )


def groups(feature: str, values: pd.Series) -> list[tuple[str, np.ndarray]]:
    """Return the groups of a feature's known values, low to high, as (label, indices of reviews); none is empty.

    Quartiles of tokens and confidence (equal values stay together), each star rating, and ranges of counts. A label is
    the lowest and the highest value in the group.
    """
    known = np.flatnonzero(values.notna())
    if not len(known):
        return []
    found = values.to_numpy()[known]
    if feature == "stars":
        codes = found
    elif feature in ("tokens", "confidence"):
        codes = np.searchsorted(np.quantile(found, [0.25, 0.5, 0.75]), found)
    else:
        codes = np.digitize(found, COUNT_CUTS)
    members = [codes == code for code in np.unique(codes)]
    return [(group_label(feature, found[group]), known[group]) for group in members]


def group_label(feature: str, values: np.ndarray) -> str:
    """Return the lowest and the highest of a group's values, once where they are equal; confidence in per cent."""
    low, high = values.min(), values.max()
    if feature == "confidence":
        return f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def share_interval(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of sum(part) / sum(whole), resampling reviews; int arrays [n].

    Reviews differ only in their pair (part, whole), so that a resample is one multinomial draw of the few pairs.
    Where the share is 0 or 1 a bootstrap has no spread, and Wilson's interval is returned.
    """
    if part.sum() in (0, whole.sum()):
        return wilson_interval(part[whole > 0] > 0)
    pairs, counts = np.unique(np.stack([part, whole]), axis=1, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(part), counts / len(part), size=RESAMPLES)
    parts, wholes = draws @ pairs[0], draws @ pairs[1]
    # A resample of a small group may hold none of the dense model's right answers: it has no share.
    low, high = np.percentile(parts[wholes > 0] / wholes[wholes > 0], [2.5, 97.5])
    return float(low), float(high)


def forgotten_by_group(features: pd.DataFrame, dense: np.ndarray, compressed: np.ndarray) -> pd.DataFrame:
    """Return how much is forgotten in each group of reviews, one row per group; the first ("all") is of all reviews.

    features: of ``describe_reviews``; dense, compressed: bool [seeds, n], right or not. Columns: feature, group,
    reviews, dense_right (share of predictions), forgotten (share of the dense model's right predictions, over all
    seeds, that the compressed one gets wrong) with forgotten_low and forgotten_high (95 % bootstrap over reviews,
    which the seeds share), learned (share of its wrong predictions that the compressed one gets right; NaN without
    any). A group in which the dense model is never right is left out.
    """
    check_shapes(features, dense, compressed)
    right, forgotten = dense.sum(0), (dense & ~compressed).sum(0)
    wrong, learned = (~dense).sum(0), (~dense & compressed).sum(0)
    every = [("all", "all", np.arange(len(features)))]
    every += [(name, label, rows) for name in features for label, rows in groups(name, features[name])]
    table = []
    for name, label, rows in every:
        if not right[rows].any():
            continue
        low, high = share_interval(forgotten[rows], right[rows])
        table.append(
            {
                "feature": name,
                "group": label,
                "reviews": len(rows),
                "dense_right": float(dense[:, rows].mean()),
                "forgotten": float(forgotten[rows].sum() / right[rows].sum()),
                "forgotten_low": low,
                "forgotten_high": high,
                "learned": float(learned[rows].sum() / wrong[rows].sum()) if wrong[rows].any() else math.nan,
            }
        )
    columns = ["feature", "group", "reviews", "dense_right", "forgotten", "forgotten_low", "forgotten_high", "learned"]
    return pd.DataFrame(table, columns=columns)


def associations(features: pd.DataFrame, dense: np.ndarray, compressed: np.ndarray) -> pd.DataFrame:
    """Test which features go with being forgotten; return one row per feature (Mann and Whitney, 1947).

    Of the reviews that the dense model gets right in most seeds, those count as forgotten that the compressed one gets
    wrong in most of these seeds. Columns: feature, forgotten and kept (reviews with a known value), effect
    (probability that a forgotten review has the larger value, ties counted half: 0.5 is no association), p_value
    (two-sided), p_adjusted (Holm). A feature without forgotten or without kept reviews is left out.
    """
    check_shapes(features, dense, compressed)
    right, lost = dense.sum(0), (dense & ~compressed).sum(0)
    counted, forgotten = 2 * right > len(dense), 2 * lost > right
    rows = []
    for name in features:
        known = counted & features[name].notna().to_numpy()
        missed, kept = (features.loc[known & group, name].to_numpy() for group in (forgotten, ~forgotten))
        if len(missed) and len(kept):
            test = mannwhitneyu(missed, kept)
            effect = float(test.statistic) / (len(missed) * len(kept))
            rows.append((name, len(missed), len(kept), effect, float(test.pvalue)))
    table = pd.DataFrame(rows, columns=["feature", "forgotten", "kept", "effect", "p_value"])
    return table.assign(p_adjusted=holm(table["p_value"]))


def strongest(links: pd.DataFrame) -> str:
    """Return the strongest of ``associations`` in a sentence."""
    if links.empty:
        return "Too few reviews are forgotten to say which."
    link = links.loc[(links["effect"] - 0.5).abs().idxmax()]
    return (
        f"The strongest association is with {link['feature']}: in {link['effect']:.0%} of all pairs of a forgotten "
        f"and a kept review, the forgotten one has the larger value (adjusted p = {link['p_adjusted']:.2g})."
    )


def shorten(text: str) -> str:
    """Return the first and last whole words of a text, about ``EXCERPT`` characters, or all of a short one."""
    if len(text) <= EXCERPT:
        return text
    head, tail = text[: EXCERPT // 2].rpartition(" ")[0], text[-(EXCERPT // 2) :].partition(" ")[2]
    return f"{head} … {tail}"


def most_forgotten(
    texts: list[str], labels: np.ndarray, dense_logits: np.ndarray, compressed_logits: np.ndarray, count: int
) -> pd.DataFrame:
    """Return the reviews, among those that most seeds forgot, whose probability of the right class fell most.

    dense_logits, compressed_logits: [seeds, n, classes]. At most ``count`` rows, the largest fall first; columns:
    review (its row), label, dense and compressed (probability of the right class, mean over seeds), forgotten_by
    (seeds), text (shortened).
    """
    labels, reviews = np.asarray(labels), np.arange(len(texts))
    dense, compressed = (
        softmax(logits.astype(float), axis=-1)[:, reviews, labels].mean(0)
        for logits in (dense_logits, compressed_logits)
    )
    forgotten_by = ((dense_logits.argmax(-1) == labels) & (compressed_logits.argmax(-1) != labels)).sum(0)
    rows = reviews[2 * forgotten_by > len(dense_logits)]
    rows = rows[np.argsort((compressed - dense)[rows], kind="stable")][:count]
    return pd.DataFrame(
        {
            "review": rows,
            "label": labels[rows],
            "dense": dense[rows],
            "compressed": compressed[rows],
            "forgotten_by": forgotten_by[rows],
            "text": [shorten(texts[row]) for row in rows],
        }
    )


# --- how much of the language model ---


def as_language_model(classifier: PreTrainedModel) -> PreTrainedModel:
    """Return the language model in a classifier's body, whose next-token head is the classifier's input embedding.

    It is a copy in eval mode that shares no memory with the classifier. Raises ``ModelError`` when the architecture
    does not tie its head to its embedding, or when the body is a sparse or compact one.
    """
    name = type(classifier).__name__
    if not isinstance(classifier, PreTrainedModel):
        raise ModelError(f"the classifier must be a model of transformers (got {name}): pass the dense one")
    if not getattr(classifier.config, "tie_word_embeddings", False):
        raise ModelError(
            f"{name} has no next-token head: its architecture does not tie one to the embedding (tie_word_embeddings)"
        )
    config = copy.deepcopy(classifier.config)
    model = AutoModelForCausalLM.from_config(config, dtype=classifier.dtype)
    model.base_model.load_state_dict(classifier.base_model.state_dict())
    return model.to(classifier.device).eval()


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return token ids of each text after the end-of-text token; no text is read as a special token."""
    ids = tokenizer(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return [np.array([tokenizer.eos_token_id, *row], dtype=np.int32) for row in ids]


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer, texts: list[str]) -> float:
    """Return the bits that the model needs per UTF-8 byte of the texts, each read from its start.

    A text is read up to ``CONTEXT`` tokens, or as many as the model has positions for; the bytes beyond are not
    counted. Comparable across tokenizers.
    """
    nats, size = 0.0, 0
    device = next(model.parameters()).device
    context = min(CONTEXT, model.config.max_position_embeddings)
    for row in encode(tokenizer, texts):
        ids = torch.as_tensor(row[:context], dtype=torch.long, device=device)
        logits = model(ids[None]).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        size += len(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False).encode())
    return nats / math.log(2) / size


def reference_passages() -> list[str]:
    """Return all passages of prose in the language reference that comes with Python, 1,000 to 2,000 characters each.

    They are whole paragraphs in the order of the topics, without headings, lists, grammar, code and repetitions.
    """
    passages, seen = [], set()
    for topic in sorted(topics):
        passage = ""
        for paragraph in re.split(r"\n\s*\n", topics[topic].strip()):
            prose = paragraph.endswith(".") and "\n " not in f"\n{paragraph}" and len(paragraph) < PASSAGE
            if not prose or paragraph in seen:
                continue
            seen.add(paragraph)
            passage = f"{passage} {' '.join(paragraph.split())}".strip()
            if len(passage) >= PASSAGE:
                passages.append(passage)
                passage = ""
    return passages


def other_domain_texts(count: int) -> list[str]:
    """Return evenly spaced passages of the Python language reference: English text that is on every machine.

    They are the same for one Python version; versions differ in their wording. Raises ``ValueError`` when there are
    fewer than ``count``.
    """
    passages = reference_passages()
    if not 1 <= count <= len(passages):
        raise ValueError(f"count must be from 1 to {len(passages)} (got {count})")
    return [passages[i * len(passages) // count] for i in range(count)]
