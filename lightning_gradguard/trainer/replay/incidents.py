"""All that looks into the bad steps of a fit: what a replay needs, who is to blame, and the file of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.alert import Culprit
from lightning_gradguard.detectors import NonFinite, Vanishing
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.policy import Action
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.guards import Guards
from lightning_gradguard.trainer.options import Options
from lightning_gradguard.trainer.packages import rank_zero_info
from lightning_gradguard.trainer.progress import fetches_batches
from lightning_gradguard.trainer.raised import RaisedSteps
from lightning_gradguard.trainer.replay.bundles import Bundles
from lightning_gradguard.trainer.replay.exceptions import Causes, ExceptionCause, SeenDamage
from lightning_gradguard.trainer.replay.investigation import Investigation
from lightning_gradguard.trainer.replay.replay import Replay
from lightning_gradguard.trainer.replay.time_probe import TimeProbe
from lightning_gradguard.trainer.replay.window import Window
from lightning_gradguard.trainer.running_step import RunningStep
from lightning_gradguard.trainer.strategies.base import Engine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Incidents:
    """Keeps what a replay needs, and replays bad steps, as far as settings and engine allow.

    Args:
        trainer: the Trainer.
        module: the one that is trained.
        buffers: their values from before the step.
        settings: of the guards.
        options: of the fit.
        engine: that trains.
        num_replays: steps that earlier parts of the run have looked into.

    Attributes:
        investigation: says who is to blame; None where nothing is replayed.
        bundles: writes bad steps down; None where they aren't.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        buffers: Buffers,
        settings: Settings,
        options: Options,
        *,
        engine: Engine,
        num_replays: int,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._options = options
        self._window = Window()
        self._looks_for_damage = any(isinstance(detector, NonFinite) for detector in settings.detectors)
        self._knows_batches = not fetches_batches(module)
        self.investigation: Investigation | None = None
        self.bundles: Bundles | None = None
        self._time_probe: TimeProbe | None = None
        self._buffers = buffers
        self._engine = engine
        if not options.max_replays:
            return
        if engine.no_replay is not None:
            rank_zero_info(
                f"GradGuard names no culprits under {type(trainer.strategy).__name__} and writes no bundles: "
                f"{engine.no_replay}, so that a bad step can't be replayed."
            )
            return
        left = options.max_replays - num_replays
        found = Investigation(trainer, module, self._window, buffers, left, sample_dim=options.sample_dim)
        self.investigation = found
        vanishing = next((detector for detector in settings.detectors if isinstance(detector, Vanishing)), None)
        if vanishing is not None:
            self._time_probe = found.time_probe(min(vanishing.policy.action, Action.WARN))
        if options.max_bundle_mib is not None and self._knows_batches:
            self.bundles = Bundles(
                trainer, module, self._window, found.diagnosis, max_mib=options.max_bundle_mib, guard=settings.in_words()
            )

    @property
    def num_replays(self) -> int:
        """Steps that have been looked into in this fit."""
        return 0 if self.investigation is None else self.investigation.num_done

    def open(self, batch: Any, batch_idx: int) -> None:
        """A micro-batch begins: keep what a replay of it needs."""
        if self._options.max_replays:
            self._window.open(batch, batch_idx)

    def look_back(self, optimizer: Optimizer, guard: Pipeline) -> None:
        """After a step: note what a later replay needs."""
        is_pending = guard.is_pending
        if self.investigation is not None:
            if isinstance(optimizer, torch.optim.LBFGS):
                self._window.reopen()
            self.investigation.note(optimizer, guard.outcome, is_pending=is_pending)
        if self._time_probe is not None and (alert := self._time_probe.look(optimizer, guard.outcome)) is not None:
            guard.notify(alert)
        self._window.note_step(optimizer, guard.num_steps - 1, is_pending=is_pending)

    def close(self) -> None:
        """A batch is done: let go of what no step needs any more."""
        self._window.close(self._trainer.optimizers)

    def clear(self) -> None:
        """Let go of all batches."""
        self._window.clear()
        if self.investigation is not None:
            self.investigation.clear()

    def follow_exceptions(
        self, guards: Guards, running: RunningStep, step: Callable[[Optimizer], None]
    ) -> RaisedSteps | None:
        """Have batches followed that end in an exception; None where nobody can or wants to know whether NaN or Inf is why.

        Args:
            guards: of the optimizers.
            running: where the Trainer is.
            step: decides about an optimizer's step.
        """
        if not self._options.max_replays or not self._looks_for_damage:
            return None
        # An engine of its own would wait for the gradients of a batch that is passed over.
        passes_over = None if self._engine.no_replay else self._options.skip_exceptions
        return RaisedSteps(
            self._trainer,
            self._module,
            guards,
            self._causes(),
            passes_over,
            running=running,
            step=step,
            set_culprit=self._set_culprit,
        )

    def _set_culprit(self, culprit: Culprit) -> None:
        if self.investigation is not None:
            self.investigation.set_culprit(culprit)

    def _causes(self) -> Causes:
        """What finds out whether NaN or Inf is the reason of an exception."""
        sample_dim = self._options.sample_dim
        is_alone = self._trainer.world_size == 1
        can_run = (is_alone and self._engine.no_replay is None) or self._engine.has_whole_weights
        if not can_run or not self._knows_batches:
            return SeenDamage(self._module, self._window, sample_dim)
        replay = Replay(self._trainer, self._module, self._window, self._buffers)
        return ExceptionCause(self._trainer, self._module, self._window, replay, sample_dim=sample_dim, is_alone=is_alone)
