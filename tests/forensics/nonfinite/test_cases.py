"""Every labelled failure, in a real fit: phase, module, operator, line and samples; nothing on healthy controls."""

from __future__ import annotations

import more_cases  # noqa: F401 - registers its cases
import own_cases  # noqa: F401
import pytest
import torch
from cases import CASES, Base, Case
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard


def fit(module: Base) -> GradGuard:
    """One step of a real Trainer."""
    guard = GradGuard()
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, callbacks=[guard], accelerator="cpu", devices=1, **silent)
    trainer.fit(module, DataLoader([module.batch()], batch_size=None))
    return guard


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
def test_culprit_of_a_labelled_failure_is_named(case: Case):
    """Exactly."""
    guard = fit(case.make())
    if case.phase == "none":
        assert guard.alerts == []
        return
    culprit = guard.alerts[0].culprit
    assert culprit is not None
    assert culprit.phase == case.phase
    if case.module.endswith("*"):
        assert culprit.module.startswith(case.module[:-1])
    else:
        assert culprit.module == case.module
    if case.phase in ("forward", "backward"):
        assert culprit.op in case.ops.split() or case.ops == "any"
        assert not case.lines or (culprit.file, culprit.line) in case.lines
        assert culprit.source
    if case.rows is not None:
        assert culprit.samples == tuple(case.rows)
    assert culprit.reproduced
    assert culprit.error == 0.0
    assert culprit.message in guard.alerts[0].message
    assert culprit.remedy == guard.alerts[0].remedy
    assert torch.is_grad_enabled()
