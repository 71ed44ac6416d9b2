"""The pipeline in a loop of one's own, without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.alert import Alert
from lightning_gradguard.clippers import Clipper
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.environment import Environment
from lightning_gradguard.forensics.nonfinite.raised import is_lost_gpu, is_no_failure
from lightning_gradguard.forensics.nonfinite.seen import seen_around
from lightning_gradguard.forensics.raw_loop import HOW, RawLoop
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.logged import HistogramsOf
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import forgotten_step
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.policy import Action, ActionName
from lightning_gradguard.record import Position, Record, Totals
from lightning_gradguard.report.raised import CANT_REPLAY, Raised, add_note, in_words
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import ConsoleSink, Sink


class Guard:
    """Watches the gradients of one optimizer: measures, judges, decides, clips or skips, and records.

    Call `step()` between `backward()` and `optimizer.step()`. Where several backward passes make one step, or to have
    the loss looked at too, call `before_backward(loss)` before each of them.

    Args:
        named_parameters: the model's parameters, as `model.named_parameters()` gives them.
        optimizer: whose parameters are watched; None: all of `named_parameters`.
        clip: largest norm, or a clipper, or a mapping of patterns of names to either (`Grouped`); None: no clipping.
        nonfinite, explosion, vanishing, overflow: an action's name, a configured detector, or None for off.
        detectors: your own, beside these.
        include: patterns of names (fnmatch); only parameters that match one are measured, judged, clipped and logged. None:
            all. NaN and infinity are looked for in the others, too, and a skipped step is skipped for all.
        exclude: patterns of names; parameters that match one are left out in the same way.
        log_every_n_steps: how often scalars are due, >= 0; 0: never, but on steps with an alert.
        log_norm_types: what norms are measured at those steps beside the 2-norm: 1 and infinity.
        histogram_every_n_steps: how often histograms are, >= 1; None: never.
        histograms_of: whether they are of gradients before clipping ("raw") or after it ("clipped"); steps that are skipped
            then have none.
        sinks: where records go: objects with `write(record)` and `close()`, or functions of a record. Alerts are
            warned of whatever they are.
        named_buffers: the model's buffers, as `model.named_buffers()` gives them: a skipped step puts their values back, as
            they were when the last step was applied.
        scaler: what scales the loss in fp16 training. The guard unscales the gradients by it before it looks at them (give
            `optimizer` too), and leaves the calibration of its scale alone.
        replay: a function that runs the step again and returns the loss, as `lambda: loss_of(model(x), y)`, or runs
            `backward()` too and returns None. It is called at up to three steps with NaN or Inf, to name the culprit; module
            and batch are found among the variables that it uses. It must not step the optimizer.

    In distributed training every rank needs a guard and has to call it at the same points: ranks decide together, over
    torch's default process group.

    Raises:
        ValueError: if an argument is wrong.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> guard = Guard(model.named_parameters(), optimizer=optimizer, clip=1.0)
    >>> model(torch.ones(4, 2)).sum().backward()
    >>> record = guard.step()
    >>> round(record.measurement.global_norm, 3), round(record.clipped_norm, 3)
    (6.928, 1.0)
    >>> optimizer.step()
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        clip: float | Clipper | Mapping[str, float | Clipper | None] | None = None,
        nonfinite: ActionName | Action | NonFinite | None = "skip",
        explosion: ActionName | Action | Explosion | None = "warn",
        vanishing: ActionName | Action | Vanishing | None = "warn",
        overflow: ActionName | Action | Overflow | None = "warn",
        detectors: Sequence[Detector] = (),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int = 50,
        log_norm_types: Sequence[float] = (),
        histogram_every_n_steps: int | None = 100,
        histograms_of: HistogramsOf = "raw",
        sinks: Sequence[Sink | Callable[[Record], object]] = (),
        named_buffers: Iterable[tuple[str, Tensor]] = (),
        scaler: GradScaler | None = None,
        replay: Callable[[], Tensor | None] | None = None,
    ) -> None:
        settings = Settings.of(
            clip=clip,
            nonfinite=nonfinite,
            explosion=explosion,
            vanishing=vanishing,
            overflow=overflow,
            detectors=detectors,
            include=include,
            exclude=exclude,
            sinks=sinks,
            histogram_every_n_steps=histogram_every_n_steps,
            histograms_of=histograms_of,
            log_norm_types=log_norm_types,
        )
        settings.refuse_rollback()
        settings = replace(settings.fresh(), sinks=(*settings.sinks, ConsoleSink()))
        parameters = WatchedParameters(named_parameters, optimizer, settings.only)
        raw_loop = (
            None if replay is None else RawLoop(replay, [it for it in parameters.tensors if isinstance(it, Tensor)], scaler)
        )
        environment = Environment(
            log_every_n_steps,
            Buffers(named_buffers),
            scaler,
            listener=None if raw_loop is None else raw_loop.note,
            investigate=raw_loop,
            hint=HOW if raw_loop is None else "",
        )
        self._raw_loop = raw_loop
        self._scaler = scaler
        self._parameters = parameters
        self._pipeline = Pipeline(settings, parameters, environment)

    @property
    def totals(self) -> Totals:
        """Counts so far."""
        return self._pipeline.totals

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings, oldest first."""
        return self._pipeline.alerts

    @property
    def last(self) -> Record | None:
        """The last step."""
        return self._pipeline.last

    @property
    def stopped_by(self) -> Alert | None:
        """What asked for the end of training; None: nothing has."""
        return self._pipeline.stopped_by

    @property
    def num_steps(self) -> int:
        """Steps so far, one included whose outcome the host has yet to learn."""
        return self._pipeline.num_steps

    @property
    def is_pending(self) -> bool:
        """Whether the host has yet to learn of the last step."""
        return self._pipeline.is_pending

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Note a backward pass that is about to begin.

        From the second one before a step on, the gradients accumulated so far are measured as well, so that an alert
        can name the pass that did the damage. No sync, rank-local.

        Args:
            loss: what `backward()` is called on, scalar; with a `scaler`, scaled by it.
        """
        self._pipeline.before_backward(loss)

    @contextmanager
    def watch_step(self, skip_exceptions: Literal["torch", "all"] | None = "torch") -> Iterator[None]:
        """Around forward pass, backward pass and step: for exceptions that NaN or Inf is the reason of.

        A context, or with `@guard.watch_step()` a decorator of a function that runs a step. Such an exception is told of as
        a damaged step is. Where the action skips and nothing has been applied yet, it ends here, and the step counts as a
        skipped one; otherwise it passes on with a note of the alert. Every other exception passes on untouched.

        Without `replay`, and where several ranks train together, nothing is run again: an exception that speaks of NaN or
        Inf passes on, with an alert of what is seen to hold some. Ranks don't tell each other of it.

        Args:
            skip_exceptions: which ones may end here: "torch": those that torch raises; "all"; None: none.
        """
        num_steps, versions = self.num_steps, self._versions()
        try:
            yield
        except Exception as error:
            is_unchanged = num_steps == self.num_steps and versions == self._versions()
            if not self._ends_here(error, skip_exceptions if is_unchanged else None):
                raise

    def step(self, position: Position | None = None) -> Record:
        """Inspect the gradients, then clip them, or keep the optimizer from applying them.

        In place. At most one collective; more on an incident with sharded gradients. On a CPU everything is immediate. On
        CUDA with a fused optimizer the device skips and clips by itself, without a sync; the host learns of it at the next
        step, or at `flush()`. On CUDA with another one the host waits once, after everything has been queued.

        Args:
            position: where in the training this is; None counts from 0.

        Returns:
            The record of this step; where the host has yet to learn of it, that of the last one it knows.

        Raises:
            GradientError: where the action is "raise"; the step is not applied.
        """
        self._pipeline.decide(position)
        self._pipeline.leave()
        self._pipeline.hand_over_taken()  # nobody asks for them here
        record = self._pipeline.last
        assert record is not None
        return record

    def _versions(self) -> int:
        """How often the weights have been changed in place."""
        return sum([parameter._version for parameter in self._parameters.everything if isinstance(parameter, Tensor)])

    def _ends_here(self, error: Exception, skip_exceptions: str | None) -> bool:
        """Tell of an exception if damage is its reason; True if its step is skipped."""
        if is_no_failure(error):
            return False
        if is_lost_gpu(error):
            add_note(error, CANT_REPLAY)
            return False
        culprit, is_in_torch, seen = None, False, ""
        if self._raw_loop is None or Ranks.current().size > 1:
            seen = self._seen_around(error)
        elif (cause := self._raw_loop.cause_of(error)) is not None:
            culprit, is_in_torch = cause
        if culprit is None and not seen:
            return False
        raised = Raised(in_words(error, seen=seen), culprit=culprit)
        may_end = culprit is not None and (skip_exceptions == "all" or (skip_exceptions == "torch" and is_in_torch))
        if may_end and self._pipeline.skips_damage:
            self._pipeline.note_exception(raised)
            with forgotten_step(self._scaler, self._parameters.optimizer):
                self.step()
            return True
        position = Position(step=self.num_steps, log_step=self.num_steps)
        if (alert := self._pipeline.report_exception(position, raised)) is not None:
            add_note(error, alert.message)
        return False

    def _seen_around(self, error: Exception) -> str:
        """What holds NaN or Inf, where the step is not run again; see `seen_around`."""
        names, tensors = self._parameters.layout.names, self._parameters.tensors
        named = [(name, it) for name, it in zip(names, tensors, strict=True) if isinstance(it, Tensor)]
        return seen_around(error, None if self._raw_loop is None else self._raw_loop.batch(), named)

    def flush(self) -> None:
        """Wait for a step that the device has decided by itself, and record it.

        Raises:
            GradientError: where its action is "raise".
        """
        self._pipeline.flush()

    def close(self) -> None:
        """Let the sinks write out what they hold. The guard can be used on."""
        self._pipeline.close()

    def detach(self) -> None:
        """Take all hooks off the optimizer, which ends the guard."""
        self._pipeline.detach()

    def notify(self, alert: Alert) -> None:
        """Report something that is no finding about gradients; before the first step it waits for that."""
        self._pipeline.notify(alert)

    def state_dict(self) -> dict[str, Any]:
        """Baselines, streaks and counts in plain types, so that a resumed run decides as one that ran through."""
        return self._pipeline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what is damaged, or configured otherwise by now, starts afresh, with a warning."""
        self._pipeline.load_state_dict(state)
