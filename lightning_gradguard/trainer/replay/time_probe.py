"""Looks whether the gradient reaches the beginning of sequences, which the gradients of weights don't show."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import distributed, nn

from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.forensics.flow.flow import FlowMeter
from lightning_gradguard.forensics.flow.recurrence import recurrences
from lightning_gradguard.forensics.flow.report import culprit_of
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_in_time
from lightning_gradguard.report.alerting import notice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from lightning_gradguard.forensics.state import State
    from lightning_gradguard.measure.distributed import Ranks
    from lightning_gradguard.policy import Action
    from lightning_gradguard.record import Position
    from lightning_gradguard.trainer.replay.replay import Replay
    from lightning_gradguard.trainer.replay.window import MicroBatch, Window

LOOKS = (30, 50)
"""Steps of an optimizer after which one is run again. LSTMs look as if they vanished at first, and then train."""

DECADES = 7.0
"""What is this much smaller than the rest of a sum does not change it in float32."""


class TimeProbe:
    """Runs two steps of a module with recurrent layers once more, to follow the gradient back in time.

    A recurrent weight is used at each step, so its gradient is in order where only the last steps count: what vanishes in
    time shows at the inputs alone. Modules without recurrent layers are never run again.

    Args:
        module: the one that is trained.
        window: the running micro-batches.
        replay: runs them again.
        ranks: that have to agree.
    """

    def __init__(self, module: nn.Module, window: Window, replay: Replay, ranks: Ranks) -> None:
        self._module = module
        self._window = window
        self._replay = replay
        self._ranks = ranks
        self._num_steps: dict[int, int] = {}
        self._reaches: set[int] = set()
        self._has_recurrence = any(isinstance(part, (nn.RNNBase, nn.RNNCellBase)) for part in module.modules())

    def is_due(self, optimizer: Optimizer) -> bool:
        """Count a step, and tell whether it is to be run again. All ranks count alike."""
        if not self._has_recurrence:
            return False
        count = self._num_steps[id(optimizer)] = self._num_steps.get(id(optimizer), 0) + 1
        return count in LOOKS and id(optimizer) not in self._reaches

    def look(self, optimizer: Optimizer, position: Position, action: Action) -> Alert | None:
        """Run the last micro-batch of a step again. A collective if there are several ranks.

        Args:
            optimizer: whose step it is.
            position: of the step.
            action: what the alert says was done.

        Returns:
            What fades over time by seven decades, at each look; None if nothing does, or there is another look to come.
        """
        found, failure = None, None
        try:
            found = self._find(optimizer, position.rank)
        except Exception as error:  # noqa: BLE001 - raised again once the other ranks have been told
            failure = error
        everyone: list[Culprit | None] = [found]
        if self._ranks.size > 1:
            everyone = [None] * self._ranks.size
            distributed.all_gather_object(everyone, found)
        if failure is not None:
            raise failure
        if any(culprit is None for culprit in everyone):
            self._reaches.add(id(optimizer))
            return None
        culprit = everyone[0]
        if culprit is None or self._num_steps[id(optimizer)] != LOOKS[-1]:
            return None
        where = f"step {position.step}"
        if position.epoch is not None:
            where += f" (epoch {position.epoch}, batch {position.batch_idx})"
        message = f"Vanishing in time at {where}: cause: recurrence; {culprit.message}. The step is applied."
        return replace(notice(position, "vanishing", action, message, culprit.remedy), culprit=culprit)

    def _find(self, optimizer: Optimizer, rank: int) -> Culprit | None:
        meter = FlowMeter(self._module)

        @contextmanager
        def observe(micro_batch: MicroBatch, state: State) -> Iterator[None]:  # noqa: ARG001 - the replay's call
            with meter.watch():
                yield

        self._replay.run(optimizer, batches=self._window.of(optimizer)[-1:], observe=observe)
        causes = [vanishing_in_time(found) for found in recurrences(meter.flow) if found.decades < -DECADES]
        return culprit_of(causes[:1], meter.flow, rank=rank, error=None, tolerance=0.0)
