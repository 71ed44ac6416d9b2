"""Made-up histories of healthy trainings that are unusual: what do the default detectors say of them that is not so?

Each has twelve parameters with noise of their own, 600 steps, and a loss. How many lines may be told of each was written
before the first run: none, unless something happens that anybody would want to be told of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.detection.rules import defaults
from benchmarks.detection.sheet import Sheet
from lightning_gradguard.judge.judge import Judge
from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.record import Measurement

STEPS, SEEDS = 600, range(5)
LAYOUT = Layout.of([f"layers.{index}.{kind}" for index in range(6) for kind in ("weight", "bias")], [(16, 16), (16,)] * 6)
_AT = np.arange(STEPS)
_NUM = len(LAYOUT.names)


@dataclass
class History:
    """What a training measures.

    Attributes:
        norms: of each parameter, [STEPS, parameters].
        losses: [STEPS].
        has_grad: [STEPS, parameters].
        resumes_at: the step before which it is stopped and resumed from its state; None: never.
    """

    norms: Floats
    losses: Floats
    has_grad: Bools
    resumes_at: int | None = None


@dataclass(frozen=True)
class Unusual:
    """One kind.

    Attributes:
        title: what happens.
        make: a history from a seeded generator.
        may_tell: how many lines at most are no fault.
        why: what these may say.
    """

    title: str
    make: Callable[[np.random.Generator], History]
    may_tell: int = 0
    why: str = "-"


UNUSUAL: list[Unusual] = []


def _kind(
    title: str, may_tell: int = 0, why: str = "-"
) -> Callable[[Callable[[np.random.Generator], History]], Callable[[np.random.Generator], History]]:
    def register(make: Callable[[np.random.Generator], History]) -> Callable[[np.random.Generator], History]:
        UNUSUAL.append(Unusual(title, make, may_tell, why))
        return make

    return register


def _history(
    random: np.random.Generator, level: Floats | float = 1.0, loss: Floats | float = 1.0, noise: Floats | float = 0.2
) -> History:
    """Norms around a level, a loss that falls from 3 to 1 by itself and around it."""
    own = np.exp(random.normal(0.0, 0.4, _NUM)) * np.exp(random.normal(0.0, 0.1, (STEPS, _NUM)))
    common = level * np.exp(noise * random.normal(0.0, 1.0, STEPS))
    losses = loss * (1.0 + 2.0 * np.exp(-_AT / 150.0)) * np.exp(random.normal(0.0, 0.05, STEPS))
    return History(own * common[:, None], losses, np.ones((STEPS, _NUM), dtype=np.bool_))


@_kind("the learning rate starts again every 150 steps: norm 4 times, loss 1.6 times, then back")
def _restarts(random: np.random.Generator) -> History:
    after = np.where(_AT >= 150, np.exp(-(_AT % 150) / 40.0), 0.0)
    return _history(random, 4.0**after, 1.6**after)


@_kind("cyclic rates: in 80 steps the norm goes from a third to three times its middle and back")
def _cyclic(random: np.random.Generator) -> History:
    wave = np.sin(2.0 * np.pi * _AT / 80.0)
    return _history(random, 3.0**wave, 1.0 + 0.1 * wave)


@_kind("a curriculum goes on: from step 300 four times the norm, twice the loss")
def _curriculum(random: np.random.Generator) -> History:
    return _history(random, np.where(_AT >= 300, 4.0, 1.0), np.where(_AT >= 300, 2.0, 1.0))


@_kind("other data: from step 300 twelve times the norm, three times the loss", 2, "the change, and its end")
def _other_data(random: np.random.Generator) -> History:
    return _history(random, np.where(_AT >= 300, 12.0, 1.0), np.where(_AT >= 300, 3.0, 1.0))


@_kind("rare rewards: in 70 % of the steps loss and gradient are exactly zero, else noise of 0.8 (log)")
def _rare_rewards(random: np.random.Generator) -> History:
    history = _history(random, noise=0.8)
    is_zero = random.random(STEPS) < 0.7
    history.norms[is_zero], history.losses[is_zero] = 0.0, 0.0
    return history


@_kind("heavy tails: Pareto's distribution with index 2.5")
def _heavy_tails(random: np.random.Generator) -> History:
    return _history(random, 1.0 + random.pareto(2.5, STEPS))


@_kind("the first 100 steps have a loss, and no gradient", 4, "the zero, again after 25, 50, ... steps, and its end")
def _silent(random: np.random.Generator) -> History:
    history = _history(random)
    history.norms[:100] = 0.0
    return history


@_kind("the first 100 steps have a loss of zero, as before a replay buffer is filled")
def _waiting(random: np.random.Generator) -> History:
    history = _silent(random)
    history.losses[:100] = 0.0
    return history


@_kind("a network that leaves zero: the norm rises from 1e-8 to 1 in 100 steps, the loss falls at the end of it")
def _from_nothing(random: np.random.Generator) -> History:
    history = _history(random, 10.0 ** np.minimum(-8.0 + 0.08 * _AT, 0.0))
    history.losses = (1.0 + 2.0 * np.exp(-np.maximum(_AT - 75, 0) / 100.0)) * np.exp(random.normal(0.0, 0.02, STEPS))
    return history


@_kind("the norm doubles ten times in 500 steps, while the loss falls steadily")
def _slow_rise(random: np.random.Generator) -> History:
    return _history(random, 2.0 ** (_AT / 50.0), np.exp(-_AT / 200.0))


@_kind("resumed with eight times the batch: norm 0.4 times, noise 0.1 instead of 0.3")
def _larger_batch(random: np.random.Generator) -> History:
    history = _history(random, np.where(_AT >= 300, 0.4, 1.0), noise=np.where(_AT >= 300, 0.1, 0.3))
    history.resumes_at = 300
    return history


@_kind("resumed with an eighth of the batch: norm 2.5 times, noise 0.4 instead of 0.1")
def _smaller_batch(random: np.random.Generator) -> History:
    history = _history(random, np.where(_AT >= 300, 2.5, 1.0), noise=np.where(_AT >= 300, 0.4, 0.1))
    history.resumes_at = 300
    return history


@_kind("gradients are accumulated as a sum, of four batches from step 200 on")
def _accumulated(random: np.random.Generator) -> History:
    return _history(random, np.where(_AT >= 200, 4.0, 1.0))


@_kind("the loss is multiplied by 1,000 at step 300", 2, "the change, and its end")
def _rescaled(random: np.random.Generator) -> History:
    factor = np.where(_AT >= 300, 1000.0, 1.0)
    return _history(random, factor, factor)


@_kind("a converging training: norm and loss fall ten-thousandfold, the noise stays")
def _converging(random: np.random.Generator) -> History:
    fall = 10.0 ** (-4.0 * _AT / STEPS)
    return _history(random, fall, fall)


@_kind("a penalty at every 16th step, of 20 times the norm")
def _lazy_penalty(random: np.random.Generator) -> History:
    return _history(random, np.where(_AT % 16 == 0, 20.0, 1.0), np.where(_AT % 16 == 0, 1.5, 1.0))


@_kind("two tasks in turn: one with 15 times the norm of the other, and a head of its own")
def _two_tasks(random: np.random.Generator) -> History:
    is_second = _AT % 2 == 1
    history = _history(random, np.where(is_second, 15.0, 1.0), np.where(is_second, 3.0, 1.0))
    history.norms[is_second, 8:10], history.norms[~is_second, 10:12] = 0.0, 0.0
    return history


@_kind("layers are unfrozen at steps 200 and 400, from the last to the first")
def _unfrozen(random: np.random.Generator) -> History:
    history = _history(random, np.where(_AT >= 400, 1.6, np.where(_AT >= 200, 1.3, 1.0)))
    for end, before in ((8, 200), (4, 400)):
        history.norms[:before, :end], history.has_grad[:before, :end] = 0.0, False
    return history


@_kind("an embedding that one batch in twenty looks up, with ten times the norm of the other parameters")
def _rare_rows(random: np.random.Generator) -> History:
    history = _history(random)
    history.norms[:, 0] *= np.where(random.random(STEPS) < 0.05, 10.0, 0.0)
    return history


@_kind("stochastic depth: each layer's gradient is exactly zero in every second step, by chance")
def _stochastic_depth(random: np.random.Generator) -> History:
    history = _history(random)
    history.norms *= np.repeat(random.random((STEPS, _NUM // 2)) < 0.5, 2, axis=1)
    history.norms[:, -2:] = np.maximum(history.norms[:, -2:], 0.1)
    return history


def lines(history: History) -> list[tuple[int, str]]:
    """What a guard would tell, and at which step: alerts, and the ends of what lasted; notes in the log are none."""
    judge, told = Judge(defaults()), []
    for step in range(STEPS):
        if step == history.resumes_at:
            state = copy.deepcopy(judge.state_dict())
            judge = Judge(defaults())
            judge.load_state_dict(state)
        norms = history.norms[step]
        total = float(np.linalg.norm(norms))
        judgement = judge.judge(Measurement(LAYOUT, norms, history.has_grad[step], total, loss=float(history.losses[step])))
        for verdict, is_told in zip(judgement.verdicts, judgement.decision.alerting, strict=True):
            if is_told and not verdict.is_note:
                told.append((step, verdict.message))
        told += [(step, f"{ended.kind} has ended after {ended.lasted} steps") for ended in judgement.decision.ended]
    return told


def by_kind() -> Sheet:
    """How many lines each kind gets, over the seeds."""
    rows = []
    for kind in UNUSUAL:
        told = [len(lines(kind.make(np.random.default_rng(seed)))) for seed in SEEDS]
        allowed = f"{kind.may_tell}: {kind.why}" if kind.may_tell else "0"
        number = f"{min(told)} to {max(told)}" if min(told) < max(told) else str(told[0])
        rows.append([kind.title, allowed, number, "yes" if max(told) <= kind.may_tell else "**no**"])
    return Sheet("Unusual histories", ["what happens", "lines that are no fault", "lines told", "kept to"], rows)
