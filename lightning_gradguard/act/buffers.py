"""A model's buffers as they were before a step, to be put back when the step is skipped."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.act.frozen import FrozenParameters

_LARGE = 1 << 20
"""Elements from which on a buffer is copied only when it is seen to have changed: mostly a table that never does."""

_HUGE = 1 << 28
"""Bytes from which on a buffer is not even copied once before it has been seen to change: mostly a whole data set."""


@dataclass(eq=False)
class _Slot:
    """One buffer: where it hangs, which tensor it was when last remembered, and a copy of its values.

    `version` counts changes in place. Kernels of normalisation layers don't count theirs, so only large buffers go by it.
    """

    holder: MutableMapping[str, Any]
    name: str
    live: Tensor | None = None
    saved: Tensor | None = None
    version: int | None = None

    @property
    def now(self) -> Tensor | None:
        """The tensor that hangs there now."""
        # What holds those of a `ScriptModule` has no `get`.
        return self.holder[self.name] if self.name in self.holder else None  # noqa: SIM401


class Buffers:
    """Remembers all buffers before a step, and puts them back: values, and the tensors where others were assigned.

    Skipping an optimizer's step undoes nothing of what the forward pass did: one bad batch would stay in the running
    statistics of a BatchNorm for good. Values are written in place, so that whoever holds a buffer sees them. Names that
    were registered during a bad step stay; where as many went, those buffers hang under the new names. Of any layout and
    dtype; a buffer that shares its memory is put back as a whole. The module's frozen parameters are treated in the same way
    where the forward pass changes them (`FrozenParameters`).

    Memory: a copy of each buffer, but for those of 256 MiB and more that were never seen to change. Time: a copy of
    each buffer of up to 2^20 elements a step, of larger ones after a change.

    Args:
        named_buffers: the buffers, where only their values can be put back, as in a loop of one's own.
        module: whose buffers, by name, are put back; looked through again when submodules or buffers were added.
        follows_steps: whether each applied step calls for another copy: where nobody says that a step begins, and where
            several optimizers share a forward pass.
    """

    def __init__(
        self,
        named_buffers: Iterable[tuple[str, Tensor]] = (),
        *,
        module: nn.Module | None = None,
        follows_steps: bool = True,
    ) -> None:
        self._module = module
        self._given: dict[str, Any] = dict(named_buffers)
        self._tree: list[tuple[Any, list[Any]]] = []
        self._holders: list[Any] = []
        self._keys: list[list[str]] = []
        self._slots: list[_Slot] = []
        self._frozen = FrozenParameters()
        self.follows_steps = follows_steps
        self._collect()
        self.remember()

    def remember(self) -> None:
        """Take the present values down: what is put back until the next call. No sync."""
        if self._has_changed():
            self._collect()
        if self._slots:
            self._remember()
        self._frozen.remember()

    def look(self) -> None:
        """The forward pass is over. A fraction of a microsecond for each frozen parameter that has changed lately."""
        self._frozen.look()

    @torch.no_grad()
    def _remember(self) -> None:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for slot in self._slots:
            now = slot.now
            is_same = now is slot.live
            slot.live = now
            if now is None or is_lazy(now) or (is_same and _is_untouched(slot, now)):
                continue
            if not is_same and slot.saved is None and _num_bytes(now) >= _HUGE:
                slot.version = now._version
                continue
            slot.version = None if now.is_inference() else now._version
            if slot.saved is not None and _is_plain(now) and slot.saved.shape == now.shape and slot.saved.dtype == now.dtype:
                targets.append(slot.saved)
                sources.append(_distinct(now))
            else:
                slot.saved = _copy(now)
        if targets:
            torch._foreach_copy_(targets, sources)

    def note_boundary(self) -> None:
        """One step has ended, and the next has not begun."""
        if self.follows_steps:
            self.remember()

    @torch.no_grad()
    def restore_(self) -> None:
        """Put back tensors and values, in place. No sync."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        renamed = self._renamed()
        for slot in self._slots:
            if slot in renamed:
                slot.holder[renamed[slot]] = slot.live
            if slot.now is not slot.live and (slot not in renamed or self._counts(slot.holder)):
                slot.holder[slot.name] = slot.live
            if slot.live is None or slot.saved is None:
                continue
            # Not counted as a change in place: a graph that is still to be run backward may hold the buffer.
            target = _distinct(slot.live.data)
            if not _is_plain(target):
                _write_back(slot, target)
            elif target.shape == slot.saved.shape:
                targets.append(target)
                sources.append(slot.saved)
            else:  # it was resized in place
                slot.holder[slot.name] = slot.saved.clone()
        for target, saved in self._frozen.pairs():
            targets.append(target)
            sources.append(saved)
        if targets:
            torch._foreach_copy_(targets, sources)

    @property
    def can_select(self) -> bool:
        """Whether the device can put them back by itself."""
        pairs = [(slot.now, slot.saved) for slot in self._slots if slot.live is not None]
        return all(
            now is not None
            and saved is not None
            and _is_plain(now)
            and _distinct(now).shape == saved.shape
            and now.dtype == saved.dtype
            for now, saved in pairs
        )

    @torch.no_grad()
    def select_(self, is_bad: Tensor) -> None:
        """Have the device put the values back if `is_bad`, 1 or 0, scalar. No sync; a handful of kernels a dtype."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        live = [(slot.now, slot.saved) for slot in self._slots]
        pairs = [(_distinct(now.data), saved) for now, saved in live if now is not None and saved is not None]
        for target, before in (*pairs, *self._frozen.pairs()):
            if target.numel():
                targets, saved = groups.setdefault((target.device, target.dtype), ([], []))
                targets.append(target)
                saved.append(before)
        for (device, _), (targets, saved) in groups.items():
            present = torch.cat([target.reshape(-1) for target in targets])
            before = torch.cat([values.reshape(-1) for values in saved])
            chosen = torch.where(is_bad.to(device, torch.bool, non_blocking=True), before, present)
            pieces = torch.split_with_sizes(chosen, [target.numel() for target in targets])
            torch._foreach_copy_(targets, [piece.view_as(target) for piece, target in zip(pieces, targets, strict=True)])

    @torch.no_grad()
    def repair_(self) -> None:
        """Put back only what is not finite now and was before. A sync for each buffer of floating-point numbers."""
        for slot in self._slots:
            now, saved = slot.now, slot.saved
            if now is None or saved is None or not _is_plain(now) or not now.is_floating_point() or now.itemsize == 1:
                continue
            target = _distinct(now.data)
            if target.shape == saved.shape and bool((~target.isfinite() & saved.isfinite()).any()):
                target.copy_(saved)

    def _has_changed(self) -> bool:
        """Whether submodules or buffers have been added or replaced. Tens of nanoseconds a submodule."""
        for children, before in self._tree:
            if list(children.values()) != before:
                return True
        return [list(holder.keys()) for holder in self._holders] != self._keys

    def _renamed(self) -> dict[_Slot, str]:
        """Buffers that hang under other names by now, and which.

        As of a module whose names count its steps. It goes by the new names, if an attribute of its own has counted on, or
        the names themselves; so the old tensors hang there again. It goes by the old ones, if it counts in a buffer.
        """
        renamed: dict[_Slot, str] = {}
        for holder, keys in zip(self._holders, self._keys, strict=True):
            if list(holder.keys()) == keys:
                continue
            gone = [slot for slot in self._slots if slot.holder is holder and slot.name not in holder]
            new = [name for name in list(holder.keys()) if name not in keys]
            pairs = list(zip(gone, new, strict=False))
            if len(gone) == len(new) and all(_is_like(slot.live, holder[name]) for slot, name in pairs):
                renamed |= dict(pairs)
        return renamed

    def _counts(self, holder: MutableMapping[str, Any]) -> bool:
        """Whether a counter is among them, which goes back."""
        values = [slot.live for slot in self._slots if slot.holder is holder and slot.live is not None]
        return any(value.numel() == 1 and not value.is_floating_point() for value in values)

    def _collect(self) -> None:
        known = {(id(slot.holder), slot.name): slot for slot in self._slots}
        holders: list[Any] = [self._given]
        self._tree, self._holders, self._keys = [], [], []
        if self._module is not None:
            modules = list(self._module.modules())
            holders = [module._buffers for module in modules]
            self._tree = [(module._modules, list(module._modules.values())) for module in modules if module._modules]
            self._holders, self._keys = holders, [list(holder.keys()) for holder in holders]
            self._frozen.collect(self._module)
        self._slots = [
            known.get((id(holder), name)) or _Slot(holder, name) for holder in holders for name in list(holder.keys())
        ]


def _is_untouched(slot: _Slot, now: Tensor) -> bool:
    return slot.version is not None and now.numel() > _LARGE and slot.version == now._version


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is dense, of a dtype with arithmetic, and no subclass: what one kernel copies together."""
    is_dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return is_dense and not tensor.is_conj() and not tensor.is_neg()


def _is_like(before: Tensor | None, now: Tensor | None) -> bool:
    if before is None or now is None:
        return before is now
    return _is_plain(before) and _is_plain(now) and (before.shape, before.dtype) == (now.shape, now.dtype)


def _distinct(tensor: Tensor) -> Tensor:
    """Without the dimensions that `expand` has made: those elements share their memory, and can't be written one by one."""
    if tensor.layout is not torch.strided or tensor.is_nested or type(tensor) is not Tensor:
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _copy(tensor: Tensor) -> Tensor | None:
    """None where torch has no copies, as of some quantised tensors: nothing changes them in place either."""
    try:
        return _distinct(tensor).clone()
    except (RuntimeError, NotImplementedError):
        return None


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout is torch.strided and not tensor.is_nested else 0


def _write_back(slot: _Slot, target: Tensor) -> None:
    """One that is copied by itself: in place where that can be, else by a new tensor."""
    assert slot.saved is not None
    try:
        target.copy_(slot.saved)
    except (RuntimeError, NotImplementedError):  # a layout that can't be written to
        slot.holder[slot.name] = slot.saved.clone()
