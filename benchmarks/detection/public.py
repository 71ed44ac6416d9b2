"""Gradient-norm histories that others have published: what the limit of `Explosion` finds in them, and at what price.

Beside the detector itself, ceilings for its limit are compared, and chosen by cross-validation: for each source the one that
does best on all others.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.detection.sheet import Sheet, percent
from lightning_gradguard import Explosion
from lightning_gradguard.judge.judge import Judge
from lightning_gradguard.layout import Floats, Layout
from lightning_gradguard.record import Measurement
from lightning_gradguard.statistics.trend import Trend

FOLDER = Path(__file__).parent / "histories"
WINDOW = 64
RATIO = 6.0
"""The default of `Explosion`."""
NUM_PLACES = 200
"""Random steps of each history at which a spike is put in."""


@dataclass(frozen=True, eq=False)
class History:
    """One published training.

    Attributes:
        name: of its file.
        training: in words.
        source: the repository.
        interval: steps between two points.
        norms, losses: one a point; NaN where the loss was not logged.
    """

    name: str
    training: str
    source: str
    interval: float
    norms: Floats
    losses: Floats

    @property
    def places(self) -> np.ndarray:
        """Points at which spikes are put in, always the same."""
        after = np.flatnonzero(np.isfinite(self.usual))
        if len(after) <= NUM_PLACES:
            return after
        return np.sort(np.random.default_rng(0).choice(after, NUM_PLACES, replace=False))

    @property
    def usual(self) -> Floats:
        """Median of the 64 finite norms before each point; NaN before there are 64 points."""
        medians = np.full(len(self.norms), np.nan)
        if len(self.norms) > WINDOW and np.isfinite(self.norms).any():
            windows = sliding_window_view(self.norms[:-1], WINDOW)
            medians[WINDOW:] = [np.median(each[np.isfinite(each)]) for each in windows]
        return medians


@cache
def histories() -> tuple[History, ...]:
    """Those that hold a training: one file is NaN from its first step on."""
    with (FOLDER / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tuple(_read(row) for row in rows if row["label"] != "NaN from step 0")


def _read(row: dict[str, str]) -> History:
    with gzip.open(FOLDER / row["file"], "rt", encoding="utf-8") as file:
        columns = np.genfromtxt(file, delimiter=",", names=True)
    name = row["file"].removesuffix(".csv.gz")
    repository = row["source"].split(" at ")[0].removeprefix("github.com/")
    interval = float(row["steps_between_points"])
    return History(name, row["training"], repository, interval, columns["grad_norm"], columns["loss"])


@dataclass(frozen=True, eq=False)
class Replay:
    """What the default `Explosion` made of a history: the limit before each point, and its alerts."""

    limits: Floats
    num_flagged: int
    num_alerts: int


@cache
def replayed(history: History, ratio: float = RATIO) -> Replay:
    """Drive the detector as a guard does."""
    judge, layout, has_grad = Judge([Explosion(ratio=ratio)]), Layout.of(["all"], [(1, 1)]), np.ones(1, dtype=np.bool_)
    limits, flagged, alerts = [], 0, 0
    for norm, loss in zip(history.norms.tolist(), history.losses.tolist(), strict=True):
        step = Measurement(layout, np.array([norm]), has_grad, norm, loss=None if math.isnan(loss) else loss)
        judgement = judge.judge(step)
        limits.append(judgement.limit)
        flagged += len(judgement.verdicts)
        alerts += sum(judgement.decision.alerting)
    return Replay(np.array(limits), flagged, alerts)


def found(history: History, limits: Floats, times: float) -> float:
    """Share of the places at which so many times the usual norm lies above the limit."""
    at = history.places
    return float((times * history.usual[at] > limits[at]).mean())


@dataclass(frozen=True, eq=False)
class Windows:
    """Of the 64 points before each point, on the logarithm; what is flagged stays in, unlike in the detector."""

    logs: Floats
    is_full: np.ndarray
    median: Floats
    center: Floats
    spread: Floats
    largest: Floats
    second: Floats
    upper: Floats


@cache
def windows_of(history: History) -> Windows:
    """All that the compared limits are made of. Gaps are rare; they are taken for the smallest of norms."""
    logs = np.log(np.where(history.norms > 0.0, history.norms, 1e-30))
    logs = np.where(np.isfinite(logs), logs, math.log(1e-30))
    windows = sliding_window_view(np.concatenate([np.full(WINDOW, logs[0]), logs[:-1]]), WINDOW)
    median, latest = np.median(windows, axis=1), np.median(windows[:, -5:], axis=1)
    center = np.maximum(median, np.median(windows[:, -16:], axis=1))
    falls, trend = [], Trend()
    for norm, loss in zip(history.norms.tolist(), history.losses.tolist(), strict=True):
        falls.append(trend.loss_falls)
        trend.add(norm, None if math.isnan(loss) else loss)
    ordered = np.sort(windows, axis=1)
    return Windows(
        logs,
        is_full=np.arange(len(logs)) >= WINDOW,
        median=median,
        center=np.where(falls, np.maximum(center, latest), center),
        spread=1.4826 * np.maximum(np.median(np.abs(windows - median[:, None]), axis=1), 0.1),
        largest=ordered[:, -1],
        second=ordered[:, -2],
        upper=np.percentile(windows, 95, axis=1),
    )


Ceiling = Callable[[Windows], Floats]
_NONE: Ceiling = lambda windows: np.full(len(windows.logs), np.inf)  # noqa: E731


def _median(times: float) -> Ceiling:
    return lambda windows: windows.median + math.log(times)


def _high(name: str, times: float) -> Ceiling:
    """So many times one of the window's largest norms, but not below six times the center."""
    return lambda windows: np.maximum(windows.center + math.log(RATIO), getattr(windows, name) + math.log(times))


