"""The chain of heavy computations on the smallest profile: what it leaves, what it repeats and what it does not."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from nbhelpers import experiments
from nbhelpers.criteria import COMPARATORS
from nbhelpers.data import load_reviews, tokenize
from nbhelpers.evaluation import evaluate_accuracy, mcnemar
from nbhelpers.masks import select, select_structures
from nbhelpers.models import blocks, create_student, load_dense, load_tokenizer, prunable_weights, structures
from nbhelpers.profiles import get_profile
from nbhelpers.statistics import calibrate
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import Run, WorkspaceError, open_run

CRITERIA = ("magnitude", "movement", "gradient", "merged")
# float32 everywhere, so that a second computation gives the same bits; enough steps for weights to move.
SETTINGS = {"precision": "no", "learning_rate": 5e-3, "recovery_learning_rate": 5e-3, "distill_learning_rate": 5e-3}


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Precision is one a process in Accelerate, and one thread is enough for matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def in_own_root(tmp_path_factory, alone):
    """Artefacts of this file lie in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(tmp_path_factory.mktemp("root")))
        patch.delenv("NBHELPERS_FORCE", raising=False)
        patch.setenv("NBHELPERS_BATCH", "1")
        yield patch


@pytest.fixture(scope="module")
def chain(in_own_root) -> tuple[Run, pd.DataFrame, pd.DataFrame]:
    """A run after fine-tuning, all recoveries, the sparse conversion and all students, and what they returned."""
    run = open_run(get_profile("smoke", **SETTINGS), 0)
    experiments.finetune_model(run)
    recovered = experiments.recover_all(run)
    students = experiments.distil_all(run)
    experiments.sparsify(run, "merged", 0.9)
    run.record("pruning", best_criterion="merged")
    experiments.compact_model(run, 0.5)
    return run, recovered, students


def created(run: Run) -> dict[str, str]:
    """When each artefact of a run was made."""
    records = [json.loads(path.read_text()) for path in run.artifacts.glob("*/artifact.json")]
    return {record["name"]: record["created"] for record in records}


# --- what is left ---


def test_the_chain_leaves_the_models_that_it_promises(chain):
    run, recovered, students = chain
    expected = [
        "pretrained",
        "fine_tuned",
        "fine_tuned_extra",
        *(f"recovered_{criterion}_90" for criterion in CRITERIA),
        *(f"student_{variant}_1" for variant in ("distilled", "labels_only", "distilled_random")),
        "sparse_merged_90",
        "structured_merged_50",
        "compact_merged_50",
    ]
    assert run.models() == expected, "oldest first; the students of the scan are no models of the run"
    assert recovered["criterion"].tolist() == list(CRITERIA)
    assert students["model"].tolist() == [name for name in expected if name.startswith("student_")]
    for name in expected:
        assert not run.load_model(name).training
        if name != "pretrained" and not name.startswith(("sparse", "compact")):
            history = experiments.read_history(run, name)
            assert np.isfinite(history["loss"]).all()
            # Recovery makes no choice among checkpoints, so it validates none on the way.
            chosen = name == "fine_tuned" or name.startswith("student_")
            assert ("accuracy" in history) == chosen
            assert not chosen or history["accuracy"].between(0, 1).all()


def test_training_moved_every_model_away_from_the_one_it_started_from(chain):
    run, *_ = chain
    pretrained, fine_tuned = (run.load_model(name) for name in ("pretrained", "fine_tuned"))
    for name, weight in prunable_weights(fine_tuned).items():
        assert not torch.equal(weight, prunable_weights(pretrained)[name])
    extra = run.load_model("fine_tuned_extra")
    assert not torch.equal(extra.score.weight, fine_tuned.score.weight)


def test_the_fine_tuned_artefact_holds_what_was_observed_of_every_prunable_weight(chain):
    run, *_ = chain
    weights, found = prunable_weights(run.load_model("fine_tuned")), experiments.load_statistics(run, "fine_tuned")
    assert set(found) == {"mean_abs_gradient", "first_order_movement"}
    for tensors in found.values():
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: w.shape for n, w in weights.items()}
    assert all((tensor >= 0).all() and tensor.mean() > 0 for tensor in found["mean_abs_gradient"].values())
    assert any((tensor < 0).any() for tensor in found["first_order_movement"].values())


