"""What computations are said to take, against what they take in tokens, and the rates that turn tokens into time."""

import dataclasses

import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.study import artefacts, cells, inputs, work
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone")


def test_tokens_of_reviews_are_estimated_without_tokenising_them():
    profile = get_profile("quick", train_size=600)
    run = open_run(profile)
    for split in ("train", "validation", "transfer"):
        counted = sum(map(len, inputs.dataset(run, split).input_ids))
        assert work.tokens_in(profile, 0, split) == pytest.approx(counted, rel=0.1), split
    assert work.tokens_in(dataclasses.replace(profile, transfer_size=0), 0, "transfer") == 0


def test_the_work_of_trained_models_is_what_their_histories_count(study):
    run, amounts = study.run, work.Amounts(study.run)
    by_name = {cell.name: cell.work for phase in cells.phases(run) for cell in phase}
    models = {
        "finetune-0": "fine_tuned",
        "control-0": "fine_tuned_extra",
        "recover-0-taylor-0.9": "recovered_taylor_90",
    }
    for cell, model in models.items():
        tokens = artefacts.read_history(run, model)["tokens"].sum()
        assert by_name[cell].trained == pytest.approx(tokens, rel=0.15), cell
    small = artefacts.read_history(run, "student_distilled_1")["tokens"].sum()
    assert by_name["student-0-distilled-1"].trained == pytest.approx(small * 1.25 / 2.25, rel=0.15)
    assert by_name["student-0-direct-1"].trained == 2 * by_name["student-0-distilled-1"].trained
    assert by_name["control-0"].judged == amounts.tokens["validation"]
    assert by_name["evaluate-dense-0"].judged == 2 * amounts.tokens["test"]


def test_work_adds_up_and_becomes_time_at_the_rates_of_a_machine():
    one = work.Work(100.0, 30.0)
    assert one + one * 2 == work.Work(300.0, 90.0)
    assert one.seconds(work.Rates(50.0, 10.0)) == 2 + 3


def test_rates_are_measured_on_the_runs_own_model_and_change_nothing_in_it(workspace):
    rates = work.measure_rates(open_run(get_profile("smoke", precision="no")), seconds=0.01)
    assert rates.trained > 0 and rates.judged > 0
    assert list(workspace.rglob("*")) == []
