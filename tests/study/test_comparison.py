"""The comparison of a finished study, against predictions of each model by itself."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from nbhelpers.evaluation import holm, mcnemar, sign_flip_test
from nbhelpers.models import load_tokenizer, prunable_weights
from nbhelpers.selection import select
from nbhelpers.study import artefacts, comparison, forgetting, inputs, predictions, pruning, scoring
from nbhelpers.study.forgetting import as_language_model, bits_per_byte, other_domain_texts
from nbhelpers.workspace import Run, open_run

pytestmark = pytest.mark.usefixtures("alone")

MAIN = ("magnitude", "movement", "gradient", "merged")
LINES = ("fine_tuned", "fine_tuned_extra")


@functools.cache
def right(run: Run, name: str, split: str = "test", seeds: int = 2) -> np.ndarray:
    """Which reviews a model of the first seeds predicts right, from its predictions on the texts: [seeds, n]."""
    reviews = inputs.reviews_of(run.profile, run.seed)[split]
    answers = [one.predict(name, reviews["text"][:]) > 0.5 for one in inputs.runs_of(run)[:seeds]]
    return np.stack(answers) == np.array(reviews["label"], bool)


# --- one seed ---


def test_compared_are_the_models_of_all_notebooks_in_their_order(study):
    assert comparison.compared_models(study.run) == [
        "fine_tuned",
        "fine_tuned_extra",
        *(f"recovered_{criterion}_90" for criterion in (*MAIN, study.comparator)),
        f"sparse_{study.best}_90",
        f"compact_{study.best}_50",
        "int8_fine_tuned",
        f"int8_blocks_{study.best}_90",
        f"int8_compact_{study.best}_50",
        "student_distilled_1",
        "student_labels_only_1",
        "student_distilled_random_1",
        "compressed_1",
    ]


def test_the_comparison_has_a_row_per_model_and_the_columns_of_the_contract(study):
    run, sparse = study.run, f"sparse_{study.best}_90"
    recovered = f"recovered_{study.best}_90"
    names = comparison.compared_models(run)
    table = comparison.comparison_table(run, names)
    required = (
        "model accuracy accuracy_low accuracy_high f1 total_parameters active_parameters encoder_sparsity file_bytes "
        "train_steps train_tokens latency_ms speedup speedup_packed peak_memory_bytes p_value"
    )
    assert set(required.split()) <= set(table.columns)
    assert table["model"].tolist() == names
    numbers = table.drop(columns="model").to_numpy(dtype=float)
    assert np.isfinite(numbers).all()
    table = table.set_index("model")
    assert table.loc["fine_tuned", ["speedup", "p_value", "train_steps", "train_tokens"]].tolist() == [1, 1, 0, 0]
    # Both are quotients of two latencies of the same turns, one of them of medians and one a median of quotients.
    packed = table["speedup_packed"] * table["latency_ms"]
    assert packed.to_numpy() == pytest.approx(packed.iloc[0])
    tokens = sum(map(len, inputs.dataset(run, "train").input_ids))
    trained = table[["train_steps", "train_tokens"]].T
    assert trained[recovered].tolist() == trained[sparse].tolist() == trained["fine_tuned_extra"].tolist()
    assert trained[recovered]["train_steps"] == 3 and 0 < trained[recovered]["train_tokens"] < tokens
    assert trained["student_distilled_1"].tolist() == [3, tokens], "48 reviews in batches of 16"
    assert trained["compressed_1"].tolist() == [6, 2 * tokens], "its own steps after those of the student"
    first = open_run(dataclasses.replace(run.profile, seeds=1), 0)
    answers = {name: right(first, name)[0] for name in names}
    for name in names:
        assert table.loc[name, "accuracy"] == pytest.approx(answers[name].mean())
        assert table.loc[name, "p_value"] == pytest.approx(mcnemar(answers[name], answers["fine_tuned"]))
    dense, pruned = run.load_model("fine_tuned"), run.load_model(recovered)
    total = sum(parameter.numel() for parameter in dense.parameters())
    assert table.loc["fine_tuned", "total_parameters"] == total
    dropped = sum(int((weight == 0).sum()) for weight in prunable_weights(pruned).values())
    gone = table["total_parameters"] - table["active_parameters"]
    assert gone[recovered] == dropped
    # In matrices as small as these some neurons have nothing left; their biases and last weights go as well.
    assert dropped <= gone[sparse] < 1.1 * dropped
    for name in (recovered, sparse):
        assert table.loc[name, "encoder_sparsity"] == pytest.approx(0.9, abs=0.05)
    assert table.loc["student_distilled_1", "total_parameters"] < total
    weights = run.folder("fine_tuned") / "model.safetensors"
    assert table.loc["fine_tuned", "file_bytes"] == weights.stat().st_size, "gradients beside the model do not count"
    assert table.loc[sparse, "file_bytes"] < table.loc["fine_tuned", "file_bytes"]


# --- over seeds ---


def test_results_are_of_all_seeds_where_all_have_the_model_and_of_the_first_otherwise(study):
    names = ["fine_tuned", "recovered_movement_50", "student_distilled_1", "tfidf"]
    found = comparison.answers_of_all(study.run, names)
    assert list(found) == names
    assert {name: answers.shape for name, answers in found.items()} == {
        "fine_tuned": (2, 24),
        "recovered_movement_50": (2, 24),
        "student_distilled_1": (1, 24),
        "tfidf": (1, 24),
    }
    assert all(answers.dtype == bool for answers in found.values())
    for name in names[:2]:
        np.testing.assert_array_equal(found[name], right(study.run, name))
    first = open_run(dataclasses.replace(study.run.profile, seeds=1), 0)
    np.testing.assert_array_equal(found["student_distilled_1"], right(first, "student_distilled_1"))


def test_the_merge_is_compared_with_every_other_score_at_each_sparsity_at_which_both_are_recovered(study):
    run = study.run
    expected = [(c, s) for s in (50, 90) for c in ("magnitude", "movement", "gradient", study.comparator)]
    pairs = [(f"recovered_merged_{percent}", f"recovered_{c}_{percent}") for c, percent in expected]
    assert sorted(comparison.rivals(run)) == sorted(pairs)
    table = comparison.compare_rivals(run)
    assert len(table) == len(pairs)
    for row in table.itertuples():
        percent = round(100 * row.sparsity)
        assert row.comparison == f"recovered_merged_{percent} - recovered_{row.criterion}_{percent}"
        assert (row.n, row.seeds) == (24, 2)
        assert row.low <= row.difference <= row.high
    assert table["p_adjusted"].tolist() == pytest.approx(holm(table["p_value"].tolist()))
    row = table[(table["criterion"] == "gradient") & (table["sparsity"] == 0.9)].iloc[0]
    change = right(run, "recovered_merged_90").astype(int) - right(run, "recovered_gradient_90")
    assert row["difference"] == pytest.approx(change.mean())
    assert row["p_value"] == pytest.approx(sign_flip_test(change.sum(0)))
    assert row["spread"] == pytest.approx(np.std(change.mean(1), ddof=1))


def test_a_score_that_was_recovered_where_the_merge_was_not_is_no_rival(study):
    changed = dataclasses.replace(study.run.profile, recovery_sparsities=(0.9,), comparator_sparsities=(0.5,))
    others = ("magnitude", "movement", "gradient", study.comparator)
    expected = [("recovered_merged_90", f"recovered_{c}_90") for c in others]
    assert sorted(comparison.rivals(open_run(changed, 0))) == sorted(expected)


# --- language modelling that was unlearned ---


def test_bits_per_byte_have_a_row_per_model_domain_and_seed(study):
    table = forgetting.unlearned(study.run, count=2)
    assert list(table) == ["model", "domain", "seed", "bits_per_byte"]
    scores = (*MAIN, study.comparator)
    pruned = [f"{stage}_{score}_90" for score in scores for stage in ("pruned", "recovered")]
    names = ["pretrained", "fine_tuned", "fine_tuned_extra", *pruned]
    found = sorted(table[["model", "domain", "seed"]].itertuples(index=False, name=None))
    assert found == sorted(itertools.product(names, ("reviews", "other"), (0, 1)))
    assert np.isfinite(table["bits_per_byte"]).all() and (table["bits_per_byte"] > 0).all()
    bits = table.set_index(["model", "domain", "seed"])["bits_per_byte"]
    second, tokenizer = open_run(study.run.profile, 1), load_tokenizer(study.run.profile)
    reviews = inputs.reviews_of(study.run.profile, 0)["validation"]["text"][:]
    texts = {"reviews": [reviews[0], reviews[8]], "other": other_domain_texts(2)}
    model = second.load_model("fine_tuned")
    masks = select(scoring.scores_of(second, "gradient"), 0.9)
    for name, weight in prunable_weights(model).items():
        weight.data *= masks[name]
    for domain, part in texts.items():
        expected = bits_per_byte(as_language_model(model), tokenizer, part)
        assert bits["pruned_gradient_90", domain, 1] == pytest.approx(expected, rel=1e-6)
        expected = bits_per_byte(as_language_model(second.load_model("recovered_gradient_90")), tokenizer, part)
        assert bits["recovered_gradient_90", domain, 1] == pytest.approx(expected, rel=1e-6)


# --- the finding ---

TESTS = ("merge", "comparator", "control", "kept", "compressed")


@pytest.fixture
def answers(study, monkeypatch):
    """Made-up test results: models this small predict all alike; these differ, some of them significantly."""
    rng, answers = np.random.default_rng(0), {}
    for i, name in enumerate([*LINES, *comparison.recovered_names(study.run).values()]):
        answers[name] = rng.random((2, 300)) < 0.7 + 0.015 * i
    monkeypatch.setattr(comparison, "right_over_seeds", lambda run, name, split: {"test": answers}[split][name])
    return answers


def test_the_finding_is_chosen_on_validation_and_measured_on_the_test_reviews(study, answers, monkeypatch):
    # Not the best single criterion, so that the two are told apart.
    run, best, comparator = study.run, "merged", study.comparator
    monkeypatch.setattr(comparison, "best_score", lambda run: best)
    found = comparison.find(run)

    def share(criterion, percent):
        return right(run, f"recovered_{criterion}_{percent}", "validation").mean()

    assert (found["seeds"], found["test_reviews"], found["sparsity"]) == (2, 24, 0.9)
    assert (found["best"], found["comparator_name"]) == (best, comparator)
    assert found["single"] == max(MAIN[:3], key=lambda c: share(c, 90))
    assert found["own"] == max(MAIN, key=lambda c: share(c, 90))
    for leader, percent in zip(found["leaders"], (50, 90), strict=True):
        # The first of equals, in the order in which the notebooks name them.
        ranked = sorted((*MAIN, comparator), key=lambda c: -share(c, percent))
        assert (leader["sparsity"], leader["best"], leader["second"]) == (percent / 100, *ranked[:2])
        first, second = (answers[f"recovered_{c}_{percent}"] for c in ranked[:2])
        assert leader["accuracy"] == pytest.approx(first.mean())
        assert leader["difference"] == pytest.approx(first.mean() - second.mean())
        assert leader["p_value"] == pytest.approx(sign_flip_test((first.astype(int) - second).sum(0)))
    assert [row["p_adjusted"] for row in found["leaders"]] == holm([row["p_value"] for row in found["leaders"]])
    pairs = {
        "merge": ("recovered_merged_90", f"recovered_{found['single']}_90"),
        "comparator": (f"recovered_{comparator}_90", f"recovered_{found['own']}_90"),
        "control": ("fine_tuned_extra", "fine_tuned"),
        "kept": (f"recovered_{best}_90", "fine_tuned_extra"),
    }
    for test, (a, b) in pairs.items():
        assert found[test]["difference"] == pytest.approx(answers[a].mean() - answers[b].mean()), test
        p_value = sign_flip_test((answers[a].astype(int) - answers[b]).sum(0))
        assert (found[test]["p_value"], found[test]["n"], found[test]["seeds"]) == (pytest.approx(p_value), 300, 2)
    assert [found[test]["p_adjusted"] for test in TESTS] == holm([found[test]["p_value"] for test in TESTS])
    small, dense = (right(run, name, "test", seeds=1) for name in ("compressed_1", "fine_tuned"))
    row = run.load_table("comparison").set_index("model").loc["compressed_1"]
    assert found["compressed"]["difference"] == pytest.approx(small.mean() - dense.mean())
    assert found["compressed"]["p_value"] == pytest.approx(mcnemar(small[0], dense[0]))
    sizes = [artefacts.model_bytes(run, name) for name in ("fine_tuned", "compressed_1")]
    assert found["compressed"]["times_smaller"] == pytest.approx(sizes[0] / sizes[1])
    assert {k: found["compressed"][k] for k in ("layers", "speedup")} == {"layers": 1, "speedup": row["speedup"]}
    assert found["recovery"]["after"] == pytest.approx(share(best, 90))
    assert found["dense"]["accuracy"] == pytest.approx(answers["fine_tuned"].mean())


def test_the_finding_compares_every_higher_sparsity_with_the_control(study, answers, monkeypatch):
    monkeypatch.setattr(comparison, "answers_right", lambda run, name, split: answers["fine_tuned"][0])
    run = dataclasses.replace(study.run, profile=dataclasses.replace(study.run.profile, main_sparsity=0.5))
    found = comparison.find(run)
    (row,), leader = found["further"], found["leaders"][-1]
    assert (row["sparsity"], row["best"]) == (0.9, leader["best"])
    pruned, control = answers[f"recovered_{row['best']}_90"], answers["fine_tuned_extra"]
    assert row["difference"] == pytest.approx(pruned.mean() - control.mean())
    family = [*(found[test] for test in TESTS), row]
    assert [one["p_adjusted"] for one in family] == holm([one["p_value"] for one in family])


def test_results_on_the_test_reviews_choose_nothing(study, monkeypatch):
    logits = predictions.split_logits

    def turned(run, name, split):
        return (-1 if split == "test" else 1) * logits(run, name, split)

    before = comparison.find(study.run)
    monkeypatch.setattr(predictions, "split_logits", turned)
    after = comparison.find(study.run)
    for key in ("best", "own", "single", "comparator_name", "recovery"):
        assert after[key] == before[key]
    for one, other in zip(after["leaders"], before["leaders"], strict=True):
        assert (one["best"], one["second"]) == (other["best"], other["second"])
        assert one["accuracy"] == pytest.approx(1 - other["accuracy"])
    for test in TESTS:
        assert after[test]["difference"] == pytest.approx(-before[test]["difference"])


def test_rows_of_the_test_reviews_in_the_curves_choose_nothing(study):
    """Notebook 06 adds them to the table from which the leaders are read."""
    before, curves = comparison.find(study.run), study.run.load_table("curves")
    on_test = pruning.recovered_curves(study.run, "test")
    on_test["accuracy"] = (on_test["criterion"] == "random").astype(float)
    study.run.save_table("curves", curves.merge(on_test, "outer"))
    try:
        assert comparison.find(study.run) == before
    finally:
        study.run.save_table("curves", curves)
