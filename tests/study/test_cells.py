"""The cells of a run: names, phases and notebooks; and that no two of a phase make the same artefact."""

from collections import Counter

import pytest
from conftest import STUDY, fresh_accelerate

from nbhelpers.profiles import get_profile
from nbhelpers.study import cells, comparison, conversion, fine_tuning, inputs, pruning, recovery, scoring, students
from nbhelpers.study.choices import best_score
from nbhelpers.workspace import Run, WorkspaceError, open_run

SETTINGS = STUDY | {"sparsities": "0.9", "recovery_sparsities": "0.9", "recovery_learning_rates": "1e-3"}
SETTINGS |= {"train_size": "16", "scan_steps": "1"}


def open_small() -> Run:
    return open_run(get_profile("smoke", **SETTINGS))


def names(phases) -> list[list[str]]:
    return [[cell.name for cell in phase] for phase in phases]


# --- names and phases ---


def test_cells_and_phases_of_smoke():
    five = ("magnitude", "movement", "gradient", "merged", "taylor")
    scores = [f"{seed}-{score}" for seed in (0, 1) for score in five]
    rates = [f"rates-{seed}-{name}" for seed in (0, 1) for name in ("pruned", "control")]
    prunes = [f"prune-{seed}-{pruner}" for seed in (0, 1) for pruner in (*five, "wanda", "sparsegpt")]
    small = [f"student-0-{variant}-{n}" for variant, n in students.student_variants(open_small().profile)]
    parts = [f"part-{seed}-{part}" for seed in (0, 1) for part in ("labels", "taught", "hidden")]
    teaching = [f"teach-{seed}-{split}" for seed in (0, 1) for split in ("train", "transfer")]
    arms = ("best", "merged", "structured", "control")
    budget = [f"budget-{seed}-{arm}-1" for seed in (0, 1) for arm in arms]
    assert names(cells.phases(open_small())) == [
        ["finetune-0", "finetune-1"],
        ["score-0", "score-1", *teaching, "tfidf-0"],
        [*rates, *prunes, "scan-0-0.5-2"],
        ["choose-distillation"],
        ["control-0", "control-1", *(f"recover-{score}-0.9" for score in scores), *small],
        ["choose-score"],
        [*parts, *budget, "structured-0-0.5", "structured-1", "blocks-0", "compress-0-1", "compress-0-width_50"],
        ["choose-compressed"],
        ["open-test"],
        [
            "evaluate-dense-0",
            "evaluate-dense-1",
            *(f"evaluate-{score}" for score in scores),
            *(f"evaluate-0-{name}" for name in students.student_names(open_small().profile)),
            "evaluate-0-tfidf",
            "evaluate-0-tfidf_taught",
            "unlearned-0",
            "unlearned-1",
        ],
    ]


def test_the_test_reviews_are_used_by_cells_of_the_last_notebook_only():
    run = open_small()
    assert names(cells.phases(run, {"01"})) == [["finetune-0", "finetune-1"], ["tfidf-0"]]
    assert cells.phases(run, set()) == []
    before = [name for phase in names(cells.phases(run, {"01", "02", "03", "04", "05"})) for name in phase]
    assert "open-test" not in before and not [name for name in before if name.startswith("evaluate")]
    last = [name for phase in names(cells.phases(run, {"06"})) for name in phase]
    assert sorted(before + last) == sorted(name for phase in names(cells.phases(run)) for name in phase)


def test_an_unknown_cell_is_refused_with_the_names_that_there_are(workspace):
    with pytest.raises(WorkspaceError, match=r"the cell must be one of finetune-0, .* \(got 'recover-7-merged'\)"):
        cells.run_cell(open_small(), "recover-7-merged")


# --- the artefacts of cells ---


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """All cells of a small run, backwards in each phase: workspace, and how many cells asked for each new artefact.

    The second part is, phase by phase, {(seed, artefact): number of cells}.
    """
    root = tmp_path_factory.mktemp("cells")
    asked, cached = set(), Run.cached

    def logged(run, name, *arguments, **options):
        asked.add((run.seed, name))
        return cached(run, name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("NBHELPERS_ROOT", str(root))
        patch.setattr(Run, "cached", logged)
        run, counts = open_small(), []
        for phase in cells.phases(run):
            there = {(one.seed, record["name"]) for one in inputs.runs_of(run) for record in one.records()}
            counts.append(Counter())
            for cell in reversed(phase):
                asked.clear()
                cell.compute()
                counts[-1].update(asked - there)
    return root, counts


def test_no_two_cells_of_a_phase_make_the_same_artefact(computed):
    for counts in computed[1]:
        assert set(counts.values()) <= {1}, counts.most_common(3)


def test_the_notebooks_find_all_that_the_cells_have_computed(computed, monkeypatch):
    monkeypatch.setenv("NBHELPERS_ROOT", str(computed[0]))
    run = open_small()

    def created():
        return {(one.seed, r["name"]): r["created"] for one in inputs.runs_of(run) for r in one.records()}

    before = created()
    for one in inputs.runs_of(run):
        fine_tuning.finetune_model(one)
        scoring.score_weights(one, scoring.MAIN)
    pruning.pruned_curves(run)
    recovery.recover_all(run)
    recovery.recovered_curves(run)
    recovery.recover_in_parts(run)
    recovery.budget_curve(run)
    conversion.block_model(run, best_score(run), run.profile.main_sparsity)
    students.distil_all(run)
    students.compress_all(run)
    comparison.open_test_part(run)
    recovery.recovered_curves(run, "test")
    comparison.answers_of_all(run, list(comparison.LINES))
    assert created() == before
