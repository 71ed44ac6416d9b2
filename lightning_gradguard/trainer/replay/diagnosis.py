"""Says why gradients vanish or explode, from replays of the step and of a healthy batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.alert import Culprit
from lightning_gradguard.detectors.depth import lost_at
from lightning_gradguard.forensics.comparison import TOLERANCE
from lightning_gradguard.forensics.flow.evidence import Changed, Evidence
from lightning_gradguard.forensics.flow.explosion_causes import explosion_causes, top_row, with_row_replaced
from lightning_gradguard.forensics.flow.flow import Flow, FlowMeter
from lightning_gradguard.forensics.flow.norm_history import NormHistory
from lightning_gradguard.forensics.flow.report import culprit_of
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_causes
from lightning_gradguard.forensics.flow.weight_history import WeightGrowth, WeightHistory
from lightning_gradguard.forensics.nonfinite.layout import layout_of
from lightning_gradguard.forensics.nonfinite.samples import Batch, exchanged
from lightning_gradguard.forensics.state import State
from lightning_gradguard.record import Measurement, Outcome, Position
from lightning_gradguard.trainer.replay.replay import Replay, Replayed
from lightning_gradguard.trainer.replay.window import MicroBatch, Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_SAME_LOSS = 1e-4
"""Relative difference up to which two losses count as the same."""


class Diagnosis:
    """Looks into steps that vanish or explode.

    Between them it remembers one healthy batch, the measurements of 64 steps, and norms and a few elements of the weights.

    Args:
        module: the one that is trained.
        window: the running micro-batches.
        replay: runs them again.
        num_ranks: processes that share a batch. Of one alone gradients can be compared with those of the replay.
    """

    def __init__(self, module: LightningModule, window: Window, replay: Replay, *, num_ranks: int) -> None:
        self._module = module
        self._window = window
        self._replay = replay
        self._num_ranks = num_ranks
        self._weights = WeightHistory(module.named_parameters())
        self._norms: dict[int, NormHistory] = {}
        self._healthy: dict[int, MicroBatch] = {}
        self._undecided: dict[int, MicroBatch] = {}
        self._num_noted = 0
        self._is_from_start = False

    def note(self, optimizer: Optimizer, outcome: Outcome | None, *, is_pending: bool = False) -> None:
        """A step has been decided and is about to be applied: take down its batch if it was in order.

        No sync. It copies a few elements of each matrix; every 16 steps one pass of norms goes over the weights.

        Args:
            optimizer: whose step it is.
            outcome: of the step; of the one before where the host has yet to learn of this one; None if there is none.
            is_pending: whether that is so.
        """
        self._num_noted += 1
        if self._num_noted == 1 and outcome is not None and not is_pending:
            self._is_from_start = outcome.position.step == 0 and outcome.position.log_step == 0
        latest = self._window.running()
        if is_pending:
            self._weights.note(optimizer)
            latest, self._undecided[id(optimizer)] = self._undecided.get(id(optimizer)), latest  # type: ignore[assignment]
        elif outcome is not None:
            is_applied = not outcome.skip and math.isfinite(outcome.measurement.global_norm)
            self._weights.note(optimizer, outcome.measurement, is_applied=is_applied)
        if outcome is not None and not outcome.has_finding and outcome.measurement.is_finite:
            if id(optimizer) not in self._norms:
                self._norms[id(optimizer)] = NormHistory()
            self._norms[id(optimizer)].note(outcome.measurement)
            if latest is not None:
                self._healthy[id(optimizer)] = latest

    def clear(self) -> None:
        """Let go of the batches."""
        self._healthy.clear()
        self._undecided.clear()

    def healthy_batch(self, optimizer: Optimizer) -> Any:
        """The batch of the last healthy step; None if there was none."""
        found = self._healthy.get(id(optimizer))
        return None if found is None else found.batch

    def healthy_norms(self, optimizer: Optimizer) -> list[float]:
        """Global gradient norms of the last healthy steps, oldest first."""
        history = self._norms.get(id(optimizer))
        return [] if history is None else history.norms

    def weight_growths(self, optimizer: Optimizer) -> tuple[WeightGrowth, ...]:
        """How the weights have moved; a few syncs."""
        return self._weights.weight_growths(optimizer)

    @property
    def is_from_start(self) -> bool:
        """Whether the weights have been seen before their first step."""
        return self._is_from_start or self._num_noted == 0

    def look(
        self, optimizer: Optimizer, position: Position, measurement: Measurement, kind: str, silent: Sequence[str] = ()
    ) -> tuple[Culprit | None, float]:
        """Why a step vanished or exploded, in this rank's part, and the gradient norm of that.

        Args:
            optimizer: whose step it is.
            position: where it is.
            measurement: of its gradients.
            kind: "vanishing" or "explosion".
            silent: names of parameters that the finding is about because their gradient is exactly zero.
        """
        held = position.step if self._window.is_held(position.step) else None
        batches = self._window.of(optimizer, held)
        measured = self._run(optimizer, held, batches, measurement)
        changed = None
        if held is None and self._num_ranks == 1:
            changed = self._compare(measured.replayed, measurement)
        history = self._norms.get(id(optimizer))
        evidence = Evidence(
            position.step,
            measured.flow,
            measured.norm,
            usual=None if history is None else history.usual(measurement),
            weight_growths=self.weight_growths(optimizer),
            is_from_start=self._is_from_start or (self._num_noted == 0 and position.step == position.log_step == 0),
            changed=changed,
            measured=None if changed is None else measurement.global_norm,
            lost_at=lost_at(measurement),
            silent=tuple(silent),
            num_ranks=self._num_ranks,
        )
        if kind == "explosion":
            replay = partial(self._run, optimizer, held, measurement=measurement)
            evidence = self._with_other_batches(evidence, optimizer, batches, measured.index, replay)
        causes = vanishing_causes(evidence) if kind == "vanishing" else explosion_causes(evidence)
        error = None if changed is None else changed.error
        ranks = {"rank": position.rank, "num_ranks": self._num_ranks}
        return culprit_of(causes, measured.flow, error=error, tolerance=TOLERANCE, **ranks), measured.norm

    def _with_other_batches(
        self,
        evidence: Evidence,
        optimizer: Optimizer,
        batches: Sequence[MicroBatch],
        index: int,
        replay: Callable[[Sequence[MicroBatch]], _Measured],
    ) -> Evidence:
        """What the last healthy batch gives on these weights, and the step's own without the row that counts most.

        Args:
            evidence: so far.
            optimizer: whose step it is.
            batches: of the step.
            index: which of them is looked at.
            replay: runs others in their place.
        """
        healthy = self._healthy.get(id(optimizer))
        if healthy is not None and healthy.is_untouched:
            other = replay([healthy] * len(batches))
            evidence = replace(evidence, healthy=other.flow, healthy_norm=other.norm)
            if evidence.norm > other.norm:
                # What the step does from a certain number on is not to be laid on its batch.
                numbered = replay([healthy._replace(batch_idx=it.batch_idx) for it in batches])
                evidence = replace(evidence, norm_under_number=numbered.norm)
        found = top_row(evidence.flow)
        if found is None:
            return evidence
        row, _, size = found
        try:
            layout = layout_of(batches[index].batch)
            if layout.size != size:
                return evidence
            rest = exchanged(batches[index].batch, layout, with_row_replaced(row, size))
            instead = batches[index]._replace(batch=rest)
            other = replay([*batches[:index], instead, *batches[index + 1 :]])
        except Exception:  # noqa: BLE001 - a batch whose rows can't be exchanged names no single one
            return evidence
        again = top_row(other.flow)
        return replace(evidence, norm_without_row=other.norm, is_place=again is not None and again[0] == row)

    def _run(
        self, optimizer: Optimizer, held: int | None, batches: Sequence[MicroBatch], measurement: Measurement
    ) -> _Measured:
        """Replay the step, or what it would be with other batches."""
        meters: list[FlowMeter] = []

        @contextmanager
        def observe(micro_batch: MicroBatch, state: State) -> Iterator[None]:  # noqa: ARG001 - the replay's call
            meters.append(FlowMeter(self._module, Batch.of(micro_batch.batch).size))
            with meters[-1].watch():
                yield

        replayed = self._replay.run(optimizer, step=held, batches=batches, observe=observe)
        watched = set(measurement.names)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        norm = _norm(gradient for key, gradient in replayed.gradients.items() if names.get(key) in watched)
        # Of several micro-batches the one that did most.
        flows = [meter.flow for meter in meters]
        index = max(range(len(flows)), key=lambda index: _size(flows[index]), default=0)
        return _Measured(flows[index] if flows else Flow(()), index, norm, replayed)

    def _compare(self, replayed: Replayed, measurement: Measurement) -> Changed | None:
        """How the gradients that are there differ from those of the replay."""
        distances: dict[str, float] = {}
        norms: dict[str, tuple[float, float]] = {}
        for name, parameter in self._module.named_parameters():
            again = replayed.gradients.get(id(parameter))
            if parameter.grad is None or again is None or again.shape != parameter.grad.shape:
                continue
            distances[name] = _norm([again.to_dense() - parameter.grad.to_dense()])
            norms[name] = _norm([parameter.grad]), _norm([again])
        total = math.hypot(*(norm for norm, _ in norms.values()))
        if not total:
            return None
        worst = max(distances, key=lambda name: distances[name])
        is_same = _is_same_loss(replayed, measurement.loss)
        return Changed(math.hypot(*distances.values()) / total, worst, *norms[worst], is_same)


@dataclass(frozen=True)
class _Measured:
    """What one replay has shown.

    Attributes:
        flow: of the micro-batch that did most.
        index: which one that is.
        norm: of the gradients of all watched parameters.
        replayed: the gradients themselves.
    """

    flow: Flow
    index: int
    norm: float
    replayed: Replayed


def _is_same_loss(replayed: Replayed, loss: float | None) -> bool | None:
    """Whether a replay gave the loss that the step had; None if one of them is not known."""
    if loss is None or not replayed.losses or not math.isfinite(loss):
        return None
    last = float(replayed.losses[-1])
    # The Trainer divides a loss by the number of batches that make a step.
    return any(math.isclose(last / part, loss, rel_tol=_SAME_LOSS, abs_tol=1e-12) for part in {1, len(replayed.losses)})


def _size(flow: Flow) -> float:
    return (flow.output.grad_norm or 0.0) if flow.output is not None else 0.0


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.hypot(*(float(gradient.detach().to_dense().double().norm()) for gradient in gradients))
