"""What each rank saw of a step's backward passes: where a loss or a gradient was first damaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.record import Damage

FIRST_LOSS, FIRST_GRADIENT, _DAMAGED_LOSS, LAST_LOSS = range(4)


class MicroBatch(NamedTuple):
    """A backward pass, its figures still on the device.

    Attributes:
        loss: the loss it started from, scalar; None if unknown.
        total_norm: norm of what this rank has accumulated so far, scalar; None for the last of a step.
        norm_before: the same before this pass, for the first of a step where other optimizers have passes, too; else None.
    """

    loss: Tensor | None = None
    total_norm: Tensor | None = None
    norm_before: Tensor | None = None


def signs_of(micro_batches: Sequence[MicroBatch], last_norm: Tensor, *, some_are_foreign: bool) -> Tensor:
    """What this rank saw of a step's backward passes, [4], of dtype and device of `last_norm`. No sync.

    The index of the first with a damaged loss, that of the first after which the gradients were damaged (their number where
    there was none), that loss, and the last loss. A foreign pass has no index.
    """
    number = len(micro_batches)
    none = last_norm.new_zeros(())
    if number == 1 and not some_are_foreign:
        loss = none if micro_batches[0].loss is None else narrow(micro_batches[0].loss, none)
        is_finite = loss.isfinite()
        return torch.stack([is_finite, torch.ones_like(is_finite), loss, loss])
    losses = torch.stack([none if micro.loss is None else narrow(micro.loss, none) for micro in micro_batches])
    norms = torch.stack([none if micro.total_norm is None else micro.total_norm.to(none) for micro in micro_batches])
    positions = torch.arange(number, device=none.device)
    own = torch.ones_like(positions, dtype=torch.bool)
    if some_are_foreign:
        after = torch.cat([norms[:-1], last_norm.to(none).reshape(1)])
        before = micro_batches[0].norm_before
        begin = none if before is None else before.to(none)
        own = after != torch.cat([begin.reshape(1), after[:-1]])  # true for NaN
        # Neither zeros nor damage with finite gradients after it come from adding: gradients have been cleared since.
        is_cleared = (after == 0) | (last_norm.isfinite() & ~after.isfinite())
        wiped = torch.where(is_cleared, positions, -1).amax()
        own &= positions > wiped
    index_of = torch.cat([own.cumsum(0) - 1, positions.new_full((1,), number)])
    bad_loss = torch.where(own & ~losses.isfinite(), positions, number).amin()
    bad_norm = torch.where(own & ~norms.isfinite(), positions, number).amin()
    last = torch.where(own, positions, 0).amax()
    picked = losses[torch.stack([bad_loss.clamp(max=number - 1), last])]
    return torch.cat([index_of[torch.stack([bad_loss, bad_norm])].to(none), picked])


def narrow(loss: Tensor, like: Tensor) -> Tensor:
    """A loss in another dtype and on another device; a finite one stays finite."""
    if loss.dtype is like.dtype and loss.device == like.device:
        return loss
    moved = loss.to(like)
    if loss.dtype is not torch.float64 or like.dtype is torch.float64:
        return moved
    largest = torch.finfo(like.dtype).max
    return torch.where(loss.isfinite().to(like.device), moved.clamp(-largest, largest), moved)


def damage_in(signs: list[list[float]], num_micro_batches: int, gradients_are_finite: bool) -> Damage | None:  # noqa: FBT001
    """Which backward pass on which rank was first: by its loss, or by gradients that were not summed over ranks yet."""
    by_loss = [row[FIRST_LOSS] for row in signs]
    if signs and (first := min(by_loss)) < num_micro_batches:
        rank = by_loss.index(first)
        return Damage(int(first), rank if len(signs) > 1 else None, loss=signs[rank][_DAMAGED_LOSS])
    if gradients_are_finite:
        return None
    # The gradients of all passes but the last were looked at one by one; what they don't show, the last has done.
    by_gradient = [row[FIRST_GRADIENT] for row in signs]
    if not signs or (first := min(by_gradient)) >= num_micro_batches:
        return Damage(max(num_micro_batches - 1, 0))
    alike = max(by_gradient) == first
    return Damage(int(first), None if alike else by_gradient.index(first))
