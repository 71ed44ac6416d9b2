"""What a user sets about a fit beside the settings that every guard has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.detectors import Detector
from lightning_gradguard.forensics.nonfinite.layout import SampleDim, check_sample_dim
from lightning_gradguard.policy import Action, require_float, require_int
from lightning_gradguard.recovery import Rollback
from lightning_gradguard.sinks.tags import LOGGED_NORMS, LoggedNorms

SkipExceptions = Literal["torch", "all"] | None


@dataclass(frozen=True)
class Options:
    """Checked options of a fit; `GradGuard` says what each means.

    Raises:
        ValueError: if a value is wrong, with its name, constraint, value and remedy.
    """

    every_backward: bool
    log_every_n_steps: int | None
    log_norms: LoggedNorms
    max_replays: int
    max_bundle_mib: float | None
    sample_dim: SampleDim
    skip_exceptions: SkipExceptions
    rollback: Rollback | None
    quarantine: Literal["list", "skip"] | None
    rollback_detectors: tuple[str, ...]
    """Names of the detectors whose action is "rollback"."""

    def __post_init__(self) -> None:
        if self.log_every_n_steps is not None:
            require_int("log_every_n_steps", self.log_every_n_steps, at_least=0, remedy="For the Trainer's own pass None.")
        if self.log_norms not in LOGGED_NORMS:
            raise ValueError(
                f"`log_norms` must be one of {', '.join(map(repr, LOGGED_NORMS))}, got {self.log_norms!r}. "
                "The default is 'groups'."
            )
        require_int("max_replays", self.max_replays, at_least=0, remedy="For no replays pass 0.")
        if self.max_bundle_mib is not None:
            require_float("max_bundle_mib", self.max_bundle_mib, above=0.0, remedy="For no bundles pass None.")
        check_sample_dim(self.sample_dim)
        if self.skip_exceptions not in ("torch", "all", None):
            raise ValueError(
                f"`skip_exceptions` must be 'torch', 'all' or None, got {self.skip_exceptions!r}. None passes over no batch "
                "that ends in an exception."
            )
        if self.rollback is not None and not self.rollback_detectors:
            raise ValueError(
                "`rollback` must go with a detector whose action is 'rollback', got none. For example "
                "`nonfinite='rollback', explosion='rollback'`."
            )
        if self.quarantine not in (None, "list", "skip"):
            raise ValueError(
                f"`quarantine` must be 'list', 'skip' or None, got {self.quarantine!r}. 'list' changes nothing."
            )

    @property
    def snapshots(self) -> Rollback | None:
        """When states are kept; None where no detector would go back to one."""
        return self.rollback or (Rollback() if self.rollback_detectors else None)


def rollback_detectors_among(detectors: Iterable[Detector]) -> tuple[str, ...]:
    """Names of those whose action is "rollback"."""
    return tuple(detector.name for detector in detectors if detector.policy.action is Action.ROLLBACK)
