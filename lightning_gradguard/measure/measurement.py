"""From gradients to a `Measurement`: one pass of norms, one sum over ranks, one host read.

It works in two halves. The device half (`measure`) queues kernels and never waits; it also runs on `device="meta"`, which
proves that. The host half (`Facts.read`) makes the one copy, and looks closer at single elements only when that copy
shows an incident.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.measure.distributed import gather
from lightning_gradguard.measure.gradients import Gradients, to_device, total
from lightning_gradguard.measure.inspection import inspect
from lightning_gradguard.measure.signs import FIRST_GRADIENT, FIRST_LOSS, LAST_LOSS, MicroBatch, damage_in, narrow, signs_of
from lightning_gradguard.record import Measurement

_ONE_LOSS = torch.Size([1, 1])


class Facts(NamedTuple):
    """What the device half found, still on the device, and the same on all ranks.

    Attributes:
        norms: 2-norm of each gradient, float32 or wider [num_tensors].
        total_norm: 2-norm over all, scalar, same dtype and device.
        num_micro_batches: backward passes of this step.
        signs: what each rank saw of them, [num_ranks, 4]; see `signs_of`. Of a single one on a single rank its loss, [1, 1].
        loss_scale: a GradScaler's scale, scalar; None without one.
        histogram: a row of counts for each gradient, [num_tensors, row]; None on most steps.
        others: 0 if the gradients that are not measured are finite, else NaN, scalar; None where there are none.
        updates: how far the step before has moved each parameter, [num_parameters]; None where that was not measured.
        weights: norm of the weights, and the update of the step before over it, [2]; None where it was not measured.
        learning_rate: the largest; None where it is not wanted or not known.
        other_norms: by norm type, 1 or infinity, that norm of each gradient [num_tensors]; empty on most steps.
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
    other_norms: Mapping[float, Tensor] = MappingProxyType({})

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
            and not self.other_norms
        )

    def pack(self, *more: Tensor) -> Tensor:
        """All but the histogram in one tensor, float32 or wider [n], and more scalars behind. No sync."""
        parts = [self.norms, self.total_norm.unsqueeze(0), self.signs.flatten()]
        some = (self.loss_scale, self.others, self.weights, *self.other_norms.values(), self.updates, *more)
        parts += [to_device(part.reshape(-1), self.norms.device, self.norms.dtype) for part in some if part is not None]
        return torch.cat(parts)

    def unpack(self, values: Floats, present: Bools, layout: Layout) -> Measurement:
        """What the packed values say, once they are on the host, float64 [n]."""
        count = self.norms.numel()
        norms = _of_all(values[:count], present)
        end = count + 1 + self.signs.numel()
        rest = iter(values[end:].tolist())
        loss_scale = None if self.loss_scale is None else float(next(rest))
        # Damage in what is not measured makes the global norm NaN, but none of the norms.
        is_damaged = self.others is not None and not math.isfinite(next(rest))
        total_norm = math.nan if is_damaged else float(values[count])
        weight_norm, update_ratio = (None, None) if self.weights is None else (_known(next(rest)), _known(next(rest)))
        other_norms = {each: _of_all(np.array([*islice(rest, count)]), present) for each in self.other_norms}
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
            loss=sum(row[LAST_LOSS] for row in signs) / len(signs) if signs else None,
            damage=damage_in(signs, self.num_micro_batches, math.isfinite(total_norm)),
            loss_scale=loss_scale,
            update_ratios=None if self.updates is None else np.fromiter(rest, dtype=np.float64),
            learning_rate=self.learning_rate,
            weight_norm=weight_norm,
            update_ratio=update_ratio,
            other_norms=other_norms,
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
            is_good = is_good * (self.signs[:, FIRST_LOSS] >= self.num_micro_batches).all()
        return 1.0 - is_good


def _of_all(norms: Floats, present: Bools) -> Floats:
    """Norms of all parameters from those of the ones that have a gradient; 0 for the others."""
    if len(norms) == len(present):
        return norms
    spread = np.zeros(len(present))
    spread[present] = norms
    return spread


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
    norm_types: Sequence[float] = (),
) -> Facts:
    """The device half: one pass over the gradients. Changes none, never waits for the device.

    At most one collective: a sum over ranks of 4 bytes for each parameter, where gradients are sharded, and of 16 bytes for
    each rank, where losses are watched. A histogram of sharded gradients travels in it. Where gradients are sharded there is
    one more, of a single number, if some are excluded, and one more for each other type of norm.

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
        norm_types: of what other norms the gradients are measured, too, each in one more pass.
    """
    norms, ranks = gradients.norms(), gradients.ranks
    total_norm = total(norms, 2.0)
    if len(micro_batches) == 1 == ranks.size and not some_are_foreign:
        # The usual case, without a kernel. Ranks may differ in their number of passes, so between them it can't be taken.
        loss = micro_batches[0].loss
        signs = norms.new_zeros(1, 1) if loss is None else narrow(loss, total_norm).reshape(1, 1)
    elif micro_batches:
        signs = gather(signs_of(micro_batches, total_norm, some_are_foreign=some_are_foreign), ranks)
    else:
        signs = norms.new_zeros(0, 4)
    if gradients.shares is not None:
        norms, signs, histogram = _sum_shards(gradients, norms, signs, histogram)
        total_norm = total(norms, 2.0)
        if len(micro_batches) > 1:
            # A rank sees damage in its own shards only, whoever has done it.
            signs[:, FIRST_GRADIENT] = signs[:, FIRST_GRADIENT].amin()
    elif micro_batches:
        ranks.sum_(signs)
    gradients.measured = norms
    others = None if gradients.others is None else gradients.others.damage()
    # The largest of NaN and a number is either, depending on who compares.
    other_norms = {each: torch.where(norms.isnan(), norms, gradients.tensor_norms(each)) for each in norm_types}
    return Facts(
        norms,
        total_norm,
        len(micro_batches),
        signs,
        loss_scale,
        histogram,
        others,
        updates,
        weights,
        learning_rate,
        other_norms,
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
    present, rows = gradients.rows_of_all(table)
    rows.index_copy_(0, present, table)
    summed = gradients.ranks.sum_(torch.cat([rows.reshape(-1), signs.reshape(-1)]))
    table = summed[: rows.numel()].view_as(rows).index_select(0, present)
    return table[:, 0].sqrt(), summed[rows.numel() :].view_as(signs), None if histogram is None else table[:, 1:]
