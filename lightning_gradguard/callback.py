"""GradGuard: Lightning's hooks, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.alert import Alert
from lightning_gradguard.clippers import Clipper
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.errors import GradientError
from lightning_gradguard.measure.logged import HistogramsOf
from lightning_gradguard.policy import Action, ActionName
from lightning_gradguard.record import Record
from lightning_gradguard.recovery import Rollback
from lightning_gradguard.saved_state import mended_alerts
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import Sink
from lightning_gradguard.sinks.tags import LoggedNorms
from lightning_gradguard.trainer.callback_order import callbacks_of, move_behind, remove
from lightning_gradguard.trainer.conflicts import refuse_clipping, refuse_second_guards
from lightning_gradguard.trainer.fit import Fit
from lightning_gradguard.trainer.history import History
from lightning_gradguard.trainer.options import Options, rollback_detectors_among
from lightning_gradguard.trainer.packages import Callback
from lightning_gradguard.trainer.recovery.snapshot_storage import random_states_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_ALERTS_KEY = "gradguard_alerts"
_MAX_SAVED_ALERTS = 100


class GradGuard(Callback):
    """Inspects every backward pass: measures, logs, clips, and keeps bad updates from being applied.

    Args:
        clip: largest global norm, or a clipper, or a mapping of patterns of names to either (`Grouped`); None: no clipping.
        nonfinite: what to do about NaN and Inf: an action's name, a configured detector, or None for off.
        explosion: the same for gradients that are finite but far too large.
        vanishing: the same for gradients that no longer reach a part of the model.
        overflow: the same for a GradScaler that does not find its scale (fp16 only).
        detectors: your own, beside these.
        include: patterns of names (fnmatch); only parameters that match one are measured, judged, clipped and logged. None:
            all. NaN and infinity are looked for in the others, too, and a skipped step is skipped for all.
        exclude: patterns of names; parameters that match one are left out in the same way.
        every_backward: look at each micro-batch and its loss too, not only at each step.
        log_every_n_steps: how often scalars are logged, >= 0; None: as often as the Trainer does.
        log_norms: of what norms are logged as scalars: "totals": of the whole model; "groups": of groups of modules, too;
            "all": of each parameter as well. The GradGuard tab has those of all parameters in any case.
        log_norm_types: what norms are logged beside the 2-norm: 1 and infinity, which is the largest magnitude.
        histogram_every_n_steps: how often histograms are logged, >= 1; None: never.
        histograms_of: "raw": of gradients before clipping; "clipped": after it, so that steps which are skipped have none.
        max_replays: how many bad steps of a run are replayed, >= 0; 0: none: to name operator, line and samples of damage,
            and why gradients vanish or explode. Keeps one more batch alive.
        max_bundle_mib: size, > 0, of the file that a bad step is written to, to be replayed anywhere; what does not fit
            is left out: optimizer state first, then weights. At most three in a folder. None: no files. It needs
            `max_replays`.
        sample_dim: the dimension of batches that samples lie along, >= 0, to name the bad ones; or that of each leaf by its
            name, as in `{"batch['x']": 1, "batch['y']": 0}`, where leaves that are left out hold no samples; None: inferred.
        skip_exceptions: which batches are passed over that end in an exception because of NaN or Inf, where the action about
            these skips: "torch": where torch raises it, as `torch.distributions` does for its parameters; "all": whoever
            raises it; None: none. Any other exception passes on as it is. It needs `max_replays`.
        sinks: where records go beside the built-in ones: objects with `write(record)` and `close()`, or functions of
            a record. They live on the first rank.
        rollback: when states are kept and how training goes back to one, for the action "rollback"; None: the defaults where
            a detector has that action, else nothing.
        quarantine: "list" writes batches that caused a skip or a rollback into `<log_dir>/gradguard/quarantine.jsonl`, with
            their samples where the sampler shows them; "skip" lists the samples that made the damage where they are certain,
            else all of the batch, and keeps them out of later batches, in this run and when it is resumed; None: neither.

    Raises:
        ValueError: if an argument is wrong; when training starts, if a pattern of names matches nothing.
        ConflictError: in `setup`, if Trainer and guard exclude each other.
        GradientError: from the Trainer's `fit`, where an action is "raise".

    >>> guard = GradGuard(clip=1.0, explosion="stop")
    >>> guard.num_steps, guard.alerts, guard.stopped_by
    (0, [], None)
    """

    def __init__(
        self,
        *,
        clip: float | Clipper | Mapping[str, float | Clipper | None] | None = None,
        nonfinite: ActionName | Action | NonFinite | None = "skip",
        explosion: ActionName | Action | Explosion | None = "warn",
        vanishing: ActionName | Action | Vanishing | None = "warn",
        overflow: ActionName | Action | Overflow | None = "warn",
        detectors: Sequence[Detector] = (),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        every_backward: bool = True,
        log_every_n_steps: int | None = None,
        log_norms: LoggedNorms = "groups",
        log_norm_types: Sequence[float] = (),
        histogram_every_n_steps: int | None = 100,
        histograms_of: HistogramsOf = "raw",
        max_replays: int = 3,
        max_bundle_mib: float | None = 64.0,
        sample_dim: int | Mapping[str, int | None] | None = None,
        skip_exceptions: Literal["torch", "all"] | None = "torch",
        sinks: Sequence[Sink | Callable[[Record], object]] = (),
        rollback: Rollback | None = None,
        quarantine: Literal["list", "skip"] | None = None,
    ) -> None:
        self._settings = Settings.of(
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
        self._options = Options(
            every_backward=every_backward,
            log_every_n_steps=log_every_n_steps,
            log_norms=log_norms,
            max_replays=max_replays,
            max_bundle_mib=max_bundle_mib,
            sample_dim=sample_dim,
            skip_exceptions=skip_exceptions,
            rollback=rollback,
            quarantine=quarantine,
            rollback_detectors=rollback_detectors_among(self._settings.detectors),
        )
        self._history = History()
        self._fit: Fit | None = None
        self._is_attached = False
        self.gives_way = False
        """Whether it leaves where the Trainer has another guard."""

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings of all optimizers, oldest first."""
        return self._current.alerts

    @property
    def stopped_by(self) -> Alert | None:
        """What ended the training; None if nothing did."""
        return self._current.stopped_by

    @property
    def last(self) -> Record | None:
        """The last step."""
        return self._current.last

    @property
    def num_steps(self) -> int:
        """Decisions so far, skipped steps included; one for each step of each optimizer."""
        return sum(totals.num_steps for totals in self._current.totals)

    @property
    def num_skipped(self) -> int:
        """Steps passed over so far."""
        return sum(totals.num_skipped for totals in self._current.totals)

    @property
    def num_clipped(self) -> int:
        """Steps so far whose gradients were made smaller."""
        return sum(totals.num_clipped for totals in self._current.totals)

    @property
    def state_key(self) -> str:
        """Key of the guard's state in a checkpoint."""
        # The Trainer's constructor refuses two callbacks of one key, with a message about checkpoints. Until `setup` has had
        # a chance to say it better, each guard has a key of its own.
        return "GradGuard" if self._is_attached else f"GradGuard-{id(self)}"

    # From here on in the order in which Lightning calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't go together, before anything is trained."""
        others = [other for other in callbacks_of(trainer) if isinstance(other, GradGuard) and other is not self]
        if self.gives_way and others:
            remove(trainer, self)
            self._is_attached = False  # a list of callbacks may hold it still, beside a later guard
            return
        refuse_second_guards(self, [other for other in others if not other.gives_way])
        self._is_attached = True
        if stage != "fit":
            return
        self._end()  # an earlier fit that was left without a word
        refuse_clipping(trainer, pl_module, self._settings)
        move_behind(trainer, self)
        # A second fit of the same Trainer and module goes on; what `test` or `validate` read is not for this fit.
        goes_on = trainer.global_step > 0 and self._history.belongs_to(pl_module)
        self._fit = Fit(trainer, pl_module, self._settings, self._options, self._history if goes_on else History())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until there are guards to take it."""
        before = self._history
        self._history = History.from_state(state_dict)
        self._history.random, self._history.alerts = before.random, before.alerts
        if self._fit is not None:
            self._fit.restore(self._history)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of a snapshot, and the alerts, until training starts."""
        if self._fit is None or not self._fit.has_started:
            self._history.random = random_states_in(checkpoint)
            self._history.alerts = mended_alerts(checkpoint.get(_ALERTS_KEY))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the last alerts, for `alerts` after a resume; nothing is decided by them, so they are not in the state."""
        checkpoint[_ALERTS_KEY] = [alert.to_dict() for alert in self.alerts[-_MAX_SAVED_ALERTS:]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a guard for each optimizer, and all else that training needs."""
        if self._fit is not None:
            self._fit.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note where we are."""
        if self._fit is not None:
            self._fit.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss; from the second micro-batch on, measure what the ones before have left."""
        if self._fit is not None:
            self._fit.before_backward(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The step: measure, judge, decide, clip or skip, record."""
        if self._fit is not None:
            self._fit.step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back where that was decided, keep a snapshot where due, let go of batches."""
        if self._fit is not None:
            self._fit.end_batch()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as one that ran through."""
        history = self._history if self._fit is None else self._fit.history()
        return history.to_state(
            with_rollbacks=self._options.snapshots is not None, with_quarantine=self._options.quarantine is not None
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last step, and say what the run came to."""
        if self._fit is not None:
            self._fit.flush()
            self._fit.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it also where the run ends by an error or an interrupt; no other hook follows."""
        if self._fit is not None:
            self._fit.explain(exception)
            with suppress(GradientError):  # there is an error already
                self._fit.flush()
            self._fit.finish()
        self._end(in_exception=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the Trainer."""
        if stage == "fit":
            self._end()

    def _end(self, *, in_exception: bool = False) -> None:
        """Take the fit down, and keep what is asked for later."""
        fit, self._fit = self._fit, None
        if fit is not None:
            self._history = fit.history()
            fit.take_down(in_exception=in_exception)

    @property
    def _current(self) -> Fit | History:
        return self._history if self._fit is None else self._fit

    def __getstate__(self) -> dict[str, Any]:
        # A copy takes no part in the fit. Lightning has set `log` and `log_dict`, which hold the whole module.
        history = self._history if self._fit is None else self._fit.history()
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return kept | {"_fit": None, "_history": history}
