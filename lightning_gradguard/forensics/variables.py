"""The variables that a function refers to: the module that it trains, its batch, and what it would use up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from io import IOBase
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.forensics.nonfinite.layout import iterators_in


def variables_of(function: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What a function and those that it calls refer to, by name: variables around them or bound to them, and globals."""
    if isinstance(function, functools.partial):
        yield from ((f"argument {index}", value) for index, value in enumerate(function.args))
        yield from function.keywords.items()
        function = function.func
    if (owner := getattr(function, "__self__", None)) is not None:
        yield from ([("self", owner)] if isinstance(owner, nn.Module) else vars(owner).items())
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType):
        return
    found = {**inspect.getclosurevars(inner).globals, **inspect.getclosurevars(inner).nonlocals, **_defaults_of(inner)}
    for value in found.values():
        if not isinstance(value, (nn.Module, Optimizer, ModuleType, type, FunctionType, MethodType, functools.partial)):
            # What a plain object holds, as in `lambda: self.loss(self.batch)`.
            yield from getattr(value, "__dict__", {}).items()
    yield from found.items()
    for value in found.values():
        if isinstance(value, (FunctionType, MethodType, functools.partial)) and depth < _MAX_DEPTH:
            yield from variables_of(value, depth + 1)


def iterator_of(replay: Callable[[], Any]) -> str | None:
    """Name of what a function uses that can be read only once, as the iterator over batches; None where there is none."""
    used = set(_names_in(replay))
    for name, value in variables_of(replay):
        is_container = isinstance(value, (dict, list, tuple))
        if (name in used or " " in name) and (is_container or isinstance(value, Iterator)) and not isinstance(value, IOBase):
            found = next(iterators_in(value, name), None)
            if found is not None:
                return found
    return None


def _names_in(function: Any, depth: int = 0) -> Iterator[str]:
    """The names that stand in the code of a function and of those that it calls; what else an object holds is not used."""
    if isinstance(function, functools.partial):
        yield from function.keywords
        function = function.func
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType):
        return
    yield from _names_in_code(inner.__code__)
    for _, value in variables_of(inner) if depth < _MAX_DEPTH else ():
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            yield from _names_in(value, depth + 1)


def _names_in_code(code: CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_freevars, *code.co_varnames)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in_code(inner)


_MAX_DEPTH = 3
"""How far functions that call functions are followed."""


def _defaults_of(function: FunctionType) -> dict[str, Any]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    return {**(function.__kwdefaults__ or {}), **dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))}


def module_among(variables: dict[str, Any], parameters: Sequence[Tensor]) -> nn.Module:
    """The module that holds the parameters; where several do together, one that holds these.

    Raises:
        ValueError: if there is none.
    """
    modules = {name: value for name, value in variables.items() if isinstance(value, nn.Module)}
    for value in [value for value in variables.values() if not isinstance(value, (nn.Module, Optimizer))]:
        inner = {key: it for key, it in getattr(value, "__dict__", {}).items() if isinstance(it, nn.Module)}
        modules = {**inner, **modules}
    watched = {id(parameter) for parameter in parameters}
    whole = [module for module in modules.values() if watched <= {id(it) for it in module.parameters()}]
    if whole:
        return whole[0]
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name.replace(".", "_"), module)
    if not watched <= {id(it) for it in root.parameters()}:
        raise ValueError(
            "`replay` refers to no module with the parameters that are watched, whose state could be put back. Let it be a "
            "function that uses the module by name, as `lambda: loss_of(model(x), y)`"
        )
    return root


def may_be_batch(value: Any) -> bool:
    """Whether a variable may hold samples."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return isinstance(value, (dict, list, tuple)) and not isinstance(value, torch.Size)