def test_comparators_are_computed_from_the_calibration_of_the_fine_tuned_model(chain):
    run, *_ = chain
    scores = experiments.score_weights(run, COMPARATORS)
    data, model = experiments.dataset(run, "train"), run.load_model("fine_tuned")
    chosen = np.linspace(0, len(data) - 1, 8).round().astype(int)
    expected = calibrate(model, [data.input_ids[i] for i in chosen], data.labels[chosen].tolist())
    assert set(data.labels[chosen]) == {0, 1}
    for name, weight in prunable_weights(model).items():
        taylor = weight.detach().abs() * expected["calibration_gradient"][name]
        torch.testing.assert_close(scores["taylor"][name], taylor, rtol=1e-4, atol=1e-9)
    assert list(scores) == list(COMPARATORS)


def test_the_other_ways_to_recover_end_at_the_same_masks_with_other_weights(chain):
    run, *_ = chain
    masks = select(experiments.with_merge(experiments.score_weights(run))["merged"], 0.9)
    names = [
        "recovered_merged_90",
        *(experiments.recover_otherwise(run, w, "merged", 0.9) for w in ("gradual", "taught")),
    ]
    models = [run.load_model(name) for name in names]
    for model in models:
        assert all(torch.equal(weight != 0, masks[name]) for name, weight in prunable_weights(model).items())
    heads = [model.score.weight for model in models]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    steps = [experiments.read_history(run, name)["steps"].max() for name in names]
    assert set(steps) == {run.profile.recovery_steps}


def test_a_compact_model_says_what_the_structured_one_says(chain):
    run, *_ = chain
    masked, small = run.load_model("structured_merged_50"), run.load_model("compact_merged_50")
    scores = experiments.with_merge(experiments.score_weights(run))["merged"]
    masks = select_structures(scores, structures(run.load_model("fine_tuned")), 0.5)
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in prunable_weights(masked).items())
    logits = [experiments.split_logits(run, f"{kind}_merged_50", "validation") for kind in ("structured", "compact")]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    assert sum(small.config.kept_neurons) < 2 * 4 * masked.config.n_embd


def test_scores_are_the_criteria_of_the_weights_on_disk(chain):
    run, *_ = chain
    scores = experiments.score_weights(run)
    after, before = (prunable_weights(load_dense(run.folder(name))) for name in ("fine_tuned", "pretrained"))
    assert list(scores) == ["magnitude", "movement", "gradient"]
    for name, weight in after.items():
        assert torch.equal(scores["magnitude"][name], weight.abs())
        assert torch.equal(scores["movement"][name], (weight - before[name]).abs())
        assert torch.equal(
            scores["gradient"][name], experiments.load_statistics(run, "fine_tuned")["mean_abs_gradient"][name]
        )


def test_recovered_models_have_exactly_the_zeros_of_their_masks(chain):
    run, recovered, _ = chain
    scores = experiments.with_merge(experiments.score_weights(run))
    total = sum(weight.numel() for weight in prunable_weights(run.load_model("fine_tuned")).values())
    for row, criterion in zip(recovered.itertuples(), CRITERIA, strict=True):
        masks = select(scores[criterion], 0.9)
        weights = prunable_weights(run.load_model(f"recovered_{criterion}_90"))
        assert all(torch.equal(weight != 0, masks[name]) for name, weight in weights.items())
        assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.9 * total)
        assert row.revived == 0
        assert row.sparsity == pytest.approx(round(0.9 * total) / total)


def test_what_a_recovery_reports_is_true_of_the_model_that_it_saved(chain):
    run, recovered, _ = chain
    data = experiments.dataset(run, "validation")
    for row in recovered.itertuples():
        model = run.load_model(f"recovered_{row.criterion}_90")
        weights = prunable_weights(model).values()
        zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        assert row.accuracy == evaluate_accuracy(model, data)
        assert zeros == round(0.9 * total)
        assert row.sparsity == pytest.approx(zeros / total)
        assert row.revived == 0


def test_the_dense_control_had_the_same_extra_steps_as_every_recovery(chain):
    run, *_ = chain
    names = ["fine_tuned_extra", *(f"recovered_{criterion}_90" for criterion in CRITERIA)]
    assert [experiments.read_history(run, name)["steps"].iloc[-1] for name in names] == [3] * 5


