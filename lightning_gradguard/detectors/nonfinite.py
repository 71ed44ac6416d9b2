"""NaN and infinity in gradients or loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.policy import Action, ActionName
from lightning_gradguard.record import Damage, Measurement, Verdict


class NonFinite(Detector):
    """Fires when an element of a gradient, or a loss, is NaN or infinite.

    A GradScaler whose scale was too large is no hit: it is `Overflow`'s.

    A gradient that is finite but too large for its norm to be computed in float32 is no hit: it is `Explosion`'s.

    Args:
        action: what happens on a hit.
        patience: consecutive hits before acting, >= 1. Anything above 1 applies damaged updates; think twice.
        cooldown: steps after which the next hit is news. 1, the default, tells of hits in a row as one condition, and of all
            others one by one: each costs a step.
        stop_after: hits in a row at which training stops. After five, the cause is not one bad batch.

    >>> NonFinite("skip").policy.stop_after
    5
    """

    name = "nonfinite"

    def __init__(
        self,
        action: Action | ActionName = "skip",
        *,
        patience: int = 1,
        cooldown: int = 1,
        stop_after: int | None = 5,
    ) -> None:
        super().__init__(action, patience=patience, cooldown=cooldown, stop_after=stop_after)

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if a gradient or a loss is NaN or infinite."""
        if measurement.is_finite or measurement.is_scaler_overflow:
            return None
        damage = measurement.damage or Damage(measurement.last_micro_batch)
        in_gradients = not math.isfinite(measurement.global_norm)
        return Verdict(
            kind=self.name,
            value=measurement.global_norm if in_gradients or damage.loss is None else damage.loss,
            limit=math.inf,
            message=_describe_gradients(measurement) if in_gradients else _describe_loss(damage),
            remedy=(
                "Look at this batch for NaN, Inf or empty samples, and at the forward pass for log, sqrt, division or exp "
                "at the edge of their domain. If it comes back on every batch, lower the learning rate."
            ),
            parameters=measurement.nonfinite,
            micro_batch=damage.micro_batch,
            rank=damage.rank,
        )

    def deferral(self) -> Deferral:
        """For good: it has nothing to say about a finite step."""
        return Deferral(sys.maxsize)

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """There is nothing to learn from them."""


def _describe_gradients(measurement: Measurement) -> str:
    # With several micro-batches the last loss may be a healthy one's.
    is_known = measurement.loss is not None and measurement.num_micro_batches == 1
    loss = f"; the loss is {measurement.loss:g}" if is_known else ""
    if not measurement.is_counted:
        return _describe_norms(measurement) + loss
    worst = measurement.nonfinite[0]
    counts = ((worst.num_nan, "NaN"), (worst.num_inf, "infinite"))
    found = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    others = len(measurement.nonfinite) - 1
    more = f", and {others} more of {int(measurement.has_grad.sum())} gradients are damaged" if others else ""
    noun = "element" if worst.num_nan + worst.num_inf == 1 else "elements"
    return f"the gradient of `{worst.name}` has {found} {noun}{more}{loss}"


def _describe_norms(measurement: Measurement) -> str:
    """Where the norms alone are known."""
    if not measurement.nonfinite:
        return "the global gradient norm is beyond what float32 can hold, although that of each gradient is not"
    worst, others = measurement.nonfinite[0], len(measurement.nonfinite) - 1
    more = f"; the norms of {others} more of {int(measurement.has_grad.sum())} gradients are not finite" if others else ""
    if worst.num_nan:
        return f"the gradient of `{worst.name}` holds NaN{more}"
    return (
        f"the norm of the gradient of `{worst.name}` is infinite: an element is, or float32 can't hold the sum of their "
        f"squares{more}"
    )


def _describe_loss(damage: Damage) -> str:
    where = "" if damage.rank is None else f" on rank {damage.rank}"
    return f"the loss is {damage.loss:g}{where} although every gradient is finite"
