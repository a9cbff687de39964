"""Numbers and findings in sentences, and the generated parts of the README between their markers."""

import json
import shutil
import sys

import pandas as pd
import pytest

from nbhelpers.profiles import get_profile
from nbhelpers.report import __main__ as command
from nbhelpers.report import readme, words
from nbhelpers.workspace import WorkspaceError, open_run

MODEL = {"accuracy": 0.9, "accuracy_low": 0.88, "accuracy_high": 0.92, "speedup": 1.0, "file_bytes": 7e6}
MODEL |= {"f1": 0.9, "active_parameters": 1e6, "total_parameters": 2e6, "latency_ms": 9.0, "peak_memory_bytes": 5e7}
MODEL |= {"encoder_sparsity": 0.0, "p_value": 1.0, "model": "fine_tuned"}
SPARSE = {"model": "sparse", "accuracy": 0.875, "speedup": 2.25, "file_bytes": 2.5e6, "encoder_sparsity": 0.9}
GAP = {"difference": -0.029, "low": -0.052, "high": -0.005, "p_value": 0.021, "n": 1000, "seeds": 2}
COMPARISON = {
    "test_reviews": 1000,
    "dense": MODEL,
    "control": MODEL,
    "sparse": MODEL | SPARSE,
    "student": MODEL,
    "compressed": MODEL | {"model": "compressed", "speedup": 12.0, "file_bytes": 5.5e5},
    "tfidf": MODEL | {"accuracy": 0.862, "seeds": 2},
    "against_tfidf": GAP,
}


def difference(points, p_adjusted):
    change = points / 100
    return {"difference": change, "low": change - 0.01, "high": change + 0.01, "p_adjusted": p_adjusted}


LEAD = {"sparsity": 0.5, "best": "merged", "second": "<wanda>", "accuracy": 0.871}
FINDING = {
    "seeds": 1,
    "test_reviews": 2500,
    "sparsity": 0.9,
    "best": "merged",
    "own": "merged",
    "single": "magnitude",
    "comparator_name": "movement_first_order",
    "leaders": [
        LEAD | difference(1.2, 0.02),
        LEAD | {"sparsity": 0.9, "best": "movement_first_order"} | difference(0.2, 0.4),
    ],
    "merge": difference(1.5, 0.001),
    "comparator": difference(-1.0, 0.2),
    "control": difference(0.3, 0.6),
    "kept": difference(-3.0, 1e-5),
    "further": [{"sparsity": 0.95, "best": "movement_first_order"} | difference(-0.04, 0.7)],
    "budget": [{"steps": 60} | difference(-5.0, 1e-6), {"steps": 1250} | difference(-3.0, 1e-5)],
    "compressed": {
        "layers": 1,
        "encoder_sparsity": 0.912,
        "speedup": 11.96,
        "times_smaller": 25.3,
        "file_bytes": 546_000,
    }
    | difference(-0.6, 0.3),
    "recovery": {"before": 0.612, "after": 0.843},
    "dense": {"accuracy": 0.88},
}


def plain(text):
    return text.replace("\N{NO-BREAK SPACE}", " ")


# --- sentences ---


@pytest.mark.parametrize(
    ("row", "text", "verdict"),
    [
        (difference(-2.0, 0.0499), "-2.0 points (-3.0 to -1.0, p = 0.05)", "significantly worse"),
        (difference(0.5, 0.05), "+0.5 points (-0.5 to +1.5, p = 0.05)", "no significant difference"),
        (difference(9.0, 1e-9), "+9.0 points (+8.0 to +10.0, p < 0.001)", "significantly better"),
        (difference(-0.01, 1.0), "+0.0 points (-1.0 to +1.0, p = 1)", "no significant difference"),
    ],
)
def test_a_difference_in_words(row, text, verdict):
    assert words.points(row) == text and words.verdict(row) == verdict


