"""Looks whether the gradient reaches the beginning of sequences, which the gradients of weights don't show."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import distributed, nn

from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.forensics.flow.flow import FlowMeter
from lightning_gradguard.forensics.flow.recurrence import recurrences
from lightning_gradguard.forensics.flow.report import culprit_of
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_in_time
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.report.alerting import notice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from lightning_gradguard.forensics.state import State
    from lightning_gradguard.policy import Action
    from lightning_gradguard.record import Outcome
    from lightning_gradguard.trainer.replay.replay import Replay
    from lightning_gradguard.trainer.replay.window import MicroBatch, Window

LOOKS = (30, 50)
"""Steps of an optimizer after which one is run again. LSTMs look as if they vanished at first, and then train."""

DECADES = 7.0
"""What is this much smaller than the rest of a sum does not change it in float32."""


class TimeProbe:
    """Runs two steps of a module with recurrent layers once more, to follow the gradient back in time.

    A recurrent weight is used at each step, so its gradient is in order where only the last steps count: what vanishes in
    time shows at the inputs alone.

    Args:
        module: the one that is trained.
        window: the running micro-batches.
        replay: runs them again.
        action: what alerts say was done, "warn" at most.
    """

    def __init__(self, module: nn.Module, window: Window, replay: Replay, action: Action) -> None:
        self._module = module
        self._window = window
        self._replay = replay
        self._action = action
        self._ranks = Ranks.current()
        self._num_steps: dict[int, int] = {}
        self._reaches: set[int] = set()

    @staticmethod
    def can_find(module: nn.Module) -> bool:
        """Whether there is anything to look for."""
        return any(isinstance(part, (nn.RNNBase, nn.RNNCellBase)) for part in module.modules())

    def look(self, optimizer: Optimizer, outcome: Outcome | None) -> Alert | None:
        """Count a step, and look into it if it is time to. All ranks count alike; a collective where they look.

        Args:
            optimizer: whose step it is.
            outcome: of the last step that is known.

        Returns:
            What fades over time by seven decades at both looks.
        """
        if outcome is None:
            return None
        count = self._num_steps[id(optimizer)] = self._num_steps.get(id(optimizer), 0) + 1
        if count not in LOOKS or id(optimizer) in self._reaches:
            return None
        culprit = None if outcome.skip else self._agreed(self._find(optimizer, outcome.position.rank))
        if culprit is None:
            self._reaches.add(id(optimizer))
            return None
        if count != LOOKS[-1]:
            return None
        position = outcome.position
        where = f"step {position.step} (epoch {position.epoch}, batch {position.batch_idx})"
        message = f"Vanishing in time at {where}: cause: recurrence; {culprit.message}. The step is applied."
        return replace(notice(position, "vanishing", self._action, message, culprit.remedy), culprit=culprit)

    def _agreed(self, found: Culprit | None) -> Culprit | None:
        """That of the first rank, if all have one."""
        everyone: list[Culprit | None] = [found] * self._ranks.size
        if self._ranks.size > 1:
            distributed.all_gather_object(everyone, found)
        return everyone[0] if all(culprit is not None for culprit in everyone) else None

    def _find(self, optimizer: Optimizer, rank: int) -> Culprit | None:
        try:
            return self._measure(optimizer, rank)
        except Exception as error:  # noqa: BLE001 - training goes on as if nothing had been tried
            warnings.warn(
                f"The step could not be replayed ({type_and_text(error)}), so whether gradients vanish in time is "
                "not known. Training goes on. `max_replays=0` turns replays off.",
                GuardWarning,
                stacklevel=2,
            )
            return None

    def _measure(self, optimizer: Optimizer, rank: int) -> Culprit | None:
        meter = FlowMeter(self._module)

        @contextmanager
        def observe(micro_batch: MicroBatch, state: State) -> Iterator[None]:  # noqa: ARG001 - the replay's call
            with meter.watch():
                yield

        self._replay.run(optimizer, batches=self._window.of(optimizer)[-1:], observe=observe)
        causes = [vanishing_in_time(found) for found in recurrences(meter.flow) if found.decades < -DECADES]
        return culprit_of(causes[:1], meter.flow, rank=rank, error=None, tolerance=0.0)
