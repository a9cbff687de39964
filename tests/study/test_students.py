"""Students of fewer layers, and the one that is compressed in every way: what is left of it, and who is chosen."""

import dataclasses

import pytest
import torch

from nbhelpers.data import UNLABELLED
from nbhelpers.models import blocks, create_student, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import FactorizedEmbedding, Int8Embedding, SparseLinear, convert_to_sparse, count_actual_params
from nbhelpers.study import choices, inputs, predictions, students, teacher
from nbhelpers.study.scoring import calibration_rows
from nbhelpers.training import recipe_for, train
from nbhelpers.workspace import open_run

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def small(study):
    """The compressed model of the finished study."""
    return study.run.load_model("compressed_1")


# --- students ---


def test_students_have_fewer_layers_and_follow_the_best_of_the_scan(study):
    table = students.distil_all(study.run)
    names = ["distilled_1", "labels_only_1", "direct_1", "distilled_width_50"]
    assert table["model"].tolist() == [f"student_{name}" for name in names]
    assert table["layers"].tolist() == [1, 1, 1, 2]
    assert table["alpha"].tolist() == [0.5, 1.0, 1.0, 0.5]
    assert table["start"].tolist() == ["fine_tuned", "fine_tuned", "pretrained", "fine_tuned"]
    # 48 labelled reviews and 24 without labels, 16 in a batch; the direct one is trained as long as the others and
    # their compression.
    assert table["steps"].tolist() == [5, 5, 10, 5]
    for row in table.itertuples():
        assert len(blocks(study.run.load_model(row.model))) == row.layers
        assert row.accuracy == predictions.validation_accuracy(study.run, row.model)


@pytest.mark.parametrize(
    ("variant", "start", "steps"), [("labels_only", "fine_tuned", 5), ("direct", "pretrained", 10)]
)
def test_a_student_without_a_teacher_is_the_one_that_plain_training_gives(study, variant, start, steps):
    run = study.run
    student = create_student(run.load_model(start), 1, run.seed)
    recipe = dataclasses.replace(recipe_for(run.profile, "distill"), steps=steps)
    train(student, inputs.dataset(run, "train"), recipe, seed=run.seed, validate=predictions.validator(run))
    saved = run.load_model(f"student_{variant}_1").state_dict()
    # alpha = 1 leaves the soft term out but computes it: no more than rounding is between the two.
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=1e-4, atol=1e-5)
    distilled = run.load_model("student_distilled_1").state_dict()
    assert (distilled["score.weight"] - saved["score.weight"]).abs().max() > 1e-4, "the teacher makes a difference"


def test_the_scan_decides_alpha_and_temperature(workspace, monkeypatch):
    accuracy = {(0.1, 1.0): 0.6, (0.1, 4.0): 0.8, (0.5, 1.0): 0.7, (0.5, 4.0): 0.8}
    row = lambda run, a, t: {"alpha": a, "temperature": t, "accuracy": accuracy[a, t]}  # noqa: E731
    monkeypatch.setattr(students, "scan_student", row)
    run = open_run(get_profile("smoke", alphas=(0.1, 0.5), temperatures=(1.0, 4.0)))
    assert len(students.scan_distillation(run)) == 4
    assert choices.distillation_scales(run) == (0.1, 4.0), "the first of the best"


def test_a_narrow_student_has_lost_whole_heads_and_neurons(study):
    model = study.run.load_model("student_distilled_width_50")
    assert count_actual_params(model)["encoder_sparsity"] == pytest.approx(0.5, abs=0.03)
    smaller = convert_to_sparse(model, "dense")
    sizes = [sum(p.numel() for n, p in m.named_parameters() if ".h." in n) for m in (smaller, model)]
    assert sizes[0] < 0.6 * sizes[1], "its matrices are smaller once it is converted"


def test_students_learn_from_labels_where_there_are_any_and_from_the_teacher_everywhere(study):
    run = study.run
    data, loss = teacher.teacher_data_and_loss(run, 0.5, 2.0, splits=("train", "transfer"))
    labels = [int(label) for label in inputs.reviews_of(run.profile, run.seed)["train"]["label"]]
    assert data.labels.tolist() == labels + [UNLABELLED] * 24
    model = run.load_model("student_distilled_1")
    dense = run.load_model("fine_tuned")
    for i in (0, 50):
        ids = torch.tensor([data.input_ids[i]])
        with torch.no_grad():
            logits = model(ids, output_hidden_states=True).hidden_states[-1]
            logits, taught = (
                model.score(logits)[0],
                dense.score(dense(ids, output_hidden_states=True).hidden_states[-1])[0],
            )
            soft = 4 * ((taught / 2).softmax(-1) * ((taught / 2).log_softmax(-1) - (logits / 2).log_softmax(-1))).sum(
                -1
            )
            hard = -logits.log_softmax(-1)[:, labels[0]] if i == 0 else torch.zeros(len(soft))
            n = len(soft)
            place = torch.arange(1, n + 1) / n
            weights = 0.5 * place / place.sum()
            weights[-1] += 0.5
            batch = {"input_ids": ids, "lengths": torch.tensor([n]), "labels": torch.tensor([data.labels[i]])}
            found = loss(model, batch | {"teacher_logits": data.teacher_logits[i][None]})
        torch.testing.assert_close(found, (weights * (0.5 * hard + 0.5 * soft)).sum(), rtol=5e-3, atol=1e-4)


