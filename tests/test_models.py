"""Models: which weights may be pruned, students, saving and loading, and errors in one line."""

import builtins
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nbhelpers import models
from nbhelpers.models import (
    MINI,
    ModelError,
    check_model,
    create_model,
    create_student,
    prunable_weights,
    stored_in_out,
)
from nbhelpers.profiles import get_profile

PROJECT = Path(__file__).parent.parent


def tiny_gpt2(layers: int = 2) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2)).eval()


def tiny_llama(layers: int = 2) -> LlamaForSequenceClassification:
    """A Llama with grouped-query attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers, "vocab_size": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads, pad_token_id=0, num_labels=2)).eval()


# --- prunable weights ---


GPT2_SHAPES = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
# Grouped-query attention: k and v are narrower than q and o.
LLAMA_SHAPES = {
    f"self_attn.{name}_proj": shape for name, shape in zip("qkvo", ((8, 8), (4, 8), (4, 8), (8, 8)), strict=True)
}
LLAMA_SHAPES |= {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}


@pytest.mark.parametrize(
    ("build", "blocks", "shapes"),
    [(tiny_gpt2, "transformer.h", GPT2_SHAPES), (tiny_llama, "model.layers", LLAMA_SHAPES)],
)
def test_prunable_weights_are_the_matrices_of_each_block_and_nothing_else(build, blocks, shapes):
    model = build()
    found, parameters = prunable_weights(model), dict(model.named_parameters())
    expected = {f"{blocks}.{i}.{name}.weight": shape for i in (0, 1) for name, shape in shapes.items()}
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected
    assert all(weight is parameters[name] for name, weight in found.items()), "the parameters themselves, not copies"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_weight_is_stored_as_its_layer_multiplies_by_it(family):
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    for name, weight in prunable_weights(model).items():
        inputs = weight.shape[0 if stored_in_out(model, name) else 1]
        x, layer = torch.randn(3, inputs), model.get_submodule(name.removesuffix(".weight"))
        product = x @ weight if stored_in_out(model, name) else x @ weight.t()
        torch.testing.assert_close(layer(x), product + (layer.bias if layer.bias is not None else 0))


def test_position_reads_layer_and_module_off_a_name():
    assert models.position("transformer.h.3.mlp.c_fc.weight") == (3, "mlp.c_fc")
    assert models.position("model.layers.11.self_attn.q_proj.weight") == (11, "self_attn.q_proj")


# --- students ---


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("layers", "chosen"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_a_student_takes_evenly_spaced_blocks_the_first_and_the_last_among_them(build, layers, chosen):
    teacher = build(layers=5)
    student = create_student(teacher, layers)
    assert student.config.num_hidden_layers == len(models.blocks(student)) == layers
    for block, i in zip(models.blocks(student), chosen, strict=True):
        for name, value in models.blocks(teacher)[i].state_dict().items():
            assert torch.equal(block.state_dict()[name], value)
    inside = (".h.", ".layers.")
    outside = {n: v for n, v in teacher.state_dict().items() if not any(part in n for part in inside)}
    assert "score.weight" in outside
    assert all(torch.equal(student.state_dict()[name], value) for name, value in outside.items())


@pytest.mark.parametrize("layers", [0, 3])
def test_a_student_of_more_layers_than_the_teacher_or_none_is_refused(layers):
    with pytest.raises(ModelError, match=rf"`layers` must be from 1 to the 2 of the teacher \(got {layers}\)"):
        create_student(tiny_gpt2(), layers)


# --- saving and loading ---


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_saved_model_comes_back_bit_by_bit_in_float32(build, tmp_path):
    model = build()
    models.save_dense(model, tmp_path)
    loaded = models.load_dense(tmp_path)
    assert type(loaded) is type(model)
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value)
    assert not list(tmp_path.glob("*.bin")), "safetensors only"


# --- creating ---


@pytest.mark.parametrize("name", ["smoke", "quick"])
def test_a_model_follows_its_seed(name):
    profile = get_profile(name)
    model, same, other = (create_model(profile, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[key]) for key, value in model.items())
    assert not torch.equal(model["score.weight"], other["score.weight"])


def test_a_model_is_float32_in_eval_mode_with_two_named_classes_and_a_padding_token():
    profile = get_profile("smoke", dropout=0.25)
    model, tokenizer = create_model(profile), models.load_tokenizer(profile)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.score.out_features == 2
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.resid_pdrop == model.config.embd_pdrop == 0.25
    assert model.config.attn_pdrop == 0.0, "it would forbid the fused attention"


def test_the_mini_model_has_a_pretrained_body_that_no_seed_changes_and_a_random_head():
    body = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).transformer.state_dict()
    model = create_model(get_profile("quick"), seed=5)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, body[name])
    random = create_model(get_profile("quick"), seed=5, pretrained=False)
    assert not any(
        torch.equal(weight, prunable_weights(model)[name]) for name, weight in prunable_weights(random).items()
    )
    assert {n: w.shape for n, w in random.state_dict().items()} == {n: w.shape for n, w in model.state_dict().items()}


# --- a user's own folder, and errors ---


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A tiny GPT-2 with the shipped tokenizer, as a user's own folder."""
    folder = tmp_path_factory.mktemp("model")
    for file in MINI.glob("tokenizer*"):
        shutil.copy(file, folder)
    save(folder, GPT2ForSequenceClassification, GPT2Config, n_embd=8, n_layer=2, n_head=2, n_positions=64)
    return folder


