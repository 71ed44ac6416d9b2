"""Rules that flag steps: ours as they are by default, and others' re-implemented with the constants that they ship.

Each is a function of a recording; for each step it names what fired. Where a rule of theirs leaves something open, it is
read in its favour.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.detection.recording import Recording
from lightning_gradguard import Action, Explosion, NonFinite, UpdateRatio, Vanishing
from lightning_gradguard.detectors import Detector, Overflow
from lightning_gradguard.judge.judge import Judge
from lightning_gradguard.layout import Partition, module_of

Fired = list[frozenset[str]]
Rule = Callable[[Recording], Fired]

LOGGED = "logged "
"""Stands before the kind of what is a note in the log, and no alarm."""

_SOMETHING, _NOTHING = frozenset({"alarm"}), frozenset[str]()


def defaults() -> list[Detector]:
    """What a `GradGuard()` has."""
    return [NonFinite(), Explosion(), Vanishing(), Overflow()]


def with_updates() -> list[Detector]:
    """The same, with the detector that is off unless it is asked for."""
    return [*defaults(), UpdateRatio()]


def gradguard(make: Callable[[], Sequence[Detector]] = defaults) -> Rule:
    """Our detectors, driven as a guard drives them: they learn only from steps that are applied.

    A step is flagged by the kinds of its verdicts, those that are only logged apart; silence inside a cooldown doesn't count
    as silence here.
    """

    def rule(recording: Recording) -> Fired:
        judge = Judge(make())
        fired = []
        is_measured = False
        for step in recording.measurements:
            judgement = judge.judge(step if is_measured else replace(step, update_ratios=None))
            is_measured = judge.needs_update()
            named = zip(judgement.verdicts, judgement.decision.actions, strict=True)
            fired.append(
                frozenset(verdict.kind if action >= Action.WARN else LOGGED + verdict.kind for verdict, action in named)
            )
        return fired

    return rule


def _flags(values: Sequence[bool]) -> Fired:
    return [_SOMETHING if value else _NOTHING for value in values]


def olmo(recording: Recording) -> Fired:
    """OLMo-core's skip-step optimizers: loss or norm more than 6 standard deviations above the mean of the last 128."""
    losses: deque[float] = deque(maxlen=129)
    norms: deque[float] = deque(maxlen=129)

    def is_in_order(values: deque[float]) -> bool:
        before = np.array(values)[:-1]
        return bool(values[-1] - before.mean() <= 6.0 * before.std(ddof=1))  # false for NaN, for 128 steps

    flags = []
    for loss, step in zip(recording.losses, recording.measurements, strict=True):
        losses.append(loss)
        norms.append(step.global_norm)
        with np.errstate(invalid="ignore"):
            flags.append(len(losses) >= 64 and not (is_in_order(losses) and is_in_order(norms)))
    return _flags(flags)


def zclip(recording: Recording) -> Fired:
    """ZClip: z-score of the norm above 2.5, mean and variance with decay 0.97 after 25 steps; learns the clipped value."""
    warmup: list[float] = []
    mean = variance = 0.0
    flags = []
    for step in recording.measurements:
        norm = step.global_norm
        if len(warmup) < 25:
            warmup.append(norm)
            flags.append(False)
            with np.errstate(invalid="ignore"):
                mean, variance = float(np.mean(warmup)), float(np.var(warmup))
            continue
        deviation = math.sqrt(variance) if variance >= 0 else math.nan
        z = (norm - mean) / (deviation + 1e-6)
        flags.append(z > 2.5)
        if z > 2.5:
            norm = mean + 2.5 * deviation * 2.5 / z
        mean = 0.97 * mean + 0.03 * norm
        variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    return _flags(flags)


def spike_detection(recording: Recording) -> Fired:
    """Lightning's SpikeDetection: a loss above three times the running mean of the last ten, or not finite."""
    window: deque[float] = deque(maxlen=10)
    flags = []
    for loss in recording.losses:
        mean = sum(window) / len(window) if window else math.nan
        is_spike = bool(window) and (not math.isfinite(loss) or (loss > mean and abs(loss - mean) > abs(2.0 * mean)))
        flags.append(is_spike)
        if not is_spike:
            window.append(loss)
    return _flags(flags)


def kill_loss_spike(recording: Recording) -> Fired:
    """llm-foundry's KillLossSpike: more than four losses in a row above twice the mean of 100, or half of them above 10."""
    window: deque[float] = deque(maxlen=100)
    in_a_row = 0
    flags = []
    for loss in recording.losses:
        is_killed = False
        if len(window) == 100:
            in_a_row = in_a_row + 1 if loss >= 2.0 * sum(window) / 100 else 0
            is_killed = in_a_row > 4 or sum(value > 10.0 for value in window) >= 50
        flags.append(is_killed)
        window.append(loss)
    return _flags(flags)


def stabilityguard(recording: Recording) -> Fired:
    """stabilityguard: any tensor's norm above ten times its running mean (weight 0.01), from step 10 on, and above 0.01."""
    means: np.ndarray | None = None
    flags = []
    for number, step in enumerate(recording.measurements, start=1):
        norms = step.norms
        usable = np.isfinite(norms) & step.has_grad
        means = np.where(usable, norms, np.nan) if means is None else means
        known = ~np.isnan(means)
        means = np.where(usable, np.where(known, 0.99 * means + 0.01 * norms, norms), means)
        large = usable & (norms > 0.01) & (means >= 1e-8) & (norms > 10.0 * means)
        flags.append(bool((~np.isfinite(norms)).any() or (number > 10 and large.any())))
    return _flags(flags)


def neurolens(recording: Recording) -> Fired:
    """neurolens: a layer's norm above 100 or about zero (below 1e-8), a loss ten times the first one, or NaN."""
    names = recording.measurements[0].names
    layers = Partition.by_key([module_of(name) for name in names])
    first = recording.losses[0]
    flags = []
    for loss, step in zip(recording.losses, recording.measurements, strict=True):
        with np.errstate(invalid="ignore", over="ignore"):
            norms = layers.norms(step.norms)[layers.any(step.has_grad)]
            flags.append(bool(not step.is_finite or (norms > 100.0).any() or (norms < 1e-8).any() or loss > 10.0 * first))
    return _flags(flags)


PEERS: dict[str, Rule] = {
    "OLMo-core, 6 sigma": olmo,
    "ZClip, z-score": zclip,
    "Lightning SpikeDetection": spike_detection,
    "llm-foundry KillLossSpike": kill_loss_spike,
    "stabilityguard, ratio": stabilityguard,
    "neurolens, absolute": neurolens,
}
