"""Runs each training once, and keeps what a guard measured of it, so that rules can be replayed in milliseconds."""

from __future__ import annotations

import hashlib
import itertools
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.detection.trainings import KINDS, STEPS, Kind, Training
from lightning_gradguard import Guard, NonFinite, UpdateRatio
from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Layout
from lightning_gradguard.record import Damage, Measurement

CACHE = Path(__file__).parents[2] / ".cache" / "detection"
_MEASURED = "updates from samples of 512"
"""To be changed where a guard measures something else of a training than before."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What a guard measured of one run.

    Attributes:
        kind: what was run.
        seed: of torch and numpy.
        measurements: one a step. It ends early where the guard's default ends a training: at five damaged steps in a row.
        seconds: that the run took.
    """

    kind: Kind
    seed: int
    measurements: tuple[Measurement, ...]
    seconds: float

    @property
    def losses(self) -> list[float]:
        """One a step."""
        return [float("nan") if step.loss is None else step.loss for step in self.measurements]


def recorded(kind: Kind, seed: int, steps: int = STEPS) -> Recording:
    """A run from the cache; if it is not there, it is run."""
    path = CACHE / f"{kind.name}-{seed}-{_digest(kind.build.__module__)}.npz"
    if not path.exists():
        recording = run(kind, seed, steps)
        CACHE.mkdir(parents=True, exist_ok=True)
        _save(recording, path)
    return _load(path, kind, seed)


def run(kind: Kind, seed: int, steps: int = STEPS) -> Recording:
    """Run a training under a guard that skips what is not finite, as it does by default, and only looks at the rest."""
    begun = time.perf_counter()
    torch.manual_seed(seed)
    training = kind.build()
    measurements: list[Measurement] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard = Guard(
            training.network.named_parameters(),
            optimizer=training.optimizer,
            named_buffers=training.network.named_buffers(),
            nonfinite=NonFinite("skip", stop_after=5),
            explosion=None,
            vanishing=None,
            overflow=None,
            detectors=[UpdateRatio("log", every_n_steps=1)],
            log_every_n_steps=0,
            histogram_every_n_steps=None,
            scaler=training.scaler,
        )
        for step in range(steps):
            _step(training, guard, step)
            assert guard.last is not None
            measurements.append(guard.last.measurement)
            if guard.stopped_by is not None:
                break
    return Recording(kind, seed, tuple(measurements), time.perf_counter() - begun)


def _step(training: Training, guard: Guard, step: int) -> None:
    training.optimizer.zero_grad()
    training.before(step)
    batch = training.batch(step)
    with torch.autocast("cpu", torch.float16) if training.autocast else nullcontext():
        loss = training.loss(batch)
    if training.scaler is not None:
        loss = training.scaler.scale(loss)
    guard.before_backward(loss)
    loss.backward()
    training.after(step)
    guard.step()
    if training.scaler is not None:
        training.scaler.step(training.optimizer)
        training.scaler.update()
    else:
        training.optimizer.step()


@cache
def _digest(module: str) -> str:
    """Changes with the trainings of a module and what they share, with what is measured of them, and with torch."""
    names = ("base", "data", "networks", module.rpartition(".")[2])
    sources = [Path(__file__).parent / "trainings" / f"{name}.py" for name in names]
    text = f"{torch.__version__} {_MEASURED}".encode() + b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(text).hexdigest()[:12]


def _save(recording: Recording, path: Path) -> None:
    steps = recording.measurements
    layout = steps[0].layout
    columns = {
        "names": np.array(layout.names),
        "numels": layout.numels,
        "ndims": layout.ndims,
        "norms": np.stack([step.norms for step in steps]),
        "has_grad": np.stack([step.has_grad for step in steps]),
        "updates": np.stack([_updates(step) for step in steps]).astype(np.float32),
        "global_norm": np.array([step.global_norm for step in steps]),
        "loss": np.array([np.nan if step.loss is None else step.loss for step in steps]),
        "loss_scale": np.array([0.0 if step.loss_scale is None else step.loss_scale for step in steps]),
        "overflowed": np.array([step.overflowed for step in steps]),
        "damaged": np.array([step.damage is not None for step in steps]),
        "damaged_loss": np.array([step.damage is not None and step.damage.loss is not None for step in steps]),
        "num_damaged": np.stack([_num_damaged(step) for step in steps]),
        "seconds": np.array(recording.seconds),
    }
    with path.open("wb") as file:
        np.savez_compressed(file, **columns)


def _updates(step: Measurement) -> np.ndarray:
    return np.full(len(step.names), np.nan) if step.update_ratios is None else step.update_ratios


def _num_damaged(step: Measurement) -> np.ndarray:
    counts = np.zeros((2, len(step.names)), dtype=np.int64)
    for report in step.nonfinite:
        counts[:, step.names.index(report.name)] = report.num_nan, report.num_inf
    return counts


def _load(path: Path, kind: Kind, seed: int) -> Recording:
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    layout = Layout(tuple(columns["names"].tolist()), columns["numels"], columns["ndims"])
    steps = tuple(_measurement(columns, layout, step) for step in range(len(columns["loss"])))
    return Recording(kind, seed, steps, float(columns["seconds"]))


def _measurement(columns: dict[str, np.ndarray], layout: Layout, step: int) -> Measurement:
    loss, scale = float(columns["loss"][step]), float(columns["loss_scale"][step])
    num_nan, num_inf = columns["num_damaged"][step]
    damaged = np.flatnonzero(num_nan + num_inf)
    return Measurement(
        layout,
        columns["norms"][step],
        columns["has_grad"][step],
        float(columns["global_norm"][step]),
        loss=loss,
        loss_scale=scale or None,
        overflowed=bool(columns["overflowed"][step]),
        damage=Damage(0, loss=loss if columns["damaged_loss"][step] else None) if columns["damaged"][step] else None,
        nonfinite=tuple(
            ParameterReport(layout.names[i], float(columns["norms"][step][i]), int(num_nan[i]), int(num_inf[i]))
            for i in damaged
        ),
        update_ratios=columns["updates"][step],
    )


def all_of(names: frozenset[str], seeds: tuple[int, ...]) -> Iterator[Recording]:
    """Recordings of these kinds, in the order of the list."""
    for name, seed in itertools.product([name for name in KINDS if name in names], seeds):
        yield recorded(KINDS[name], seed)
