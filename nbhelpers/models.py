"""Pretrained, teacher, student; which of their weights may be pruned."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file
from transformers.utils import logging as transformers_logging

from nbhelpers.profiles import Profile, local_path, shown
from nbhelpers.reading import reason_of
from nbhelpers.system.files import sha256

# A new classification head is not in a language model's checkpoint; notebook 01 explains this warning.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# Without network there is one clear error, instead of five lines about retries before it.
hub_logging.set_verbosity_error()

MINI = Path(__file__).parent / "pretrained"
LABEL_NAMES = {0: "negative", 1: "positive"}
KINDS = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
DECODERS = "a decoder with a classification head and blocks named h or layers, such as GPT-2, Llama or Qwen2"
BLOCK_WEIGHT = re.compile(r"\.(?:h|layers)\.(\d+)\.(.+)\.weight$")


class ModelError(ValueError):
    """A model that cannot be found, loaded or used; the message says what is expected and what was found."""


def model_source(profile: Profile) -> tuple[str, dict]:
    """Return where ``from_pretrained`` finds a profile's model: a folder, or a Hub id and its revision."""
    path = local_path(profile.model)
    if profile.model in ("mini", "tiny"):
        return str(MINI), {}
    if path and path.is_dir():
        return str(path), {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", profile.model):
        return profile.model, {"revision": profile.model_revision}
    problem = "is not a folder" if path else "does not exist"
    raise ModelError(f"`model` must be mini, a Hub id or a local folder ({shown(profile.model)} {problem})")


@contextlib.contextmanager
def clear_errors(profile: Profile) -> Iterator[None]:
    """Turn every failure to load a profile's model into one clear ``ModelError``."""
    try:
        yield
    except ModelError:
        raise
    # Bad files raise errors of every kind, down to a plain Exception, in several libraries.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"`model` must be {DECODERS} ({profile.model!r} needs code of its own, which is never run)"
            ) from error
        hint = "its folder must hold config.json, tokenizer.json and model.safetensors, as save_pretrained writes them"
        if isinstance(error, SafetensorError):
            hint = "its weights are damaged or truncated, download them again"
        elif model_source(profile)[1]:
            hint = "check its name and model_revision, the network and HF_HUB_OFFLINE; weights must be safetensors"
        raise ModelError(f"`model` {shown(profile.model)} cannot be loaded ({reason_of(error)}): {hint}") from error


def load_from(loader, profile: Profile, **options):
    """Return ``loader.from_pretrained`` of a profile's model, without running code that comes with it."""
    source, revision = model_source(profile)
    with clear_errors(profile):
        return loader.from_pretrained(source, **revision, **options, trust_remote_code=False)


def load_tokenizer(profile: Profile):
    """Return the model's tokenizer, padding on the right; without a padding token, end-of-text serves as one.

    That is safe because texts are tokenised so that they never contain a special token.
    """
    tokenizer = load_from(AutoTokenizer, profile)
    # Without a file, the tokenizers of some families are empty, without an error.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"`model` {profile.model!r} must have a tokenizer.json in its folder (its tokenizer is empty)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of `model` {profile.model!r} must have a pad_token or an eos_token (has neither)"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def check_model(profile: Profile) -> None:
    """Raise ``ModelError`` now rather than in the middle of a run; this reads the weights."""
    tokenizer = load_tokenizer(profile)
    config = base_config(profile, tokenizer)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > config.vocab_size:
        raise ModelError(
            f"`model` {profile.model!r} must have an embedding for each of its tokenizer's {tokens} tokens "
            f"(has {config.vocab_size})"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and profile.max_tokens > positions:
        raise ModelError(f"`max_tokens` must be at most {positions} for {profile.model!r} (got {profile.max_tokens})")
    if max(profile.student_layers) > config.num_hidden_layers:
        raise ModelError(
            f"`student_layers` must be at most the {config.num_hidden_layers} layers of the teacher {profile.model!r} "
            f"(got {profile.student_layers})"
        )
    if profile.embedding_rank >= config.hidden_size:
        raise ModelError(
            f"`embedding_rank` must be below the {config.hidden_size} features of {profile.model!r} "
            f"(got {profile.embedding_rank})"
        )
    create_model(profile)


def base_config(profile: Profile, tokenizer):
    """Return the configuration of a profile's model as it was saved; "tiny" is defined here."""
    if profile.model != "tiny":
        config = load_from(AutoConfig, profile)
        plain = config.get_text_config() is config  # other models combine several
        if not plain or any(type(config) not in kinds for kinds in KINDS):
            raise ModelError(f"`model` must be {DECODERS} ({profile.model!r} is of the type {config.model_type})")
        return config
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.1}
    return GPT2Config(vocab_size=len(tokenizer), activation_function="gelu_pytorch_tanh", **shape)


