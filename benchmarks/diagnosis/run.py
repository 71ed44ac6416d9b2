"""Runs a labelled training under a guard up to its alert, and asks why."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.detection.trainings import KINDS, Kind, Training
from benchmarks.diagnosis.labels import TUNED_ON
from benchmarks.diagnosis.trainings import CHECKED, FURTHER, FURTHER_HEALTHY, MISTAKEN, NO_CAUSE, NOT_ON_THE_LIST
from lightning_gradguard import Explosion, Guard, NonFinite
from lightning_gradguard.forensics.flow.evidence import Cause, Changed, Evidence
from lightning_gradguard.forensics.flow.explosion_causes import explosion_causes, top_row, with_row_replaced
from lightning_gradguard.forensics.flow.flow import Flow, FlowMeter
from lightning_gradguard.forensics.flow.norm_history import NormHistory
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_causes
from lightning_gradguard.forensics.flow.weight_history import WeightHistory
from lightning_gradguard.forensics.nonfinite.layout import layout_of
from lightning_gradguard.forensics.nonfinite.samples import Batch, exchanged
from lightning_gradguard.forensics.state import unchanged
from lightning_gradguard.record import Measurement

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
    kind = KINDS[name] if name in TUNED_ON else {**CHECKED, **MISTAKEN, **FURTHER}[name]
    label = TUNED_ON.get(name, kind.fault)
    return _built(kind, kind.must_find[0], NO_CAUSE if label == NOT_ON_THE_LIST else label, seed)


def diagnose_healthy(name: str, symptom: str, seed: int = 0) -> Outcome:
    """Ask why a healthy training should vanish or explode."""
    return _built({**KINDS, **FURTHER_HEALTHY}[name], symptom, NO_CAUSE, seed)


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
    weights, norms = WeightHistory(network.named_parameters()), NormHistory()
    healthy: Any = None
    found = None
    for step in range(STEPS):
        training.before(step)
        batch = training.batch(step)
        random_state = torch.get_rng_state()
        loss = training.loss(batch)
        optimizer.zero_grad()
        guard.before_backward(loss)
        loss.backward()
        training.after(step)
        grads = {key: value.grad.clone() for key, value in network.named_parameters() if value.grad is not None}
        record = guard.step()
        of_symptom = [alert for alert in record.alerts if alert.kind == symptom]
        alerted = bool(of_symptom) if kind.fault else step == FORCED_AT
        overdue = step == kind.onset + WITHOUT_ALERT or not math.isfinite(record.measurement.global_norm)
        if (alerted or overdue) and step >= kind.onset - 1 and (alerted or found is None):
            scene = _Scene(training, batch, healthy, grads, random_state)
            evidence = replace(
                collect(scene, step, record.measurement),
                usual=norms.usual(record.measurement),
                weight_growths=weights.weight_growths(optimizer),
                is_from_start=True,
                silent=tuple(it.name for alert in of_symptom for it in alert.parameters if it.norm == 0.0),
            )
            causes = (vanishing_causes if symptom == "vanishing" else explosion_causes)(evidence)
            found = Outcome(kind.name, seed, symptom, label, causes, alerted, step, evidence)
        if alerted and found is not None:
            return found
        weights.note(optimizer, record.measurement, is_applied=record.measurement.is_finite)
        if not record.verdicts:
            healthy = batch
            norms.note(record.measurement)
        optimizer.step()
    assert found is not None
    return found


@dataclass(frozen=True)
class _Scene:
    """A step that is looked into: its batch and gradients, the last healthy batch, the random state before the step."""

    training: Training
    batch: Any
    healthy: Any
    grads: dict[str, torch.Tensor]
    random_state: torch.Tensor


def collect(scene: _Scene, step: int, measurement: Measurement) -> Evidence:
    """Replay the batch, the healthy one, and the batch without the row that counts most."""
    flow, norm, again = replay(scene, scene.batch)
    evidence = Evidence(step, flow, norm, changed=_compare(scene.grads, again, measurement))
    if scene.healthy is not None:
        there, there_norm, _ = replay(scene, scene.healthy)
        evidence = replace(evidence, healthy=there, healthy_norm=there_norm)
    if (top := top_row(flow)) is not None:
        row, _, size = top
        other, rest, _ = replay(scene, exchanged(scene.batch, layout_of(scene.batch), with_row_replaced(row, size)))
        again = top_row(other)
        evidence = replace(evidence, norm_without_row=rest, is_place=again is not None and again[0] == row)
    return evidence


def _compare(grads: dict[str, torch.Tensor], again: Replayed, measurement: Measurement) -> Changed:
    loss, replayed = again
    difference = {key: float((replayed[key] - grad).norm()) for key, grad in grads.items() if key in replayed}
    total = math.sqrt(sum(float(grad.norm()) ** 2 for grad in grads.values()))
    error = math.sqrt(sum(value**2 for value in difference.values())) / total if total else 0.0
    worst = max(difference, key=lambda key: difference[key], default="")
    is_same = None if measurement.loss is None else math.isclose(loss, measurement.loss, rel_tol=1e-4)
    if not worst:
        return Changed(error)
    return Changed(error, worst, float(grads[worst].norm()), float(replayed[worst].norm()), is_same)


Replayed = tuple[float, dict[str, torch.Tensor]]
"""The loss, and gradients by name."""


def replay(scene: _Scene, batch: Any) -> tuple[Flow, float, Replayed]:
    """One forward and backward pass with the meter on."""
    network = scene.training.network
    meter = FlowMeter(network, Batch.of(batch).size)
    with unchanged(network), torch.random.fork_rng(), meter.watch(), torch.enable_grad():
        torch.set_rng_state(scene.random_state)
        loss = scene.training.loss(batch)
        loss.backward()
        grads = {key: value.grad for key, value in network.named_parameters() if value.grad is not None}
    norm = math.sqrt(sum(float(grad.double().norm()) ** 2 for grad in grads.values()))
    return meter.flow, norm, (float(loss.detach()), grads)
