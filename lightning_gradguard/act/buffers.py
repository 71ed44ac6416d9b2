"""Repair of what a bad forward pass did to the model's buffers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MAX_NUMEL = 1 << 16
"""Buffers above this many elements are not copied: they are tables (positions, masks), not running statistics."""


class BufferRepair:
    """Puts back buffers that a skipped step has made non-finite.

    One NaN batch makes the running mean and variance of a BatchNorm layer NaN for good, since they average over all
    batches; skipping the optimizer step doesn't undo that.

    Args:
        named_buffers: the model's buffers. Floating-point ones of up to `MAX_NUMEL` elements are remembered, at the cost
            of two copies each, and of one kernel a step for all of them.
    """

    def __init__(self, named_buffers: Iterable[tuple[str, Tensor]]) -> None:
        self._buffers = {
            name: buffer for name, buffer in named_buffers if buffer.is_floating_point() and 0 < buffer.numel() <= MAX_NUMEL
        }
        self._live = list(self._buffers.values())
        self._saved = [buffer.detach().clone() for buffer in self._live]
        self._candidates = [saved.clone() for saved in self._saved]

    @torch.no_grad()
    def remember(self) -> None:
        """Take the present values down. They count once the step they come from is confirmed. No sync."""
        if self._live:
            torch._foreach_copy_(self._candidates, self._live)

    def confirm(self) -> None:
        """The step after which values were last remembered was in order: they are what is put back from now on."""
        self._saved, self._candidates = self._candidates, self._saved

    @torch.no_grad()
    def repair_(self) -> tuple[str, ...]:
        """Put back what is not finite now but was when last confirmed; the names of those. One sync."""
        if not self._live:
            return ()
        damaged = torch.stack([(~live.isfinite() & saved.isfinite()).any().cpu() for live, saved in self._pairs()])
        names = [name for name, bad in zip(self._buffers, damaged.tolist(), strict=True) if bad]
        for (live, saved), bad in zip(self._pairs(), damaged.tolist(), strict=True):
            if bad:
                live.copy_(saved)
        return tuple(names)

    @torch.no_grad()
    def rewind_(self) -> None:
        """Put all back to the values last confirmed, for a replay of the step. No sync."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._live, self._saved, strict=True))
