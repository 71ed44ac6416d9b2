"""A bad step as a file that can be replayed anywhere."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.alert import Alert
from lightning_gradguard.files.torch_files import UnreadableError, load_plain
from lightning_gradguard.forensics.flow.weight_history import WeightGrowth

FORMAT = 1
SUFFIX = ".bundle.pt"

_IN_FILE = {"weight_growths": "motions"}
"""Attributes that the file has under another name, which is older."""


@dataclass
class Bundle:
    """A bad step, in tensors and plain types.

    Attributes:
        alert: as `Alert.to_dict` gives it.
        guard: how the guard was configured, in words.
        versions: of Python and of the packages that matter.
        batches: of its micro-batches, each `{batch, batch_idx, rng, cuda_rng}`.
        healthy: the batch of the last healthy step; None if there was none, or it did not fit.
        model: the module's state before the step; None if it did not fit.
        optimizer: the optimizer's state before the step; None if it did not fit.
        weight_growths: how the weights had moved.
        healthy_norms: global gradient norms of the healthy steps before, oldest first.
        is_from_start: whether `weight_growths` goes back to before the first step.
        left_out: what is not in here, and why.
    """

    alert: dict[str, Any]
    guard: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    healthy: Any = None
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    weight_growths: list[dict[str, Any]] = field(default_factory=list)
    healthy_norms: list[float] = field(default_factory=list)
    is_from_start: bool = False
    left_out: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, room: int) -> int:
        """Put a value in, if there is room for it.

        Args:
            name: of the attribute.
            value: copied to the CPU.
            room: bytes left.

        Returns:
            Bytes left then.
        """
        size = num_bytes(value)
        if size > room:
            self.left_out.append(f"{name}: {size / 2**20:.1f} MiB, with {room / 2**20:.1f} MiB left")
            return room
        setattr(self, name, plain_tree(value, self.left_out, name))
        return room - size

    def weights_have_moved(self) -> tuple[WeightGrowth, ...]:
        """`weight_growths` as objects."""
        return tuple(WeightGrowth(**growth) for growth in self.weight_growths)

    def save(self, path: Path) -> None:
        """Write the file whole, or not at all, for its owner's eyes only: it holds data. Its folder is made.

        Raises:
            OSError, RuntimeError: if it can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            content = {_IN_FILE.get(name, name): value for name, value in vars(self).items()}
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                torch.save(plain_tree({"gradguard_bundle": FORMAT, **content}, []), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)  # noqa: PTH105 - atomic, whether the target exists or not
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Read a file, which may be a stranger's: no code of it is run, and what it holds is checked.

        Raises:
            UnreadableError: if it is no bundle, or not a whole one.
        """
        content = load_plain(path)
        if not isinstance(content, dict) or content.get("gradguard_bundle") != FORMAT:
            raise UnreadableError(
                f"`{path}` is not a bundle of format {FORMAT}. Bundles lie in `<log_dir>/gradguard/*{SUFFIX}`."
            )
        parts = {entry.name: content.get(_IN_FILE.get(entry.name, entry.name)) for entry in fields(cls)}
        try:
            bundle = cls(**{name: value for name, value in parts.items() if value is not None})
            bundle.alert = {"step": 0, "parameters": [], **bundle.alert}
            Alert.from_dict(bundle.alert)
            wrong = next((name for name, is_well in _checks(bundle) if not is_well), None)
        except (TypeError, ValueError) as error:
            raise UnreadableError(f"{path} is a bundle whose alert is damaged: {error}.") from error
        if wrong is not None:
            raise UnreadableError(f"{path} is a bundle whose `{wrong}` is damaged.")
        return bundle


def _checks(bundle: Bundle) -> Iterator[tuple[str, bool]]:
    """The parts, and whether each is of its type."""
    yield "guard", _is_table_of(bundle.guard, str)
    yield "versions", _is_table_of(bundle.versions, str)
    yield "batches", isinstance(bundle.batches, list) and all(map(_is_micro_batch, bundle.batches))
    yield "model", bundle.model is None or _is_table_of(bundle.model, object)
    yield "optimizer", bundle.optimizer is None or isinstance(bundle.optimizer, dict)
    yield "left_out", isinstance(bundle.left_out, list) and all(isinstance(part, str) for part in bundle.left_out)
    yield "motions", isinstance(bundle.weight_growths, list) and all(map(_is_growth, bundle.weight_growths))


def _is_table_of(value: Any, of_type: type) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and isinstance(it, of_type) for key, it in value.items())


def _is_micro_batch(value: Any) -> bool:
    if not isinstance(value, dict) or not {"batch", "batch_idx", "rng"} <= value.keys():
        return False
    return isinstance(value["batch_idx"], int) and isinstance(value["rng"], Tensor)


def _is_growth(value: Any) -> bool:
    try:
        growth = WeightGrowth(**value)
    except TypeError:
        return False
    numbers = (growth.norm, growth.num_steps, growth.update, 0 if growth.before is None else growth.before)
    return isinstance(growth.name, str) and all(isinstance(number, (int, float)) for number in numbers)


def versions() -> dict[str, str]:
    """What may make a replay differ."""
    import lightning_gradguard  # noqa: PLC0415 - the package's own name, not one of its modules

    return {
        "lightning_gradguard": lightning_gradguard.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def plain_tree(value: Any, left_out: list[str], name: str = "") -> Any:  # noqa: PLR0911 - one a type
    """The same of tensors on the CPU and plain types only, copied; what is neither becomes None, and is listed.

    >>> missing = []
    >>> plain_tree({"x": (1, object())}, missing, "batch"), missing
    ({'x': (1, None)}, ["batch['x'][1]: a object"])
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            left_out.append(f"{name}: a {type(value).__name__} ({value.layout})")
            return None
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):  # or a subclass, as torch's version and numpy's numbers are
            return plain(value)
    if isinstance(value, Mapping):
        return {_plain_key(key): plain_tree(entry, left_out, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [plain_tree(entry, left_out, f"{name}[{index}]") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    left_out.append(f"{name}: a {type(value).__name__}")
    return None


def _plain_key(key: Any) -> Any:
    return key if type(key) in (str, int, float, bool) or key is None else str(key)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors and arrays in a tree."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(num_bytes(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(num_bytes(entry) for entry in value)
    return 0


def as_plain(weight_growths: tuple[WeightGrowth, ...]) -> list[dict[str, Any]]:
    """For `Bundle.weight_growths`."""
    return [asdict(growth) for growth in weight_growths]
