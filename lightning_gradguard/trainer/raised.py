"""A batch that ends in an exception: told of where NaN or infinity is the reason, and passed over where that is safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_gradguard.act.gate import is_of_torch
from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.errors import GradientError
from lightning_gradguard.forensics.nonfinite.raised import is_lost_gpu, is_no_failure, warn_of_failed_replay
from lightning_gradguard.forensics.nonfinite.seen import speaks_of_it
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.scaling import forgotten_step
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.report.raised import CANT_REPLAY, Raised, add_note, in_words
from lightning_gradguard.trainer.guards import Guards
from lightning_gradguard.trainer.options import SkipExceptions
from lightning_gradguard.trainer.packages import classes
from lightning_gradguard.trainer.precision import scaler_of
from lightning_gradguard.trainer.rank_messages import RaisedOnRank, RankMessages
from lightning_gradguard.trainer.replay.exceptions import Cause, Causes
from lightning_gradguard.trainer.running_step import RunningStep

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RaisedSteps:
    """Stands in for what runs a batch in the Trainer's loops.

    An exception goes on as it is: with the alert, and a note of it, where damage is its reason. Where the action skips and
    it is safe, it ends here, and the batch counts as a skipped step.

    Args:
        trainer: the Trainer.
        module: the one that is trained.
        guards: of its optimizers.
        cause: finds the reason of an exception.
        passes_over: which exceptions are passed over: "torch": those that torch raises; "all"; None: none.
        running: where the Trainer is.
        step: decides about an optimizer's step.
        set_culprit: told who is to blame for the step.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        guards: Guards,
        cause: Causes,
        passes_over: SkipExceptions,
        *,
        running: RunningStep,
        step: Callable[[Optimizer], None],
        set_culprit: Callable[[Culprit], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._guards = guards
        self._cause = cause
        self._passes_over = passes_over
        self._running = running
        self._step = step
        self._set_culprit = set_culprit
        ranks = Ranks.current()
        self._others = RankMessages(ranks) if ranks.size > 1 else None
        self._num_runs = 0
        loop = trainer.fit_loop.epoch_loop
        self._loops = loop.automatic_optimization, loop.manual_optimization
        self._num_steps = 0
        self._stand_ins = (
            StandIn(loop.automatic_optimization, "run", self._run_automatic),
            StandIn(loop.manual_optimization, "run", self._run_manual),
        )

    def detach(self) -> None:
        """Give the loops their own methods back."""
        for stand_in in self._stand_ins:
            stand_in.remove()
        if self._others is not None:
            self._others.stop()

    def explain(self, error: BaseException) -> None:
        """Tell of the exception of another rank, which has ended the run on this one as well."""
        alert = None if self._others is None else self._others.told()
        if alert is not None:
            self._guards[0].pass_on(alert, replace(self._running.position(0, self._guards), rank=alert.rank))
            add_note(error, alert.message)

    def _run_automatic(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hook, self._num_steps = self._module._current_fx_name, self._guards.num_steps
        self._num_runs += 1
        try:
            return run(*args, **kwargs)
        except Exception as error:
            if not self._ends_here(error, self._can_pass_automatic):
                raise
        self._module._current_fx_name = hook
        return {}

    def _run_manual(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hook, self._num_steps = self._module._current_fx_name, self._guards.num_steps
        versions = self._versions()
        self._num_runs += 1
        try:
            return run(*args, **kwargs)
        except Exception as error:
            # Whoever has stepped has written to weights, whether it told us or not.
            is_unchanged = versions == self._versions()
            if not self._ends_here(error, lambda: is_unchanged and self._guards.num_steps == self._num_steps):
                raise
        self._module._current_fx_name = hook
        flags: dict[Any, bool] = {**self._module._param_requires_grad_state}  # annotated for names, but keyed by parameters
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        self._module._param_requires_grad_state = {}
        self._loops[1].on_run_end()
        return {}

    def _versions(self) -> int:
        return sum([parameter._version for parameter in self._module.parameters()])

    def _ends_here(self, error: Exception, can_pass: Callable[[], bool]) -> bool:
        """Tell of an exception if damage is its reason; True if the batch is passed over."""
        if not len(self._guards) or _is_none_of_ours(error):
            return False
        if is_lost_gpu(error):
            add_note(error, CANT_REPLAY)
            return False
        if (told := self._told_of_batch()) is not None and speaks_of_it(error):
            add_note(error, told.message)
            return False
        may_pass = can_pass() and not self._is_between_ranks
        if self._others is None:
            own = self._look(error, may_pass)
            return own is not None and self._act(error, own, [own])
        self._others.tell_raised(self._num_runs)
        own = self._look(error, may_pass)
        together = self._others.exchange(self._num_runs, own)
        return own is not None and self._act(error, own, together)

    def _told_of_batch(self) -> Alert | None:
        """What has been said of a step that the batch has made before it ended in an exception; alike on all ranks."""
        if self._guards.num_steps == self._num_steps or not self._guards.alerts:
            return None
        alert = self._guards.alerts[-1]
        return alert if alert.kind == "nonfinite" and alert.step >= self._num_steps else None

    def _look(self, error: Exception, can_pass: bool) -> RaisedOnRank | None:  # noqa: FBT001
        """What was raised here; None if damage is not the reason."""
        cause = self._reason_of(error)
        if cause is None:
            return None
        raised = Raised(in_words(error, seen=cause.seen), self._running.end_in_exception(), cause.culprit)
        may_pass = self._passes_over == "all" or (self._passes_over == "torch" and cause.is_in_torch)
        can_pass = can_pass and may_pass and not cause.seen and self._guards[0].skips_damage
        return RaisedOnRank(self._trainer.global_rank, raised, can_pass)

    def _act(self, error: Exception, own: RaisedOnRank, together: list[RaisedOnRank] | None) -> bool:
        """Pass over the batch, or tell of the exception.

        Args:
            error: the exception.
            own: what is known of it.
            together: the same of all ranks; None if it was not raised by all of them because of damage.
        """
        guard = self._guards[0]
        first = own if together is None else together[0]
        if together is not None and all(each.can_pass for each in together):
            return self._pass_over(error, guard, first.raised)
        alert = self._told(guard, own, together)
        if alert is not None:
            add_note(error, alert.message)
            if together is None and self._others is not None:
                self._others.tell_end(alert)
        return False

    def _told(self, guard: Pipeline, own: RaisedOnRank, together: list[RaisedOnRank] | None) -> Alert | None:
        """Tell of the first rank's exception. No collective: what a backward pass has begun may still be under way."""
        first = own if together is None else together[0]
        position = replace(self._running.position(0, self._guards), rank=first.rank)
        if together is None or self._others is None:
            return guard.report_exception(position, first.raised, is_alone=True)
        if first.rank == own.rank:
            alert = guard.report_exception(position, first.raised, is_alone=True)
            self._others.share(self._num_runs, alert)
            return alert
        alert = self._others.shared(self._num_runs)
        if alert is not None:
            guard.pass_on(alert, position)
        return alert

    def _reason_of(self, error: Exception) -> Cause | None:
        try:
            return self._cause.of(error, self._trainer.optimizers[0])
        except Exception as failure:  # noqa: BLE001 - the exception that was there first matters more
            warn_of_failed_replay(error, failure)
            return None

    def _can_pass_automatic(self) -> bool:
        """Whether nothing of the step has been applied yet, and nothing will be if it is left here."""
        return self._guards.num_steps == self._num_steps and (self._accumulates or is_of_torch(self._trainer.optimizers[0]))

    @property
    def _is_between_ranks(self) -> bool:
        """Whether DDP is half way through a backward pass: it has noted some gradients, and waits for the others.

        As long as no parameter has a gradient it has noted none. A static graph is counted from the first forward pass.
        """
        model = self._trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            return False
        if model.static_graph:
            return True
        has_some = any(parameter.grad is not None for parameter in self._module.parameters())
        return self._running.has_backward and not self._accumulates and has_some

    @property
    def _accumulates(self) -> bool:
        """Whether the running batch is not the last one of its step."""
        return self._module.automatic_optimization and self._trainer.fit_loop._should_accumulate()

    def _pass_over(self, error: Exception, guard: Pipeline, raised: Raised) -> bool:
        guard.note_exception(raised)
        if raised.culprit is not None:
            self._set_culprit(raised.culprit)
        if self._accumulates:
            return True
        optimizer = self._trainer.optimizers[0]
        scaler = scaler_of(self._trainer)
        if scaler is not None and scaler._scale is None:
            scaler.scale(torch.zeros((), device=self._module.device))
        with forgotten_step(scaler, optimizer):
            try:
                self._step(optimizer)
            except GradientError as refused:  # the exception that was there first is not replaced
                add_note(error, str(refused))
                return False
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers look for a first step
        progress = self._loops[0].optim_progress.optimizer.step
        if self._module.automatic_optimization and progress.total.ready > progress.total.completed:
            progress.increment_completed()
        return True


def _is_none_of_ours(error: Exception) -> bool:
    """Whether it is no failure of a computation, or an error of settings."""
    lightnings = ("utilities.exceptions.MisconfigurationException", "utilities.exceptions._TunerExitException")
    return is_no_failure(error) or any(isinstance(error, classes(name)) for name in lightnings)