def _tail(times: float) -> Ceiling:
    """A heavier tail than the normal distribution's: measured where the tail is, between median and 95 % quantile."""
    return lambda windows: np.maximum(
        windows.center + math.log(RATIO), windows.median + times * (windows.upper - windows.median)
    )


def _lower(*ceilings: Ceiling) -> Ceiling:
    return lambda windows: np.min([ceiling(windows) for ceiling in ceilings], axis=0)


CEILINGS: dict[str, Ceiling] = {
    "none": _NONE,
    **{f"{times} x median": _median(times) for times in (15, 20, 24, 50)},
    **{f"{times} x largest": _high("largest", times) for times in (2, 3, 5)},
    **{f"{times} x second largest": _high("second", times) for times in (2, 3, 4, 5)},
    **{f"{times} x 95 % quantile": _high("upper", times) for times in (3, 5)},
    **{f"tail, {times} x": _tail(times) for times in (2, 3)},
    **{f"24 x median, {times} x second largest": _lower(_median(24), _high("second", times)) for times in (2, 3, 4, 5)},
    "24 x median, 3 x largest": _lower(_median(24), _high("largest", 3)),
    "24 x median, tail, 3 x": _lower(_median(24), _tail(3)),
}
"""Of the limit of six times and eight deviations, once the window is full."""
CHOSEN = "24 x median, 4 x second largest"


@dataclass(frozen=True)
class Outcome:
    """One ceiling on one history: points above the limit, and the share of spikes found."""

    num_points: int
    num_flagged: int
    thirty: float
    ten: float


@cache
def outcome(history: History, name: str) -> Outcome:
    """Run a ceiling over a history."""
    windows = windows_of(history)
    logs = windows.center + np.maximum(math.log(RATIO), 8.0 * windows.spread)
    logs = np.where(windows.is_full, np.minimum(logs, CEILINGS[name](windows)), logs)
    logs[:16] = np.inf
    with np.errstate(over="ignore"):
        limits = np.exp(logs)
    flagged = int((windows.logs > logs).sum())
    return Outcome(len(logs), flagged, found(history, limits, 30.0), found(history, limits, 10.0))


def best_on(chosen: Sequence[History]) -> str:
    """The ceiling that finds 99 % of the spikes of 30 times in each history, with the fewest flags, then the most of ten."""

    def merit(name: str) -> tuple[bool, int, float]:
        outcomes = [outcome(history, name) for history in chosen]
        finds = all(each.thirty >= 0.99 for each in outcomes)
        return finds, -sum(each.num_flagged for each in outcomes), float(np.mean([each.ten for each in outcomes]))

    return max(CEILINGS, key=merit)


def by_ceiling() -> Sheet:
    """All ceilings on all histories."""
    rows = []
    for name in CEILINGS:
        outcomes = [outcome(history, name) for history in histories()]
        rows.append([f"**{name}**" if name == CHOSEN else name, *_summary(outcomes)])
    return Sheet("Ceilings of the limit", ["ceiling", "points above", "30 x: worst", "10 x: mean"], rows)


def cross_validated() -> Sheet:
    """For each source, what the ceiling that is best on all others does on its histories."""
    rows, outcomes = [], []
    for source in sorted({history.source for history in histories()}):
        name = best_on([history for history in histories() if history.source != source])
        held_out = [outcome(history, name) for history in histories() if history.source == source]
        outcomes += held_out
        rows.append([source, name, *_summary(held_out)])
    rows.append(["all", "", *_summary(outcomes)])
    return Sheet("Held out", ["source", "best on the others", "points above", "30 x: worst", "10 x: mean"], rows)


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        str(sum(each.num_flagged for each in outcomes)),
        percent(min(each.thirty for each in outcomes)),
        percent(float(np.mean([each.ten for each in outcomes]))),
    ]


