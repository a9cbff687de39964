"""The comparison of a finished study, against predictions of each model by itself."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from conftest import assert_percentiles, literal_means

from nbhelpers.evaluation import against, mcnemar, predict_logits, sign_flip_test, significance_table
from nbhelpers.models import load_tokenizer, prunable_weights
from nbhelpers.selection import select
from nbhelpers.study import (
    artefacts,
    baseline,
    comparison,
    forgetting,
    inputs,
    predictions,
    recovery,
    scoring,
    students,
)
from nbhelpers.study.forgetting import as_language_model, bits_per_byte, other_domain_texts
from nbhelpers.workspace import Run, open_run

pytestmark = pytest.mark.usefixtures("alone")

MAIN = ("magnitude", "movement", "gradient", "merged")
SCORES = (*MAIN, "taylor")
LINES = ("fine_tuned", "fine_tuned_extra")


@functools.cache
def right(run: Run, name: str, split: str = "test", seeds: int = 2) -> np.ndarray:
    """Which reviews a model of the first seeds predicts right, from its predictions on the texts: [seeds, n]."""
    reviews = inputs.reviews_of(run.profile, run.seed)[split]
    answers = [one.predict(name, reviews["text"][:]) > 0.5 for one in inputs.runs_of(run)[:seeds]]
    return np.stack(answers) == np.array(reviews["label"], bool)


def adjusted(p_values: list[float]) -> list[float]:
    """Holm's p-values: the smallest counts as often as there are values, the next once less, and none falls."""
    found, highest = {}, 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        found[i] = highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
    return pytest.approx([found[i] for i in range(len(p_values))], rel=1e-12)


# --- one seed ---


def test_compared_are_the_models_of_all_notebooks_in_their_order_packed_ones_and_counts_of_words(study):
    assert comparison.rows_of(study.run) == [
        *LINES,
        *(f"recovered_{score}_90" for score in SCORES),
        f"sparse_{study.best}_90",
        f"compact_{study.best}_50",
        "int8_fine_tuned",
        f"int8_blocks_{study.best}_90",
        f"int8_compact_{study.best}_50",
        *students.student_names(study.run.profile),
        "fine_tuned_packed",
        "student_distilled_1_packed",
        "student_distilled_width_50_packed",
        "tfidf",
        "tfidf_taught",
    ]


def test_the_comparison_has_a_row_per_model_and_the_columns_of_the_contract(study):
    run, sparse = study.run, f"sparse_{study.best}_90"
    recovered = f"recovered_{study.best}_90"
    names = comparison.rows_of(run)
    table = run.load_table("comparison")
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
    quotients = table.loc["fine_tuned_packed", "latency_ms"] / table["latency_ms"]
    assert table["speedup_packed"].to_numpy() == pytest.approx(quotients.to_numpy())
    tokens = sum(map(len, inputs.dataset(run, "train").input_ids))
    trained = table[["train_steps", "train_tokens"]].T
    assert trained[recovered].tolist() == trained[sparse].tolist() == trained["fine_tuned_extra"].tolist()
    assert trained[recovered]["train_steps"] == 3 and 0 < trained[recovered]["train_tokens"] < tokens
    read = tokens + sum(map(len, inputs.dataset(run, "transfer").input_ids))
    assert trained["student_distilled_1"].tolist() == [5, read], "48 reviews and 24 without labels in batches of 16"
    assert trained["compressed_1"].tolist() == [10, 2 * read], "its own steps after those of the student"
    for name in comparison.compared_models(run):
        answers, dense = right(run, name, seeds=1), right(run, "fine_tuned")
        assert table.loc[name, "accuracy"] == pytest.approx(answers.mean())
        if name in (*LINES, *(f"recovered_{score}_90" for score in SCORES)):
            expected = sign_flip_test((right(run, name).astype(int) - dense).sum(0))
        else:
            expected = mcnemar(answers[0], dense[0])
        assert table.loc[name, "p_value"] == pytest.approx(expected), "of all seeds that both models have"
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


def test_a_packed_model_is_the_same_model_but_for_its_speed(study):
    run, table = study.run, study.run.load_table("comparison").set_index("model")
    timed = [name for name in table if name.startswith(("latency", "speedup", "peak"))]
    for name in ("fine_tuned", "student_distilled_1"):
        assert table.loc[f"{name}_packed"].drop(timed).equals(table.loc[name].drop(timed)), name
        found = predict_logits(comparison.load_row(run, f"{name}_packed"), inputs.dataset(run, "test").input_ids)
        # The same sums without padding, float32.
        np.testing.assert_allclose(found, predictions.split_logits(run, name, "test"), atol=1e-5)


