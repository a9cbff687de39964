"""Fine-tuning, students, predictions and the test part on the smallest profile: what is left and not done twice."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from nbhelpers.criteria import CRITERIA
from nbhelpers.data import load_reviews, tokenize
from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.masks import unpack
from nbhelpers.models import blocks, create_student, load_tokenizer, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.sparse import convert_to_sparse, save_sparse
from nbhelpers.study import (
    artefacts,
    baseline,
    comparison,
    conversion,
    fine_tuning,
    inputs,
    predictions,
    pruning,
    scoring,
    students,
)
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import Run, WorkspaceError, open_run

pytestmark = pytest.mark.usefixtures("alone")


def created(run: Run) -> dict[str, str]:
    """When each artefact of a run was made."""
    records = [json.loads(path.read_text()) for path in run.artifacts.glob("*/artifact.json")]
    return {record["name"]: record["created"] for record in records}


def new_run(**changes) -> Run:
    return open_run(get_profile("smoke", precision="no", learning_rate=5e-3, **changes), 0)


# --- what is left ---


def test_a_study_leaves_the_models_that_it_promises(study):
    recovered = [artefacts.model_name("recovered", c, s) for c, s in pruning.recoveries(study.run)]
    students = [f"student_{variant}_1" for variant in ("distilled", "labels_only", "distilled_random")]
    sparse = [f"{stage}_{study.best}_{p}" for stage, p in (("sparse", 90), ("structured", 50), ("compact", 50))]
    dense = ["pretrained", "fine_tuned", "fine_tuned_extra", *recovered]
    every = [*dense, *students, "compressed_1", *sparse]
    assert study.models[0] == every, "oldest first; the students of the scan are no models"
    assert study.models[1] == dense, "of every seed what is compared over seeds, and nothing else"
    assert study.students["model"].tolist() == students
    for name in study.models[0]:
        assert not study.run.load_model(name).training
        if name != "pretrained" and not name.startswith(("sparse", "compact")):
            history = artefacts.read_history(study.run, name)
            assert np.isfinite(history["loss"]).all()
            # Recovery makes no choice among checkpoints, so it validates none on the way.
            chosen = name == "fine_tuned" or name.startswith(("student_", "compressed_"))
            assert ("accuracy" in history) == chosen
            assert not chosen or history["accuracy"].between(0, 1).all()


def test_the_runs_of_a_profile_are_its_seeds_from_the_runs_own_upwards():
    run = open_run(get_profile("smoke", seeds=3), 4)
    assert [one.seed for one in inputs.runs_of(run)] == [4, 5, 6]
    assert {one.profile for one in inputs.runs_of(run)} == {run.profile}


def test_training_moved_every_model_away_from_the_one_it_started_from(study):
    pretrained, fine_tuned = (study.run.load_model(name) for name in ("pretrained", "fine_tuned"))
    for name, weight in prunable_weights(fine_tuned).items():
        assert not torch.equal(weight, prunable_weights(pretrained)[name])
    assert not torch.equal(study.run.load_model("fine_tuned_extra").score.weight, fine_tuned.score.weight)


def test_the_fine_tuned_artefact_holds_what_was_observed_of_every_prunable_weight(study):
    weights = prunable_weights(study.run.load_model("fine_tuned"))
    found = artefacts.load_statistics(study.run, "fine_tuned")
    assert set(found) == {"mean_abs_gradient", "first_order_movement"}
    for tensors in found.values():
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: w.shape for n, w in weights.items()}
    assert all((tensor >= 0).all() and tensor.mean() > 0 for tensor in found["mean_abs_gradient"].values())
    assert any((tensor < 0).any() for tensor in found["first_order_movement"].values())


def test_what_was_flagged_last_along_fine_tuning_is_what_the_scores_flag(study):
    flagged = fine_tuning.flagged_along_the_way(study.run)
    weights = prunable_weights(study.run.load_model("fine_tuned"))
    steps = {int(key.split("/")[0]) for key in flagged}
    assert steps == {0, 1, 2, 4, 6}
    for criterion in CRITERIA:
        found = unpack(flagged[f"6/{criterion}"], weights)
        expected = select(scoring.scores_of(study.run, criterion), 0.9)
        assert all(torch.equal(found[name], mask) for name, mask in expected.items()), criterion


def test_students_have_fewer_layers_and_follow_the_best_of_the_scan(study):
    students = study.students
    assert students["layers"].tolist() == [1, 1, 1]
    assert students["alpha"].tolist() == [0.5, 1.0, 0.5]
    assert students["from_teacher"].tolist() == [True, True, False]
    assert students["temperature"].tolist() == [2.0] * 3
    for row in students.itertuples():
        model = study.run.load_model(row.model)
        assert len(blocks(model)) == 1
        assert row.accuracy == evaluate_accuracy(model, inputs.dataset(study.run, "validation"))


def test_a_student_of_the_labels_alone_is_one_that_plain_training_gives(study):
    run = study.run
    student = create_student(run.load_model("fine_tuned"), 1, run.seed)
    train(
        student,
        inputs.dataset(run, "train"),
        recipe_for(run.profile, "distill"),
        seed=run.seed,
        validate=predictions.validator(run),
    )
    saved = run.load_model("student_labels_only_1").state_dict()
    # alpha = 1 leaves the soft term out but computes it: no more than rounding is between the two.
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=1e-4, atol=1e-5)
    distilled = run.load_model("student_distilled_1").state_dict()
    assert (distilled["score.weight"] - saved["score.weight"]).abs().max() > 1e-4, "the teacher makes a difference"


# --- what is not done twice ---


def test_a_second_call_finds_everything_and_computes_nothing(study, monkeypatch):
    before = [created(one) for one in inputs.runs_of(study.run)]

    def never(*_, **__):
        raise AssertionError("computed again")

    for module in (experiments, pruning):
        monkeypatch.setattr(module, "train", never)
        monkeypatch.setattr(module, "predict_logits", never)
    monkeypatch.setattr(pruning, "calibrate", never)
    again = open_run(dataclasses.replace(study.run.profile), 0)
    assert fine_tuning.finetune_model(again)["steps"].tolist() == [6]
    pd.testing.assert_frame_equal(pruning.recover_all(again), study.recovered)
    pd.testing.assert_frame_equal(students.distil_all(again), study.students)
    pruning.pruned_curves(again)
    conversion.sparsify(again, study.best, 0.9)
    conversion.compact_model(again, 0.5)
    assert [created(one) for one in inputs.runs_of(again)] == before


def test_dense_models_are_judged_in_the_precision_of_training_and_sparse_engines_in_float32(workspace, monkeypatch):
    run, asked = open_run(get_profile("smoke", precision="bf16"), 0), []
    fine_tuning.finetune_model(run)
    sparse = convert_to_sparse(run.load_model("fine_tuned"), "auto")
    run.cached("sparse", {}, lambda folder: save_sparse(sparse, folder), kind="sparse", made_by="04")

    def judge(model, rows, batch_size, precision):
        asked.append((batch_size, precision))
        return np.zeros((len(rows), 2), dtype=np.float32)

    monkeypatch.setattr(experiments, "predict_logits", judge)
    for name in ("fine_tuned", "sparse"):
        predictions.split_logits(run, name, "validation")
    assert asked == [(32, "bf16"), (32, "no")]


def test_a_changed_setting_trains_again_what_depends_on_it_and_nothing_else(workspace):
    def made(**changes):
        run = new_run(**changes)
        fine_tuning.finetune_model(run)
        pruning.train_control(run)
        return created(run)

    def changed(before, after):
        return {name for name in before | after if after.get(name) != before.get(name)}

    first = made()
    recovery = {"rates_control", "fine_tuned_extra", "logits_fine_tuned_extra_validation"}
    assert set(first) == {"pretrained", "fine_tuned"} | recovery
    assert made() == first
    steps = made(recovery_steps=2)
    assert changed(first, steps) == recovery
    longer = made(recovery_steps=2, epochs=2)
    assert changed(steps, longer) == {"fine_tuned"} | recovery
    measured = made(recovery_steps=2, epochs=2, latency_repeats=7, student_layers=(2,), seeds=3)
    assert measured == longer, "what a model does not depend on does not train it again"
    rates = made(recovery_steps=2, epochs=2, recovery_learning_rates=(2e-3,))
    assert changed(longer, rates) == recovery
    assert changed(rates, made(recovery_steps=2, epochs=2, dropout=0.2)) == set(first)


def test_another_seed_is_another_run_of_the_same_test_reviews(study):
    first, second = inputs.runs_of(study.run)
    assert first.artifacts != second.artifacts
    heads = [one.load_model("pretrained").score.weight for one in (first, second)]
    assert not torch.equal(*heads)
    trained = [prunable_weights(one.load_model("fine_tuned")) for one in (first, second)]
    assert not any(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    for split in ("validation", "test"):
        texts = [inputs.reviews_of(one.profile, one.seed)[split]["text"][:] for one in (first, second)]
        assert texts[0] == texts[1], "answers of seeds are paired review by review"


def test_an_interrupted_training_leaves_no_artefact(workspace, monkeypatch):
    run = new_run()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.finetune_model(run)
    assert run.models() == ["pretrained"]
    with pytest.raises(WorkspaceError, match=r"fine_tuned is missing .* run notebook 01"):
        run.load_model("fine_tuned")


# --- predictions ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_logits_are_the_models_own_in_the_order_of_the_reviews(study, split):
    run = study.run
    found = predictions.split_logits(run, "fine_tuned", split)
    model, texts = run.load_model("fine_tuned"), list(load_reviews(run.profile, run.seed)[split]["text"])
    with torch.inference_mode():
        alone = [
            model(input_ids=torch.tensor([ids])).logits[0].numpy()
            for ids in tokenize(texts, load_tokenizer(run.profile), run.profile)
        ]
    assert found.shape == (len(texts), 2)
    # Padded batches against single reviews, float32.
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)


def test_predict_gives_the_probability_of_positive_and_agrees_with_the_logits(study):
    run = study.run
    texts = list(load_reviews(run.profile, run.seed)["test"]["text"])
    for name in ("fine_tuned", "recovered_merged_90", f"sparse_{study.best}_90", "student_distilled_1"):
        found = run.predict(name, texts)
        assert found.shape == (len(texts),)
        assert ((found >= 0) & (found <= 1)).all()
        expected = predictions.probabilities(predictions.split_logits(run, name, "test"))[:, 1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_predict_cleans_what_it_is_given_and_does_not_mind_company(study):
    one = study.run.predict("fine_tuned", ["A good film &amp; a fine cast."])
    raw = study.run.predict("fine_tuned", ["A good<br />film & a fine\n cast.", "", "<|pad|> " * 40])
    np.testing.assert_allclose(raw[0], one[0], atol=1e-6)
    assert np.isfinite(raw).all()


def test_the_reviews_that_a_model_gets_right_are_those_that_it_predicts_right(study):
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


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [(0.9, "pruned_merged_90"), (0.95, "pruned_merged_95"), (0.975, "pruned_merged_97p5"), (0.29, "pruned_merged_29")],
)
def test_a_models_name_states_its_sparsity_in_percent(sparsity, name):
    assert artefacts.model_name("pruned", "merged", sparsity) == name


def test_the_baseline_learns_words_and_word_pairs():
    texts = ["not good at all", "not good really", "good at all", "good really"] * 3
    model = baseline.tfidf_baseline(texts, [0, 0, 1, 1] * 3)
    assert model.predict(["not good", "good"]).tolist() == [0, 1]
    assert "not good" in model[0].vocabulary_


def test_the_baselines_logits_are_those_of_a_fit_on_the_training_reviews(study):
    parts = load_reviews(study.run.profile, study.run.seed)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    train_rows = vectorizer.fit_transform(parts["train"]["text"][:])
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(train_rows, parts["train"]["label"][:])
    expected = fitted.predict_proba(vectorizer.transform(parts["test"]["text"][:]))
    found = predictions.probabilities(predictions.split_logits(study.run, "tfidf", "test"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- the test part ---


def test_the_test_reviews_answer_no_model_that_is_not_declared(study):
    with pytest.raises(WorkspaceError, match=r"pretrained is not declared for the test reviews, .* use validation"):
        predictions.split_logits(study.run, "pretrained", "test")
    with pytest.raises(WorkspaceError, match="not declared"):
        predictions.right_over_seeds(study.run, f"structured_{study.best}_50", "test")
    assert len(predictions.split_logits(study.run, "pretrained", "validation")) == 16
    assert len(predictions.split_logits(study.run, "fine_tuned", "test")) == 24


def test_the_test_part_is_opened_once_a_study(workspace):
    run = new_run()
    assert predictions.test_record(run)["models"] == []
    first = predictions.open_test(run, ["fine_tuned", "student"])
    assert (first["models"], first["reasons"], first["studies"]) == (["fine_tuned", "student"], [], 1)
    assert predictions.open_test(run, ["student", "fine_tuned"]) == first
    assert predictions.open_test(run, ["student"]) == first
    assert predictions.test_record(run) == first
    with pytest.raises(WorkspaceError, match=r"another.*again='the reason'"):
        predictions.open_test(run, ["fine_tuned", "another"])
    assert predictions.test_record(run) == first, "what was refused leaves nothing"
    later = predictions.open_test(run, ["another"], again="the recipe had a bug")
    assert later["models"] == ["fine_tuned", "student", "another"]
    assert later["reasons"] == ["the recipe had a bug"]
    assert predictions.open_test(run, ["more"], again="and one more")["reasons"] == [
        "the recipe had a bug",
        "and one more",
    ]
    assert predictions.test_record(run)["studies"] == 1


def test_other_settings_are_another_study_and_the_studies_are_counted(workspace):
    first = predictions.open_test(new_run(), ["fine_tuned"])
    assert first["studies"] == 1
    other = new_run(recovery_steps=2)
    assert predictions.test_record(other)["models"] == []
    with pytest.raises(WorkspaceError, match="not declared"):
        predictions.split_logits(other, "fine_tuned", "test")
    assert predictions.test_record(new_run())["models"] == ["fine_tuned"], "asking is no study"
    assert predictions.open_test(other, ["another"])["studies"] == 2
    assert predictions.open_test(other, ["another"])["studies"] == 2
    with pytest.raises(WorkspaceError, match="another"):
        predictions.open_test(new_run(), ["another"])
    assert predictions.open_test(new_run(), ["fine_tuned"])["studies"] == 2, "whoever goes back finds what was declared"


def test_other_code_is_another_study(workspace, monkeypatch):
    predictions.open_test(new_run(), ["fine_tuned"])
    monkeypatch.setattr(experiments, "code_fingerprint", lambda *modules: "other")
    assert predictions.open_test(new_run(), ["fine_tuned"])["studies"] == 2


def test_every_seed_keeps_a_record_of_its_own(study):
    first, second = (predictions.test_record(one) for one in inputs.runs_of(study.run))
    recovered = [artefacts.model_name("recovered", c, s) for c, s in pruning.recoveries(study.run)]
    assert set(second["models"]) == {"fine_tuned", "fine_tuned_extra", *recovered}
    assert set(first["models"]) == {*second["models"], *comparison.compared_models(study.run), "tfidf"}
    assert (first["studies"], second["studies"]) == (1, 1)
