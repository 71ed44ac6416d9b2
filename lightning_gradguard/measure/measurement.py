"""From gradients to a `Measurement`: one pass of norms, one sum over ranks, one host read.

It works in two halves. The device half (`measure`) queues kernels and never waits; it also runs on `device="meta"`, which
proves that. The host half (`Facts.read`) makes the one copy, and looks closer at single elements only when that copy
shows an incident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.measure.distributed import gather
from lightning_gradguard.measure.gradients import Gradients, to_device, total
from lightning_gradguard.measure.inspection import inspect
from lightning_gradguard.record import Damage, Measurement

_ONE_LOSS = torch.Size([1, 1])


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


class Facts(NamedTuple):
    """What the device half found, still on the device, and the same on all ranks.

    Attributes:
        norms: 2-norm of each gradient, float32 or wider [num_tensors].
        total_norm: 2-norm over all, scalar, same dtype and device.
        num_micro_batches: backward passes of this step.
        signs: what each rank saw of them, [num_ranks, 4]; see `_signs`. Of a single one on a single rank its loss, [1, 1].
        loss_scale: a GradScaler's scale, scalar; None without one.
        histogram: a row of counts for each gradient, [num_tensors, row]; None on most steps.
        others: 0 if the gradients that are not measured are finite, else NaN, scalar; None where there are none.
        updates: how far the step before has moved each parameter, [num_parameters]; None where that was not measured.
        weights: norm of the weights, and the update of the step before over it, [2]; None where it was not measured.
        learning_rate: the largest; None where it is not wanted or not known.
    """

    norms: Tensor
    total_norm: Tensor
    num_micro_batches: int
    signs: Tensor
    loss_scale: Tensor | None = None
    histogram: Tensor | None = None
    others: Tensor | None = None
    updates: Tensor | None = None
    weights: Tensor | None = None
    learning_rate: float | None = None

    def read(self, gradients: Gradients, layout: Layout) -> Measurement:
        """Bring the facts to the host in one copy (one sync); on an incident look closer at the gradients.

        A collective only on an incident with sharded gradients, which all ranks see alike.
        """
        if self.norms.is_cpu and self._is_plain and len(gradients.tensors) == len(layout.names):
            total_norm, loss = self.total_norm.item(), self.signs.item()
            if math.isfinite(total_norm) and math.isfinite(loss):
                norms: Floats = self.norms.numpy().astype(np.float64)
                return Measurement(layout, norms, gradients.present, total_norm, self.num_micro_batches, loss)
        values: Floats = self.pack().to("cpu", torch.float64).numpy()
        measurement = self.unpack(values, gradients.present, layout)
        return measurement if math.isfinite(measurement.global_norm) else look_closer(measurement, gradients)

    @property
    def _is_plain(self) -> bool:
        """Whether there is nothing but the norms and a single loss."""
        return (
            self.signs.shape == _ONE_LOSS
            and self.loss_scale is None
            and self.others is None
            and self.updates is None
            and self.weights is None
        )

    def pack(self, *more: Tensor) -> Tensor:
        """All but the histogram in one tensor, float32 or wider [n], and more scalars behind. No sync."""
        parts = [self.norms, self.total_norm.unsqueeze(0), self.signs.flatten()]
        some = (self.loss_scale, self.others, self.weights, self.updates, *more)
        parts += [to_device(part.reshape(-1), self.norms.device, self.norms.dtype) for part in some if part is not None]
        return torch.cat(parts)

    def unpack(self, values: Floats, present: Bools, layout: Layout) -> Measurement:
        """What the packed values say, once they are on the host, float64 [n]."""
        count = self.norms.numel()
        norms: Floats = values[:count]
        if count < len(layout.names):
            norms = np.zeros(len(layout.names))
            norms[present] = values[:count]
        end = count + 1 + self.signs.numel()
        rest = iter(values[end:].tolist())
        loss_scale = None if self.loss_scale is None else float(next(rest))
        # Damage in what is not measured makes the global norm NaN, but none of the norms.
        is_damaged = self.others is not None and not math.isfinite(next(rest))
        total_norm = math.nan if is_damaged else float(values[count])
        weight_norm, update_ratio = (None, None) if self.weights is None else (_known(next(rest)), _known(next(rest)))
        # Plain lists: for a handful of ranks faster than numpy.
        signs = [[float(value) for value in row] for row in values[count + 1 : end].reshape(self.signs.shape)]
        if self.signs.shape[1] == 1:
            signs = [[float(math.isfinite(loss)), 1.0, loss, loss] for (loss,) in signs]
        return Measurement(
            layout,
            norms,
            present,
            total_norm,
            num_micro_batches=max(self.num_micro_batches, 1),
            loss=sum(row[_LAST_LOSS] for row in signs) / len(signs) if signs else None,
            damage=_damage(signs, self.num_micro_batches, math.isfinite(total_norm)),
            loss_scale=loss_scale,
            update_ratios=None if self.updates is None else np.fromiter(rest, dtype=np.float64),
            learning_rate=self.learning_rate,
            weight_norm=weight_norm,
            update_ratio=update_ratio,
        )

    def exceeds(self, max_norm: float, *, must_be_finite: bool) -> Tensor:
        """Whether the step may not be applied: 1 or 0, a scalar on the device. No sync; a launch for each operator here."""
        norm = self.total_norm
        if not must_be_finite:
            return ((norm > max_norm) & (norm < math.inf)).to(norm.dtype)
        has_one_loss = self.signs.shape[1] == 1
        # 0 times a loss that is NaN or infinite is NaN, and NaN is not below anything.
        norm = torch.add(norm, self.signs[0, 0], alpha=0) if has_one_loss else norm.clone()
        is_good = norm.le_(min(max_norm, torch.finfo(norm.dtype).max))
        if not has_one_loss and self.num_micro_batches:
            is_good = is_good * (self.signs[:, _FIRST_LOSS] >= self.num_micro_batches).all()
        return 1.0 - is_good


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def measure(
    gradients: Gradients,
    micro_batches: Sequence[MicroBatch] = (),
    *,
    loss_scale: Tensor | None = None,
    histogram: Tensor | None = None,
    some_are_foreign: bool = False,
    updates: Tensor | None = None,
    weights: Tensor | None = None,
    learning_rate: float | None = None,
) -> Facts:
    """The device half: one pass over the gradients. Changes none, never waits for the device.

    At most one collective: a sum over ranks of 4 bytes for each parameter, where gradients are sharded, and of 16 bytes for
    each rank, where losses are watched. A histogram of sharded gradients travels in it. One more, of a single number, where
    gradients are sharded and some are excluded.

    Args:
        gradients: of one optimizer.
        micro_batches: the backward passes that built them.
        loss_scale: a GradScaler's scale, scalar.
        histogram: what this rank counted, [num_tensors, row].
        some_are_foreign: whether backward passes of other optimizers are among `micro_batches`. Those are told by the
            gradients, which they leave as they were.
        updates: how far the step before has moved each parameter, [num_parameters].
        weights: norm of the weights, and the update of the step before over it, [2].
        learning_rate: passed on.
    """
    norms, ranks = gradients.norms(), gradients.ranks
    total_norm = total(norms, 2.0)
    if len(micro_batches) == 1 == ranks.size and not some_are_foreign:
        # The usual case, without a kernel. Ranks may differ in their number of passes, so between them it can't be taken.
        loss = micro_batches[0].loss
        signs = norms.new_zeros(1, 1) if loss is None else _narrow(loss, total_norm).reshape(1, 1)
    elif micro_batches:
        signs = gather(_signs(micro_batches, total_norm, some_are_foreign=some_are_foreign), ranks)
    else:
        signs = norms.new_zeros(0, 4)
    if gradients.shares is not None:
        norms, signs, histogram = _sum_shards(gradients, norms, signs, histogram)
        total_norm = total(norms, 2.0)
        if len(micro_batches) > 1:
            # A rank sees damage in its own shards only, whoever has done it.
            signs[:, _FIRST_GRADIENT] = signs[:, _FIRST_GRADIENT].amin()
    elif micro_batches:
        ranks.sum_(signs)
    gradients.measured = norms
    others = None if gradients.others is None else gradients.others.damage()
    return Facts(
        norms, total_norm, len(micro_batches), signs, loss_scale, histogram, others, updates, weights, learning_rate
    )


def look_closer(measurement: Measurement, gradients: Gradients) -> Measurement:
    """Where the global norm is not finite, tell why; see `inspect`. Other measurements come back as they are."""
    if math.isfinite(measurement.global_norm):
        return measurement
    seen, others = measurement, gradients.others
    # Of finite norms the total can be infinite, but NaN only where the others have made it so.
    if not (math.isnan(measurement.global_norm) and np.isfinite(measurement.norms).all()):
        seen = inspect(measurement, gradients.tensors, gradients.shares, gradients.ranks)
    if others is None:
        return seen
    blank = Measurement(others.layout, np.zeros(len(others.present)), others.present, math.nan, damage=measurement.damage)
    found = inspect(blank, others.tensors, others.shares, others.ranks) if others.tensors else blank
    if not found.nonfinite:
        return seen
    return replace(
        seen,
        global_norm=math.nan,
        nonfinite=seen.nonfinite + found.nonfinite,
        overflowed=False,
        damage=measurement.damage,
    )


def _sum_shards(
    gradients: Gradients, norms: Tensor, signs: Tensor, histogram: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Norms, signs and histogram over all ranks; one collective."""
    assert gradients.shares is not None
    columns = [(norms**2 * gradients.shares)[:, None]]
    if histogram is not None:
        columns.append(histogram.to(norms) * gradients.shares[:, None])
    table = torch.cat(columns, dim=1)
    # Over all parameters, also those without a gradient here, so that all ranks sum vectors of one length.
    present = torch.from_numpy(np.flatnonzero(gradients.present)).to(norms.device, non_blocking=True)
    rows = table.new_zeros(len(gradients.present), table.shape[1]).index_copy_(0, present, table)
    summed = gradients.ranks.sum_(torch.cat([rows.reshape(-1), signs.reshape(-1)]))
    table = summed[: rows.numel()].view_as(rows).index_select(0, present)
    return table[:, 0].sqrt(), summed[rows.numel() :].view_as(signs), None if histogram is None else table[:, 1:]


