"""Names the culprit of a damaged step in a loop without a Trainer, by a function of the user's that runs it again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradguard.alert import Culprit
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.forensics.comparison import compare_gradients
from lightning_gradguard.forensics.nonfinite.layout import Variables
from lightning_gradguard.forensics.nonfinite.raised import is_gone_without_damage, is_in_torch, is_same
from lightning_gradguard.forensics.nonfinite.report import culprit_of
from lightning_gradguard.forensics.nonfinite.search import Search
from lightning_gradguard.forensics.nonfinite.suspects import suspects_of
from lightning_gradguard.forensics.nonfinite.trial import tried
from lightning_gradguard.forensics.state import RandomState, State, unchanged
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.record import Measurement, Position, Record

HOW = (
    "To learn who made it, give the guard a function that runs the step again: `Guard(..., replay=lambda: loss_of(batch))`."
)
"""What is said to whoever has not."""

_MAX_REPLAYS = 3
"""Damaged steps that are looked into."""


class RawLoop:
    """Replays damaged steps, up to three of a run.

    Module and batch are found among the variables that the function uses. Everything about the module is put back
    afterwards, and so are the random states. Where several ranks train together, all of them replay.

    Args:
        replay: runs forward, and gives the loss; or runs backward too, and gives None.
        parameters: those that are watched.
        scaler: what scales the loss; None: nothing does.
    """

    def __init__(
        self, replay: Callable[[], Tensor | None], parameters: Sequence[Tensor], scaler: GradScaler | None = None
    ) -> None:
        if not callable(replay):
            raise ValueError(
                f"`replay` must be a function without arguments that runs the step, got {replay!r}. As in "
                "`replay=lambda: loss_of(batch)`."
            )
        self._replay = replay
        self._parameters = parameters
        self._scaler = scaler
        self._num_left = _MAX_REPLAYS
        self._random = RandomState()

    def note(self, record: Record) -> None:  # noqa: ARG002 - called with every record
        """A step is done, and the next begins. Some ten microseconds."""
        self._random = RandomState()

    def __call__(
        self,
        position: Position,
        measurement: Measurement,
        kind: str,
        *,
        ends_run: bool = False,
    ) -> Culprit | None:
        """Who is to blame for a step; None if it can't be told. What ends the run is always looked into."""
        if kind != "nonfinite" or not (self._num_left or ends_run):
            return None
        self._num_left = max(self._num_left - 1, 0)
        culprit = None
        try:
            culprit = self._look(position)
        except Exception as error:  # noqa: BLE001 - training goes on as if nothing had been tried
            warnings.warn(
                f"The step could not be replayed ({type_and_text(error)}), so who is to blame is not known. "
                "Training goes on.",
                GuardWarning,
                stacklevel=2,
            )
        return self._agreed(culprit, measurement)

    def cause_of(self, error: Exception) -> tuple[Culprit, bool] | None:
        """The damage that an exception was raised because of; None if there is none, or it can't be told.

        Returns:
            Who made it, and whether torch has raised the exception.
        """
        variables = dict(_variables_of(self._replay))
        module = _module_among(variables, self._parameters)
        batch = Variables({name: value for name, value in variables.items() if _may_be_batch(value)})
        search = Search(module, follow_rows=True)

        def run(watch: Callable[[State], AbstractContextManager[object]]) -> Exception | None:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with unchanged(module) as state:
                    self._random.restore()
                    try:
                        with watch(state):
                            run_step(self._replay, self._scaler)
                    except Exception as again:  # noqa: BLE001 - it is the answer
                        return again
            return None

        again = run(lambda state: search.watch(batch, state.tensors))
        if again is None or search.blame is None or not is_same(error, again):
            return None
        if not is_gone_without_damage(lambda context: run(lambda _: context)):
            return None
        suspects = suspects_of(search.blame, search.layout, search.rows, None)
        culprit = culprit_of(search.blame, suspects, reproduced=True, root=_name_of(self._replay))
        return culprit, search.is_raised_by_operator or is_in_torch(error)

    def _look(self, position: Position) -> Culprit | None:
        variables = dict(_variables_of(self._replay))
        module = _module_among(variables, self._parameters)
        is_alone = Ranks.current().size == 1
        batch = Variables({name: value for name, value in variables.items() if _may_be_batch(value)})
        search = Search(module, follow_rows=not is_alone)
        reproduced, error = self._run(module, search, batch)
        if search.blame is not None and is_alone:
            detailed = Search(module, follow_rows=True)
            self._run(module, detailed, batch)
            if detailed.blame is not None and detailed.blame.is_like(search.blame):
                search = detailed
        blame = search.blame
        if blame is None:
            return None
        suspects = suspects_of(blame, search.layout, search.rows, None)
        root = _name_of(self._replay)
        culprit = culprit_of(blame, suspects, rank=position.rank, reproduced=reproduced, error=error, root=root)
        return tried(culprit, functools.partial(self._is_in_order, module)) if is_alone else culprit

    def _is_in_order(self, module: nn.Module, context: AbstractContextManager[object]) -> bool:
        """Whether no loss and no gradient is damaged in a replay inside a context."""
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with unchanged(module), context:
                self._random.restore()
                loss = run_step(self._replay, self._scaler)
                values = [it.grad for it in self._parameters if it.grad is not None]
                return all(bool(it.isfinite().all()) for it in ([] if loss is None else [loss]) + values)

    def _run(self, module: nn.Module, search: Search, batch: Variables) -> tuple[bool, float | None]:
        """One replay; whether it gave the gradients that are there, and their relative error."""
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradients: dict[int, Tensor] = {}
            with unchanged(module) as state:
                self._random.restore()
                with search.watch(batch, state.tensors):
                    run_step(self._replay, self._scaler)
                scale = 1.0 if self._scaler is None else self._scaler.get_scale()
                gradients = {id(it): it.grad / scale for it in self._parameters if it.grad is not None}
        return compare_gradients(gradients, self._parameters)

    def _agreed(self, culprit: Culprit | None, measurement: Measurement) -> Culprit | None:
        """One verdict on all ranks: that of the rank which was first to see damage, else of the first that found any."""
        ranks = Ranks.current()
        if ranks.size == 1:
            return culprit
        everyone: list[Culprit | None] = [None] * ranks.size
        torch.distributed.all_gather_object(everyone, culprit)
        first = None if measurement.damage is None else measurement.damage.rank
        found = [it for it in everyone if it is not None]
        return next((it for it in found if it.rank == first), found[0] if found else None)


def run_step(replay: Callable[[], Tensor | None], scaler: GradScaler | None) -> Tensor | None:
    """Forward, and backward where the function has not run it; the loss, where it gives one."""
    loss = replay()
    if not isinstance(loss, Tensor):
        return None
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _variables_of(function: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
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
            yield from _variables_of(value, depth + 1)


_MAX_DEPTH = 3
"""How far functions that call functions are followed."""


def _defaults_of(function: FunctionType) -> dict[str, Any]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    return {**(function.__kwdefaults__ or {}), **dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))}


def _module_among(variables: dict[str, Any], parameters: Sequence[Tensor]) -> nn.Module:
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


def _may_be_batch(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return isinstance(value, (dict, list, tuple)) and not isinstance(value, torch.Size)


def _name_of(function: Any) -> str:
    """Its name; "replay" for what has none."""
    name = getattr(getattr(function, "func", function), "__name__", "<")
    return "replay" if name.startswith("<") else str(name)
