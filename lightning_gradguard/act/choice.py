"""Which way decisions reach an optimizer."""

from __future__ import annotations

import torch

from lightning_gradguard.act.base import Executor
from lightning_gradguard.act.closures import ForeignEvaluations, InClosure, LBFGSEvaluations
from lightning_gradguard.act.gate import Gate, is_of_torch
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
    optimizer = parameters.optimizer
    can_queue = parameters.device.type in DEFERRING_DEVICES and gate.clips_unseen
    if isinstance(optimizer, torch.optim.LBFGS):
        return InClosure(gate, LBFGSEvaluations(optimizer, gate), None)
    if optimizer is not None and not is_of_torch(optimizer):
        return InClosure(gate, ForeignEvaluations(optimizer, gate), Queued(gate) if can_queue else None)
    if not can_queue:
        return OnHost(gate)
    return Queued(gate) if gate.kernel is None else OnDevice(gate)
