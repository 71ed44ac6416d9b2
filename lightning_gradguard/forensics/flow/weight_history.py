"""How weights have moved, and how much of it the optimizer's updates can account for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.forensics.flow.updates import AppliedStep, decay_factor, last_update, reach
from lightning_gradguard.forensics.flow.weight_samples import WeightSamples
from lightning_gradguard.measure.weights import has_norm
from lightning_gradguard.record import Measurement

INTERVAL = 16
"""Steps between two looks at the norms of all weights."""

_SLACK = 1.05
"""An update may be as much larger than computed, since kernels round."""


@dataclass(frozen=True)
class WeightGrowth:
    """How a weight has moved.

    Attributes:
        name: of the parameter.
        norm: now.
        before: some steps ago; None where nobody looked.
        num_steps: how many steps ago that was.
        update: by how much the last step that was applied has moved it, from a sample of its elements.
        is_matrix: whether it has at least two dimensions.
        reach: the most by which all updates since `before` can have made it larger; None where no bound is known.
        excess: by how much the last step has moved it beyond the optimizer's update; 0 where that is not known.
        start: norm before the first step of the run; None where nobody looked.
        weight_decay: the optimizer's setting.
        decayed: what weight decay alone has multiplied it by since then; None where that can't be told apart.
        pull: gradient of the weight decay over that of the loss, in the last step; None where that is not known.
    """

    name: str
    norm: float
    before: float | None
    num_steps: int
    update: float = 0.0
    is_matrix: bool = True
    reach: float | None = None
    excess: float = 0.0
    start: float | None = None
    weight_decay: float = 0.0
    decayed: float | None = None
    pull: float | None = None

    @property
    def rate(self) -> float:
        """Update-to-weight ratio of the last step."""
        return self.update / self.norm if self.norm > 0.0 else 0.0

    @property
    def jump(self) -> float:
        """The norm over what it can be at most if nothing but the optimizer has moved it; 1 where no bound is known."""
        if self.before is None or self.reach is None or not math.isfinite(self.norm):
            return 1.0
        most = self.before + self.reach
        return self.norm / most if most > 0.0 else 1.0

    @property
    def since_start(self) -> float | None:
        """The norm over that before the first step."""
        return self.norm / self.start if self.start else None


class _Look(NamedTuple):
    """Norms of all weights, and of their momentum buffers, before some step."""

    step: int
    norms: list[Tensor]
    momenta: dict[int, Tensor]
    optimizers: frozenset[int]


class _Applied(NamedTuple):
    """A step that was applied."""

    step: int
    optimizer: Optimizer
    rates: list[Any]
    measurement: Measurement | None


class WeightHistory:
    """Remembers norms of all weights every 16 steps, and a few elements of each matrix from step to step.

    The last two looks are kept, so that one just before an alert does not hide what went wrong before it.

    Args:
        named: the parameters.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._named = [(name, parameter) for name, parameter in named if parameter.is_floating_point()]
        self._looks: deque[_Look] = deque(maxlen=2)
        self._start: list[Tensor] = []
        self._applied: deque[_Applied] = deque(maxlen=2 * INTERVAL)
        self._decayed: dict[int, list[float | None]] = {}
        self._open_decays: list[tuple[Optimizer, list[Any]]] = []
        self._optimizers: dict[int, Optimizer] = {}
        self._samples: dict[int, WeightSamples] = {}
        self._num_steps = 0

    def note(self, optimizer: Optimizer, measurement: Measurement | None = None, *, is_applied: bool = True) -> None:
        """A step has been decided, and is about to be applied or skipped. No sync.

        Args:
            optimizer: whose step it is.
            measurement: of its gradients; None if not known yet.
            is_applied: whether it is applied, as far as is known.
        """
        self._optimizers[id(optimizer)] = optimizer
        is_due = self._num_steps % INTERVAL == 0
        if is_due:
            self._look()
            self._close_decays()
        if is_applied:
            rates = [group["lr"] for group in optimizer.param_groups]
            if True in [isinstance(rate, Tensor) for rate in rates]:  # it is changed in place
                rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
            self._applied.append(_Applied(self._num_steps, optimizer, rates, measurement))
            self._open_decays.append((optimizer, rates))
            samples = self._samples.get(id(optimizer))
            if samples is None or not samples.is_in_place or (is_due and not samples.is_of(optimizer)):
                samples = self._samples[id(optimizer)] = WeightSamples(self._named, optimizer)
            samples.take()
        self._num_steps += 1

    @torch.no_grad()
    def weight_growths(self, optimizer: Optimizer) -> tuple[WeightGrowth, ...]:
        """How each weight of an optimizer has moved; a few syncs."""
        self._close_decays()
        now = [float(norm) for norm in _norms([parameter for _, parameter in self._named])]
        look = self._looks[0] if self._looks else None
        before = [float(norm) for norm in look.norms] if look is not None else [None] * len(now)
        start = [float(norm) for norm in self._start] or now
        shared = self._shared(optimizer)
        groups = {
            id(parameter): (index, group)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        growths = []
        for (name, parameter), norm, norm_before, norm_at_start in zip(self._named, now, before, start, strict=True):
            if id(parameter) not in groups:
                continue
            index, group = groups[id(parameter)]
            decay = float(group.get("weight_decay", 0.0))
            is_known = id(parameter) not in shared
            moved, excess = self._last_step(optimizer, parameter, index)
            share = norm if math.isfinite(norm) else 0.0
            growths.append(
                WeightGrowth(
                    name,
                    norm,
                    norm_before,
                    self._num_steps - (0 if look is None else look.step),
                    moved * share,
                    parameter.dim() >= 2,
                    self._reach(optimizer, name, parameter, index) if is_known else None,
                    excess * share if is_known else 0.0,
                    norm_at_start,
                    decay,
                    self._decayed.get(id(optimizer), [None] * (index + 1))[index],
                    self._pull(optimizer, name, decay * share),
                )
            )
        return tuple(growths)

    def _pull(self, optimizer: Optimizer, name: str, decay: float) -> float | None:
        applied = next((it for it in reversed(self._applied) if it.optimizer is optimizer), None)
        grad_norm = None if applied is None or applied.measurement is None else applied.measurement.by_name.get(name)
        return None if not grad_norm else decay / grad_norm

    @torch.no_grad()
    def _look(self) -> None:
        parameters = [parameter for _, parameter in self._named]
        norms = _norms(parameters)
        momenta: dict[int, Tensor] = {}
        for optimizer in self._optimizers.values():
            buffers = {id(it): optimizer.state[it].get("momentum_buffer") for it in parameters if it in optimizer.state}
            present = {key: buffer for key, buffer in buffers.items() if isinstance(buffer, Tensor)}
            momenta.update(zip(present, _norms([*present.values()]), strict=True))
        self._looks.append(_Look(self._num_steps, norms, momenta, frozenset(self._optimizers)))
        self._start = self._start or norms

    def _close_decays(self) -> None:
        """Multiply up what weight decay alone has done in the steps since the last time."""
        steps, self._open_decays = self._open_decays, []
        for optimizer, rates in steps:
            sofar = self._decayed.setdefault(id(optimizer), [1.0] * len(rates))
            for index, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=False)):
                if index == len(sofar):  # a group that was added later
                    sofar.append(None)
                factor = None if isinstance(rate, Tensor) else decay_factor(optimizer, group, rate)
                last = sofar[index]
                sofar[index] = None if factor is None or last is None else last * factor

    def _shared(self, optimizer: Optimizer) -> set[int]:
        """Parameters that other optimizers move as well."""
        others = [it for it in self._optimizers.values() if it is not optimizer]
        return {id(parameter) for it in others for group in it.param_groups for parameter in group["params"]}

    def _reach(self, optimizer: Optimizer, name: str, parameter: Tensor, index: int) -> float | None:
        if not self._looks or id(optimizer) not in self._looks[0].optimizers:
            return None
        look = self._looks[0]
        row = next(row for row, (_, it) in enumerate(self._named) if it is parameter)
        steps = []
        for applied in self._applied:
            if applied.step < look.step or applied.optimizer is not optimizer:
                continue
            if index >= len(applied.rates):
                return None
            steps.append(AppliedStep(float(applied.rates[index]), _grad_norm(applied.measurement, name)))
        momentum = look.momenta.get(id(parameter))
        return reach(
            optimizer,
            optimizer.param_groups[index],
            steps,
            num_elements=parameter.numel(),
            norm=float(look.norms[row]),
            momentum=0.0 if momentum is None else float(momentum),
        )

    def _last_step(self, optimizer: Optimizer, parameter: Tensor, index: int) -> tuple[float, float]:
        """By which part of its size the last step has moved a weight, and beyond the optimizer's update; 0 if not known."""
        samples = self._samples.get(id(optimizer))
        pair = None if samples is None else samples.compare(parameter)
        applied = next((it for it in reversed(self._applied) if it.optimizer is optimizer), None)
        if samples is None or pair is None or applied is None or index >= len(applied.rates):
            return 0.0, 0.0
        before, now = pair
        size = float(before.norm())
        if not size or not bool(now.isfinite().all()):
            return 0.0, 0.0
        moved = float((now - before).norm())
        group = optimizer.param_groups[index]
        rate = float(applied.rates[index])
        update = last_update(optimizer, parameter, group, rate, samples.pick)
        if update is None or update.shape != before.shape:
            return moved / size, 0.0
        decay = rate * float(group.get("weight_decay", 0.0)) * size
        rounding = 2.0 * torch.finfo(parameter.dtype).eps * size
        most = _SLACK * float(update.norm()) + decay + rounding
        return moved / size, max(moved - most, 0.0) / size


def _grad_norm(measurement: Measurement | None, name: str) -> float | None:
    """Norm of a gradient before clipping; 0 for a parameter without one, None for one that was not measured."""
    if measurement is None or name not in measurement.names:
        return None
    return measurement.by_name.get(name, 0.0)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """NaN for those that torch has no norm of, which nobody trains."""
    values = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    dense = {index: value.detach() for index, value in enumerate(values) if has_norm(value)}
    norms = dict(zip(dense, torch._foreach_norm([*dense.values()]), strict=True)) if dense else {}
    return [norms[index] if index in norms else torch.tensor(math.nan) for index in range(len(values))]
