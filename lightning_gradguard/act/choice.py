"""Which way decisions reach an optimizer."""

from __future__ import annotations

import torch

from lightning_gradguard.act.base import Executor
from lightning_gradguard.act.closures import InClosure, UndoableStep
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.on_device import OnDevice
from lightning_gradguard.act.on_host import OnHost
from lightning_gradguard.act.queued import Queued
from lightning_gradguard.measure.parameters import WatchedParameters

DEFERRING_DEVICES = {"cuda"}
"""Where the host runs ahead of the device, so that waiting for a fact costs time."""


def executor_for(gate: Gate, parameters: WatchedParameters) -> Executor:
    """The way that costs least.

    Args:
        gate: of the optimizer.
        parameters: of the optimizer, where they are trained.
    """
    if isinstance(parameters.optimizer, torch.optim.LBFGS):
        return InClosure(gate, UndoableStep(parameters.optimizer, parameters.everything))
    if parameters.device.type not in DEFERRING_DEVICES or not gate.clips_unseen:
        return OnHost(gate)
    return Queued(gate) if gate.kernel is None else OnDevice(gate)
