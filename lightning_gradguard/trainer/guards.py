"""The guards of a fit: one for each optimizer that the Trainer has, also where it gets others on the way."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from torch.optim import Optimizer

from lightning_gradguard.alert import Alert
from lightning_gradguard.environment import Environment
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.record import Totals
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.history import History
from lightning_gradguard.trainer.packages import is_no_optimizer, rank_zero_info

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Guards(Sequence[Pipeline]):
    """One guard for each optimizer, in the Trainer's order.

    An optimizer that takes another's place gets a guard that goes on with the other's counts, alerts and baselines.

    Args:
        trainer: whose optimizers.
        watch: gives the parameters that an optimizer trains.
        settings: of each guard.
        environment: of each guard.
        history: what to go on from.
    """

    def __init__(
        self,
        trainer: Trainer,
        watch: Callable[[Optimizer], WatchedParameters],
        settings: Settings,
        environment: Environment,
        history: History,
    ) -> None:
        self._trainer = trainer
        self._watch = watch
        self._settings = settings
        self._environment = environment
        self._optimizers: list[Optimizer] = []
        self._guards: list[Pipeline] = []
        self._retired: list[Pipeline] = []
        self._seen: list[Optimizer] = []
        self._stopped_by: Alert | None = None
        for index, optimizer in enumerate(self._to_watch()):
            guard = self._make(optimizer)
            if index < len(history.guards):
                guard.load_state_dict(history.guards[index])
                guard.alerts.extend(alert for alert in history.alerts if alert.optimizer == index)
            self._optimizers.append(optimizer)
            self._guards.append(guard)
        if not self._guards:
            rank_zero_info(
                "GradGuard: there is no optimizer, so there are no steps to look at. Training goes on without the guard."
            )

    def __iter__(self) -> Iterator[Pipeline]:
        return iter(self._guards)

    def __len__(self) -> int:
        return len(self._guards)

    @overload
    def __getitem__(self, index: int) -> Pipeline: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pipeline]: ...
    def __getitem__(self, index: int | slice) -> Pipeline | Sequence[Pipeline]:
        return self._guards[index]

    def index_of(self, optimizer: Optimizer) -> int | None:
        """Number of an optimizer; a new one is taken in first. None for what stands in where there is none."""
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return index
        if is_no_optimizer(optimizer):
            return None
        self.follow(optimizer)
        return next(index for index, known in enumerate(self._optimizers) if known is optimizer)

    def follow(self, stepping: Optimizer | None = None) -> None:
        """Look whether the Trainer has other optimizers by now. A fraction of a microsecond where it has not.

        Args:
            stepping: one that is about to step, whether the Trainer knows it or not.
        """
        of_trainer = self._trainer.optimizers
        if stepping is None and len(of_trainer) == len(self._seen) and all(map(operator.is_, of_trainer, self._seen)):
            return
        self._seen = list(of_trainer)
        now = self._to_watch()
        if stepping is not None and not any(stepping is optimizer for optimizer in now):
            now.append(stepping)
        if len(now) == len(self._optimizers) and all(map(operator.is_, now, self._optimizers)):
            return
        known = dict(zip(map(id, self._optimizers), self._guards, strict=True))
        before = self._guards
        self._guards = [known[id(optimizer)] if id(optimizer) in known else self._make(optimizer) for optimizer in now]
        gone = [guard for guard in before if guard not in self._guards]
        for place, guard in zip(before, self._guards, strict=False):
            if place in gone and guard not in before:
                # Counts and baselines go on; what the last step did to other parameters says nothing.
                guard.load_state_dict({**place.state_dict(), "updates": {"ratios": None}})
                guard.alerts.extend(place.alerts)
                self._stopped_by = self._stopped_by or place.stopped_by
                gone.remove(place)
            if guard is not place:
                place.detach()
        self._retired.extend(gone)
        self._optimizers = now

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings of all, oldest first."""
        return sorted((alert for guard in self._all for alert in guard.alerts), key=lambda alert: alert.step)

    @property
    def stopped_by(self) -> Alert | None:
        """What ended the training; None if nothing did."""
        return next((guard.stopped_by for guard in self._all if guard.stopped_by is not None), self._stopped_by)

    @property
    def totals(self) -> list[Totals]:
        """Counts of each optimizer; those that have been taken away come last."""
        return [guard.totals for guard in self._all]

    @property
    def num_steps(self) -> int:
        """Decisions so far, those included of which the host has yet to learn."""
        if len(self._guards) == 1 and not self._retired:  # asked for several times a step
            return self._guards[0].num_steps
        return sum([guard.num_steps for guard in self._all])

    def flush(self) -> None:
        """Learn of the last steps.

        Raises:
            GradientError: where the action of one is "raise".
        """
        for guard in self._all:
            guard.flush()

    def close(self) -> None:
        """Let the sinks write out what they hold."""
        for guard in self._guards:
            guard.close()

    def detach(self) -> None:
        """Leave no trace on the optimizers."""
        for guard in self._all:
            guard.detach()

    @property
    def _all(self) -> list[Pipeline]:
        return [*self._guards, *self._retired] if self._retired else self._guards

    def _to_watch(self) -> list[Optimizer]:
        # What stands in where `configure_optimizers` returns None never steps.
        return [optimizer for optimizer in self._trainer.optimizers if not is_no_optimizer(optimizer)]

    def _make(self, optimizer: Optimizer) -> Pipeline:
        return Pipeline(self._settings.fresh(), self._watch(optimizer), self._environment)