def test_a_finding_in_words_worked_out_by_hand():
    text = words.finding_text(FINDING)
    for piece in (
        "same 2,500 test reviews, one seed",
        "merged at 50% (87.1%; +1.2 points (+0.2 to +2.2, p = 0.02) to <wanda>), movement first order at 90% (87.1%;",
        "Significant leads: 1 of 2.",
        "At 90%, the merge against magnitude: +1.5 points (+0.5 to +2.5, p = 0.001): significantly better.",
        "a score of the literature?** Movement first order against merged: -1.0 points (-2.0 to +0.0, p = 0.2): no",
        "Merged at 90% (validation): 61.2% right after pruning, 84.3% after recovery.",
        "change the dense model (88.0%) by +0.3 points (-0.7 to +1.3, p = 0.6).",
        "1 layer left, 91% of the block weights removed, a low-rank embedding, int8: 12.0 times as fast as the",
        "25 times smaller (0.55 MB), at -0.6 points (-1.6 to +0.4, p = 0.3) to it, first seed: no significant",
        "removing 90% of the block weights changes accuracy by -3.0 points (-4.0 to -2.0, p < 0.001): significantly "
        "worse; 95% (movement first order) +0.0 points (-1.0 to +1.0, p = 0.7): no significant difference.",
        "Merged at 90% against the control with as many steps: after 60 steps -5.0 points (-6.0 to -4.0, p < 0.001); "
        "after 1,250 steps -3.0 points (-4.0 to -2.0, p < 0.001).",
    ):
        assert piece in text


def test_the_context_says_which_seed_and_what_the_control_has():
    results = {"comparison": COMPARISON, "run": {"profile": {"seeds": 3}}}
    text = plain(words.context(results))
    assert "On 1,000 test reviews" in text and "Models of the first seed." in text and "90.0 % (88.0 to 92.0)." in text
    results["run"]["profile"]["seeds"] = 1
    assert "first seed" not in words.context(results) and words.context({}) == ""


def test_gains_say_what_a_model_costs_and_saves():
    sparse = COMPARISON["sparse"] | {"p_value": 1e-5}
    assert plain(" / ".join(words.gains(sparse, MODEL))) == (
        "90 % of the block weights removed / 2.25 times the speed / "
        "-2.5 points to the dense model, p < 0.001 / 2.50 MB on disk"
    )
    assert "removed" not in " ".join(words.gains(COMPARISON["student"], MODEL))


def test_all_numbers_are_spelled_out():
    results = {"pruning": {"best_one": 0.123456, "rates": {"a_b": [1, 2000]}, "none": []}, "captions": {"x": "y"}}
    numbers = [("best one", "0.1235"), ("rates", "a b 1, 2,000"), ("none", "none")]
    assert words.all_numbers(results) == [("pruning", numbers)]


# --- the README ---


@pytest.fixture
def compared(workspace):
    """A run that has the results of notebook 06, in the profile quick."""
    run = open_run(get_profile("quick"))
    run.record("comparison", **COMPARISON)
    run.record("fine_tuning", total_parameters=6_967_808)
    run.record("finding", **FINDING)
    run.save_table("comparison", pd.DataFrame([MODEL, MODEL | SPARSE | {"p_value": 0.0001}]))
    (run.reports / "figures").mkdir()
    for name in (readme.README_FRONT, *readme.README_FIGURES):
        run.record("captions", **{name: f"Caption of {name}"})
        (run.reports / "figures" / f"{name}.png").write_bytes(b"")
    return run


