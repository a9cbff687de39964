"""Everything at once: what is left of the student, what the steps say of it, and what its zeros are chosen by."""

import pytest
import torch

from nbhelpers.evaluation import evaluate_accuracy
from nbhelpers.models import ModelError, check_model, prunable_weights
from nbhelpers.profiles import get_profile
from nbhelpers.sparse import FactorizedEmbedding, Int8Embedding, SparseLinear, count_actual_params
from nbhelpers.study import inputs, students
from nbhelpers.study.scoring import calibration_rows
from nbhelpers.workspace import open_run


@pytest.fixture
def small(study):
    """The compressed model of the finished study."""
    return study.run.load_model("compressed_1")


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
        torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-3)
    assert len(layers) == 4


def test_the_steps_say_what_lies_on_disk_and_what_it_gets_right(study, small):
    run, steps = study.run, study.steps
    assert steps["step"].tolist() == ["fine-tuned", "distilled", "pruned, low-rank embedding", "int8"]
    assert steps["model"].tolist() == ["fine_tuned", "compressed_1", "compressed_1", "compressed_1"]
    assert steps["layers"].tolist() == [2, 1, 1, 1]
    assert steps["file_bytes"].iloc[-1] == (run.folder("compressed_1") / "sparse.safetensors").stat().st_size
    assert (
        steps["file_bytes"].is_monotonic_decreasing and steps["file_bytes"].iloc[0] > 10 * steps["file_bytes"].iloc[-1]
    )
    for step, model in ((0, "fine_tuned"), (1, "student_distilled_1"), (3, "compressed_1")):
        found = evaluate_accuracy(run.load_model(model), inputs.dataset(run, "validation"))
        assert steps["accuracy"].iloc[step] == found


def test_the_zeros_are_those_of_the_lowest_weight_times_gradient(study):
    run = study.run
    model = run.load_model("student_distilled_1")
    weights = prunable_weights(model)
    scores = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for ids, label in zip(*calibration_rows(run, run.profile.calibration_reviews), strict=True):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        for name, weight in weights.items():
            scores[name] += (weight * weight.grad).abs().detach().double()
    lowest = torch.cat([score.flatten() for score in scores.values()]).sort().values
    limit = lowest[round(0.5 * len(lowest)) - 1]
    chosen = students.taylor_masks(run, model, 0.5)
    wrong = sum(int((mask != (scores[name] > limit)).sum()) for name, mask in chosen.items())
    assert wrong <= 2  # rounding, next to the limit


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ({"compressed_2": 0.9, "compressed_1": 0.892}, "compressed_1"),
        ({"compressed_2": 0.9, "compressed_1": 0.88}, "compressed_2"),
        ({"compressed_2": 0.7, "compressed_1": 0.8}, "compressed_1"),
    ],
)
def test_the_smallest_that_loses_at_most_a_point_on_validation_is_the_best(monkeypatch, accuracy, best):
    monkeypatch.setattr(compression, "validation_accuracy", lambda run, name: {"fine_tuned": 0.9, **accuracy}[name])
    monkeypatch.setattr(compression, "model_bytes", lambda run, name: int(name.split("_")[1]))
    run = open_run(get_profile("quick", student_layers=(2, 1)))
    assert students.best_compressed(run) == best


def test_it_is_found_again(study, monkeypatch):
    monkeypatch.setattr(compression, "train", lambda *_, **__: pytest.fail("trained again"))
    assert students.compress_all(study.run).equals(study.steps)


def test_a_rank_that_saves_nothing_is_refused_before_anything_runs():
    with pytest.raises(ModelError, match="embedding_rank is 32: the embeddings of 'tiny' have 32 features"):
        check_model(get_profile("smoke", embedding_rank=32))
