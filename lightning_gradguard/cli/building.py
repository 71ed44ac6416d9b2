"""Makes the module that a bad step is run again on, from what a user names."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_gradguard.cli.terminal import fail, one_line
from lightning_gradguard.files.torch_files import UnreadableError, load_plain


def build(path: str, arguments: Iterable[str], checkpoint: Path | None) -> nn.Module:
    """Import and call `package.module:function`; says what is wrong if that does not give a module.

    Args:
        path: of the function or class.
        arguments: for it, each `name=value`; a value is JSON, or else a text.
        checkpoint: whose `hyper_parameters` are arguments as well.
    """
    function = _find(path)
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        fail(
            f"`--module {path}` is of type {type(function).__name__}; it must be a class, or a function that makes a module."
        )
    values = {**(_hyper_parameters(checkpoint, function) if checkpoint is not None else {}), **_given(arguments)}
    try:
        built = function(**values)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user's
        fail(
            f"`--module {path}` could not be made: {one_line(error)}. It was called with ({_listed(values)}) and takes "
            f"{_signature(function)}. Pass arguments by `--arg name=value`, or a checkpoint of it, whose `hyper_parameters` "
            "are used, by `--checkpoint`."
        )
    if not isinstance(built, nn.Module):
        fail(f"`--module {path}` gave an object of type {type(built).__name__}, and not a module.")
    return built


def _find(path: str) -> Any:
    where, _, name = path.partition(":")
    if not where or not name:
        fail(f"`--module` must look like package.module:function, got {path!r}.")
    # As with `python -m`. All that this package needs is imported by now, so no file here can stand in for it.
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        fail(f"`--module {path}` can't be found: {one_line(error)}.")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user's
        fail(f"`--module {path}` can't be imported: {one_line(error)}.")
    return found


def _given(arguments: Iterable[str]) -> dict[str, Any]:
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name.isidentifier() or not equals:
            fail(f"`--arg` must look like name=value, got {argument!r}.")
        values[name] = _value_of(text)
    return values


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _hyper_parameters(checkpoint: Path, function: Callable[..., Any]) -> dict[str, Any]:
    """Those that Lightning has saved, as it would pass them itself."""
    try:
        content = load_plain(checkpoint)
    except UnreadableError as error:
        fail(f"{error} So its `hyper_parameters` can't be used; pass them by `--arg name=value`.")
    saved = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        fail(f"{checkpoint} has no `hyper_parameters`: the module does not call `save_hyperparameters`. Use `--arg`.")
    taken = _parameters(function) or {}
    name = content.get("hparams_name")
    if name not in (None, "kwargs") and name in taken:
        return {name: saved}
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    return {str(key): value for key, value in saved.items() if takes_all or key in taken}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """None where that isn't known, as of some built-in types."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def _signature(function: Callable[..., Any]) -> str:
    taken = _parameters(function)
    if taken is None:
        return "(...)"
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in taken.values()]
    return f"({', '.join(map(str, bare))})"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
