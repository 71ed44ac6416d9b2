"""Parameters that no optimizer trains, but that a step changes all the same: a momentum encoder, a target network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.measure.distributed import local_part
from lightning_gradguard.measure.parameters import is_cut_up

_NUM_TRIALS = 10
"""Steps in which a parameter is compared with a copy to begin with. More than one: a momentum encoder equals its student at
first, and an average of two that are equal changes nothing."""

_PERIOD = 100
"""Steps after which some are compared once more: an average may set in late."""

_AT_ONCE = ("cpu",)
"""Where the host learns of a comparison without waiting."""

_BUDGET = 1 << 27
"""Bytes of copies that are compared in one step at most."""


@dataclass(eq=False)
class _Slot:
    """One parameter.

    Attributes:
        parameter: whole, or a DTensor, of which a rank restores what it holds.
        saved: the bits of its values from before the step; None: they are not kept.
        mark: that of the beginning of the step.
        moves: whether it was seen to change within a step.
        num_trials: how often it was compared with a copy.
        differs: whether it did in the running trial, on its device; None: no trial.
        is_unknown: whether the host has yet to learn of the last trial.
    """

    parameter: nn.Parameter
    saved: Tensor | None = None
    mark: tuple[int, int] = (0, 0)
    moves: bool = False
    num_trials: int = 0
    differs: Tensor | None = None
    is_unknown: bool = False

    @torch.no_grad()
    def compare(self) -> None:
        """Note whether it differs from its copy. No sync."""
        assert self.saved is not None
        assert self.differs is not None
        now = _values(self.parameter)
        if now.device.type in _AT_ONCE:
            self.moves = not torch.equal(now, self.saved)
        else:
            self.differs |= (now != self.saved).any()

    def keep(self) -> tuple[Tensor, Tensor] | None:
        """Take its values down, or say where they are to be copied to, and from where."""
        values = _values(self.parameter)
        if self.saved is not None and self.saved.shape == values.shape and self.saved.dtype == values.dtype:
            return self.saved, values
        self.saved = values.clone()
        return None


class _Trial(NamedTuple):
    """What was compared in one step, on its way to the host."""

    slots: list[_Slot]
    flags: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, slots: list[_Slot]) -> _Trial:
        """Queue one copy. No sync."""
        present = [slot.differs for slot in slots if slot.differs is not None]
        flags = torch.stack([flag.to(present[0].device) for flag in present])
        for slot in slots:
            slot.differs, slot.is_unknown = None, True
        if not flags.is_cuda:
            return cls(slots, flags, None)
        target = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)  # pragma: no cover - needs a GPU
        target.copy_(flags, non_blocking=True)  # pragma: no cover - needs a GPU
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # pragma: no cover - needs a GPU
        done.record()  # pragma: no cover - needs a GPU
        return cls(slots, target, done)  # pragma: no cover - needs a GPU

    @property
    def has_arrived(self) -> bool:
        """Whether the host can read it without waiting."""
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class FrozenParameters:
    """Remembers the frozen parameters that `training_step` itself changes, as MoCo and BYOL average their teacher there.

    Most never change, and they may be larger than all else (what LoRA adapts). So only those are copied before each step
    that were seen to change within one; where they are changed between steps there is nothing to put back. A version counter
    shows a change, but not one through `.data`. So all are copied and compared in their first steps, as many at a time as
    `_BUDGET` allows, and some every hundred steps from then on; in these steps they are put back, too.
    """

    _module: nn.Module | None = None
    _slots: list[_Slot] = field(default_factory=list)
    _on_trial: list[_Slot] = field(default_factory=list)
    _arriving: deque[_Trial] = field(default_factory=deque)
    _num_steps: int = 0

    def collect(self, module: nn.Module) -> None:
        """Look for them. What is known of those that stay is kept."""
        known = {id(slot.parameter): slot for slot in self._slots}
        self._module = module
        self._slots = [known.get(id(it)) or _Slot(it) for it in module.parameters() if _is_frozen(it)]

    def remember(self) -> None:
        """A step begins. A fraction of a microsecond each, a copy of those that move. No sync."""
        if self._slots or self._num_steps % _PERIOD == 0:
            self._remember()
        self._num_steps += 1

    @torch.no_grad()
    def _remember(self) -> None:
        self._end_trial()
        if self._module is not None and self._num_steps % _PERIOD == 0:
            self.collect(self._module)  # some may have been frozen since
        pairs = []
        for slot in self._slots:
            slot.mark = _mark(slot.parameter)
            if slot.parameter.requires_grad:  # an optimizer's by now
                slot.saved = None
            elif (slot.moves or slot.is_unknown) and (pair := slot.keep()) is not None:
                pairs.append(pair)
        if pairs:
            torch._foreach_copy_([saved for saved, _ in pairs], [values for _, values in pairs])
        self._begin_trial()

    def look(self) -> None:
        """Note which change within the step. No sync."""
        for slot in self._slots:
            if slot.moves:
                continue
            slot.moves = _mark(slot.parameter) != slot.mark
            if slot.differs is not None and not slot.moves:
                slot.compare()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What can be put back, and the values. To be asked for without grad mode."""
        for slot in self._slots:
            if slot.saved is not None and not slot.parameter.requires_grad:
                target = _values(slot.parameter)
                if target.shape == slot.saved.shape and target.dtype == slot.saved.dtype:
                    yield target, slot.saved

    def _begin_trial(self) -> None:
        resting = [it for it in self._slots if not (it.moves or it.is_unknown or it.parameter.requires_grad)]
        if self._num_steps % _PERIOD:
            resting = [slot for slot in resting if slot.num_trials < _NUM_TRIALS]
        left = _BUDGET
        for slot in sorted(resting, key=lambda it: it.num_trials):
            values = _values(slot.parameter)
            size = values.numel() * values.element_size()
            if size <= left and not values.is_meta:
                left -= size
                slot.keep()
                slot.num_trials += 1
                slot.differs = torch.zeros((), dtype=torch.bool, device=values.device)
                self._on_trial.append(slot)

    def _end_trial(self) -> None:
        """Take down what was found, once it has arrived; until then all that was compared is kept."""
        if self._on_trial:
            self._arriving.append(_Trial.of(self._on_trial))
            self._on_trial = []
        while self._arriving and self._arriving[0].has_arrived:
            trial = self._arriving.popleft()
            for slot, differs in zip(trial.slots, trial.flags.tolist(), strict=True):
                slot.is_unknown = False
                slot.moves |= differs
                if not slot.moves:
                    slot.saved = None


def _is_frozen(parameter: nn.Parameter) -> bool:
    # What FSDP1 and DeepSpeed have cut up is whole at some times and not at others; other subclasses are quantised or not
    # there yet.
    values = local_part(parameter)
    if type(values) not in (Tensor, nn.Parameter) or values.layout is not torch.strided or is_cut_up(parameter):
        return False
    # A view of the bits of a quantised tensor ends the process.
    is_odd = values.is_quantized or values.is_nested or values.is_conj() or values.is_neg() or values.is_inference()
    return not (parameter.requires_grad or is_odd) and values.dtype.itemsize in _INTEGERS


def _values(parameter: nn.Parameter) -> Tensor:
    """What this rank holds, as whole numbers of the same bits: all of them can be copied, and NaN is equal to itself.

    With a version counter of its own, so that a graph does not take the parameter for changed.
    """
    local = local_part(parameter.data)
    return local.view(_INTEGERS[local.dtype.itemsize])


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    """Another one after a change in place, and after an assignment to `.data`, which is not counted as one."""
    whole = type(parameter) is nn.Parameter
    return parameter._version, (parameter if whole else local_part(parameter)).data_ptr()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
