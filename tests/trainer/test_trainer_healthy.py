"""The default guard on ten ordinary trainings."""

from __future__ import annotations

import pytest
from ordinary import TRAININGS
from toys import fit, same, seeded, weights_of

from lightning_gradguard import GradGuard


def _train(training, root, *callbacks):
    module = seeded(training)
    fit(root, module, *callbacks, batches=training.data(), **training.trainer_settings)
    return weights_of(module)


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.__name__)
def test_default_guard_ordinary_training_changes_no_bit_and_raises_no_alert(training, tmp_path):
    """No warning (they are errors here), no alert, no skip, and the same weights as without a guard."""
    guard = GradGuard()

    guarded = _train(training, tmp_path, guard)

    assert (guard.alerts, guard.num_skipped, guard.num_clipped, guard.stopped_by) == ([], 0, 0, None)
    assert guard.num_steps >= 60
    assert not (tmp_path / "gradguard").exists()
    assert same(guarded, _train(training, tmp_path))