def refuse_pickles(profile: Profile) -> None:
    """Raise ``ModelError`` where weights are pickled: all of them, or shards that an index of safetensors names."""
    source, revision = model_source(profile)
    pickled = set()
    if not revision and not any(Path(source).glob("*.safetensors*")):
        pickled = {path.name for path in Path(source).glob("pytorch_model*.bin")}
    with clear_errors(profile), contextlib.suppress(OSError):  # raised where there is no index
        index = json.loads(Path(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **revision)).read_text(encoding="utf-8"))
        pickled |= {name for name in index["weight_map"].values() if not name.endswith(".safetensors")}
    if pickled:
        raise ModelError(
            f"the weights of `model` {profile.model!r} must be model.safetensors, as save_pretrained writes them (got "
            f"{min(pickled)}, a pickle, which could run code and is never read)"
        )


def load_weights(profile: Profile, config) -> PreTrainedModel:
    """Return a profile's model with all of its weights, float32; a head that is missing or has other classes is random.

    Raises ``ModelError`` where the weights are pickled, missing, damaged, or do not match the configuration.
    """
    refuse_pickles(profile)
    config.transformers_weights = None  # would name another file than the ones that were checked
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load_from(AutoModelForSequenceClassification, profile, config=config, dtype=torch.float32, **options)
    absent = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    absent = sorted(name for name in absent if name.startswith(f"{model.base_model_prefix}."))
    if absent:
        raise ModelError(
            f"the weights of `model` {profile.model!r} must match its config.json ({len(absent)} are missing or have "
            f"another shape, the first is {absent[0]})"
        )
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ModelError(f"the weights of `model` {profile.model!r} must be finite numbers: download them again")
    return model


def source_fingerprint(profile: Profile) -> dict[str, str]:
    """Return what a profile's model is made from: the checksums of a folder's files, or the Hub's revision."""
    source, revision = model_source(profile)
    return revision or {path.name: sha256(path) for path in sorted(Path(source).iterdir()) if path.is_file()}


def set_dropout(config, dropout: float) -> None:
    """Set the dropout rates that the architecture has, and the one of attention weights to zero.

    Dropout of attention weights rules out the fused attention on a CPU and costs a fifth of a training step.
    """
    for name in ("resid_pdrop", "embd_pdrop", "hidden_dropout", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0 if name.startswith("att") else dropout)


