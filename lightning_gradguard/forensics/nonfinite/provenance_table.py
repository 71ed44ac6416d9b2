"""Which tensors are damaged, and how they came to be: storage by storage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.tensors import flaw_of, plain


class ProvenanceTable:
    """Keeps descriptions, and weak references to storages: no tensor lives longer for being listed."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, Provenance]] = {}
        self.latest: Provenance | None = None
        """What was listed last, but for infinities that somebody has put there on purpose."""

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether something is known of a tensor's storage."""
        return key_of(tensor) in self._entries

    def get(self, tensor: Tensor) -> Provenance | None:
        """What is known of a tensor's storage, whether this part of it is damaged or not."""
        entry = self._entries.get(key_of(tensor)) if self._entries else None
        return None if entry is None else entry[1]

    def damage_of(self, tensor: Tensor) -> Provenance | None:
        """What is known of a tensor if this part of its storage is damaged. One sync if something is."""
        provenance = self.get(tensor)
        return provenance if provenance is not None and flaw_of(tensor) is not None else None

    def put(self, tensor: Tensor, provenance: Provenance) -> None:
        """Say how a tensor got its damage."""
        storage = storage_of(tensor)
        if not provenance.is_sentinel:
            self.latest = provenance
        if storage is not None:
            # The weak reference keeps the storage's address from being used again.
            self._entries[storage._cdata] = (StorageWeakRef(storage), provenance)  # type: ignore[no-untyped-call]

    def clear(self, tensor: Tensor) -> None:
        """A tensor is in order now; its storage is if it fills it."""
        if self._entries and (key := key_of(tensor)) in self._entries:
            storage = storage_of(tensor)
            if storage is not None and tensor.numel() * tensor.element_size() >= storage.nbytes():
                del self._entries[key]


def key_of(tensor: Tensor) -> int:
    """A number that tells storages apart; -1 for what has none."""
    storage = storage_of(tensor)
    return -1 if storage is None else storage._cdata


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Where its floating-point values lie on this rank; None if there are none."""
    values = plain(tensor)
    return None if values is None else values.untyped_storage()
