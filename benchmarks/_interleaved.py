"""Timing of variants that take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Variant:
    """One of the things compared.

    Attributes:
        run: what is timed.
        prepare: what has to happen before it each time and is not timed.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = field(default=lambda: None)


@dataclass(frozen=True)
class Ratio:
    """Median over median or mean over mean, with a 95 % confidence interval from resampled rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Timings:
    """Seconds of every variant in every round, [num_rounds] each."""

    seconds: Mapping[str, np.ndarray]

    def median(self, name: str) -> float:
        """Median over the rounds, in seconds."""
        return float(np.median(self.seconds[name]))

    def mean(self, name: str) -> float:
        """Mean over the rounds, in seconds; unlike the median it shows steps that are rare and slow."""
        return float(np.mean(self.seconds[name]))

    def iqr(self, name: str) -> float:
        """Distance between the quartiles, in seconds."""
        low, high = np.quantile(self.seconds[name], (0.25, 0.75))
        return float(high - low)

    def ratio(self, name: str, over: str) -> Ratio:
        """How many times the baseline's median this variant's is.

        Whole rounds are resampled, since the variants of a round shared the state of the machine.
        """
        return self._ratio(name, over, np.median)

    def mean_ratio(self, name: str, over: str) -> Ratio:
        """The same of the means."""
        return self._ratio(name, over, np.mean)

    def _ratio(self, name: str, over: str, average: Callable[..., np.ndarray]) -> Ratio:
        above, below = self.seconds[name], self.seconds[over]
        rounds = np.random.default_rng(0).integers(len(above), size=(NUM_RESAMPLES, len(above)))
        ratios = average(above[rounds], axis=1) / average(below[rounds], axis=1)
        low, high = np.quantile(ratios, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return Ratio(float(average(above) / average(below)), float(low), float(high))


def interleave(
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    warmup: int,
    max_seconds: float | None = None,
    min_rounds: int = 10,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run all variants once a round, each round in another order.

    Args:
        variants: by name.
        rounds: rounds that count, >= 1.
        warmup: rounds before them that don't.
        max_seconds: no new round begins after so long, and a quarter of it may go to the warm-up, of which two rounds are
            run whatever they take; None: all rounds are run.
        min_rounds: are run whatever they take.
        device: "cuda" waits for the device at both ends of each timing.
        clock: in seconds; `time.process_time` counts what the threads of this process compute, and nobody else's work;
            `time.thread_time` what this thread does.
    """
    order, shuffle = list(variants), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with _no_garbage_collection():
        begin, num_warm, num_counted = time.perf_counter(), 0, 0
        while num_counted < rounds:
            spent = 0.0 if max_seconds is None else (time.perf_counter() - begin) / max_seconds
            is_warm = num_warm >= warmup or (num_warm >= 2 and spent > 0.25)
            if num_counted >= min_rounds and spent > 1.0:
                break
            shuffle(order)
            for name in order:
                variants[name].prepare()
                wait()
                start = clock()
                variants[name].run()
                wait()
                took = clock() - start
                if is_warm:
                    seconds[name].append(took)
            num_counted += is_warm
            num_warm += not is_warm
            gc.collect()
    return Timings({name: np.array(values) for name, values in seconds.items()})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside a timing would clear what another variant has left; so it is done between rounds."""
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again, so those collections are short
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