def save(folder, kind, config, **shape):
    """Save a random model of some kind to a folder that has its tokenizer."""
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    kind(config(vocab_size=AutoConfig.from_pretrained(MINI).vocab_size, **ids, **shape)).save_pretrained(folder)


def edit(folder, name="config.json", **values):
    """Change fields of a JSON file in a folder."""
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | values))


def encoder(folder):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    save(folder, BertForSequenceClassification, BertConfig, **shape)


def image_config(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def half(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def not_finite(folder):
    model = GPT2ForSequenceClassification.from_pretrained(folder)
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)


def pickled(folder):
    """Pickle the weights so that reading them would leave a file behind."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(folder)))


def pickled_shards(folder):
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(pickle.dumps(Touch(folder)))
    names = GPT2ForSequenceClassification(AutoConfig.from_pretrained(folder)).state_dict()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Touch:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return open, (str(self.folder / "ran"), "w")


def own_code(folder):
    """Make it a type that only its own code knows; running the code would leave a file behind."""
    code = "from transformers import GPT2Config as C, GPT2ForSequenceClassification as M\n"
    (folder / "own.py").write_text(f"{code}open({str(folder / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    edit(folder, model_type="own", auto_map=classes)


def no_tokenizer(folder):
    """Remove the tokenizer, of which transformers would make an empty one."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_special_tokens(folder):
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)


def one_token_more(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)


