"""The detectors of one optimizer, what they have been up to, and what their findings lead to."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradguard.detectors import Detector, NonFinite
from lightning_gradguard.detectors.base import Deferral
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.judge.decision import Streak, decide
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Decision, Measurement, Verdict

_MAX_DEFERRED = 16
"""More would save nothing, and make one step slow."""

_TOGETHER = ("deferral", "observe", "learn", "catch_up")


@dataclass(frozen=True)
class Judgement:
    """What was found about one step, and what is done about it.

    Attributes:
        limit: the global norm above which the step would be an explosion; infinite without a limit.
        found: one entry for each detector; None where it found nothing.
        decision: what is done.
    """

    limit: float
    found: tuple[Verdict | None, ...]
    decision: Decision

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What was found."""
        return tuple(verdict for verdict in self.found if verdict is not None)


@dataclass(frozen=True)
class SkipThreshold:
    """What a step must not exceed to be applied, known before the step.

    Attributes:
        max_norm: largest global norm; infinite for none.
        must_be_finite: whether gradients and losses may hold no NaN or infinity.
    """

    max_norm: float
    must_be_finite: bool


NOTHING_FOUND = Judgement(math.inf, (), Decision())
"""The step is applied."""


class Judge:
    """Runs the detectors over one step after another.

    Steps that nothing can be found at may be deferred: the detectors are told of several together. They decide as if they
    had been told of each, so it makes no difference when that happens.

    Args:
        detectors: in the order in which their verdicts appear.
        can_defer: whether steps may be deferred at all.
    """

    def __init__(self, detectors: Sequence[Detector], *, can_defer: bool = False) -> None:
        self._detectors = tuple(detectors)
        self._names = tuple(detector.name for detector in detectors)
        self._asking = [detector for detector in detectors if type(detector).needs_update is not Detector.needs_update]
        self._streaks = tuple(Streak() for _ in self._detectors)
        self._streaks_before = self._streaks
        self._num_steps = 0
        self._can_defer = can_defer and all(_says_how_far(detector) for detector in self._detectors)
        self._looking = [detector for detector in detectors if type(detector).can_defer is not Detector.can_defer]
        self._deferral: Deferral | None = None
        self._deferred: list[Measurement] = []
        self._last_limit = math.inf

    @property
    def last_limit(self) -> float:
        """The global norm above which the last step would have been an explosion."""
        self.catch_up()
        return self._last_limit

    def skip_threshold(self) -> SkipThreshold | None:
        """What decides whether the next step is skipped, if that is known before it; else None.

        It is where every detector that would skip the step at its next hit looks at nothing but the global norm or at
        finiteness. Then the device can skip by itself.
        """
        self.catch_up()
        skipping = [
            detector
            for detector, streak in zip(self._detectors, self._streaks, strict=True)
            if detector.policy.act(streak.hits + 1).skips
        ]
        if not all(isinstance(detector, NonFinite) or detector.is_gated for detector in skipping):
            return None
        return SkipThreshold(
            max_norm=min((detector.limit() for detector in skipping), default=math.inf),
            must_be_finite=any(isinstance(detector, NonFinite) for detector in skipping),
        )

    @property
    def damage_action(self) -> Action | None:
        """What would be done about NaN or infinity at the next step; None if nobody looks for them."""
        actions = [
            detector.policy.act(streak.hits + 1)
            for detector, streak in zip(self._detectors, self._streaks, strict=True)
            if isinstance(detector, NonFinite)
        ]
        return max(actions, default=None)

    def tell_exception(self, judgement: Judgement, told_by: Callable[[Verdict], Verdict]) -> Judgement:
        """The same, in which the finding of NaN and infinity is told by a function of it."""
        pairs = zip(self._detectors, judgement.found, strict=True)
        found = tuple(told_by(it) if it is not None and isinstance(detector, NonFinite) else it for detector, it in pairs)
        return replace(judgement, found=found)

    def needs_update(self) -> bool:
        """Whether a detector wants to know what the coming step does to the weights."""
        return True in [detector.needs_update() for detector in self._asking]

    @property
    def can_defer(self) -> bool:
        """Whether steps may ever be deferred, and no detector asks what they do to the weights."""
        return self._can_defer and not self._asking

    def can_wait(self) -> bool:
        """Whether the next step may be deferred, if it turns out to be one that nothing can be found at."""
        if not self._can_defer:
            return False
        if self._deferral is None or len(self._deferred) >= self._deferral.num_steps:
            self._tell(self._take_deferred())
            self._deferral = self._how_far()
        return self._deferral.num_steps > 0

    def defer(self, measurement: Measurement) -> bool:
        """Take a step that is applied, and at which nothing can be found; False if it has to be judged at once."""
        if not self.can_wait():
            return False
        assert self._deferral is not None
        if (
            not measurement.global_norm <= self._deferral.max_norm
            or measurement.damage is not None
            or measurement.overflowed
            or measurement.loss_scale is not None
        ):
            return False
        for detector in self._looking:
            if not detector.can_defer(measurement):
                return False
        self._deferred.append(measurement)
        return True

    def catch_up(self) -> None:
        """Tell the detectors of the steps that were deferred."""
        deferred = self._take_deferred()
        if deferred:
            self._tell(deferred[:-1])
            self._last_limit = self._limit()
            self._tell(deferred[-1:])

    def _take_deferred(self) -> list[Measurement]:
        deferred, self._deferred, self._deferral = self._deferred, [], None
        return deferred

    def _tell(self, measurements: Sequence[Measurement]) -> None:
        self._num_steps += len(measurements)
        for detector in self._detectors if measurements else ():
            detector.catch_up(measurements)

    def _limit(self) -> float:
        return min((detector.limit() for detector in self._detectors), default=math.inf)

    def _how_far(self) -> Deferral:
        """How far all of them can wait; not at all while a condition may last."""
        found = [detector.deferral() for detector in self._detectors]
        known = [deferral for deferral in found if deferral is not None]
        if len(known) < len(found) or not all(streak.is_idle for streak in self._streaks):
            return Deferral(0)
        num_steps = min((deferral.num_steps for deferral in known), default=_MAX_DEFERRED)
        return Deferral(min(num_steps, _MAX_DEFERRED), min([sys.float_info.max, *(it.max_norm for it in known)]))

    def judge(self, measurement: Measurement, *, is_repeated: bool = False) -> Judgement:
        """Judge a step, and let the detectors learn from it if it is applied.

        Args:
            measurement: of the step.
            is_repeated: whether it is the same step as the last one, measured again.
        """
        self._tell(self._take_deferred())
        if not is_repeated:
            self._num_steps += 1
            self._streaks_before = self._streaks
        limit = self._last_limit = self._limit()
        found = tuple(detector.observe(measurement) for detector in self._detectors)
        decision, self._streaks = decide(
            self._num_steps - 1,
            [detector.policy for detector in self._detectors],
            self._streaks_before,
            found,
            kinds=self._names,
            must_skip=measurement.is_scaler_overflow,
        )
        if measurement.is_finite and not decision.skip:
            for detector, verdict in zip(self._detectors, found, strict=True):
                if verdict is None:
                    detector.learn(measurement)
        return Judgement(limit, found, decision)

    def state_dict(self) -> dict[str, Any]:
        """Baselines and streaks, in plain types."""
        self.catch_up()
        return {
            "num_steps": self._num_steps,
            "detectors": {
                detector.name: {
                    "type": type(detector).__qualname__,
                    "state": detector.state_dict(),
                    "streak": streak.state_dict(),
                }
                for detector, streak in zip(self._detectors, self._streaks, strict=True)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; a detector that was not there then starts afresh, with a warning."""
        self._deferred, self._deferral = [], None
        self._num_steps = state["num_steps"]
        self._streaks = tuple(self._restore(detector, state["detectors"].get(detector.name)) for detector in self._detectors)

    def _restore(self, detector: Detector, saved: dict[str, Any] | None) -> Streak:
        state = state_for(detector, saved, f"detector `{detector.name}`")
        if saved is None or state is None:
            return Streak()
        detector.load_state_dict(state)
        return Streak.from_state(saved["streak"])


def _says_how_far(detector: Detector) -> bool:
    """Whether `deferral` knows of all that the detector looks at: a subclass may look at more than the class that has it."""
    definers = {name: next(cls for cls in type(detector).__mro__ if name in vars(cls)) for name in _TOGETHER}
    return all(issubclass(definers["deferral"], definers[name]) for name in _TOGETHER)


def state_for(part: object, saved: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The saved state of a detector or clipper if it is one of its type; else None, with a warning."""
    if saved is not None and saved["type"] == type(part).__qualname__:
        state: dict[str, Any] = saved["state"]
        return state
    before = "nothing" if saved is None else saved["type"]
    warnings.warn(
        f"The checkpoint holds {before} for the {name}, which is {type(part).__qualname__} now. It starts without history; "
        "the rest of the guard's state is restored.",
        GuardWarning,
        stacklevel=2,
    )
    return None
