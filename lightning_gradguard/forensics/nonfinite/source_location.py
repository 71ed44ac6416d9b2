"""Where in the user's code something happens: module and line."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_gradguard.alert import Frame
from lightning_gradguard.layout import clean_name

_PACKAGES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics")
_OWN = str(Path(__file__).parents[2]) + "/"
_STDLIB = sysconfig.get_path("stdlib") + "/"
_HOOKS = torch.utils.hooks.__file__
_ENGINE = "_engine_run_backward"
"""The function of `torch.autograd.graph` below which, on the stack, is whoever called `backward()`."""


@dataclass(frozen=True)
class Line:
    """A line of code."""

    file: str
    number: int

    @property
    def source(self) -> str:
        """Its text."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        cell = cell_of(self.file)
        return f"{Path(self.file).name}:{self.number}" if cell is None else f"cell {cell}, line {self.number}"


@dataclass(frozen=True)
class SourceLocation:
    """Where something happens.

    Attributes:
        module: its path.
        line: where one is known.
        frames: the calls that led there, innermost first, where these are noted.
        via: the function of torch's that the line calls, if that is what runs the operator; noted with the frames.
        hook_on: the parameter or module whose hook it is, in words; "" for any other hook.
    """

    module: str = ""
    line: Line | None = None
    frames: tuple[Frame, ...] = ()
    via: str = ""
    hook_on: str = ""


def cell_of(file: str) -> str | None:
    """What IPython and Jupyter call the cell that a file stands for, as `In[3]`; None for any other file."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None:
        return None
    named = shell.compile.format_code_name(file)
    return None if named is None else str(named[1])


def shown_file(file: str) -> str:
    """The name of a file for people: a cell's own, since what it is compiled from is a temporary file or none."""
    return cell_of(file) or file


_known: dict[CodeType, bool] = {}


def _is_foreign(code: CodeType) -> bool:
    foreign = _known.get(code)
    if foreign is None:
        foreign = _known[code] = _belongs_to_a_package(code.co_filename)
    return foreign


def current_line() -> Line | None:
    """The innermost line outside torch, lightning, the standard library and this package; None where there is none.

    In a backward pass only what the engine itself runs: `Function.backward`, hooks, recomputation.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not _is_foreign(code):
            return Line(code.co_filename, frame.f_lineno)
        if code.co_name == _ENGINE:
            return None
        frame = frame.f_back
    return None


def current_frames() -> tuple[Frame, ...]:
    """The user's calls that lead here, innermost first, and after them those of libraries, one for each library.

    In a backward pass only what the engine runs. Torch, Lightning, the standard library and this package are left out.
    """
    own: list[Frame] = []
    libraries: dict[str, Frame] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(own) < MAX_FRAMES and frame.f_code.co_name != _RAW_LOOP:
        code = frame.f_code
        if not _is_foreign(code):
            line = Line(code.co_filename, frame.f_lineno)
            called = Frame(shown_file(line.file), line.number, _name_of(frame), line.source)
            library = _library_of(code.co_filename)
            if library is None:
                own.append(called)
            else:
                libraries.setdefault(library, called)
            if code.co_name in _OUTERMOST:
                break
        elif code.co_name == _ENGINE:
            break
        frame = frame.f_back
    return tuple([*own, *libraries.values()][:MAX_FRAMES])


def current_location(module: str, *, is_detailed: bool) -> SourceLocation:
    """Where the code is that runs.

    Args:
        module: the one that runs.
        is_detailed: whether to look at the whole stack, which takes longer.
    """
    if not is_detailed:
        return SourceLocation(module, current_line())
    return SourceLocation(module, current_line(), current_frames(), current_torch_function())


def current_torch_function() -> str:
    """The function of torch's, of those made of several operators, that other code has called; "" where it is none."""
    name = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_foreign(frame.f_code) and frame.f_code.co_name != _ENGINE:
        if frame.f_code.co_filename.startswith(_COMPOSED):
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def is_function_of_a_user(node: Any) -> bool:
    """Whether an autograd node is a `Function` written in Python, other than that beside which torch runs modules' hooks."""
    own = getattr(type(node), "_forward_cls", None)
    return isinstance(node, torch.autograd.function.BackwardCFunction) and own is not BackwardHookFunction


_COMPOSED = tuple(f"{Path(torch.__file__).parent}/{part}" for part in ("nn/functional.py", "distributions/", "nn/utils/"))

MAX_FRAMES = 5
_RAW_LOOP = "run_step"
"""What calls the user's function in a loop without a Trainer."""
_OUTERMOST = ("training_step",)
"""What the Trainer calls; whoever started it is of no interest."""


def _name_of(frame: FrameType) -> str:
    """As `Model.loss`, by the class of `self`: code has no qualified name before Python 3.11."""
    name = frame.f_code.co_name
    owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
    return name if owner is None else f"{type(owner).__name__}.{name}"


def _library_of(file: str) -> str | None:
    parts = file.replace("\\", "/").split("/")
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    return None


def _belongs_to_a_package(file: str) -> bool:
    if file.startswith(("<frozen", _OWN)):
        return True
    parts = file.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return parts[len(parts) - parts[::-1].index("site-packages")] in _PACKAGES
    return file.startswith((_STDLIB, str(Path(torch.__file__).parent)))


class ModuleStack:
    """Which module is running; two global hooks, for as long as it is watched."""

    def __init__(self, root: nn.Module) -> None:
        self._paths = {id(module): clean_name(path) for path, module in root.named_modules()}
        self._names = {id(parameter): clean_name(name) for name, parameter in root.named_parameters()}
        self._stack: list[str] = []

    def hooked(self, node: Any) -> tuple[str, str] | None:
        """Path of the module, and in words what the hook is on, that runs beside a node; None where it is on another tensor.

        A parameter's hooks run beside the node that adds up its gradient, and those of a module's backward pass below a
        function of torch's that knows the module.
        """
        name = self._names.get(id(getattr(node, "variable", None)))
        if name is not None:
            return name.rpartition(".")[0], f"`{name}`"
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != _ENGINE:
            if frame.f_code.co_filename == _HOOKS:
                module = getattr(frame.f_locals.get("self"), "module", None)
                path = self._paths.get(id(module))
                return None if path is None else (path, f"the backward pass of `{path}`")
            frame = frame.f_back
        return None

    @property
    def current(self) -> str:
        """Path of the innermost module that runs, "" for the root's own code."""
        return self._stack[-1] if self._stack else ""

    @property
    def is_inside(self) -> bool:
        """Whether a module is being called at all."""
        return bool(self._stack)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the calls of modules."""
        before = register_module_forward_pre_hook(self._enter)
        # Also where forward ends by an exception, as recomputation does once it has what it needs.
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002 - torch's signature
        # A module that was made on the way, and is no part of the root, counts as its caller's code.
        self._stack.append(self._paths.get(id(module), self.current))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002 - torch's signature
        if self._stack:
            self._stack.pop()
