"""The fast path of a step: measured, judged and clipped in one go, where it is as plain as most steps of most trainings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.judge.judge import NOTHING_FOUND, Judge
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.gradients import all_of
from lightning_gradguard.measure.one_pass import OnePass
from lightning_gradguard.measure.step import StepMeter
from lightning_gradguard.record import Measurement, Outcome, Position
from lightning_gradguard.report.reporter import DecidedStep, Reporter

_LOSSES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of losses that float32 holds."""


class FastPath:
    """Decides about plain steps: with the same kernels as on the way through all stages, and to the same, to the last bit.

    Plain is a step of one backward pass on one process, with dense gradients in float32 on the CPU that have no graph and
    are clipped by one factor, if at all; at which nothing is due, and that the judge may be told of later. There kernels
    take no longer than making what only other steps need: figures that wait on the device, shares of ranks, signs of several
    passes, an object for each stage. None of it is made here.

    Args:
        meter: of an optimizer, told of its backward passes.
        judge: of its steps.
        gate: that lets them through.
        reporter: that tells of them.
        is_possible: whether the host carries out what is decided, and nothing is scaled.
    """

    def __init__(self, meter: StepMeter, judge: Judge, gate: Gate, reporter: Reporter, *, is_possible: bool) -> None:
        self._parameters = meter.parameters
        self._meter = meter
        self._judge = judge
        self._gate = gate
        self._reporter = reporter
        is_alone = Ranks.current().size == 1
        self._is_possible = is_possible and is_alone and gate.clips_on_host and judge.can_defer
        self._quiet = range(0)
        """Steps at which nothing is due, nor at the one after, since weights are looked at from one to the next."""

    def look_ahead(self, position: Position) -> None:
        """After a step that was not plain: note up to which step nothing is due."""
        step = position.log_step
        self._quiet = range(step + 1, self._meter.logged.next_due(step) - 1 if self._is_possible else 0)

    def decide(self, position: Position | None) -> Outcome | None:
        """Measure a step, and let it through, clipped; None, and nothing done, if it is not plain, or may have a finding."""
        if (
            position is None
            or position.log_step not in self._quiet
            or position.num_optimizers > 1
            or self._reporter.stopped_by is not None
            or self._parameters.refresh()
            or not self._judge.can_wait()
        ):
            return None
        gradients = self._gradients()
        measurement = None if gradients is None else self._measure(gradients)
        if gradients is None or measurement is None or not self._judge.defer(measurement):
            return None
        self._gate.open()
        self._meter.note_measured(position)
        norm = measurement.global_norm
        coef = self._gate.clip_on_host_(gradients, norm)
        self._gate.buffers.note_boundary()
        self._reporter.note(DecidedStep(position, measurement, NOTHING_FOUND, coef, norm * coef))
        return Outcome(position, measurement)

    def _gradients(self) -> list[Tensor] | None:
        """Those of all parameters; None if they aren't plain."""
        if not self._parameters.are_plain:
            return None
        gradients = [parameter.grad for parameter in self._parameters.tensors]
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) < len(gradients) or True in [gradient.is_sparse for gradient in present]:
            return None
        return present

    def _measure(self, gradients: list[Tensor]) -> Measurement | None:
        """None if there is no loss to go by, or something is not finite."""
        loss = self._meter.only_loss
        if loss is None or not loss.is_cpu or loss.dtype not in _LOSSES:
            return None
        norms = torch.stack(torch._foreach_norm(gradients))
        if norms.dtype is not torch.float32 or norms.requires_grad:  # gradients of another dtype, or with a graph
            return None
        total_norm, last_loss = torch.linalg.vector_norm(norms).item(), loss.item()
        if not (math.isfinite(total_norm) and math.isfinite(last_loss)):
            return None
        return OnePass.of(self._parameters.layout, norms.tolist(), all_of(len(gradients)), total_norm, last_loss)
