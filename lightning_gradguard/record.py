"""What travels down the pipeline: plain values, no tensors, nothing that can be changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lightning_gradguard.alert import Alert, ParameterReport
from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.policy import Action


@dataclass(frozen=True)
class Position:
    """Where in the training a step stands.

    Attributes:
        step: number of the decision, from 0; skipped steps count, every optimizer counts.
        epoch: epoch, from 0; None outside a Trainer.
        batch_idx: batch in the epoch, from 0; None outside a Trainer.
        batches: the same for each backward pass of the step, where several batches make one; empty if not known.
        optimizer: index of the optimizer.
        num_optimizers: how many there are.
        rank: this process.
        log_step: x value in the loggers.
    """

    step: int
    epoch: int | None = None
    batch_idx: int | None = None
    batches: tuple[int, ...] = ()
    optimizer: int = 0
    num_optimizers: int = 1
    rank: int = 0
    log_step: int = 0

    def batch_of(self, micro_batch: int) -> int | None:
        """The batch that a backward pass saw."""
        return self.batches[micro_batch] if micro_batch < len(self.batches) else self.batch_idx


@dataclass(frozen=True)
class Damage:
    """Where a step first went wrong.

    Attributes:
        micro_batch: the backward pass, from 0.
        rank: the process; None if the gradients were already summed over all of them when it showed.
        loss: the loss that was NaN or infinite; None if the losses were in order.
    """

    micro_batch: int
    rank: int | None = None
    loss: float | None = None


@dataclass(frozen=True, eq=False)
class Measurement:
    """The gradients of one optimizer at one step, before clipping.

    Attributes:
        layout: names and sizes of the parameters.
        norms: 2-norm of each parameter's gradient, float64 [num_parameters]; 0 where there is none.
        has_grad: which parameters have a gradient, bool [num_parameters].
        global_norm: 2-norm over all gradients; NaN or infinite exactly when an element is, if `is_counted`.
        num_micro_batches: backward passes that built these gradients, as far as they were told of.
        loss: loss of the last of them, unscaled, mean over ranks; None if unknown.
        damage: where NaN or infinity first showed in a loss or gradient; None if nowhere.
        loss_scale: by how much a GradScaler scales the loss at this step; None without one.
        nonfinite: the parameters with NaN or infinite elements, worst first.
        is_counted: whether the elements of these were looked at. If not, their norms alone are known, and what has an
            infinite one may be finite: float32 can't hold the squares of what is above 1.8e19.
        overflowed: whether the gradients are finite, but too large for float32 to square (float64 gave the norm then).
        max_abs: largest finite magnitude of an element; measured on an incident only, None otherwise.
        update_ratios: by which part of its size the step before has moved each matrix or kernel, NaN for vectors,
            [num_parameters]; None unless a detector has asked for it, see `UpdateRatio`.
        learning_rate: the largest of the optimizer's groups; None at steps that are not logged, and where it is not known.
        weight_norm: 2-norm of all weights before this step; None at steps that are not logged, and where they are sharded.
        update_ratio: norm of their last change over that, from a sample; None as there, and after a skip or a resume.
        other_norms: by type, 1 or infinity, that norm of each parameter, at steps that are logged; see `log_norm_types`.
    """

    layout: Layout
    norms: Floats
    has_grad: Bools
    global_norm: float
    num_micro_batches: int = 1
    loss: float | None = None
    damage: Damage | None = None
    loss_scale: float | None = None
    nonfinite: tuple[ParameterReport, ...] = ()
    overflowed: bool = False
    max_abs: float | None = None
    update_ratios: Floats | None = None
    learning_rate: float | None = None
    weight_norm: float | None = None
    update_ratio: float | None = None
    is_counted: bool = True
    other_norms: Mapping[float, Floats] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all watched parameters, in model order."""
        return self.layout.names

    @property
    def is_finite(self) -> bool:
        """Whether neither a gradient nor a loss holds NaN or infinity."""
        return math.isfinite(self.global_norm) and self.damage is None

    @property
    def is_scaler_overflow(self) -> bool:
        """Whether a GradScaler's scale was too large for this step: damaged gradients from a healthy loss.

        The scaler skips such a step by itself and lowers its scale; it is how the scale is found.
        """
        in_loss = self.damage is not None and self.damage.loss is not None
        return self.loss_scale is not None and not math.isfinite(self.global_norm) and not in_loss

    @property
    def last_micro_batch(self) -> int:
        """Index of the last backward pass."""
        return max(self.num_micro_batches - 1, 0)

    @cached_property
    def by_name(self) -> Mapping[str, float]:
        """Norm of each parameter that has a gradient."""
        return {self.names[index]: float(self.norms[index]) for index in np.flatnonzero(self.has_grad)}

    @cached_property
    def log_norms(self) -> Floats:
        """Natural logarithms of the norms; minus infinity where there is no gradient."""
        with np.errstate(divide="ignore"):
            return np.log(self.norms)

    @cached_property
    def largest_norm(self) -> float:
        """Largest of the norms; 0 without parameters."""
        return float(self.norms.max(initial=0.0))

    def largest(self, count: int = 5) -> tuple[ParameterReport, ...]:
        """The parameters with the largest gradients, largest first."""
        order = np.argsort(-self.norms, kind="stable")[:count]
        return tuple(ParameterReport(self.names[index], float(self.norms[index])) for index in order if self.has_grad[index])


