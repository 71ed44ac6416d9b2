"""Copies of tensors in CPU memory, and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_gradguard.measure.distributed import local_part

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, eq=False)
class HostTensor:
    """A tensor's value in CPU memory.

    Attributes:
        value: what this rank holds of it, on the CPU; pinned where it came from a GPU.
        device: where it came from.
    """

    value: Tensor
    device: torch.device


@torch.no_grad()
def copy_to_host(tree: Any, reuse: Any = None) -> Any:
    """Copy nested dicts, lists and tuples with all that is in them. Rank-local.

    From a GPU the copies are queued and the host does not wait: read them after a synchronisation of the device.

    Args:
        tree: of tensors and of anything that can be copied.
        reuse: an earlier result, whose memory is used again where shape and dtype fit.

    Returns:
        The same structure with a `HostTensor` for each tensor.
    """
    if isinstance(tree, Tensor):
        return _copy_tensor(local_part(tree.detach()), tree.device, reuse)
    if isinstance(tree, dict):
        olds = reuse if isinstance(reuse, dict) else {}
        return {key: copy_to_host(value, olds.get(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        old = reuse if isinstance(reuse, (list, tuple)) and len(reuse) == len(tree) else [None] * len(tree)
        copies = [copy_to_host(value, before) for value, before in zip(tree, old, strict=True)]
        return copies if isinstance(tree, list) else tuple(copies)
    return copy.deepcopy(tree)


def _copy_tensor(local: Tensor, device: torch.device, reuse: Any) -> HostTensor:
    if not _is_dense(local):
        return HostTensor(local.to("cpu", copy=True), device)
    fits = isinstance(reuse, HostTensor) and reuse.value.shape == local.shape and reuse.value.dtype == local.dtype
    target = reuse.value if fits else torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    target.copy_(local, non_blocking=True)
    return HostTensor(target, device)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


@torch.no_grad()
def put_back(saved: Any, live: Any) -> Any:
    """What `copy_to_host` has taken, as it was. Rank-local.

    Args:
        saved: the copies.
        live: the present structure. Its tensors are written into where shape and dtype fit, so that whoever holds them sees
            the old values; else new ones are made.
    """
    if isinstance(saved, HostTensor):
        if isinstance(live, Tensor):
            local = local_part(live.detach())
            if _is_dense(local) and local.shape == saved.value.shape and local.dtype == saved.value.dtype:
                # What `expand` has made shares its memory, and takes the values once.
                once = [slice(0, 1) if stride == 0 else slice(None) for stride in local.stride()]
                local[tuple(once)].copy_(saved.value[tuple(once)])
                return live
        return saved.value.to(saved.device, copy=True)
    if isinstance(saved, dict):
        lives = live if isinstance(live, dict) else {}
        return {key: put_back(value, lives.get(key)) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        now = live if isinstance(live, (list, tuple)) and len(live) == len(saved) else [None] * len(saved)
        values = [put_back(value, present) for value, present in zip(saved, now, strict=True)]
        return values if isinstance(saved, list) else tuple(values)
    return copy.deepcopy(saved)


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples, as far as this rank holds them."""
    if isinstance(tree, Tensor):
        if is_lazy(tree):
            return 0
        local = local_part(tree)
        return local.numel() * local.element_size() if _is_dense(local) else 0
    if isinstance(tree, HostTensor):
        return num_bytes(tree.value)
    if isinstance(tree, dict):
        return sum(num_bytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(num_bytes(value) for value in tree)
    return 0


def available_bytes() -> int | None:
    """CPU memory that can still be had, by the machine and by the control group (a container's limit); None if unknown."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.extend(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # pragma: no cover - not Linux
        return None
    for limit_path, used_path in _CGROUPS:
        try:
            limit = Path(limit_path).read_text(encoding="ascii").strip()
            used = Path(used_path).read_text(encoding="ascii").strip()
        except OSError:
            continue  # the other version, or none
        if limit.isdigit():  # pragma: no branch - "max" or a number, as the machine has it
            found.append(max(int(limit) - int(used), 0))
    return min(found, default=None)
