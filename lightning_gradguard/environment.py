"""What a pipeline works with besides its settings: where it runs, and whom it asks and tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.alert import Culprit
from lightning_gradguard.measure.scaling import Scaling
from lightning_gradguard.policy import require_int
from lightning_gradguard.record import Measurement, Position, Record
from lightning_gradguard.report.reporter import Archive


class Investigate(Protocol):
    """Says who is to blame for a finding of some kind."""

    def __call__(
        self, position: Position, measurement: Measurement, kind: str, *, silent: Sequence[str] = (), ends_run: bool
    ) -> Culprit | None:
        """Asked while the step's gradients are still there, if they ever are.

        Args:
            position: where the step stands.
            measurement: of its gradients.
            kind: "nonfinite", "explosion" or "vanishing".
            silent: names of parameters that the finding is about because their gradient is exactly zero.
            ends_run: whether the finding ends the training, so that it needs an answer more than any other.
        """


@dataclass(frozen=True, eq=False)
class Environment:
    """What a guard works with besides its settings.

    Attributes:
        log_every_n_steps: how often scalars are due, >= 0; 0: never, but on steps with an alert.
        buffers: what the forward pass of a skipped step has changed.
        scaler: what scales the loss in fp16 training.
        scaling: the same, where an engine has its own instead.
        listener: gets every record on every rank, before the sinks; what it raises is not caught.
        clips_later: whether somebody else clips after the guard.
        can_defer: whether healthy steps may be judged later, several together; what is found is the same.
        investigate: says who is to blame for a finding.
        archive: writes a step with these alerts down, and gives them back with where that is; called before they are told.
        hint: what is said where nobody can tell who is to blame.

    Raises:
        ValueError: if `log_every_n_steps` is wrong.
    """

    log_every_n_steps: int
    buffers: Buffers
    scaler: GradScaler | None = None
    scaling: Scaling | None = None
    listener: Callable[[Record], None] | None = None
    clips_later: bool = False
    can_defer: bool = False
    investigate: Investigate | None = None
    archive: Archive | None = None
    hint: str = ""

    def __post_init__(self) -> None:
        require_int("log_every_n_steps", self.log_every_n_steps, at_least=0, remedy="For no scalars pass 0.")
