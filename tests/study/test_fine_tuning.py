"""The artefacts of a study: which models it leaves, what is not computed twice, and what a changed setting changes."""

import dataclasses

import numpy as np
import pytest
import torch

from nbhelpers.criteria import CRITERIA
from nbhelpers.masks import unpack
from nbhelpers.models import prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.selection import select
from nbhelpers.study import (
    artefacts,
    conversion,
    fine_tuning,
    inputs,
    pruning,
    recovery,
    scoring,
    students,
)
from nbhelpers.workspace import Run, open_run

pytestmark = pytest.mark.usefixtures("alone")


def created(run: Run) -> dict[str, str]:
    """When each artefact of a run was made."""
    return {record["name"]: record["created"] for record in run.records()}


def new_run(**changes) -> Run:
    return open_run(get_profile("smoke", precision="no", learning_rate=5e-3, **changes), 0)


# --- what is left ---


def test_a_study_leaves_the_models_that_it_promises(study):
    scores = ("magnitude", "movement", "gradient", "merged", "taylor")
    recovered = [f"recovered_{score}_{percent}" for percent in (50, 90) for score in scores]
    parts = [f"{part}_{study.best}_90" for part in ("labels", "taught", "hidden")]
    budget = [f"recovered_{score}_90_steps_1" for score in dict.fromkeys((study.best, "merged"))]
    budget += [f"structured_{study.best}_50_steps_1", "fine_tuned_extra_steps_1"]
    structured = f"structured_{study.best}_50"
    dense = ["pretrained", "fine_tuned", "fine_tuned_extra", *recovered, structured, *parts, *budget]
    rounded = ["fine_tuned", f"blocks_{study.best}_90", f"compact_{study.best}_50"]
    every = [*dense, *students.student_names(study.run.profile), f"sparse_{study.best}_90", rounded[2], rounded[1]]
    every += [f"int8_{name}" for name in rounded]
    assert study.models[0] == every, "oldest first; the students of the scan are no models"
    assert sorted(study.models[1]) == sorted(dense), "of every seed what is compared over seeds, and nothing else"
    for name in study.models[0]:
        assert not study.run.load_model(name).training
        if name != "pretrained" and not name.startswith(("sparse", "compact", "int8")):
            history = artefacts.read_history(study.run, name)
            assert np.isfinite(history["loss"]).all()
            if name.startswith(("recovered", "labels", "taught", "hidden", "structured", "blocks", "fine_tuned_extra")):
                steps = 1 if name.endswith("_steps_1") else 3
                assert history["steps"].iloc[-1] == steps, "the dense control has the steps of every recovery"
            # Recovery makes no choice among checkpoints, so it validates none on the way.
            validated = name == "fine_tuned" or (name.startswith("student_") and "width" not in name)
            assert ("accuracy" in history) == validated
            assert not validated or history["accuracy"].between(0, 1).all()


def test_the_fine_tuned_artefact_holds_what_was_observed_of_every_prunable_weight(study):
    weights = prunable_weights(study.run.load_model("fine_tuned"))
    found = artefacts.load_statistics(study.run, "fine_tuned")
    assert set(found) == {"mean_abs_gradient", "first_order_movement"}
    for tensors in found.values():
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: w.shape for n, w in weights.items()}
    assert all((tensor >= 0).all() and tensor.mean() > 0 for tensor in found["mean_abs_gradient"].values())
    assert any((tensor < 0).any() for tensor in found["first_order_movement"].values())


def test_the_last_flags_along_fine_tuning_are_those_of_the_scores(study):
    flagged = fine_tuning.flagged_along_the_way(study.run)
    weights = prunable_weights(study.run.load_model("fine_tuned"))
    assert {int(key.split("/")[0]) for key in flagged} == {0, 1, 2, 4, 6}
    for criterion in CRITERIA:
        found = unpack(flagged[f"6/{criterion}"], weights)
        expected = select(scoring.scores_of(study.run, criterion), 0.9)
        assert all(torch.equal(found[name], mask) for name, mask in expected.items()), criterion


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [(0.9, "pruned_merged_90"), (0.975, "pruned_merged_97p5"), (0.29, "pruned_merged_29")],
)
def test_a_models_name_states_its_sparsity_in_percent(sparsity, name):
    assert artefacts.model_name("pruned", "merged", sparsity) == name


# --- seeds ---


def test_another_seed_is_another_run_of_the_same_test_reviews(study):
    first, second = inputs.runs_of(study.run)
    assert first.artifacts != second.artifacts
    heads = [one.load_model("pretrained").score.weight for one in (first, second)]
    assert not torch.equal(*heads)
    trained = [prunable_weights(one.load_model("fine_tuned")) for one in (first, second)]
    assert not any(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    for split in ("validation", "test"):
        texts = [inputs.reviews_of(one.profile, one.seed)[split]["text"][:] for one in (first, second)]
        assert texts[0] == texts[1], "predictions of seeds are paired review by review"


# --- what is not done twice ---


def test_a_second_call_finds_everything_and_computes_nothing(study, monkeypatch):
    before = [created(one) for one in inputs.runs_of(study.run)]

    def never(*_, **__):
        raise AssertionError("computed again")

    for module in (fine_tuning, recovery, students):
        monkeypatch.setattr(module, "train", never)
    monkeypatch.setattr(Run, "judge", never)
    for module in (pruning, scoring):
        monkeypatch.setattr(module, "calibrate", never)
    again = open_run(dataclasses.replace(study.run.profile), 0)
    assert fine_tuning.finetune_model(again)["steps"].tolist() == [6]
    recovered = recovery.recover_all(again)
    asked = [(seed, score) for seed in (0, 1) for _ in (0.5, 0.9) for score in again.profile.scores]
    assert list(recovered[["seed", "criterion"]].itertuples(index=False, name=None)) == asked
    recovery.recover_in_parts(again)
    recovery.budget_curve(again)
    students.distil_all(again)
    students.compress_all(again)
    pruning.pruned_curves(again)
    conversion.sparsify(again, study.best, 0.9)
    conversion.compact_model(again, study.best, 0.5)
    assert [created(one) for one in inputs.runs_of(again)] == before


def test_a_changed_setting_trains_again_what_depends_on_it_and_nothing_else(workspace):
    def made(**changes):
        run = new_run(**changes)
        fine_tuning.finetune_model(run)
        recovery.scan_rates(run, "control")
        recovery.train_control(run)
        return created(run)

    def changed(before, after):
        return {name for name in before | after if after.get(name) != before.get(name)}

    first = made()
    control = {"rates_control", "fine_tuned_extra", "logits_fine_tuned_extra_validation"}
    tuned = {"fine_tuned", "teacher_logits_train", "calibration", "scores_taylor"}
    assert set(first) == {"pretrained", "choice_rate_control"} | tuned | control
    assert made() == first
    rates = made(recovery_learning_rates=(2e-3,))
    assert changed(first, rates) == control | {"choice_rate_control"}
    longer = made(recovery_learning_rates=(2e-3,), epochs=2)
    assert control | tuned <= changed(rates, longer) <= control | tuned | {"choice_rate_control"}
    others = {"latency_repeats": 7, "student_layers": (2,), "seeds": 3, "comparators": (), "budget_steps": (2, 5)}
    other = made(recovery_learning_rates=(2e-3,), epochs=2, **others)
    assert other == longer, "a setting that a model does not depend on does not train it again"
