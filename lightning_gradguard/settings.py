"""From what a user wrote to what a guard works with; `GradGuard` and `Guard` share it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lightning_gradguard.clippers import ClipNorm, Clipper, Grouped
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.measure.logged import HISTOGRAMS_OF, HistogramsOf, Logged, other_norm_types
from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.policy import Action, ActionName, require_int, to_action
from lightning_gradguard.record import Record
from lightning_gradguard.sinks import Sink
from lightning_gradguard.sinks.base import to_sink

_D = TypeVar("_D", bound=Detector)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """Checked settings.

    Attributes:
        clipper: what clips; None for nothing.
        detectors: what judges, in the order in which their verdicts appear.
        only: which parameters are watched.
        sinks: the user's own.
        histogram_every_n_steps: cadence of histograms, >= 1; None for none.
        histograms_of: "raw" or "clipped" gradients.
        norm_types: what norms are logged beside the 2-norm.
    """

    clipper: Clipper | None
    detectors: tuple[Detector, ...]
    only: NameFilter
    sinks: tuple[Sink, ...]
    histogram_every_n_steps: int | None
    histograms_of: HistogramsOf = "raw"
    norm_types: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        clip: float | Clipper | Mapping[str, float | Clipper | None] | None,
        nonfinite: ActionName | Action | NonFinite | None,
        explosion: ActionName | Action | Explosion | None,
        vanishing: ActionName | Action | Vanishing | None,
        overflow: ActionName | Action | Overflow | None,
        detectors: Sequence[Detector],
        include: Sequence[str] | None,
        exclude: Sequence[str],
        sinks: Sequence[Sink | Callable[[Record], object]],
        histogram_every_n_steps: int | None,
        histograms_of: HistogramsOf = "raw",
        log_norm_types: Sequence[float] = (),
    ) -> Settings:
        """Check what the user wrote.

        Raises:
            ValueError: if a value is wrong, with its name, constraint, value and remedy.
        """
        if histogram_every_n_steps is not None:
            require_int(
                "histogram_every_n_steps", histogram_every_n_steps, at_least=1, remedy="For no histograms pass None."
            )
        if histograms_of not in HISTOGRAMS_OF:
            raise ValueError(
                f"`histograms_of` must be one of {', '.join(map(repr, HISTOGRAMS_OF))}, got {histograms_of!r}. 'raw' is of "
                "the gradients before clipping."
            )
        built_in = (
            _to_detector(nonfinite, NonFinite, parameter="nonfinite"),
            _to_detector(explosion, Explosion, parameter="explosion"),
            _to_detector(vanishing, Vanishing, parameter="vanishing"),
            _to_detector(overflow, Overflow, parameter="overflow"),
        )
        chosen: list[Detector] = [detector for detector in built_in if detector is not None]
        for detector in _sequence(detectors, parameter="detectors"):
            _check_own(
                detector,
                taken={NonFinite.name, Explosion.name, Vanishing.name, Overflow.name} | {other.name for other in chosen},
            )
            chosen.append(detector)
        return cls(
            clipper=_to_clipper(clip),
            detectors=tuple(chosen),
            only=NameFilter.of(include, exclude),
            sinks=tuple(to_sink(sink) for sink in _sequence(sinks, parameter="sinks")),
            histogram_every_n_steps=histogram_every_n_steps,
            histograms_of=histograms_of,
            norm_types=other_norm_types(log_norm_types),
        )

    def logged(self, interval: int) -> Logged:
        """What is measured for the logs alone.

        Args:
            interval: every how many steps scalars are due, >= 0; 0: never.
        """
        return Logged(
            interval,
            has_readers=bool(self.sinks),
            norm_types=self.norm_types,
            histogram_interval=self.histogram_every_n_steps or 0,
            histograms_of=self.histograms_of,
        )

    def in_words(self) -> dict[str, str]:
        """For people and files."""
        detectors = {detector.name: f"{type(detector).__name__}({detector.policy})" for detector in self.detectors}
        return {"clip": repr(self.clipper), **detectors}

    def refuse_rollback(self) -> None:
        """Raise a `ValueError` if a detector would go back to an earlier state, which needs a Trainer."""
        for detector in self.detectors:
            if detector.policy.action is Action.ROLLBACK:
                raise ValueError(
                    f"The action of detector `{detector.name}` must be one that a guard alone can take, got 'rollback': "
                    "going back needs a Trainer. Use `GradGuard`, or 'skip' here."
                )

    def fresh(self) -> Settings:
        """The same with clipper and detectors of its own, so that several optimizers share no baseline."""
        return replace(self, clipper=copy.deepcopy(self.clipper), detectors=copy.deepcopy(self.detectors))


def _to_clipper(clip: float | Clipper | Mapping[str, float | Clipper | None] | None) -> Clipper | None:
    if clip is None or isinstance(clip, Clipper):
        return clip
    if isinstance(clip, Mapping):
        return Grouped(clip)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        raise ValueError(
            f"`clip` must be a number (the largest norm), a Clipper or None, got {clip!r}. "
            "For example `clip=1.0` or `clip=ClipValue(0.5)`."
        )
    try:
        return ClipNorm(clip)
    except ValueError as error:
        raise ValueError(str(error).replace("`max_norm`", "`clip`", 1)) from None


def _to_detector(value: object, of_type: type[_D], *, parameter: str) -> _D | None:
    if value is None or isinstance(value, of_type):
        return value
    if isinstance(value, str):
        return of_type(to_action(value, parameter=parameter))
    raise ValueError(
        f"`{parameter}` must be an action's name, {of_type.__name__}(...) or None, got {value!r}. "
        f'For example `{parameter}="warn"` or `{parameter}={of_type.__name__}("skip", patience=3)`.'
    )


def _sequence(value: Sequence[_T], *, parameter: str) -> Sequence[_T]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"`{parameter}` must be a list or tuple, got {value!r}. Put it in brackets: `{parameter}=[...]`.")
    return value


def _check_own(detector: object, taken: set[str]) -> None:
    if not isinstance(detector, Detector):
        raise ValueError(
            f"`detectors` must hold instances of Detector, got {detector!r}. Derive from lightning_gradguard.Detector, "
            "give the class a `name` and implement `observe(measurement)`."
        )
    kind = type(detector).__name__
    if not isinstance(detector.name, str) or not detector.name:
        raise ValueError(
            f"`name` of detector {kind} must be a non-empty string, got {detector.name!r}. "
            'Set it in the class: `name = "my_detector"`.'
        )
    if detector.name in taken:
        raise ValueError(
            f"`name` of detector {kind} must be unique, got {detector.name!r}, which another one has. "
            "To configure a built-in detector pass it by its own keyword, for example `explosion=Explosion(...)`."
        )
    if not hasattr(detector, "policy"):
        raise ValueError(f"Detector {kind} has no `policy`. Call `super().__init__(action, ...)` in its `__init__`.")
