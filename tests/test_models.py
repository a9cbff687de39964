"""Models: which weights may be pruned, students, saving and loading, predictions, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from nbhelpers import models
from nbhelpers.evaluation import predict_logits
from nbhelpers.models import MINI, ModelError, create_model, create_student, prunable_weights, stored_in_out
from nbhelpers.profiles import get_profile


def tiny_gpt2(layers: int = 2, spread: float = 0.02) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    sizes["initializer_range"] = spread
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2)).eval()


def tiny_llama(layers: int = 2) -> LlamaForSequenceClassification:
    """Two query heads share a key and a value head: k and v are narrower than q and o."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers, "vocab_size": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads, pad_token_id=0, num_labels=2)).eval()


# --- prunable weights ---


def test_prunable_weights_of_gpt2_are_the_four_matrices_of_each_block():
    model = tiny_gpt2()
    found = prunable_weights(model)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {
        "transformer.h.0.attn.c_attn.weight": (8, 24),
        "transformer.h.0.attn.c_proj.weight": (8, 8),
        "transformer.h.0.mlp.c_fc.weight": (8, 32),
        "transformer.h.0.mlp.c_proj.weight": (32, 8),
        "transformer.h.1.attn.c_attn.weight": (8, 24),
        "transformer.h.1.attn.c_proj.weight": (8, 8),
        "transformer.h.1.mlp.c_fc.weight": (8, 32),
        "transformer.h.1.mlp.c_proj.weight": (32, 8),
    }
    parameters = dict(model.named_parameters())
    assert all(weight is parameters[name] for name, weight in found.items()), "the parameters themselves, not copies"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_way_in_which_a_weight_is_stored_is_told_from_what_its_layer_computes(family):
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    for name, weight in prunable_weights(model).items():
        inputs = weight.shape[0 if stored_in_out(model, name) else 1]
        x, layer = torch.randn(3, inputs), model.get_submodule(name.removesuffix(".weight"))
        product = x @ weight if stored_in_out(model, name) else x @ weight.t()
        torch.testing.assert_close(layer(x), product + (layer.bias if layer.bias is not None else 0))


def test_prunable_weights_of_llama_are_the_seven_matrices_of_each_block():
    model = tiny_llama()
    shapes = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in shapes.items()}
    found = prunable_weights(model)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected
    assert all(weight is dict(model.named_parameters())[name] for name, weight in found.items())


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_embeddings_head_norms_and_biases_are_never_prunable(build):
    model = build()
    left = set(dict(model.named_parameters())) - set(prunable_weights(model))
    assert all(
        name.endswith(".bias") or any(part in name for part in ("wte", "wpe", "embed", "ln_", "norm", "score"))
        for name in left
    )
    assert {"score.weight"} < left


def test_position_reads_layer_and_module_off_a_name():
    assert models.position("transformer.h.3.mlp.c_fc.weight") == (3, "mlp.c_fc")
    assert models.position("model.layers.11.self_attn.q_proj.weight") == (11, "self_attn.q_proj")


