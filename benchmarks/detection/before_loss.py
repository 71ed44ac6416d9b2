"""What sees trouble coming: candidates of the literature over the recorded trainings, against our detectors and the loss.

Each candidate is one figure a step. Its threshold is the largest value in any healthy run, so that it raises no false alarm
at all here; then it is asked how many steps before our detectors, and before the loss itself, it crosses that threshold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.detection.recording import Recording, recorded
from benchmarks.detection.rules import gradguard
from benchmarks.detection.sheet import Sheet
from benchmarks.detection.split import OPENED, SEEDS, TEST, TUNING
from benchmarks.detection.trainings import KINDS
from benchmarks.detection.trainings.architectures import ARCHITECTURES
from benchmarks.detection.trainings.architectures import STEPS as ARCHITECTURE_STEPS
from lightning_gradguard.layout import Bools, Floats

DIVERGING = (
    "slow_divergence", "range_test_adam", "range_test_sgd", "range_test_transformer", "range_test_residual",
    "exploding_rnn", "inverted_decay", "inverted_decay_text", "slow_layer_growth", "adam_epsilon",
)  # fmt: skip
"""Kinds that fall apart over many steps, so that there is something to foresee."""
_WARMUP = 16
_MIN_SHARE = 0.05
_HORIZON = 150


@dataclass(frozen=True, eq=False)
class Series:
    """A recorded run as arrays."""

    norms: Floats
    has_rows: Bools
    numels: Floats
    updates: Floats
    is_finite: Bools

    @classmethod
    def of(cls, recording: Recording) -> Series:
        """From its measurements. Embeddings are left out of the ratios: their rare rows leap in health."""
        steps = recording.measurements
        layout = steps[0].layout
        is_embedding = np.array(["embed" in name for name in layout.names])
        norms = np.stack([step.norms for step in steps])
        updates = np.stack(
            [np.zeros(len(step.names)) if step.update_ratios is None else step.update_ratios for step in steps]
        )
        is_finite = np.isfinite(norms).all(axis=1) & np.array([step.is_finite for step in steps])
        return cls(
            norms, (layout.ndims >= 2) & ~is_embedding, layout.numels.astype(float), np.nan_to_num(updates), is_finite
        )


def against_second_moment(decay: float, pick: Callable[[Floats], float]) -> Callable[[Series], Floats]:
    """Norm of a matrix's gradient over the root of Adam's second moment of it (Wortsman et al., arXiv:2304.13013, 2023)."""

    def figure(series: Series) -> Floats:
        norms = series.norms[:, series.has_rows]
        moment, number, values = np.zeros(norms.shape[1]), 0, np.zeros(len(norms))
        for step, row in enumerate(norms):
            if not series.is_finite[step] or not len(row):
                continue
            number += 1
            moment = decay * moment + (1.0 - decay) * row**2
            root = np.sqrt(moment / (1.0 - decay**number))
            values[step] = pick(row / np.maximum(root, 1e-300))
        return values

    return figure


def near_epsilon(series: Series) -> Floats:
    """Adam's epsilon over the rms of the median matrix's gradient elements (Wortsman et al., arXiv:2309.14322, 2023)."""
    if not series.has_rows.any():
        return np.zeros(len(series.norms))
    rms = series.norms[:, series.has_rows] / np.sqrt(series.numels[series.has_rows])
    middle = np.median(rms, axis=1)
    return np.where(series.is_finite & (middle > 0.0), 1e-8 / np.maximum(middle, 1e-30), 0.0)


def growth(pick: Callable[[Floats], float]) -> Callable[[Series], Floats]:
    """How many times the median norm of the last 8 steps of a matrix's gradient is that of 64 steps before.

    Of matrices that carry a twentieth of the norm at least.
    """

    def figure(series: Series) -> Floats:
        norms, values = series.norms[:, series.has_rows], np.zeros(len(series.norms))
        for step in range(64, len(norms)):
            if series.is_finite[step - 7 : step + 1].all() and norms.shape[1]:
                before, now = np.median(norms[step - 64 : step - 56], axis=0), np.median(norms[step - 7 : step + 1], axis=0)
                counts = (before > 0.0) & (now > _MIN_SHARE * np.linalg.norm(now))
                values[step] = pick(now[counts] / before[counts]) if counts.any() else 0.0
        return values

    return figure


def noise(series: Series) -> Floats:
    """Spread of the global norm's steps over the last 16, over that of the 47 before."""
    norms = np.linalg.norm(np.where(series.is_finite[:, None], series.norms, 0.0), axis=1)
    changes, values = np.diff(np.log(np.maximum(norms, 1e-300))), np.zeros(len(norms))
    for step in range(64, len(norms)):
        if series.is_finite[step - 64 : step + 1].all():
            values[step] = changes[step - 16 : step].std() / (changes[step - 63 : step - 16].std() + 0.02)
    return values


