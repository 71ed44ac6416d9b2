"""Runs a labelled training under a guard up to its alert, and asks why."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.detection.trainings import KINDS, Kind, Training
from benchmarks.diagnosis.labels import TUNED_ON
from benchmarks.diagnosis.trainings import CHECKED, MISTAKEN, NO_CAUSE
from lightning_gradguard import Explosion, Guard, NonFinite
from lightning_gradguard.forensics.flow.evidence import Cause, Evidence
from lightning_gradguard.forensics.flow.exploded import exploded
from lightning_gradguard.forensics.flow.flow import Flow, FlowMeter
from lightning_gradguard.forensics.flow.vanished import vanished
from lightning_gradguard.forensics.flow.weight_growth import WeightGrowth, WeightWatch
from lightning_gradguard.forensics.nonfinite.samples import Batch
from lightning_gradguard.forensics.state import unchanged

STEPS = 260
WITHOUT_ALERT = 40
"""Steps after the onset at which a training is looked at that raised no alert."""
FORCED_AT = 120
"""Step of the alert that is forced on a healthy training."""
SYMPTOMS = ("vanishing", "explosion")


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        symptom: "vanishing" or "explosion".
        label: the cause; "" where nothing is wrong.
        causes: those named, first the surest.
        alerted: whether the guard's own detectors raised the alert.
        step: that was looked at.
    """

    name: str
    seed: int
    symptom: str
    label: str
    causes: tuple[Cause, ...]
    alerted: bool
    step: int
    evidence: Evidence

    @property
    def named(self) -> str:
        """The cause that was named first; "" if none was."""
        return self.causes[0].name if self.causes else NO_CAUSE

    @property
    def is_right(self) -> bool:
        """Whether the labelled cause was named first, or none where there is none."""
        return self.named == self.label

    @property
    def is_false(self) -> bool:
        """Whether a cause was named first that is not the labelled one: worse than none."""
        return self.named not in (self.label, NO_CAUSE)


def diagnose(name: str, seed: int = 0) -> Outcome:
    """Train until the alert of the labelled kind, and say why."""
    kind = KINDS[name] if name in TUNED_ON else {**CHECKED, **MISTAKEN}[name]
    return _built(kind, kind.must_find[0], TUNED_ON.get(name, kind.fault), seed)


def diagnose_healthy(name: str, symptom: str, seed: int = 0) -> Outcome:
    """Ask why a healthy training should vanish or explode."""
    return _built(KINDS[name], symptom, NO_CAUSE, seed)


def _built(kind: Kind, symptom: str, label: str, seed: int) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        training = kind.build()
        return _train(training, kind, symptom, label, seed)


def _train(training: Training, kind: Kind, symptom: str, label: str, seed: int) -> Outcome:
    network, optimizer = training.network, training.optimizer
    guard = Guard(
        network.named_parameters(),
        optimizer=optimizer,
        nonfinite=NonFinite("skip", stop_after=None),
        explosion=Explosion("warn", max_norm=1e3),
        log_every_n_steps=0,
        histogram_every_n_steps=None,
    )
    watch = WeightWatch(network.named_parameters())
    healthy: Any = None
    last: dict[str, float] = {}
    found = None
    for step in range(STEPS):
        training.before(step)
        batch = training.batch(step)
        loss = training.loss(batch)
        optimizer.zero_grad()
        guard.before_backward(loss)
        loss.backward()
        training.after(step)
        grads = {key: value.grad.clone() for key, value in network.named_parameters() if value.grad is not None}
        record = guard.step()
        alerted = any(alert.kind == symptom for alert in record.alerts) if label else step == FORCED_AT
        overdue = step == kind.onset + WITHOUT_ALERT or not math.isfinite(record.measurement.global_norm)
        if (alerted or overdue) and step >= kind.onset - 1 and (alerted or found is None):
            weight_growths = watch.weight_growths(optimizer, last)
            evidence = collect(training, step, (batch, healthy), grads, weight_growths)
            causes = (vanished if symptom == "vanishing" else exploded)(evidence)
            found = Outcome(kind.name, seed, symptom, label, causes, alerted, step, evidence)
        if alerted and found is not None:
            return found
        if not record.verdicts:
            healthy = batch
        optimizer.step()
        last = dict(record.measurement.by_name)
        watch.note()
    assert found is not None
    return found


def collect(
    training: Training, step: int, batches: tuple[Any, Any], grads: Any, weight_growths: tuple[WeightGrowth, ...]
) -> Evidence:
    """Replay the batch, and the healthy one."""
    batch, healthy = batches
    flow, norm, again = replay(training, batch)
    there, there_norm = None, None
    if healthy is not None:
        there, there_norm, _ = replay(training, healthy)
    difference = {key: float((again[key] - grad).norm()) for key, grad in grads.items() if key in again}
    total = math.sqrt(sum(float(grad.norm()) ** 2 for grad in grads.values()))
    error = math.sqrt(sum(value**2 for value in difference.values())) / total if total else 0.0
    worst = max(difference, key=lambda key: difference[key], default="")
    return Evidence(step, flow, norm, there, there_norm, weight_growths, error, worst)


def replay(training: Training, batch: Any) -> tuple[Flow, float, dict[str, torch.Tensor]]:
    """One forward and backward pass with the meter on."""
    network = training.network
    meter = FlowMeter(network, Batch.of(batch).size)
    with unchanged(network), meter.watch(), torch.enable_grad():
        training.loss(batch).backward()
        grads = {key: value.grad for key, value in network.named_parameters() if value.grad is not None}
    norm = math.sqrt(sum(float(grad.double().norm()) ** 2 for grad in grads.values()))
    return meter.flow, norm, grads
