"""`Guard.watch_step`: exceptions that NaN is the reason of, in a loop without a Trainer."""

from __future__ import annotations

import pytest
import torch

from lightning_gradguard import Guard

pytestmark = pytest.mark.filterwarnings("ignore")

BAD, ROW = 2, 3


class _Loop:
    """Five batches, of which one has NaN in a row."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 4)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batches = [torch.randn(8, 6) for _ in range(5)]
        self.batches[BAD][ROW, 1] = torch.nan
        self.batch = self.batches[0]
        self.is_bad_code = False
        self.guard = Guard(self.model.named_parameters(), self.optimizer, replay=lambda: self.loss(self.batch), **settings)

    def loss(self, x):
        if self.is_bad_code and bool(x.isnan().any()):
            raise KeyError("missing")
        return -torch.distributions.Normal(self.model(x), 1.0).log_prob(torch.zeros(8, 4)).mean()

    def run(self, **watching):
        for batch in self.batches:
            self.batch = batch
            with self.guard.watch_step(**watching):
                self.optimizer.zero_grad()
                self.loss(self.batch).backward()
                self.guard.step()
                self.optimizer.step()


def test_exception_of_torch_is_a_skipped_step():
    """The loop goes on."""
    loop = _Loop()
    loop.run()
    assert (loop.guard.totals.num_steps, loop.guard.totals.num_skipped) == (5, 1)
    (alert,) = loop.guard.alerts
    assert (alert.step, alert.culprit.samples) == (BAD, (ROW,))


@pytest.mark.parametrize(("settings", "watching"), [({"nonfinite": "warn"}, {}), ({}, {"skip_exceptions": None})])
def test_exception_passes_on_with_an_alert_where_nothing_is_skipped(settings, watching):
    """It is the one that was raised."""
    loop = _Loop(**settings)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        loop.run(**watching)
    (alert,) = loop.guard.alerts
    assert alert.message.endswith("The exception passes on.")


def test_exception_of_others_passes_on():
    """It is a decision of its author."""
    loop = _Loop()
    loop.is_bad_code = True
    with pytest.raises(KeyError):
        loop.run()
    assert len(loop.guard.alerts) == 1


def test_exception_without_damage_is_untouched():
    """Nothing is said."""
    loop = _Loop()
    loop.batches[1] = torch.randn(8, 5)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        loop.run()
    assert loop.guard.alerts == []