_FIRST_LOSS, _FIRST_GRADIENT, _DAMAGED_LOSS, _LAST_LOSS = range(4)


def _signs(micro_batches: Sequence[MicroBatch], last_norm: Tensor, *, some_are_foreign: bool) -> Tensor:
    """What this rank saw of a step's backward passes, [4], of dtype and device of `last_norm`. No sync.

    The index of the first with a damaged loss, that of the first after which the gradients were damaged (their number where
    there was none), that loss, and the last loss. A foreign pass has no index.
    """
    number = len(micro_batches)
    none = last_norm.new_zeros(())
    if number == 1 and not some_are_foreign:
        loss = none if micro_batches[0].loss is None else _narrow(micro_batches[0].loss, none)
        is_finite = loss.isfinite()
        return torch.stack([is_finite, torch.ones_like(is_finite), loss, loss])
    losses = torch.stack([none if micro.loss is None else _narrow(micro.loss, none) for micro in micro_batches])
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


def _narrow(loss: Tensor, like: Tensor) -> Tensor:
    """A loss in another dtype and on another device; a finite one stays finite."""
    if loss.dtype is like.dtype and loss.device == like.device:
        return loss
    narrow = loss.to(like)
    if loss.dtype is not torch.float64 or like.dtype is torch.float64:
        return narrow
    largest = torch.finfo(like.dtype).max
    return torch.where(loss.isfinite().to(like.device), narrow.clamp(-largest, largest), narrow)


def _damage(signs: list[list[float]], num_micro_batches: int, gradients_are_finite: bool) -> Damage | None:  # noqa: FBT001
    """Which backward pass on which rank was first: by its loss, or by gradients that were not summed over ranks yet."""
    by_loss = [row[_FIRST_LOSS] for row in signs]
    if signs and (first := min(by_loss)) < num_micro_batches:
        rank = by_loss.index(first)
        return Damage(int(first), rank if len(signs) > 1 else None, loss=signs[rank][_DAMAGED_LOSS])
    if gradients_are_finite:
        return None
    # The gradients of all passes but the last were looked at one by one; what they don't show, the last has done.
    by_gradient = [row[_FIRST_GRADIENT] for row in signs]
    if not signs or (first := min(by_gradient)) >= num_micro_batches:
        return Damage(max(num_micro_batches - 1, 0))
    alike = max(by_gradient) == first
    return Damage(int(first), None if alike else by_gradient.index(first))
