"""Logits of a run's models, once per model and split; and the register that lets the test reviews be used once."""

import json

import numpy as np
import pytest
import torch

from nbhelpers import workspace as workspace_module
from nbhelpers.data import load_reviews, tokenize
from nbhelpers.evaluation import predict_logits
from nbhelpers.models import load_tokenizer
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import SparseGPT2ForSequenceClassification, convert_to_sparse, save_sparse
from nbhelpers.study import comparison, fine_tuning, inputs, predictions
from nbhelpers.workspace import Run, WorkspaceError, open_run

pytestmark = pytest.mark.usefixtures("alone")


def new_run(**changes) -> Run:
    return open_run(get_profile("smoke", precision="no", **changes), 0)


# --- logits ---


def test_split_logits_are_the_models_own_in_the_order_of_the_reviews(study):
    run = study.run
    found = predictions.split_logits(run, "fine_tuned", "test")
    model, texts = run.load_model("fine_tuned"), list(load_reviews(run.profile, run.seed)["test"]["text"])
    with torch.inference_mode():
        alone = [
            model(input_ids=torch.tensor([ids])).logits[0].numpy()
            for ids in tokenize(texts, load_tokenizer(run.profile), run.profile)
        ]
    assert found.shape == (len(texts), 2)
    # Padded batches against single reviews, float32.
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)


def test_predict_agrees_with_the_logits_of_the_same_texts(study):
    run = study.run
    texts = list(load_reviews(run.profile, run.seed)["test"]["text"])
    for name in ("fine_tuned", "recovered_merged_90", f"sparse_{study.best}_90", "student_distilled_1"):
        found = run.predict(name, texts)
        assert found.shape == (len(texts),)
        assert ((found >= 0) & (found <= 1)).all()
        expected = predictions.probabilities(predictions.split_logits(run, name, "test"))[:, 1]
        # The same batches in float32; a sparse layer may take another engine where it is loaded again.
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_models_are_evaluated_in_the_precision_of_training_and_sparse_engines_in_float32(workspace, monkeypatch):
    run = open_run(get_profile("smoke", precision="bf16"), 0)
    fine_tuning.finetune_model(run)
    sparse = convert_to_sparse(run.load_model("fine_tuned"), "auto")
    run.cached("sparse", {}, lambda target: save_sparse(sparse, target.folder), kind="sparse", made_by="04")
    assert run.inference_options() == {"batch_size": 32, "precision": "bf16"}
    assert run.inference_options(sparse=True) == {"batch_size": 32, "precision": "no"}
    texts = inputs.reviews_of(run.profile, run.seed)["validation"]["text"][:]
    chances = {}
    for name in ("fine_tuned", "sparse"):
        chances[name] = run.predict(name, texts)
        expected = predictions.probabilities(predictions.split_logits(run, name, "validation"))[:, 1]
        # The same computation twice: what remains is float32 rounding of the softmax.
        np.testing.assert_allclose(chances[name], expected, atol=1e-6)
    # bfloat16 has 8 bits: the dense model differs from the same weights in float32.
    assert not np.allclose(chances["fine_tuned"], chances["sparse"], atol=1e-6)


def test_in_float32_a_dense_model_is_judged_packed_with_the_logits_of_the_plain_path(study, monkeypatch):
    run, seen = study.run, []
    model, rows = run.load_model("fine_tuned"), inputs.dataset(study.run, "validation").input_ids
    plain = predict_logits(model, rows, 32)
    monkeypatch.setattr(
        workspace_module, "predict_logits", lambda m, *a, **k: seen.append(m) or predict_logits(m, *a, **k)
    )
    found = run.judge(model, rows)
    assert isinstance(seen[0], SparseGPT2ForSequenceClassification)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    sparse = convert_to_sparse(model, "auto")
    np.testing.assert_allclose(run.judge(sparse, rows), plain, atol=1e-5)
    assert seen[1] is sparse, "it is packed already"
    run = open_run(get_profile("smoke", precision="bf16"), 0)
    run.judge(model, rows)
    assert seen[2] is model, "packed, bfloat16 is no faster"


def test_predict_cleans_its_texts_and_gives_the_same_in_any_batch(study):
    one = study.run.predict("fine_tuned", ["A good film &amp; a fine cast."])
    raw = study.run.predict("fine_tuned", ["A good<br />film & a fine\n cast.", "", "<|pad|> " * 40])
    # Padded to the longest of another batch, float32.
    np.testing.assert_allclose(raw[0], one[0], atol=1e-6)
    assert np.isfinite(raw).all()


def test_right_are_the_reviews_whose_label_is_predicted(study):
    found, expected = predictions.right_over_seeds(study.run, "fine_tuned", "validation"), []
    for one in inputs.runs_of(study.run):
        reviews = load_reviews(one.profile, one.seed)["validation"]
        chances = one.predict("fine_tuned", reviews["text"][:])
        expected.append([(p > 0.5) == (label == 1) for p, label in zip(chances, reviews["label"], strict=True)])
        assert predictions.answers_right(one, "fine_tuned", "validation").tolist() == expected[-1]
        assert predictions.validation_accuracy(one, "fine_tuned") == pytest.approx(np.mean(expected[-1]))
    assert found.dtype == bool
    assert found.tolist() == expected


def test_probabilities_are_a_softmax_that_temperature_softens():
    logits = np.array([[0.0, np.log(3.0)], [2.0, 2.0]])
    np.testing.assert_allclose(predictions.probabilities(logits), [[0.25, 0.75], [0.5, 0.5]])
    # Half the logits: the square roots of the odds.
    np.testing.assert_allclose(predictions.probabilities(logits, 2.0)[0, 1], 3**0.5 / (1 + 3**0.5))


