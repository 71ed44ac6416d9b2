"""From verdicts and a decision to the alerts that people read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Decision, Ended, Position, Verdict
from lightning_gradguard.wording import counted

_DONE = {
    Action.LOG: "Logged only.",
    Action.WARN: "The step is applied.",
    Action.SKIP: "The step is skipped.",
    Action.ROLLBACK: "The step is skipped and training goes back to the last good state.",
    Action.STOP: "The step is skipped and training stops.",
    Action.RAISE: "The step is skipped and training ends with an error.",
}


INVESTIGATED = ("nonfinite", "explosion", "vanishing")
"""Kinds of findings that have a culprit."""


def alerts_of(
    position: Position,
    verdicts: Sequence[Verdict],
    decision: Decision,
    culprit: Culprit | None = None,
    *,
    done: str | None = None,
    is_clipped: bool = True,
) -> tuple[Alert, ...]:
    """The verdicts that are reported, in their order.

    Args:
        position: where in the training.
        verdicts: what was found.
        decision: what is done about it.
        culprit: who made the damage; None if that is not known.
        done: what is done, in words; None: what the action says.
        is_clipped: whether something clips these gradients, so that it need not be advised.
    """
    every = zip(verdicts, decision.actions, decision.alerting, strict=True)
    reported = [(verdict, action) for verdict, action, alerting in every if alerting]
    # It was looked for on behalf of the first one: why a gradient explodes is not why another vanishes.
    blamed = next((verdict for verdict, _ in reported if verdict.kind in INVESTIGATED), None)
    begun = [
        _with_bounds(
            _alert(position, verdict, action, culprit if verdict is blamed else None, done or _done(action, decision)),
            verdict,
            is_clipped=is_clipped,
        )
        for verdict, action in reported
    ]
    return (*begun, *(_over(position, ended) for ended in decision.ended))


def notice(position: Position, kind: str, action: Action, message: str, remedy: str, *, value: float = 0.0) -> Alert:
    """An alert about something else than a step's gradients: a rollback, a snapshot, a checkpoint.

    Args:
        position: of the last step.
        kind: "rollback", "snapshot", "checkpoint", or a detector's name.
        action: what was done.
        message: whole sentences.
        remedy: what to try.
        value: a number that says how much; the limit of a notice is 0.
    """
    return Alert(
        time=time.time(),
        step=position.step,
        epoch=position.epoch,
        batch_idx=position.batch_idx,
        micro_batch=0,
        optimizer=position.optimizer,
        rank=position.rank,
        kind=kind,
        action=action,
        value=value,
        limit=0.0,
        parameters=(),
        culprit=None,
        message=message,
        remedy=remedy,
    )


def _over(position: Position, ended: Ended) -> Alert:
    """That a condition is over: good news, so it is only logged."""
    found = "" if ended.num_found == ended.lasted else f", {ended.num_found:,} of which it was found at"
    since = "" if ended.steps_ago == 1 else f", and has not come back for {counted(ended.steps_ago, 'step')}"
    where = _where(position, 0)
    lasted = f"it lasted {counted(ended.lasted, 'step')}{found}{since}"
    message = f"{ended.kind.capitalize()} at {where}: what was reported before is over; {lasted}."
    return notice(position, ended.kind, Action.LOG, message, "", value=float(ended.lasted))


def _done(action: Action, decision: Decision) -> str:
    # A step is skipped as a whole, also on behalf of a finding that alone would only warn.
    return _DONE[Action.SKIP] if decision.skip and not action.skips else _DONE[action]


def _alert(position: Position, verdict: Verdict, action: Action, culprit: Culprit | None, done: str) -> Alert:
    named = f"; {culprit.in_words}" if culprit is not None else ""
    return Alert(
        time=time.time(),
        step=position.step,
        epoch=position.epoch,
        batch_idx=position.batch_of(verdict.micro_batch),
        micro_batch=verdict.micro_batch,
        optimizer=position.optimizer,
        rank=position.rank if verdict.rank is None else verdict.rank,
        kind=verdict.kind,
        action=action,
        value=verdict.value,
        limit=verdict.limit,
        parameters=verdict.parameters,
        culprit=culprit,
        message=f"{verdict.kind.capitalize()} at {_where(position, verdict.micro_batch)}: {verdict.message}{named}. {done}",
        remedy=_remedy(verdict, culprit),
    )


def _remedy(verdict: Verdict, culprit: Culprit | None) -> str:
    """The culprit's own; one who is known to have made NaN has no other than that, as a guess may be wrong."""
    is_known = culprit is not None and (culprit.remedy or not culprit.cause)
    return culprit.remedy if culprit is not None and is_known else verdict.remedy


_BOUNDED = ("", "batch", "rate", "recurrence", "sample")
"""Causes of explosion whose harm is less where steps are clipped, or passed over."""


def _with_bounds(alert: Alert, verdict: Verdict, *, is_clipped: bool) -> Alert:
    """With the options that bound what such a step does, as far as they are not set already."""
    cause = "" if alert.culprit is None else alert.culprit.cause
    if alert.kind != "explosion" or verdict.is_advisory or cause not in _BOUNDED:
        return alert
    clip = "" if is_clipped else " Clipping bounds what one such step does: `clip=1.0`, for example."
    # Weights that have moved too far give large gradients until somebody moves them back.
    skip = (
        "" if alert.action.skips or cause not in ("", "batch", "sample") else ' `explosion="skip"` passes such a step over.'
    )
    return replace(alert, remedy=f"{alert.remedy}{clip}{skip}")


def _where(position: Position, micro_batch: int) -> str:
    where = f"step {position.step}"
    if position.epoch is not None and position.batch_idx is None:
        where += f" (epoch {position.epoch})"
    elif position.epoch is not None:
        where += f" (epoch {position.epoch}, batch {position.batch_of(micro_batch)})"
    if micro_batch:
        where += f", micro-batch {micro_batch}"
    if position.num_optimizers > 1:
        where += f", optimizer {position.optimizer}"
    return where