# --- students ---


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("layers", "chosen"), [(2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
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


def test_a_student_of_all_layers_computes_what_its_teacher_does():
    teacher = tiny_gpt2()
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    assert torch.equal(create_student(teacher, 2)(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_a_student_is_a_copy_that_leaves_the_teacher_alone():
    teacher = tiny_gpt2()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = create_student(teacher, 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 2


def test_a_random_student_shares_no_weight_with_the_teacher_and_follows_its_seed():
    teacher = tiny_gpt2()
    one, same, other = (create_student(teacher, 1, seed, from_teacher=False) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    weights, others = prunable_weights(one), prunable_weights(other)
    for name, weight in weights.items():
        assert not torch.equal(weight, prunable_weights(teacher)[name])
        assert not torch.equal(weight, others[name])


@pytest.mark.parametrize("layers", [0, 3])
def test_a_student_of_more_layers_than_the_teacher_or_none_is_refused(layers):
    with pytest.raises(ModelError, match=f"a student of {layers} layers: the teacher has 2"):
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
    one, same, other = (create_model(profile, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["score.weight"], other["score.weight"])


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


# --- errors ---


def test_a_missing_folder_is_an_error_that_names_it():
    with pytest.raises(ModelError, match="'/no/such/folder' does not exist: it takes mini, a hub id or a local folder"):
        create_model(get_profile("quick", model="/no/such/folder"))


def test_an_unreachable_hub_is_an_error_that_names_the_model():
    with pytest.raises(ModelError, match=r"'nobody/no-such-model' cannot be loaded .*HF_HUB_OFFLINE"):
        create_model(get_profile("quick", model="nobody/no-such-model"))


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.check_model(get_profile("quick", model=str(tmp_path)))


def test_more_tokens_than_positions_is_an_error():
    positions = AutoConfig.from_pretrained(MINI).n_positions
    models.check_model(get_profile("quick", max_tokens=positions))
    with pytest.raises(ModelError, match=f"max_tokens is {positions + 1}: 'mini' takes at most {positions}"):
        models.check_model(get_profile("quick", max_tokens=positions + 1))


def test_a_student_deeper_than_the_model_is_an_error_before_the_run():
    with pytest.raises(ModelError, match=r"student_layers is \(99,\): the teacher 'mini' has \d+ layers"):
        models.check_model(get_profile("quick", student_layers="99"))


@pytest.fixture
def local_folder(tmp_path):
    """The shipped tokenizer beside a random model of its vocabulary, as a user's own folder."""
    for file in MINI.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    torch.manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(MINI).vocab_size
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, vocab_size=vocabulary, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder_is_a_model(local_folder):
    profile = get_profile("quick", model=str(local_folder), max_tokens=64, embedding_rank=4)
    models.check_model(profile)
    assert len(prunable_weights(create_model(profile))) == 8


def test_a_tokenizer_without_padding_token_pads_with_end_of_text(local_folder):
    path = local_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))
    profile = get_profile("quick", model=str(local_folder), max_tokens=64)
    tokenizer = models.load_tokenizer(profile)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.padding_side == "right"
    assert create_model(profile).config.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_embeddings_is_an_error(local_folder):
    config = json.loads((local_folder / "config.json").read_text()) | {"vocab_size": 100}
    (local_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"100 embeddings, its tokenizer \d+ tokens: they do not belong together"):
        models.check_model(get_profile("quick", model=str(local_folder), max_tokens=64))


# --- prediction ---


@pytest.fixture
def token_rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, length).tolist() for length in rng.permutation(np.arange(1, 17))]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_logits_come_in_the_order_of_the_reviews_whatever_the_batches(token_rows, batch_size):
    model = tiny_gpt2(spread=0.3).train()
    found = predict_logits(model, token_rows, batch_size)
    assert found.shape == (16, 2)
    assert found.dtype == np.float32
    assert not model.training, "dropout must be off"
    with torch.inference_mode():
        alone = np.concatenate([model(input_ids=torch.tensor([row])).logits.numpy() for row in token_rows])
    # float32 products of width 8 to 32 in another order: a few 1e-7.
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.ptp(alone[:, 0]) > 0.1, "rows that are all alike would show no order"


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_models_are_judged_in_the_precision_that_is_asked_for(token_rows, precision, dtype):
    model, seen = tiny_gpt2(spread=0.3), []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    found = predict_logits(model, token_rows, precision=precision)
    assert set(seen) == {dtype}
    assert found.dtype == np.float32
    exact = predict_logits(model, token_rows)
    # bfloat16 keeps 8 binary digits.
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())
    assert np.array_equal(found, exact) == (precision == "no")


def test_no_reviews_and_logits_that_are_not_finite_are_errors(token_rows):
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="there are no reviews to predict"):
        predict_logits(model, [])
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        predict_logits(model, token_rows)
