"""Says why gradients vanish or explode, from replays of the step and of a healthy batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.flow.evidence import Evidence
from lightning_gradguard.forensics.flow.exploded import exploded
from lightning_gradguard.forensics.flow.factors import culprit_of
from lightning_gradguard.forensics.flow.flow import Flow, FlowMeter
from lightning_gradguard.forensics.flow.vanished import vanished
from lightning_gradguard.forensics.flow.weight_growth import WeightGrowth, WeightWatch
from lightning_gradguard.forensics.nonfinite.samples import Batch
from lightning_gradguard.forensics.state import State
from lightning_gradguard.record import Position, Record
from lightning_gradguard.trainer.replay.replay import TOLERANCE, Replay, Replayed
from lightning_gradguard.trainer.replay.window import MicroBatch, Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class Diagnosis:
    """Looks into steps that vanish or explode; between them it remembers one healthy batch, and norms of weights.

    Args:
        module: the one that is trained.
        window: the running micro-batches.
        replay: runs them again.
        is_alone: whether no other rank takes part, so that gradients can be compared with those of the replay.
    """

    def __init__(self, module: LightningModule, window: Window, replay: Replay, *, is_alone: bool) -> None:
        self._module = module
        self._window = window
        self._replay = replay
        self._is_alone = is_alone
        self._weights = WeightWatch(module.named_parameters())
        self._healthy: dict[int, MicroBatch] = {}
        self._last: dict[int, Record] = {}

    def note(self, optimizer: Optimizer, record: Record | None) -> None:
        """A step is done: take down its batch if it was in order. No copy and no sync; norms of weights every 16 steps."""
        self._weights.note()
        if record is None:
            return
        self._last[id(optimizer)] = record
        if not record.verdicts and record.measurement.is_finite and (batches := self._window.of(optimizer)):
            self._healthy[id(optimizer)] = batches[-1]

    def clear(self) -> None:
        """Let go of the batch."""
        self._healthy.clear()
        self._last.clear()

    def healthy_batch(self, optimizer: Optimizer) -> Any:
        """The batch of the last healthy step; None if there was none."""
        found = self._healthy.get(id(optimizer))
        return None if found is None else found.batch

    def weight_growths(self, optimizer: Optimizer) -> tuple[WeightGrowth, ...]:
        """How the weights have moved; a few syncs."""
        last = self._last.get(id(optimizer))
        return self._weights.weight_growths(optimizer, {} if last is None else last.measurement.by_name)

    def look(self, optimizer: Optimizer, position: Position, kind: str) -> tuple[Culprit | None, float]:
        """Why a step vanished or exploded, in this rank's part, and the gradient norm of that.

        Args:
            optimizer: whose step it is.
            position: where it is.
            kind: "vanishing" or "explosion".
        """
        held = position.step if self._window.is_held(position.step) else None
        flow, norm, replayed = self._run(optimizer, held, None)
        healthy_flow, healthy_norm = None, None
        healthy = self._healthy.get(id(optimizer))
        if kind == "explosion" and healthy is not None:
            healthy_flow, healthy_norm, _ = self._run(optimizer, held, healthy)
        error, differing = None, ""
        if held is None and self._is_alone:
            error, differing = self._compare(replayed)
        weight_growths = self.weight_growths(optimizer)
        evidence = Evidence(position.step, flow, norm, healthy_flow, healthy_norm, weight_growths, error, differing)
        causes = vanished(evidence) if kind == "vanishing" else exploded(evidence)
        return culprit_of(causes, flow, rank=position.rank, error=error, tolerance=TOLERANCE), norm

    def _run(self, optimizer: Optimizer, held: int | None, instead: MicroBatch | None) -> tuple[Flow, float, Replayed]:
        """Replay the step, or what it would be with another batch."""
        meters: list[FlowMeter] = []

        @contextmanager
        def observe(micro_batch: MicroBatch, state: State) -> Iterator[None]:  # noqa: ARG001 - the replay's call
            batch = micro_batch.batch if instead is None else instead.batch
            meters.append(FlowMeter(self._module, Batch.of(batch).size))
            with meters[-1].watch():
                yield

        def change(batch: Any) -> Any:
            return batch if instead is None else instead.batch

        replayed = self._replay.run(optimizer, step=held, observe=observe, change=change)
        norm = _norm(replayed.gradients.values())
        # Of several micro-batches the one that did most.
        flow = max((meter.flow for meter in meters), key=_size, default=Flow(()))
        return flow, norm, replayed

    def _compare(self, replayed: Replayed) -> tuple[float | None, str]:
        """Relative difference between the gradients that are there and those of the replay, and where it is largest."""
        distances: dict[str, float] = {}
        total = 0.0
        for name, parameter in self._module.named_parameters():
            again = replayed.gradients.get(id(parameter))
            if parameter.grad is None or again is None or again.shape != parameter.grad.shape:
                continue
            distances[name] = _norm([again.to_dense() - parameter.grad.to_dense()])
            total = math.hypot(total, _norm([parameter.grad]))
        if not total:
            return None, ""
        return math.hypot(*distances.values()) / total, max(distances, key=lambda name: distances[name])


def _size(flow: Flow) -> float:
    return (flow.output.grad_norm or 0.0) if flow.output is not None else 0.0


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.hypot(*(float(gradient.detach().to_dense().double().norm()) for gradient in gradients))
