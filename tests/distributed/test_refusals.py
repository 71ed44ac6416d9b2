"""Strategies under which a norm could be wrong are refused, with a way out in the message."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning_package import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.strategies import engine_of


class Unknown:
    """A strategy that nobody here has heard of."""


class MyDDP(DDPStrategy):
    """A user's own, of a supported kind."""


def _trainer(strategy: type) -> SimpleNamespace:
    # Most of these can't be made on a CPU; the class is all that is looked at.
    return SimpleNamespace(strategy=strategy.__new__(strategy))


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        (XLAStrategy, "Use GradGuard on a GPU or CPU"),
        (SingleDeviceXLAStrategy, "Use GradGuard on a GPU or CPU"),
        (Unknown, "must be one of SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy"),
    ],
)
def test_strategy_whose_gradients_can_not_be_read_is_refused_with_the_remedy(strategy, remedy):
    """Rather than to give a wrong norm."""
    with pytest.raises(ConflictError, match=remedy):
        engine_of(_trainer(strategy))


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, MyDDP, ModelParallelStrategy, FSDPStrategy])
def test_strategy_that_is_supported_passes(strategy):
    """And what is derived from it."""
    engine_of(_trainer(strategy))