def update(series: Series) -> Floats:
    """How far the step before has moved a matrix, relative to its size: the figure of `UpdateRatio`."""
    return np.where(np.isfinite(series.updates), series.updates, 1e30).max(axis=1)


def _largest(values: Floats) -> float:
    return float(values.max())


def _median(values: Floats) -> float:
    return float(np.median(values))


CANDIDATES: dict[str, Callable[[Series], Floats]] = {
    "gradient over second moment (0.999), largest matrix": against_second_moment(0.999, _largest),
    "gradient over second moment (0.95), median matrix": against_second_moment(0.95, _median),
    "Adam's epsilon over the rms of gradients": near_epsilon,
    "growth of one matrix's gradient over 64 steps": growth(_largest),
    "growth of the median matrix's gradient over 64 steps": growth(_median),
    "noise of the norm, last 16 steps over the 47 before": noise,
    "update over weight": update,
}


@dataclass(frozen=True)
class Foresight:
    """When a diverging run was seen, in steps after the onset; None: not within the run."""

    ours: int | None
    loss: int | None
    candidates: dict[str, int | None]


def loss_rises(losses: Sequence[float], onset: int) -> int | None:
    """Steps until the median of 8 losses is further above those before the onset than they lay apart."""
    values = np.array(losses)
    before = [float(np.median(values[at : at + 8])) for at in range(max(0, onset - 64), onset - 7)]
    limit = max(before) + max(before) - statistics.median(before)
    for step in range(onset, len(values)):
        if not np.isfinite(values[step]) or np.median(values[step - 7 : step + 1]) > limit:
            return step - onset
    return None


@cache
def _thresholds() -> dict[str, float]:
    known = TUNING | OPENED | TEST
    series = [Series.of(recorded(KINDS[kind], seed)) for kind in sorted(known) if KINDS[kind].is_healthy for seed in SEEDS]
    series += [Series.of(recorded(kind, seed, ARCHITECTURE_STEPS)) for kind in ARCHITECTURES.values() for seed in (0, 1)]
    return {
        name: max(float(figure(run)[_WARMUP:].max(initial=0.0)) for run in series) for name, figure in CANDIDATES.items()
    }


def foresights() -> list[Foresight]:
    """Of all diverging kinds and seeds."""
    found = []
    ours = gradguard()
    for kind in (KINDS[name] for name in DIVERGING):
        for seed in SEEDS:
            recording = recorded(kind, seed)
            fired, series = ours(recording), Series.of(recording)
            first = next((step for step in range(kind.onset, len(fired)) if fired[step]), None)
            seen = {}
            for name, figure in CANDIDATES.items():
                above = np.flatnonzero(figure(series)[kind.onset :] > _thresholds()[name])
                seen[name] = int(above[0]) if len(above) else None
            rises = loss_rises(recording.losses, kind.onset)
            found.append(Foresight(None if first is None else first - kind.onset, rises, seen))
    return found


def by_candidate() -> Sheet:
    """How often, and how early."""
    runs = foresights()
    rows = []
    for name in CANDIDATES:
        seen = [(run, step) for run in runs if (step := run.candidates[name]) is not None]
        leads = [_or_end(run.ours) - step for run, step in seen]
        over_loss = [_or_end(run.loss) - step for run, step in seen]
        rows.append(
            [
                name,
                f"{_thresholds()[name]:.3g}",
                f"{len(seen)} / {len(runs)}",
                _middle(leads),
                f"{sum(lead > 0 for lead in leads)}",
                _middle(over_loss),
            ]
        )
    columns = [
        "candidate",
        "largest in health",
        "found",
        "steps before ours",
        "runs earlier than ours",
        "steps before the loss",
    ]
    return Sheet("Before the loss", columns, rows)


def _or_end(step: int | None) -> int:
    return _HORIZON if step is None else step


def _middle(values: Sequence[int]) -> str:
    return f"{statistics.median(values):g}" if values else "-"