def test_what_counts_words_is_timed_on_the_texts_whose_tokens_the_others_get(study):
    run, table = study.run, study.run.load_table("comparison").set_index("model")
    batch = inputs.latency_batch(run, 4)["input_ids"]
    rows = [row[row != load_tokenizer(run.profile).pad_token_id].tolist() for row in batch]
    for name in ("tfidf", "tfidf_taught"):
        model, row = comparison.load_row(run, name), table.loc[name]
        assert run.encode(model.texts) == rows
        assert (row["file_bytes"], row["train_steps"], row["train_tokens"]) == (model.file_bytes(), 0, 0)
        assert row["total_parameters"] == row["active_parameters"] == len(model.pipeline[0].vocabulary_)
        answers = baseline.tfidf_right(run, "test", name)
        assert row["accuracy"] == pytest.approx(answers.mean())
        assert row["p_value"] == pytest.approx(mcnemar(answers, right(run, "fine_tuned", seeds=1)[0]))


def test_one_pair_has_one_p_value_in_both_tables(study):
    names = comparison.compared_models(study.run)
    correct = comparison.answers_of_all(study.run, names)
    significance = significance_table(correct, against(correct, "fine_tuned"), "all models against fine_tuned")
    table = study.run.load_table("comparison").set_index("model")
    assert table.loc[names[1:], "p_value"].to_numpy() == pytest.approx(significance["p_value"].to_numpy(), rel=1e-12)
    assert significance["p_adjusted"].tolist() == adjusted(significance["p_value"].tolist())


def test_a_published_interval_is_that_of_resampled_reviews_and_seeds(study):
    row = study.run.load_table("budget").set_index(["model", "steps"]).loc[f"recovered_{study.best}_90", 3]
    answers = right(study.run, f"recovered_{study.best}_90", "validation")
    assert_percentiles(row[["accuracy_low", "accuracy_high"]].to_numpy(dtype=float), literal_means(answers))


# --- over seeds ---


def test_results_are_of_all_seeds_where_all_have_the_model_and_of_the_first_otherwise(study):
    steps = f"recovered_{study.best}_90_steps_1"
    names = ["fine_tuned", "recovered_movement_50", steps, "student_distilled_1", "fine_tuned_packed", "tfidf_taught"]
    found = comparison.answers_of_all(study.run, names)
    assert list(found) == names
    assert [answers.shape for answers in found.values()] == [(2, 24)] * 2 + [(1, 24)] * 4
    assert all(answers.dtype == bool for answers in found.values())
    for name in names[:2]:
        np.testing.assert_array_equal(found[name], right(study.run, name))
    first = open_run(dataclasses.replace(study.run.profile, seeds=1), 0)
    for name in (steps, "student_distilled_1"):
        np.testing.assert_array_equal(found[name], right(first, name))


def test_the_merge_is_compared_with_every_other_score_at_each_sparsity_at_which_both_are_recovered(study):
    run = study.run
    expected = [(c, s) for s in (50, 90) for c in ("magnitude", "movement", "gradient", "taylor")]
    pairs = [(f"recovered_merged_{percent}", f"recovered_{c}_{percent}") for c, percent in expected]
    assert sorted(comparison.rivals(run)) == sorted(pairs)
    table = comparison.compare_rivals(run)
    assert len(table) == len(pairs)
    for row in table.itertuples():
        percent = round(100 * row.sparsity)
        assert row.comparison == f"recovered_merged_{percent} - recovered_{row.criterion}_{percent}"
        assert (row.n, row.seeds) == (24, 2)
        assert row.low <= row.difference <= row.high
    assert table["p_adjusted"].tolist() == adjusted(table["p_value"].tolist())
    row = table[(table["criterion"] == "gradient") & (table["sparsity"] == 0.9)].iloc[0]
    change = right(run, "recovered_merged_90").astype(int) - right(run, "recovered_gradient_90")
    assert row["difference"] == pytest.approx(change.mean())
    assert row["p_value"] == pytest.approx(sign_flip_test(change.sum(0)))
    assert row["spread"] == pytest.approx(np.std(change.mean(1), ddof=1))


# --- language modelling that was unlearned ---