@dataclass(frozen=True)
class Verdict:
    """A detector's finding about one step.

    Attributes:
        kind: the detector's name.
        value: what was found, comparable with `limit`.
        limit: what would have been in order.
        message: one sentence a person can act on, without the step (the alert adds it).
        remedy: what to try.
        parameters: worst offenders first.
        micro_batch: the backward pass that was first, from 0.
        rank: the process that was first; None if that can't be told.
        is_advisory: whether it is worth a warning at most, whatever the detector's action: the step is applied.
        is_note: whether it is only logged, once, whatever the action, and counts as no hit.
        is_dire: whether nothing is learned as long as it lasts: it is told of again, each time after twice as many steps.
    """

    kind: str
    value: float
    limit: float
    message: str
    remedy: str
    parameters: tuple[ParameterReport, ...] = ()
    micro_batch: int = 0
    rank: int | None = None
    is_advisory: bool = False
    is_note: bool = False
    is_dire: bool = False


@dataclass(frozen=True)
class Ended:
    """A condition that is over: a detector's hits, of which none was more than its cooldown after the one before.

    Attributes:
        kind: the detector's name.
        lasted: steps of this optimizer from its first hit to its last, both included.
        num_found: hits among them.
        steps_ago: steps since the last one.
    """

    kind: str
    lasted: int
    num_found: int
    steps_ago: int


@dataclass(frozen=True)
class Decision:
    """What is done about one step.

    Attributes:
        action: the strongest action of this step's verdicts; None if there were none.
        actions: one per verdict, in their order.
        alerting: whether each verdict is reported (or silent, since it lasts or patience holds it back), in their order.
        skip: whether the optimizer step is passed over.
        ended: conditions that are over and are reported.
    """

    action: Action | None = None
    actions: tuple[Action, ...] = ()
    alerting: tuple[bool, ...] = ()
    skip: bool = False
    ended: tuple[Ended, ...] = ()


class Outcome(NamedTuple):
    """What a step came to, in short.

    Attributes:
        position: where it stands.
        measurement: the gradients before clipping.
        skip: whether it was passed over.
        has_finding: whether a detector found something.
    """

    position: Position
    measurement: Measurement
    skip: bool = False
    has_finding: bool = False


@dataclass(frozen=True)
class Totals:
    """Running counts of one optimizer's guard.

    Attributes:
        num_steps: decisions, skipped ones included.
        num_skipped: steps passed over, overflows of a GradScaler included.
        num_overflows: steps at which a GradScaler's scale was too large.
        num_clipped: steps whose gradients were made smaller.
        num_alerts: reported findings.
        num_repeats: findings that were not reported, since they lasted or patience held them back.
        alerts_by_kind: reported findings by kind.
    """

    num_steps: int = 0
    num_skipped: int = 0
    num_overflows: int = 0
    num_clipped: int = 0
    num_alerts: int = 0
    num_repeats: int = 0
    alerts_by_kind: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Histograms:
    """Distribution of log10|g| of every parameter at one step.

    Attributes:
        names: parameters that have a gradient.
        edges: bin edges in decades, float64 [num_bins + 1]; the outermost bins also hold what lies beyond.
        counts: elements in each bin, float64 [num_parameters, num_bins]; estimates where `sampled`.
        num_zero, num_nan, num_inf: elements counted apart, float64 [num_parameters].
        sampled: which rows were estimated from a sample, bool [num_parameters].
        clipped: whether these are the gradients as the optimizer got them, after clipping.
    """

    names: tuple[str, ...]
    edges: Floats
    counts: Floats
    num_zero: Floats
    num_nan: Floats
    num_inf: Floats
    sampled: Bools
    clipped: bool = False


@dataclass(frozen=True, eq=False)
class Record:
    """Everything about one step of one optimizer; what sinks get.

    Attributes:
        position: where it stands.
        measurement: the gradients before clipping.
        verdicts: what the detectors found.
        decision: what was done about it.
        clip_coef: factor in (0, 1] of clipping; 1 for a skipped step. None where Trainer or module clip later, unseen.
        clipped_norm: global norm after clipping; equals the norm before for a skipped step. None as above.
        explosion_limit: the norm above which this step would have been an explosion; infinite without a limit.
        alerts: the reported findings.
        totals: counts up to and with this step.
        scalars_due: whether this is a step that loggers want.
        histograms: distributions, on the steps that want them.
    """

    position: Position
    measurement: Measurement
    verdicts: tuple[Verdict, ...]
    decision: Decision
    clip_coef: float | None
    clipped_norm: float | None
    explosion_limit: float
    alerts: tuple[Alert, ...]
    totals: Totals
    scalars_due: bool = False
    histograms: Histograms | None = None

    @property
    def limit_ratio(self) -> float:
        """The explosion limit over the global norm: how many times as large the step could have been.

        Infinite without a limit and where the norm is 0, NaN where the norm is not finite.
        """
        norm = self.measurement.global_norm
        if not math.isfinite(norm):
            return math.nan
        return self.explosion_limit / norm if norm > 0.0 else math.inf