@dataclass(frozen=True)
class Price:
    """What the detector finds at one ratio on some histories, and what it costs.

    Attributes:
        num_points, num_alerts: of the histories of every step.
        num_others: alerts on the others.
        thirty: share of the spikes of thirty times found, in the worst history.
        ten: of ten times, on average.
    """

    num_points: int
    num_alerts: int
    num_others: int
    thirty: float
    ten: float

    @classmethod
    def of(cls, ratio: float, chosen: Sequence[History]) -> Price:
        """On these."""
        replays = [replayed(history, ratio) for history in chosen]
        pairs = list(zip(chosen, replays, strict=True))
        return cls(
            sum(len(history.norms) for history in chosen if history.interval == 1.0),
            sum(replay.num_alerts for history, replay in pairs if history.interval == 1.0),
            sum(replay.num_alerts for history, replay in pairs if history.interval != 1.0),
            min(found(history, replay.limits, 30.0) for history, replay in pairs),
            float(np.mean([found(history, replay.limits, 10.0) for history, replay in pairs])),
        )

    def in_a_row(self) -> list[str]:
        """As cells of a table."""
        rate = f" ({1000 * self.num_alerts / self.num_points:.3f})" if self.num_points else ""
        return [f"{self.num_alerts}{rate}", str(self.num_others), percent(self.thirty, 1), percent(self.ten, 1)]


RATIOS = (4.0, 5.0, 6.0, 7.0, 8.0)
_PRICES = ["alerts, every step (in 1,000)", "alerts, others", "30 x: worst", "10 x: mean"]


def best_ratio(chosen: Sequence[History]) -> float:
    """The ratio that finds 99 % of the spikes of 30 times in each history, with the fewest alerts; the lowest such."""
    prices = {ratio: Price.of(ratio, chosen) for ratio in RATIOS}
    able = [ratio for ratio in RATIOS if prices[ratio].thirty >= 0.99]
    return min(able, key=lambda ratio: (prices[ratio].num_alerts, ratio))


def by_ratio() -> Sheet:
    """The detector itself at several ratios, on all histories."""
    rows = []
    for ratio in RATIOS:
        name = f"**{ratio:g}**" if ratio == RATIO else f"{ratio:g}"
        rows.append([name, *Price.of(ratio, histories()).in_a_row()])
    return Sheet("Ratios", ["ratio", *_PRICES], rows)


def ratio_cross_validated() -> Sheet:
    """For each source, what the ratio that is best on all others does on its histories."""
    rows = []
    for source in sorted({history.source for history in histories()}):
        ratio = best_ratio([history for history in histories() if history.source != source])
        held_out = Price.of(ratio, [history for history in histories() if history.source == source])
        rows.append([source, f"{ratio:g}", *held_out.in_a_row()])
    return Sheet("Ratio held out", ["source", "best on the others", *_PRICES], rows)


def by_history() -> Sheet:
    """What the default detector does on each."""
    rows = []
    for history in histories():
        replay = replayed(history)
        ratio = replay.limits / history.usual
        rows.append(
            [
                f"{history.training} ({history.name})",
                f"{len(history.norms):,}",
                f"{history.interval:g}",
                f"{np.median(ratio[np.isfinite(ratio)]):.1f}",
                percent(found(history, replay.limits, 30.0), 1),
                percent(found(history, replay.limits, 10.0), 1),
                str(replay.num_flagged),
                str(replay.num_alerts),
            ]
        )
    columns = ["training", "points", "steps apart", "limit / usual norm", "30 x found", "10 x found", "flagged", "alerts"]
    return Sheet("Published histories", columns, rows)


def in_all() -> str:
    """The figures that the aims are about."""
    replays = {history: replayed(history) for history in histories()}
    thirty = min(found(history, replay.limits, 30.0) for history, replay in replays.items())
    ten = float(np.mean([found(history, replay.limits, 10.0) for history, replay in replays.items()]))
    stepwise = {history: replay for history, replay in replays.items() if history.interval == 1.0}
    points, alerts = sum(len(each.norms) for each in stepwise), sum(each.num_alerts for each in stepwise.values())
    return (
        f"A step of 30 times the usual norm is found at {percent(thirty, 1)} of the places of the worst history, one of 10 "
        f"times at {percent(ten, 1)} on average. On histories of every step there are {alerts} alerts in {points:,} points, "
        f"{1000 * alerts / points:.3f} in 1,000."
    )
