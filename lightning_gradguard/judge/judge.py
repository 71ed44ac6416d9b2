"""The detectors of one optimizer, what they have been up to, and what their findings lead to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradguard.detectors import Detector, NonFinite
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.judge.decision import Streak, decide
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Decision, Measurement, Verdict


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


class Judge:
    """Runs the detectors over one step after another.

    Args:
        detectors: in the order in which their verdicts appear.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = tuple(detectors)
        self._names = tuple(detector.name for detector in detectors)
        self._asking = [detector for detector in detectors if type(detector).needs_update is not Detector.needs_update]
        self._streaks = tuple(Streak() for _ in self._detectors)
        self._streaks_before = self._streaks
        self._num_steps = 0

    def skip_threshold(self) -> SkipThreshold | None:
        """What decides whether the next step is skipped, if that is known before it; else None.

        It is where every detector that would skip the step at its next hit looks at nothing but the global norm or at
        finiteness. Then the device can skip by itself.
        """
        armed = [
            detector
            for detector, streak in zip(self._detectors, self._streaks, strict=True)
            if detector.policy.act(streak.hits + 1).skips
        ]
        if not all(isinstance(detector, NonFinite) or detector.is_gated for detector in armed):
            return None
        return SkipThreshold(
            max_norm=min((detector.limit() for detector in armed), default=math.inf),
            must_be_finite=any(isinstance(detector, NonFinite) for detector in armed),
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

    def judge(self, measurement: Measurement, *, is_repeated: bool = False) -> Judgement:
        """Judge a step, and let the detectors learn from it if it is applied.

        Args:
            measurement: of the step.
            is_repeated: whether it is the same step as the last one, measured again.
        """
        if not is_repeated:
            self._num_steps += 1
            self._streaks_before = self._streaks
        limit = min((detector.limit() for detector in self._detectors), default=math.inf)
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
        self._num_steps = state["num_steps"]
        self._streaks = tuple(self._restore(detector, state["detectors"].get(detector.name)) for detector in self._detectors)

    def _restore(self, detector: Detector, saved: dict[str, Any] | None) -> Streak:
        state = state_for(detector, saved, f"detector `{detector.name}`")
        if saved is None or state is None:
            return Streak()
        detector.load_state_dict(state)
        return Streak.from_state(saved["streak"])


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