def test_the_sparse_model_computes_what_the_recovered_one_does(chain):
    run, *_ = chain
    sparse, dense = (experiments.split_logits(run, f"{kind}_merged_90", "test") for kind in ("sparse", "recovered"))
    # float32 sums of at most 128 terms in another order, through two blocks.
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


def test_students_have_fewer_layers_and_follow_the_best_of_the_scan(chain):
    run, _, students = chain
    assert students["layers"].tolist() == [1, 1, 1]
    assert students["alpha"].tolist() == [0.5, 1.0, 0.5]
    assert students["from_teacher"].tolist() == [True, True, False]
    assert students["temperature"].tolist() == [2.0] * 3
    for row in students.itertuples():
        model = run.load_model(row.model)
        assert len(blocks(model)) == 1
        assert row.accuracy == evaluate_accuracy(model, experiments.dataset(run, "validation"))


def test_a_student_of_the_labels_alone_is_one_that_plain_training_gives(chain):
    run, *_ = chain
    student = create_student(run.load_model("fine_tuned"), 1, run.seed)
    train(
        student,
        experiments.dataset(run, "train"),
        recipe_for(run.profile, "distill"),
        seed=run.seed,
        validate=experiments.validator(run),
    )
    saved = run.load_model("student_labels_only_1").state_dict()
    # alpha = 1 leaves the soft term out but computes it: no more than rounding is between the two.
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=1e-4, atol=1e-5)
    distilled = run.load_model("student_distilled_1").state_dict()
    assert (distilled["score.weight"] - saved["score.weight"]).abs().max() > 1e-4, "the teacher makes a difference"


# --- what is not done twice ---


def test_a_second_call_finds_everything_and_trains_nothing(chain, monkeypatch):
    run, recovered, students = chain
    before = created(run)

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(experiments, "train", never)
    monkeypatch.setattr(experiments, "predict_logits", never)
    again = open_run(get_profile("smoke", **SETTINGS), 0)
    curve = experiments.finetune_model(again)
    assert curve["steps"].tolist() == [6]
    pd.testing.assert_frame_equal(experiments.recover_all(again), recovered)
    pd.testing.assert_frame_equal(experiments.distil_all(again), students)
    experiments.sparsify(again, "merged", 0.9)
    assert created(run) == before


