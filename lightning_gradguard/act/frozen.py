"""Parameters that no optimizer trains, but that a step changes all the same: a momentum encoder, a target network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradguard.measure.parameters import is_cut_up


@dataclass(eq=False)
class _Slot:
    """One parameter; `mark` tells whether its values are still those of when it was last remembered.

    `was_watched`: over at least one step. `moves`: it was seen to change within one.
    """

    parameter: nn.Parameter
    mark: tuple[int, int] | None = None
    was_watched: bool = False
    moves: bool = False
    saved: Tensor | None = None


class FrozenParameters:
    """Remembers the frozen parameters that `training_step` itself changes, as MoCo and BYOL average their teacher there.

    Most never change, and they may be larger than all else (what LoRA adapts). So only those are copied that were seen to
    change within a step, before each later one; where they are changed between steps there is nothing to put back.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._watched: list[_Slot] = []

    def collect(self, module: nn.Module) -> None:
        """Look for them. What is known of those that stay is kept."""
        known = {id(slot.parameter): slot for slot in self._slots}
        self._slots = [known.get(id(it)) or _Slot(it) for it in module.parameters() if _is_frozen(it)]
        self._watched = []

    def remember(self) -> None:
        """A step begins. A fraction of a microsecond each, a copy of those that move. No sync."""
        if self._slots:
            self._remember()

    @torch.no_grad()
    def _remember(self) -> None:
        self._watched = []
        for slot in self._slots:
            parameter, before = slot.parameter, slot.mark
            slot.mark = _mark(parameter)
            if parameter.requires_grad:  # an optimizer's by now
                slot.saved = None
            elif not slot.moves:
                if slot.mark != before or not slot.was_watched:
                    self._watched.append(slot)
            elif slot.saved is None or slot.saved.shape != parameter.shape or slot.saved.dtype != parameter.dtype:
                slot.saved = parameter.detach().clone()
            else:
                slot.saved.copy_(parameter)

    def look(self) -> None:
        """Note which of those that have changed lately change within the step."""
        for slot in self._watched:
            slot.was_watched = True
            slot.moves = slot.moves or _mark(slot.parameter) != slot.mark

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What can be put back, and the values."""
        for slot in self._slots:
            saved, parameter = slot.saved, slot.parameter
            if saved is not None and not parameter.requires_grad and saved.shape == parameter.shape:
                yield parameter.data, saved


def _is_frozen(parameter: nn.Parameter) -> bool:
    # Subclasses are sharded, quantised or not there yet.
    is_plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not is_cut_up(parameter)
    return is_plain and not (parameter.requires_grad or parameter.is_inference() or parameter.is_conj())


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    """Another one after a change in place, and after an assignment to `.data`, which is not counted as one."""
    return parameter._version, parameter.data_ptr()