def test_bits_per_byte_have_a_row_per_model_domain_and_seed(study, monkeypatch):
    monkeypatch.setattr(forgetting, "other_domain_texts", lambda count: other_domain_texts(2))
    monkeypatch.setattr(forgetting.read_as_language_models, "__defaults__", (2,))
    table = forgetting.unlearned(study.run)
    assert list(table) == ["model", "domain", "seed", "bits_per_byte"]
    pruned = [f"{stage}_{score}_90" for score in SCORES for stage in ("pruned", "recovered")]
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
    names = [*LINES, *recovery.recovered_names(study.run).values()]
    names += [f"{name}_steps_1" for name in ("fine_tuned_extra", "recovered_merged_90", f"recovered_{study.best}_50")]
    for i, name in enumerate(names):
        answers[name] = rng.random((2, 300)) < 0.7 + 0.015 * i
    monkeypatch.setattr(
        comparison, "right_over_seeds", lambda run, name, split, seeds=None: {"test": answers}[split][name]
    )
    return answers


def test_the_finding_is_chosen_on_validation_and_measured_on_the_test_reviews(study, answers, monkeypatch):
    # Not the best single criterion, so that the two are told apart.
    run, best = study.run, "merged"
    monkeypatch.setattr(comparison, "best_score", lambda run: best)
    found = comparison.find(run)

    def share(criterion, percent):
        return right(run, f"recovered_{criterion}_{percent}", "validation").mean()

    assert (found["seeds"], found["test_reviews"], found["sparsity"]) == (2, 24, 0.9)
    assert (found["best"], found["comparator_name"]) == (best, "taylor")
    assert found["single"] == max(MAIN[:3], key=lambda c: share(c, 90))
    assert found["own"] == max(MAIN, key=lambda c: share(c, 90))
    for leader, percent in zip(found["leaders"], (50, 90), strict=True):
        # The first of equals, in the order in which the notebooks name them.
        ranked = sorted(SCORES, key=lambda c: -share(c, percent))
        assert (leader["sparsity"], leader["best"], leader["second"]) == (percent / 100, *ranked[:2])
        first, second = (answers[f"recovered_{c}_{percent}"] for c in ranked[:2])
        assert leader["accuracy"] == pytest.approx(first.mean())
        assert leader["difference"] == pytest.approx(first.mean() - second.mean())
        assert leader["p_value"] == pytest.approx(sign_flip_test((first.astype(int) - second).sum(0)))
    pairs = {
        "merge": ("recovered_merged_90", f"recovered_{found['single']}_90"),
        "comparator": ("recovered_taylor_90", f"recovered_{found['own']}_90"),
        "control": ("fine_tuned_extra", "fine_tuned"),
        "kept": (f"recovered_{best}_90", "fine_tuned_extra"),
    }
    for test, (a, b) in pairs.items():
        assert found[test]["difference"] == pytest.approx(answers[a].mean() - answers[b].mean()), test
        p_value = sign_flip_test((answers[a].astype(int) - answers[b]).sum(0))
        assert (found[test]["p_value"], found[test]["n"], found[test]["seeds"]) == (pytest.approx(p_value), 300, 2)
    for row, name in zip(found["budget"], ("_steps_1", ""), strict=True):
        a, b = answers[f"recovered_{best}_90{name}"], answers[f"fine_tuned_extra{name}"]
        assert (row["steps"], row["difference"]) == (1 if name else 3, pytest.approx(a.mean() - b.mean()))
        assert row["p_value"] == pytest.approx(sign_flip_test((a.astype(int) - b).sum(0)))
    families = {"leaders": found["leaders"], "finding": [found[test] for test in TESTS], "budget": found["budget"]}
    for name, rows in families.items():
        assert {row["family"] for row in rows} == {name}
        assert [row["p_adjusted"] for row in rows] == adjusted([row["p_value"] for row in rows])
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
    assert [one["p_adjusted"] for one in family] == adjusted([one["p_value"] for one in family])
    assert {one["family"] for one in family} == {"finding"}


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
    for one, other in zip(after["budget"], before["budget"], strict=True):
        assert (one["steps"], one["difference"]) == (other["steps"], pytest.approx(-other["difference"]))
    for test in TESTS:
        assert after[test]["difference"] == pytest.approx(-before[test]["difference"])


def test_rows_of_the_test_reviews_in_the_curves_choose_nothing(study):
    """Notebook 06 adds them to the table from which the leaders are read."""
    before, curves = comparison.find(study.run), study.run.load_table("curves")
    on_test = recovery.recovered_curves(study.run, "test")
    on_test["accuracy"] = (on_test["criterion"] == before["leaders"][1]["second"]).astype(float)
    study.run.save_table("curves", curves.merge(on_test, "outer"))
    try:
        assert comparison.find(study.run) == before
    finally:
        study.run.save_table("curves", curves)