# --- compressed in every way ---


def test_the_model_is_shallow_sparse_low_rank_and_int8(study, small):
    profile = study.run.profile
    table = small.transformer.wte
    assert isinstance(table, FactorizedEmbedding) and isinstance(table.table, Int8Embedding)
    assert table.table.numbers.shape == (small.config.vocab_size, profile.embedding_rank)
    assert isinstance(small.transformer.wpe, Int8Embedding) and len(small.transformer.h) == 1
    # Structures without any weight left are taken out as well.
    assert profile.main_sparsity <= count_actual_params(small)["encoder_sparsity"] < profile.main_sparsity + 0.05
    layers = [module for module in small.modules() if isinstance(module, SparseLinear)]
    for layer in layers:
        values, _, starts, _ = layer.csr()
        numbers = values / layer.scale.repeat_interleave(starts.diff())
        # Whole numbers up to 127, after a product and a division in float32.
        torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-3)
    assert len(layers) == 4


def test_the_steps_are_those_of_the_files_and_their_accuracy(study):
    run, steps = study.run, students.compress_all(study.run)
    assert steps["step"].tolist() == ["fine-tuned", *(2 * ["distilled", "pruned, low-rank embedding", "int8"])]
    assert steps["model"].tolist() == ["fine_tuned", *(3 * ["compressed_1"]), *(3 * ["compressed_width_50"])]
    assert steps["layers"].tolist() == [2, 1, 1, 1, 2, 2, 2]
    steps = steps.head(4)
    assert steps["file_bytes"].iloc[-1] == (run.folder("compressed_1") / "sparse.safetensors").stat().st_size
    assert steps["file_bytes"].is_monotonic_decreasing
    assert steps["file_bytes"].iloc[0] > 10 * steps["file_bytes"].iloc[-1]
    for step, name in ((0, "fine_tuned"), (1, "student_distilled_1"), (3, "compressed_1")):
        assert steps["accuracy"].iloc[step] == predictions.validation_accuracy(run, name)


def test_a_student_is_pruned_by_weight_times_gradient_step_by_step_to_the_main_sparsity(study):
    run, sums = study.run, {}
    model = run.load_model("student_distilled_1")
    weights = prunable_weights(model)
    for ids, label in zip(*calibration_rows(run, run.profile.calibration_reviews), strict=True):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        for name, weight in weights.items():
            sums[name] = sums.get(name, 0) + (weight * weight.grad).abs().detach().double()
    found = students.taylor_scores(run, model)
    count = len(calibration_rows(run, run.profile.calibration_reviews)[0])
    for name, total in sums.items():
        torch.testing.assert_close(found[name].double(), total / count, rtol=1e-4, atol=1e-9)
    keeper, observed = students.taylor_keeper(run, model, run.profile.main_sparsity, steps=10)
    dropped = []
    for _ in range(7):
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        observed.after_backward()
        keeper.apply()
        dropped.append(sum(int((~mask).sum()) for mask in keeper.masks.values()))
    total = sum(weight.numel() for weight in weights.values())
    # 0.9 * (1 - (1 - t)^3) over 60 % of ten steps.
    assert dropped == [round(0.9 * (1 - (1 - min(1, step / 6)) ** 3) * total) for step in range(1, 8)]


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ({"compressed_2": 0.9, "compressed_1": 0.892}, "compressed_1"),
        ({"compressed_2": 0.9, "compressed_1": 0.88}, "compressed_2"),
        ({"compressed_2": 0.7, "compressed_1": 0.8}, "compressed_1"),
    ],
)
def test_the_smallest_that_loses_at_most_a_point_on_validation_is_chosen(workspace, monkeypatch, accuracy, best):
    monkeypatch.setattr(students, "validation_accuracy", lambda run, name: {"fine_tuned": 0.9, **accuracy}[name])
    monkeypatch.setattr(students, "model_bytes", lambda run, name: int(name.split("_")[1]))
    run = open_run(get_profile("quick", student_layers=(2, 1)))
    assert students.choose_compressed(run) == choices.best_compressed(run) == best
