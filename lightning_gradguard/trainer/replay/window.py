"""What a replay needs to know of the running window: its batches, and the random state before each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.forensics.host_random import HostRandom, HostRandomNotes

_MAY_HAVE_CUDA = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]

_MAX_BATCHES = 64
"""Micro-batches kept at most; a longer window is replayed in part."""


class MicroBatch(NamedTuple):
    """One call of `training_step`.

    Attributes:
        batch: its batch, as it was passed; not copied.
        batch_idx: its number.
        serial: number of the call, ascending.
        versions: of the tensors of the batch, to tell whether they are changed in place.
        rng: torch's random state on the CPU before it.
        cuda_rng: the same on the current GPU; None without one.
        host_random: python's and numpy's.
    """

    batch: Any
    batch_idx: int
    serial: int
    versions: tuple[int, ...]
    rng: Tensor
    cuda_rng: Tensor | None
    host_random: HostRandom

    @property
    def is_untouched(self) -> bool:
        """Whether the batch is as it was."""
        return versions_of(self.batch) == self.versions

    def restore_rng(self) -> None:
        """Put all random states back to where the call began."""
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:  # pragma: no cover - needs a GPU
            torch.cuda.set_rng_state(self.cuda_rng)
        self.host_random.restore()


class Window:
    """The micro-batches since the last step, of each optimizer. References and random states only: nothing is copied."""

    def __init__(self) -> None:
        self._entries: deque[MicroBatch] = deque(maxlen=_MAX_BATCHES)
        self._stepped: dict[int, tuple[int, int]] = {}
        self._held: tuple[int, list[MicroBatch]] | None = None
        self._serial = 0
        self._host_random = HostRandomNotes()

    def open(self, batch: Any, batch_idx: int) -> None:
        """A micro-batch is about to be trained on. Some ten microseconds; no sync."""
        self._serial += 1
        has_cuda = _MAY_HAVE_CUDA and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda_rng = torch.cuda.get_rng_state() if has_cuda else None
        rng = torch.default_generator.get_state()
        random = self._host_random.note()
        self._entries.append(MicroBatch(batch, batch_idx, self._serial, versions_of(batch), rng, cuda_rng, random))

    def reopen(self) -> None:
        """The same micro-batch will be evaluated again, as LBFGS does, with the random state as it is now."""
        if self._entries:
            last = self._entries.pop()
            self._serial -= 1
            self.open(last.batch, last.batch_idx)

    def note_step(self, optimizer: Optimizer, step: int, *, is_pending: bool = False) -> None:
        """An optimizer has stepped.

        Args:
            optimizer: which.
            step: number of the decision about it.
            is_pending: whether the decision comes later, so that the batches have to be kept.
        """
        serial, count = self._stepped.get(id(optimizer), (0, 0))
        self._held = (step, self.of(optimizer)) if is_pending else None
        self._stepped[id(optimizer)] = (self._serial, count + 1 if serial == self._serial else 1)

    def close(self, optimizers: Iterable[Optimizer]) -> None:
        """A micro-batch is done: let go of those that no optimizer needs any more."""
        done = min([self._stepped.get(id(optimizer), (0, 0))[0] for optimizer in optimizers], default=0)
        while self._entries and self._entries[0].serial <= done:
            self._entries.popleft()

    def of(self, optimizer: Optimizer, step: int | None = None) -> list[MicroBatch]:
        """The micro-batches that made an optimizer's gradients; of an earlier decision, if these have been kept."""
        if step is not None and self._held is not None and self._held[0] == step:
            return self._held[1]
        last = self._stepped.get(id(optimizer), (0, 0))[0]
        return [entry for entry in self._entries if entry.serial > last or entry.serial == self._serial]

    def running(self) -> MicroBatch | None:
        """The micro-batch that is being trained on; None before the first."""
        return self._entries[-1] if self._entries else None

    def num_steps(self, optimizer: Optimizer) -> int:
        """How often an optimizer has stepped in the running micro-batch."""
        serial, count = self._stepped.get(id(optimizer), (0, 0))
        return count if serial == self._serial else 0

    def is_held(self, step: int) -> bool:
        """Whether it is an earlier decision that is asked about."""
        return self._held is not None and self._held[0] == step

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()
        self._stepped.clear()
        self._held = None


def versions_of(batch: Any) -> tuple[int, ...]:
    """How often each tensor of a batch was changed in place; of containers only the outermost is looked into."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else (batch,)
    return tuple([value._version for value in values if isinstance(value, Tensor) and not value.is_inference()])