def test_a_latency_batch_spreads_over_the_lengths_of_the_test_reviews(study):
    rows = inputs.dataset(study.run, "test").input_ids
    batch = inputs.latency_batch(study.run, 4)["input_ids"]
    pad = load_tokenizer(study.run.profile).pad_token_id
    lengths = (batch != pad).sum(1).tolist()
    assert lengths == [sorted(map(len, rows))[place] for place in (3, 9, 15, 21)]
    assert all(row[row != pad].tolist() in rows for row in batch)


# --- the register of the test reviews ---


def test_only_registered_models_are_evaluated_on_the_test_reviews(study):
    with pytest.raises(WorkspaceError, match=r"pretrained is not registered for the test reviews, .* use validation"):
        predictions.split_logits(study.run, "pretrained", "test")
    with pytest.raises(WorkspaceError, match="not registered"):
        predictions.right_over_seeds(study.run, f"structured_{study.best}_50", "test")
    assert len(predictions.split_logits(study.run, "pretrained", "validation")) == 16
    assert len(predictions.split_logits(study.run, "fine_tuned", "test")) == 24


def test_models_are_registered_once_per_study(workspace):
    run = new_run()
    assert predictions.test_record(run) == {"models": [], "reasons": [], "studies": 1}
    first = predictions.open_test(run, ["fine_tuned", "student"])
    assert first == {"models": ["fine_tuned", "student"], "reasons": [], "studies": 1}
    assert predictions.open_test(run, ["student", "fine_tuned"]) == first
    assert predictions.open_test(run, ["student"]) == first
    with pytest.raises(WorkspaceError, match=r"another.*again='the reason'"):
        predictions.open_test(run, ["fine_tuned", "another"])
    assert predictions.test_record(run) == first, "a refused call changes nothing"
    later = predictions.open_test(run, ["another"], again="the recipe had a bug")
    assert later["models"] == ["fine_tuned", "student", "another"]
    assert later["reasons"] == ["the recipe had a bug"]
    more = predictions.open_test(run, ["more"], again="and one more")
    assert more["reasons"] == ["the recipe had a bug", "and one more"] and more["studies"] == 1


def test_other_settings_are_another_study_of_the_same_reviews(workspace):
    assert predictions.open_test(new_run(), ["fine_tuned"])["studies"] == 1
    other = new_run(recovery_epochs=2.0)
    assert predictions.test_record(other)["models"] == []
    with pytest.raises(WorkspaceError, match="not registered"):
        predictions.split_logits(other, "fine_tuned", "test")
    assert predictions.open_test(other, ["another"])["studies"] == 2
    assert predictions.open_test(other, ["another"])["studies"] == 2
    with pytest.raises(WorkspaceError, match="another"):
        predictions.open_test(new_run(), ["another"])
    assert predictions.open_test(new_run(), ["fine_tuned"])["studies"] == 2, "the first study is found again"


def test_other_code_is_another_study(workspace, monkeypatch):
    predictions.open_test(new_run(), ["fine_tuned"])
    monkeypatch.setattr(predictions, "code_fingerprint", lambda *modules: "other")
    assert predictions.open_test(new_run(), ["fine_tuned"])["studies"] == 2


def write_reviews(folder, tests):
    """A data set with an official test part of these texts."""
    folder.mkdir()
    train = [f"Review {i} of a film that I {'liked' if i % 2 else 'hated'}." for i in range(80)]
    for part, texts in (("train", train), ("test", tests)):
        rows = [f"{text},{i % 2}" for i, text in enumerate(texts)]
        (folder / f"{part}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(folder)


def test_studies_are_counted_over_profiles_that_share_test_reviews(workspace, tmp_path_factory):
    base = tmp_path_factory.mktemp("data")
    shared = write_reviews(base / "shared", [f"Test review {i}." for i in range(40)])
    apart = write_reviews(base / "apart", [f"Another test review {i}." for i in range(40)])

    def study(profile, data, **changes):
        return open_run(get_profile(profile, data=data, validation_size=16, train_size=20, **changes))

    smoke, quick = study("smoke", shared), study("quick", shared, test_size=40, model="tiny", embedding_rank=4)
    reviews = [set(predictions.review_hashes(run)) for run in (smoke, quick)]
    assert reviews[0] < reviews[1], "of different sizes, and some in common"
    assert predictions.open_test(smoke, ["fine_tuned"])["studies"] == 1
    assert predictions.open_test(quick, ["fine_tuned"])["studies"] == 2
    assert predictions.test_record(smoke)["studies"] == 2
    disjoint = predictions.open_test(study("smoke", apart), ["fine_tuned"])
    assert disjoint["studies"] == 1 and predictions.test_record(quick)["studies"] == 2
    # Another seed uses the same reviews for the same study.
    assert predictions.test_record(open_run(smoke.profile, 1)) == predictions.test_record(smoke)
    written = json.loads((workspace / ".artifacts" / "test_reviews.json").read_text())
    assert sorted(record["profile"] for record in written.values()) == ["quick", "smoke", "smoke"]


def test_a_study_registers_all_that_it_compares(study):
    record = predictions.test_record(study.run)
    expected = {*comparison.compared_models(study.run), "fine_tuned_extra", "tfidf", "tfidf_taught"}
    expected |= {f"recovered_{score}_{percent}" for score in study.run.profile.scores for percent in (50, 90)}
    expected |= {f"recovered_{study.best}_90_steps_1", "fine_tuned_extra_steps_1"}
    assert set(record["models"]) == expected
    assert (record["reasons"], record["studies"]) == ([], 1)