KIND = "`model` must be a decoder with a classification head and blocks named h or layers"
FILES = "its folder must hold config.json, tokenizer.json and model.safetensors"
DAMAGED = "damaged or truncated, download them again"
BAD_MODELS = {
    "an encoder": (encoder, "BertForSequenceClassification has no blocks of that name", KIND),
    "a model of images": (image_config, "is of the type vit", KIND),
    "an encoder's config": (lambda f: edit(f, model_type="bert"), "must match its config.json", "the first is bert."),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded", FILES),
    "no layers": (lambda f: edit(f, n_layer=0), "`student_layers` must be at most the 0 layers", "got (1,)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors", FILES),
    "half of the weights": (half, "file not fully covered", DAMAGED),
    # transformers would initialise missing weights at random, without an error.
    "more layers than weights": (lambda f: edit(f, n_layer=4), "24 are missing", "the first is transformer.h.2."),
    "another width": (lambda f: edit(f, n_embd=16), "must match its config.json (28 are", "have another shape"),
    "weights that are not finite": (not_finite, "must be finite numbers", "download them again"),
    "pickled weights": (pickled, "got pytorch_model.bin, a pickle", "must be model.safetensors"),
    "pickled shards": (pickled_shards, "got part.bin, a pickle", "must be model.safetensors"),
    "code of its own": (own_code, "needs code of its own, which is never run", KIND),
    "no tokenizer": (no_tokenizer, "must have a tokenizer.json", "its tokenizer is empty"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded", FILES),
    "no token to pad with": (no_special_tokens, "the tokenizer of", "must have a pad_token or an eos_token"),
    "one token more": (one_token_more, "its tokenizer's 8193 tokens", "has 8192"),
    "fewer positions": (lambda f: edit(f, n_positions=16), "`max_tokens` must be at most 16", "got 32"),
    "fewer features": (lambda f: edit(f, n_embd=4), "`embedding_rank` must be below the 4 features", "got 4"),
}  # fmt: skip


@pytest.fixture
def damaged(own_model, tmp_path_factory):
    """A function that returns a damaged copy of the tiny model."""

    def copy_and_damage(damage) -> Path:
        folder = tmp_path_factory.mktemp("models") / "damaged"
        shutil.copytree(own_model, folder)
        damage(folder)
        return folder

    return copy_and_damage


@pytest.mark.parametrize(("damage", "found", "expected"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_is_an_error_in_one_line(damaged, monkeypatch, damage, found, expected):
    # Whoever answers yes to every question must not run code or read a pickle either.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    folder = damaged(damage)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ModelError) as error:
        check_model(get_profile("smoke", model=str(folder)))
    message = str(error.value)
    assert f"'{folder}'" in message or "SequenceClassification" in message
    assert found in message and expected in message and len(message.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files, "and no code ran"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "must be mini, a Hub id or a local folder ('/no/such/folder' does not exist)"),
        ("y" * 5000, "(5,002 characters) does not exist)"),
        (str(MINI / "config.json"), "is not a folder)"),
        ("nobody/no-such-model", "check its name and model_revision, the network and HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_cannot_be_found_is_an_error_in_one_line(source, message):
    with pytest.raises(ModelError) as error:
        create_model(get_profile("quick", model=source))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_tokenizer_without_padding_token_pads_with_end_of_text(damaged):
    folder = damaged(lambda folder: edit(folder, "tokenizer_config.json", pad_token=None))
    profile = get_profile("smoke", model=str(folder))
    check_model(profile)
    tokenizer = models.load_tokenizer(profile)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.padding_side == "right"
    assert create_model(profile).config.pad_token_id == tokenizer.eos_token_id


def test_code_that_comes_with_a_model_that_does_not_need_it_is_left_alone(damaged, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    folder = damaged(own_code)
    edit(folder, model_type="gpt2")
    profile = get_profile("smoke", model=str(folder))
    check_model(profile)
    models.save_dense(create_model(profile), folder / "again")
    models.load_dense(folder / "again")
    assert type(create_model(profile)).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


def test_shards_and_a_head_for_other_classes_are_fine(own_model, tmp_path):
    for file in own_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    body = GPT2ForSequenceClassification.from_pretrained(own_model, num_labels=5, ignore_mismatched_sizes=True)
    body.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    profile = get_profile("smoke", model=str(tmp_path))
    check_model(profile)
    found = create_model(profile)
    assert found.score.out_features == 2
    assert all(torch.equal(v, body.transformer.state_dict()[n]) for n, v in found.transformer.state_dict().items())


def test_nothing_lets_a_model_run_its_code_or_reads_a_pickle():
    files = [*(PROJECT / "nbhelpers").rglob("*.py"), *(PROJECT / "notebooks").glob("*.ipynb")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert set(re.findall(r"trust_remote_code\W{1,4}(\w+)", code)) == {"False", "in"}
    assert not re.findall(r"torch\.load\(|\bimport pickle|\bimport joblib|allow_pickle", code)