def create_model(profile: Profile, seed: int = 0, pretrained: bool = True) -> PreTrainedModel:
    """Return a decoder with a two-class head: pretrained body, random head; with ``pretrained=False``, all random.

    Weights are float32. Raises ``ModelError`` when the model cannot be loaded or has no block weights to prune.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(profile)
    config = base_config(profile, tokenizer)
    config.num_labels = 2
    config.id2label = LABEL_NAMES
    config.label2id = {name: i for i, name in LABEL_NAMES.items()}
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.use_cache = False
    set_dropout(config, profile.dropout)
    if profile.model == "tiny":
        model = GPT2ForSequenceClassification(config)
    elif pretrained:
        model = load_weights(profile, config)
    else:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    base = model.base_model
    if not (hasattr(base, "h") or hasattr(base, "layers")) or not prunable_weights(model):
        raise ModelError(
            f"`model` must be {DECODERS} ({type(model).__name__} has no blocks of that name with matrices)"
        )
    return model.eval()


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer blocks, bottom first."""
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def create_student(teacher: PreTrainedModel, layers: int, seed: int = 0) -> PreTrainedModel:
    """Return a copy of the teacher with fewer, evenly spaced blocks.

    The first block is always among them and, of two or more, the last (DistilBERT, Sanh et al. 2019, takes every other
    layer). Raises ``ModelError`` when the student would have more layers than the teacher.
    """
    depth = len(blocks(teacher))
    if not 1 <= layers <= depth:
        raise ModelError(f"`layers` must be from 1 to the {depth} of the teacher (got {layers})")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    torch.manual_seed(seed)
    student = type(teacher)(config)
    chosen = [round(i * (depth - 1) / max(1, layers - 1)) for i in range(layers)]
    for block, i in zip(blocks(student), chosen, strict=True):
        block.load_state_dict(blocks(teacher)[i].state_dict())
    outside = {n: v for n, v in teacher.state_dict().items() if not re.search(r"\.(?:h|layers)\.\d+\.", n)}
    student.load_state_dict(outside, strict=False)
    return student.eval()


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of the blocks (attention and MLP projections), by name, bottom first.

    GPT-2's are ``Conv1D``, stored [in, out]; Llama's are ``nn.Linear``, stored [out, in]. The classification head is
    not among them.
    """
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, Conv1D | nn.Linear) and BLOCK_WEIGHT.search(f"{n}.weight")}


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of ``prunable_layers``, by parameter name: no embeddings, LayerNorms, biases or head."""
    return {f"{name}.weight": layer.weight for name, layer in prunable_layers(model).items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, or the CPU where it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def stored_in_out(model: nn.Module, name: str) -> bool:
    """Return whether a prunable weight is stored [in, out], as GPT-2's are, rather than [out, in]."""
    return isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)


def position(name: str) -> tuple[int, str]:
    """Return layer and module of a prunable weight: ``transformer.h.3.mlp.c_fc.weight`` -> (3, "mlp.c_fc")."""
    match = BLOCK_WEIGHT.search(name)
    return int(match[1]), match[2]


@dataclass(frozen=True)
class Structures:
    """The heads of an attention, or the neurons of an MLP: parts of a model that can be removed whole.

    parts: (parameter name, dimension, groups) of each matrix that has a slice per structure; the dimension is laid out
    as [groups, count, size], as in GPT-2's ``c_attn`` with its groups query, key and value.
    """

    name: str
    count: int
    parts: tuple[tuple[str, int, int], ...]

    def slices(self, weights: dict[str, torch.Tensor], part: tuple[str, int, int]) -> torch.Tensor:
        """Return a part's matrix as [groups, count, size, rest]: ``[:, i]`` belongs to structure i."""
        name, dimension, groups = part
        first = weights[name].movedim(dimension, 0)
        return first.reshape(groups, self.count, first.shape[0] // (groups * self.count), -1)


def has_structures(config: PreTrainedConfig) -> bool:
    """Return whether ``structures`` supports a model: GPT-2 only."""
    return config.model_type == "gpt2"


def structures(model: PreTrainedModel) -> list[Structures]:
    """Return the attention heads and MLP neurons of every block of a GPT-2, bottom first; others: ``ModelError``."""
    if not has_structures(model.config):
        raise ModelError(f"`model` must be a GPT-2 to remove heads and neurons (got {type(model).__name__})")
    found, prefix = [], f"{model.base_model_prefix}.h"
    for i, block in enumerate(blocks(model)):
        attention, mlp = f"{prefix}.{i}.attn", f"{prefix}.{i}.mlp"
        heads = ((f"{attention}.c_attn.weight", 1, 3), (f"{attention}.c_proj.weight", 0, 1))
        neurons = ((f"{mlp}.c_fc.weight", 1, 1), (f"{mlp}.c_proj.weight", 0, 1))
        found += [
            Structures(attention, model.config.num_attention_heads, heads),
            Structures(mlp, block.mlp.c_fc.weight.shape[1], neurons),
        ]
    return found


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the model in a folder, dense or sparse; its weights are not read."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_dense(folder: Path) -> PreTrainedModel:
    """Return the dense model in a folder that ``save_dense`` wrote."""
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def save_dense(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights (safetensors) as ``from_pretrained`` reads them."""
    model.save_pretrained(folder)