@pytest.fixture
def elsewhere(in_own_root, tmp_path):
    """Another empty root, for runs that are changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_ROOT", str(tmp_path))
        yield tmp_path


def test_a_changed_setting_trains_again_what_depends_on_it_and_nothing_else(elsewhere):
    def made(**changes):
        run = open_run(get_profile("smoke", **SETTINGS | changes), 0)
        experiments.finetune_model(run)
        experiments.train_control(run)
        return created(run)

    first = made()
    control = {"fine_tuned_extra", "logits_fine_tuned_extra_validation"}
    assert set(first) == {"pretrained", "fine_tuned", *control}
    assert made() == first
    recovery = made(recovery_steps=2)
    assert {name for name in first if recovery[name] != first[name]} == control
    longer = made(recovery_steps=2, epochs=2)
    assert {name for name in first if longer[name] != recovery[name]} == {"fine_tuned", *control}
    measured = made(recovery_steps=2, epochs=2, latency_repeats=7, student_layers=(2,))
    assert measured == longer, "what a model does not depend on does not train it again"
    dropout = made(recovery_steps=2, epochs=2, dropout=0.2)
    assert not {name for name in first if dropout[name] == longer[name]}


def test_another_seed_is_another_run(chain):
    run, *_ = chain
    other = open_run(run.profile, 1)
    before = created(run)
    experiments.save_pretrained_model(other)
    assert other.models() == ["pretrained"]
    assert created(run) == before
    assert not torch.equal(other.load_model("pretrained").score.weight, run.load_model("pretrained").score.weight)


def test_an_interrupted_training_leaves_no_artefact(elsewhere, monkeypatch):
    run = open_run(get_profile("smoke", **SETTINGS), 0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiments.finetune_model(run)
    assert run.models() == ["pretrained"]
    with pytest.raises(WorkspaceError, match=r"fine_tuned is missing .* run notebook 01"):
        run.load_model("fine_tuned")


# --- predictions ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_logits_are_the_models_own_in_the_order_of_the_reviews(chain, split):
    run, *_ = chain
    found = experiments.split_logits(run, "fine_tuned", split)
    model, texts = run.load_model("fine_tuned"), list(load_reviews(run.profile, run.seed)[split]["text"])
    with torch.inference_mode():
        alone = [
            model(input_ids=torch.tensor([ids])).logits[0].numpy()
            for ids in tokenize(texts, load_tokenizer(run.profile), run.profile)
        ]
    assert found.shape == (len(texts), 2)
    # Padded batches against single reviews, float32.
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)


def test_predict_gives_the_probability_of_positive_and_agrees_with_the_logits(chain):
    run, *_ = chain
    texts = list(load_reviews(run.profile, run.seed)["test"]["text"])
    for name in ("fine_tuned", "recovered_merged_90", "sparse_merged_90", "student_distilled_1"):
        found = run.predict(name, texts)
        assert found.shape == (len(texts),)
        assert ((found >= 0) & (found <= 1)).all()
        expected = experiments.probabilities(experiments.split_logits(run, name, "test"))[:, 1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_predict_cleans_what_it_is_given_and_does_not_mind_company(chain):
    run, *_ = chain
    one = run.predict("fine_tuned", ["A good film &amp; a fine cast."])
    raw = run.predict("fine_tuned", ["A good<br />film & a fine\n cast.", "", "<|pad|> " * 40])
    np.testing.assert_allclose(raw[0], one[0], atol=1e-6)
    assert np.isfinite(raw).all()


def test_the_reviews_that_a_model_gets_right_are_those_that_it_predicts_right_one_by_one(chain):
    run, *_ = chain
    reviews = load_reviews(run.profile, run.seed)["validation"]
    expected = [(run.predict("fine_tuned", [row["text"]])[0] > 0.5) == row["label"] for row in reviews]
    assert experiments.answers_right(run, "fine_tuned", "validation").tolist() == expected
    assert experiments.validation_accuracy(run, "fine_tuned") == pytest.approx(np.mean(expected))


def test_probabilities_are_a_softmax_that_temperature_softens():
    logits = np.array([[0.0, np.log(3.0)], [2.0, 2.0]])
    np.testing.assert_allclose(experiments.probabilities(logits), [[0.25, 0.75], [0.5, 0.5]])
    # Half the logits: the square roots of the odds.
    np.testing.assert_allclose(experiments.probabilities(logits, 2.0)[0, 1], 3**0.5 / (1 + 3**0.5))


# --- comparison ---


def test_the_comparison_has_a_row_a_model_and_the_columns_of_the_contract(chain):
    run, *_ = chain
    names = experiments.compared_models(run)
    assert names == [
        "fine_tuned",
        "fine_tuned_extra",
        *(f"recovered_{criterion}_90" for criterion in CRITERIA),
        "sparse_merged_90",
        "compact_merged_50",
        "student_distilled_1",
        "student_labels_only_1",
        "student_distilled_random_1",
    ]
    table = experiments.comparison_table(run, names)
    required = (
        "model accuracy accuracy_low accuracy_high f1 total_parameters active_parameters encoder_sparsity file_bytes "
        "latency_ms speedup peak_memory_bytes p_value"
    )
    assert set(required.split()) <= set(table.columns)
    assert table["model"].tolist() == names
    numbers = table.drop(columns="model").to_numpy(dtype=float)
    assert np.isfinite(numbers).all()
    table = table.set_index("model")
    assert table.loc["fine_tuned", ["speedup", "p_value"]].tolist() == [1.0, 1.0]
    labels = np.array(load_reviews(run.profile, run.seed)["test"]["label"])
    right = {
        name: (run.predict(name, experiments.reviews_of(run.profile, 0)["test"]["text"]) > 0.5) == labels
        for name in names
    }
    for name in names:
        assert table.loc[name, "accuracy"] == pytest.approx(right[name].mean())
        assert table.loc[name, "p_value"] == pytest.approx(mcnemar(right[name], right["fine_tuned"]))
    dense, pruned = run.load_model("fine_tuned"), run.load_model("recovered_merged_90")
    total = sum(parameter.numel() for parameter in dense.parameters())
    assert table.loc["fine_tuned", "total_parameters"] == total
    dropped = sum(int((weight == 0).sum()) for weight in prunable_weights(pruned).values())
    gone = table["total_parameters"] - table["active_parameters"]
    assert gone["recovered_merged_90"] == dropped
    # In matrices as small as these some neurons have nothing left; their biases and last weights go as well.
    assert dropped <= gone["sparse_merged_90"] < 1.05 * dropped
    for name in ("recovered_merged_90", "sparse_merged_90"):
        assert table.loc[name, "encoder_sparsity"] == pytest.approx(0.9, abs=0.03)
    assert table.loc["student_distilled_1", "total_parameters"] < total
    weights = run.folder("fine_tuned") / "model.safetensors"
    assert table.loc["fine_tuned", "file_bytes"] == weights.stat().st_size, "gradients beside the model do not count"
    assert table.loc["sparse_merged_90", "file_bytes"] < table.loc["fine_tuned", "file_bytes"]


def test_a_comparison_without_its_models_says_which_notebook_to_run(elsewhere):
    run = open_run(get_profile("smoke", **SETTINGS), 0)
    with pytest.raises(WorkspaceError, match=r"fine_tuned is missing .* run notebook 01"):
        experiments.compared_models(run)
    with pytest.raises(WorkspaceError, match="run notebook 03"):
        experiments.best_criterion(run)


def test_the_best_criterion_and_its_masks_come_from_the_results(chain):
    run, *_ = chain
    run.record("pruning", best_criterion="movement")
    assert experiments.best_criterion(run) == "movement"
    expected = select(experiments.score_weights(run)["movement"], 0.7)
    found = experiments.masks_of(run, 0.7)
    assert all(torch.equal(mask, found[name]) for name, mask in expected.items())
    run.record("pruning", best_criterion="merged")


def test_a_latency_batch_spreads_over_the_lengths_of_the_test_reviews(chain):
    run, *_ = chain
    rows = experiments.dataset(run, "test").input_ids
    batch = experiments.latency_batch(run, 4)["input_ids"]
    pad = load_tokenizer(run.profile).pad_token_id
    lengths = (batch != pad).sum(1).tolist()
    assert lengths == [sorted(map(len, rows))[place] for place in (3, 9, 15, 21)]
    assert all(row[row != pad].tolist() in rows for row in batch)


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [(0.9, "pruned_merged_90"), (0.95, "pruned_merged_95"), (0.975, "pruned_merged_97p5"), (0.29, "pruned_merged_29")],
)
def test_a_models_name_states_its_sparsity_in_percent(sparsity, name):
    assert experiments.model_name("pruned", "merged", sparsity) == name


def test_the_baseline_learns_words_and_word_pairs():
    texts = ["not good at all", "not good really", "good at all", "good really"] * 3
    model = experiments.tfidf_baseline(texts, [0, 0, 1, 1] * 3)
    assert model.predict(["not good", "good"]).tolist() == [0, 1]
    assert "not good" in model[0].vocabulary_


# --- from the command line ---


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *words])
    experiments.main()


def test_the_command_leaves_the_artefact_that_the_notebook_finds(elsewhere, monkeypatch, capsys):
    words = [word for field, value in SETTINGS.items() for word in ("--set", f"{field}={value}")]
    command(monkeypatch, "finetune", "--profile", "smoke", *words)
    assert "accuracy" in capsys.readouterr().out
    run = open_run(get_profile("smoke", **SETTINGS), 0)
    monkeypatch.setattr(experiments, "train", lambda *_, **__: pytest.fail("trained again"))
    experiments.finetune_model(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "nonsense"], "no profile 'nonsense'"),
        (["--set", "epochs=banana"], "epochs is 'banana'"),
        (["--set", "no_such_field=1"], "no field 'no_such_field'"),
        (["--set", "data=/no/such/file.csv"], "'/no/such/file.csv' does not exist"),
        (["--set", "model=/no/such/folder"], "'/no/such/folder' does not exist"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(elsewhere, monkeypatch, words, message):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "finetune", *(["--profile", "smoke"] if "--profile" not in words else []), *words)
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in elsewhere.rglob("*") if path.is_file() and "pretrained" not in path.parts]