def test_the_readme_is_rewritten_between_its_markers_only(compared, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("Before\n{}\nold\n{}\nBetween\n{}\nold\n{}\nAfter\n".format(*readme.FRONT, *readme.RESULTS))
    readme.write_readme(compared, path)
    text = path.read_text()
    readme.write_readme(compared, path)
    assert path.read_text() == text and "old" not in text
    assert text.startswith(f"Before\n{readme.FRONT[0]}\n") and text.endswith(f"{readme.RESULTS[1]}\nAfter\n")
    assert f"{readme.FRONT[1]}\nBetween\n{readme.RESULTS[0]}\n" in text
    for name in (readme.README_FRONT, *readme.README_FIGURES):
        assert f"![Caption of {name}](reports/quick/figures/{name}.png)" in text
    assert f"\n### The finding\n\n{words.finding_text(FINDING)}\n\n!" in text
    text = plain(text)
    for piece in (
        "1,000 test reviews the fine-tuned model gets 90.0 % (88.0 to 92.0) right",
        "runs 2.2 times as fast and takes 2.50 MB on disk instead of 7.00",
        "embedding, int8) it gets 90.0 % (88.0 to 92.0), runs 12.0 times as fast and takes 0.55 MB",
        "86.2 %; against it the fine-tuned model is at -2.9 points (-5.2 to -0.5, p = 0.021; over 2 seeds).",
        "Models of the first seed; profile `quick`, seed 0, a model of 6.97M parameters, ",
    ):
        assert piece in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert rows[3].startswith("| sparse | 87.5 % (88.0 to 92.0) |") and rows[3].endswith("| < 0.001 |")


@pytest.mark.parametrize(("minutes", "time"), [(12.34, "12 minutes"), (660.0, "11.0 hours")])
def test_the_readme_says_what_the_results_took(compared, minutes, time):
    compared.record("effort", process_minutes=minutes, cores=2, device_minutes={"chip": minutes})
    assert readme.made_with(compared, compared.results()).endswith(f"; {time} of one process's computing, on 2 cores")
    compared.record("effort", device_minutes={"chip": 3.0, "card": minutes})
    text = f", on which all times were measured; of one process's computing {time} on card and 3 minutes on chip"
    assert readme.made_with(compared, compared.results()).endswith(text)


def test_the_readme_leads_with_thorough_once_it_has_a_finding(compared, workspace, tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("\n".join((*readme.FRONT, *readme.RESULTS)))
    monkeypatch.setattr(command, "write_readme", lambda run: readme.write_readme(run, path))
    monkeypatch.setattr(command, "write_measured", lambda: None)
    monkeypatch.setattr(sys, "argv", ["report", "readme"])
    command.main()
    assert "profile `quick`, seed 0" in path.read_text() and "The default run" not in path.read_text()
    reports = workspace / "reports"
    shutil.copytree(reports / "quick", reports / "thorough")
    command.main()
    first, second = path.read_text().split("### The default run")
    assert "reports/thorough/figures/06_rivals.png" in first and "profile `thorough`, seeds 0 to 3" in first
    assert "The default run, profile `quick`, seed 0, a model of 6.97M parameters, " in second
    assert "| model | accuracy | sparsity | file, MB | speed-up | p |" in second and "reports/" not in second


@pytest.mark.parametrize("missing", ["finding", "comparison", "figure"])
def test_a_readme_without_results_is_refused(compared, missing):
    if missing == "figure":
        (compared.reports / "figures" / f"{readme.README_FIGURES[0]}.png").unlink()
    else:
        results = {name: found for name, found in compared.results().items() if name != missing}
        (compared.reports / "results.json").write_text(json.dumps(results))
    with pytest.raises(WorkspaceError, match="run notebook 0"):
        readme.front_block(compared) + readme.readme_block(compared)


@pytest.mark.parametrize(
    "markers", [(), (*readme.FRONT, *reversed(readme.RESULTS)), (*readme.FRONT, readme.RESULTS[0])]
)
def test_a_readme_without_markers_is_refused(compared, tmp_path, markers):
    path = tmp_path / "README.md"
    path.write_text(" ".join(markers))
    with pytest.raises(WorkspaceError, match=r"(front|generated):start"):
        readme.write_readme(compared, path)
    assert path.read_text() == " ".join(markers)


def test_the_measurements_at_full_size_are_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "BENCHMARK", tmp_path)
    monkeypatch.setattr(readme, "labels_block", lambda: "labels")
    path = tmp_path / "README.md"
    path.write_text("Before\n{}\nstale\n{}\n{}\n{}\nAfter\n".format(*readme.MEASURED, *readme.LABELS))
    with pytest.raises(WorkspaceError, match=r"full_size\.csv is missing"):
        readme.write_measured(path)
    stages = pd.DataFrame({"notebook": ["01_fine_tune", "02_criteria_scoring"], "peak_memory_bytes": [5.23e9, 4e9]})
    stages.assign(device="cpu").to_csv(tmp_path / "full_size.csv")
    about = {"shape": "mini", "reviews": 160, "length": 512, "batch_size": 8, "precision": "bf16", "task": "train"}
    about |= {"seconds": 12.3, "speedup": 2.188, "speedup_low": 2.1, "speedup_high": 2.3}
    pd.DataFrame([about | {"name": name} for name in ("ours", "trainer")]).to_csv(tmp_path / "training.csv")
    selected = [
        ("ours", 0.3, 1e8, 84934656, 1),
        ("torch", 13.1, 4315e6, 84934656, 43.3),
        ("merge", 30, 3e9, 84934656, 9),
    ]
    columns = ["engine", "seconds", "extra_bytes", "weights", "times_ours"]
    pd.DataFrame(selected, columns=columns).to_csv(tmp_path / "selection.csv")
    readme.write_measured(path)
    text = path.read_text()
    assert text.startswith("Before\n") and text.endswith("\nAfter\n") and "stale" not in text
    assert "Not measured: 03 prune and recover, 04 sparse conversion, 05 distillation, 06 comparison." in text
    assert "| 01 fine tune | 5.2 |\n| 02 criteria scoring | 4.0 |" in text
    assert "bf16: 0.61 s a step; training takes `trainer` 2.19 times as long (2.10 to 2.30)." in text
    assert "84,934,656 weights" in text and "13.1 s and 4.3 GB, 43 times as long" in text
    assert "{}\nlabels\n{}".format(*readme.LABELS) in text


def test_the_gain_of_pretraining_is_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "SETTINGS", tmp_path)
    with pytest.raises(WorkspaceError, match=r"labels\.csv is missing"):
        readme.labels_block()
    line = {"labels": 6000, "max_tokens": 512, "accuracy_low": 0.871, "accuracy_high": 0.9, "n": 2495}
    scratch = {"model": "from_scratch", "accuracy": 0.82, "p_value": 1e-9, "minutes": 8.2, "device": "a card"}
    scratch |= {"difference": -0.06, "difference_low": -0.075, "difference_high": -0.045}
    pd.DataFrame([line | {"model": "tfidf", "accuracy": 0.88}, line | scratch]).to_csv(tmp_path / "labels.csv")
    trials = pd.DataFrame({"trial": range(3), "accuracy": [0.8, 0.85, 0.7], "learning_rate": [1e-3, 1.5e-4, 3e-5]})
    trials = trials.assign(start="pretrained", layer_decay=1.0, epochs=2, dropout=0.1, prefix_share=0.5, n=5000)
    trials.assign(accuracy_low=0.7, accuracy_high=0.9, labels=1500, max_tokens=160).to_csv(tmp_path / "quick.csv")
    text = plain(readme.labels_block())
    assert "labels.png" not in text, "there is one number of labels only"
    for piece in (
        "On 2,495 test reviews, of which a model reads at most 512 tokens; minutes",
        "are those of one fine-tuning beside others, on a card.",
        "| 6,000 | TF-IDF | 88.0 % (87.1 to 90.0) |  |  |",
        "| from scratch | 82.0 % (87.1 to 90.0) | -6.0 points (-7.5 to -4.5, p < 0.001) | 8.2 |",
        "`quick`: 3 of each start, 1,500 labels, at most 160 tokens, judged on 5,000 validation reviews.",
        "- pretrained: 85.0 % (70.0 to 90.0) on validation with learning rate 0.00015, 2 epochs",
        "median of the trials 80.0 %, worst 70.0 %.",
    ):
        assert piece in text
