"""Files of `torch.save` from anywhere, read as tensors and plain types.

`torch.load(weights_only=True)` runs no code of the file. It still believes what the file says about sizes, and its errors
advise to switch it off. So the sizes are checked here before it is called and after, and its errors are said in other words.
"""

from __future__ import annotations

import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.wording import counted

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_LEAVES = 10_000_000
_MAX_DEPTH = 100
_ARCHIVE = b"PK\x03\x04"
_CONTAINERS = (Mapping, list, tuple, set, frozenset)


class UnreadableError(ValueError):
    """A file that can't be read without running code of it, or at all.

    Attributes:
        foreign: the first type in it that is neither a tensor nor plain; None if that is not the reason.
    """

    def __init__(self, message: str, foreign: str | None = None) -> None:
        super().__init__(message)
        self.foreign = foreign


def load_plain(path: str | Path) -> Any:
    """Read a file onto the CPU.

    Raises:
        UnreadableError: if it is none of `torch.save`, holds other objects than tensors and plain types, claims sizes that
            it does not have, or is built to be endless. The message is one line.
    """
    path = Path(path)
    try:
        num_bytes = _size_of(path)
        with path.open("rb") as file:
            is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
        if is_archive:
            _check_archive(path, num_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} can't be read: {error.strerror or error}.") from error
    except Exception as error:  # noqa: BLE001 - torch raises nearly anything for a damaged file
        raise _in_other_words(path, error) from None
    _check_content(path, content, num_bytes)
    return content


def _size_of(path: Path) -> int:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a named pipe would block
        raise UnreadableError(f"{path} is no regular file.")
    return about.st_size


def _in_other_words(path: Path, error: Exception) -> UnreadableError:
    text = str(error)
    if found := re.search(
        r"GLOBAL\s+([\w.]+)|unsupported GLOBAL ([\w.]+)|function <?(?:class|function)?\s*'?([\w.]+)", text
    ):
        name = next(filter(None, found.groups()))
        return UnreadableError(f"{path} holds {name}, which is neither a tensor nor a plain type.", name)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return UnreadableError(f"{path} claims to hold more than there is memory for.")
    return UnreadableError(f"{path} is not for torch.load: damaged, or no file of torch.save ({type(error).__name__}).")


def _check_archive(path: Path, num_bytes: int) -> None:
    """Whether the parts are together no larger than the file, and each as large as the tensors in it claim."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise UnreadableError(f"{path} is compressed, which torch.save never does.")
        if sum(part.file_size for part in parts) > num_bytes:
            raise UnreadableError(f"{path} claims to hold more than its {counted(num_bytes, 'byte')}.")
        sizes = {part.filename.partition("/")[2]: part.file_size for part in parts}
        pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableError(f"{path} is an archive, but none of torch.save.")
        with archive.open(pickles[0]) as file:
            _Storages(file, path, sizes).load()


class _Inert:
    """Stands for whatever a file names, and does nothing."""

    name = ""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __call__(self, *_: object, **__: object) -> Self:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, entry: object) -> None:
        """Forget it."""

    extend = append


class _Storages(pickle._Unpickler):
    """Goes through a pickle for the sizes of the tensors' storages; makes nothing of it, and runs nothing.

    It is the one written in Python: the other takes memory for as many memos as a file claims to have.
    """

    def __init__(self, file: Any, path: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(file)
        self._path = path
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """Something that does nothing, whatever is asked for."""
        return type("_Named", (_Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its size has to be that of its part of the file."""
        _, kind, key, _, numel, *_ = pid
        num_bytes = numel * _element_size(kind.name)
        if not 0 <= num_bytes <= self._sizes.get(f"data/{key}", 0):
            raise UnreadableError(f"{self._path} claims a tensor of {counted(num_bytes, 'byte')} and does not hold them.")
        return _Inert()


def _element_size(storage: str) -> int:
    """Bytes of an element, by a storage's name, as `torch.FloatStorage`; 1 where it is of plain bytes."""
    dtypes = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
    dtype = dtypes.get(storage.rpartition(".")[2])
    return 1 if dtype is None else dtype.itemsize


def _check_content(path: Path, content: Any, num_bytes: int) -> None:
    """Whether the tensors have no more than the file's bytes, and the containers an end."""
    storages: dict[int, int] = {}
    num_leaves: dict[int, int] = {}

    def count(value: Any, depth: int) -> int:
        if isinstance(value, Tensor):
            _note_storages(value, storages)
        elif isinstance(value, bytearray):
            storages[id(value)] = len(value)
        if not isinstance(value, _CONTAINERS):
            return 1
        if depth > _MAX_DEPTH:
            raise UnreadableError(f"{path} is nested too deeply.")
        if id(value) not in num_leaves:
            num_leaves[id(value)] = _MAX_LEAVES + 1  # as long as it is being counted: it may hold itself
            entries = value.values() if isinstance(value, Mapping) else value
            num_leaves[id(value)] = 1 + sum(count(entry, depth + 1) for entry in entries)
        if num_leaves[id(value)] > _MAX_LEAVES:
            raise UnreadableError(f"{path} is endless: the same parts appear in it over and over.")
        return num_leaves[id(value)]

    count(content, 0)
    if (claimed := sum(storages.values())) > num_bytes:
        raise UnreadableError(f"{path} claims {counted(claimed, 'byte')} of tensors, and has {num_bytes:,}.")


def _note_storages(tensor: Tensor, storages: dict[int, int]) -> None:
    for part in parts_of(tensor):
        if not part.is_meta:
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that a tensor is made of: itself, or the values and indices of a sparse one; none if unknown."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return ()
    if tensor.layout is torch.strided:
        return () if tensor.is_quantized or tensor.is_nested else (tensor,)
    if tensor.layout is torch.sparse_coo:
        return (tensor._values(), tensor._indices())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.values(), tensor.crow_indices(), tensor.col_indices())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.values(), tensor.ccol_indices(), tensor.row_indices())
    return ()
