"""Sparse and compact models compute what the pruned models that they come from compute."""

import numpy as np
import pytest
import torch

from nbhelpers.masks import select_structures
from nbhelpers.models import prunable_weights, structures
from nbhelpers.profiles import get_profile
from nbhelpers.study import conversion, predictions, scoring

pytestmark = pytest.mark.usefixtures("alone")


def test_converted_are_the_sparsities_of_recovery_from_80_percent_on_and_the_main_one():
    assert conversion.converted_sparsities(get_profile("thorough")) == (0.8, 0.9, 0.95)
    low = get_profile("smoke", recovery_sparsities="0.5,0.6,0.8", main_sparsity="0.6")
    assert conversion.converted_sparsities(low) == (0.6, 0.8)


def test_the_sparse_model_computes_what_the_recovered_one_does(study):
    names = (f"{stage}_{study.best}_90" for stage in ("sparse", "recovered"))
    sparse, dense = (predictions.split_logits(study.run, name, "test") for name in names)
    # float32 sums of at most 128 terms in another order, through two blocks.
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


def test_a_compact_model_computes_what_the_structured_one_does(study):
    run = study.run
    names = [f"{stage}_{study.best}_50" for stage in ("structured", "compact")]
    masked, small = (run.load_model(name) for name in names)
    scores = scoring.scores_of(run, study.best)
    masks = select_structures(scores, structures(run.load_model("fine_tuned")), 0.5)
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in prunable_weights(masked).items())
    logits = [predictions.split_logits(run, name, "validation") for name in names]
    # The same sums without the terms that are zero, in another order.
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    assert sum(small.config.kept_neurons) < 2 * 4 * masked.config.n_embd


def test_a_block_model_has_only_whole_blocks_of_four_left(study):
    model = study.run.load_model(f"blocks_{study.best}_90")
    dropped = total = 0
    for weight in prunable_weights(model).values():
        blocks = (weight != 0).view(len(weight) // 4, 4, -1)  # GPT-2 stores [in, out]
        assert torch.equal(blocks.all(1), blocks.any(1))
        dropped, total = dropped + int((~blocks.any(1)).sum()), total + blocks[:, 0].numel()
    assert dropped == round(0.9 * total)


def test_models_in_eight_bits_are_compared_with_what_they_were_made_from(study):
    run = study.run
    names = conversion.int8_sources(run, study.best)
    assert names == ["fine_tuned", f"blocks_{study.best}_90", f"compact_{study.best}_50"]
    table = conversion.compare_int8(run, names).set_index("model")
    for name, row in table.iterrows():
        before, after = (run.load_model(model) for model in (name, f"int8_{name}"))
        assert torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
        logits = [predictions.split_logits(run, model, "validation") for model in (name, f"int8_{name}")]
        assert row["largest_logit_difference"] == pytest.approx(np.abs(logits[0] - logits[1]).max())
        assert row["largest_logit_difference"] < 0.1 * np.abs(logits[0]).max()
        assert row["file_bytes_int8"] < row["file_bytes"]
        assert sum(int(part.split()[0]) for part in row["engines"].split(", ")) == 4 * len(before.transformer.h)
    assert table["largest_logit_difference"].max() > 0, (
        "one of these models may have nothing left that could be rounded"
    )
