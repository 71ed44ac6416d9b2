"""Tries a remedy before it is printed: the failing line is run as the remedy says, and the step must be in order then."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.nonfinite.source_location import shown_file

_SAME = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "rtruediv": "reciprocal",
    "rdiv": "reciprocal",
    "rpow": "pow",
    "square": "pow",
    "rmul": "mul",
    "multiply": "mul",
    "matmul": "mm",
    "rmatmul": "mm",
    "bmm": "mm",
    "linear": "mm",
    "einsum": "mm",
}
"""Functions of torch by the operator that a remedy is written for."""
_BEGINS = (("with ", "mm"), ("x.bfloat16", "half"), ("x.sum()", "mean"), ("torch.where(m, x /", "div"))
_MODULE = re.compile(r"F|torch(\.\w+)?")
_BACKWARD = {"gradient", "retain_graph", "create_graph", "inputs"}


@dataclass(frozen=True)
class Change:
    """One line of code instead of another.

    Attributes:
        code: the new one.
        of: the function that it replaces.
        is_everywhere: whether it is meant for other lines than the culprit's too.
    """

    code: str
    of: str
    is_everywhere: bool


def changes_in(remedy: str) -> list[Change]:
    """What a remedy's text says is to be written; of alternatives the first.

    >>> changes_in("Keep the input above 0: `torch.log(x.clamp_min(1e-8))`.")
    [Change(code='torch.log(x.clamp_min(1e-8))', of='log', is_everywhere=False)]
    """
    found = []
    for sentence in re.split(r"(?<=`\.) ", remedy):
        codes = re.findall(r"`([^`]*\(.*?)`\.", sentence)
        if codes and not sentence.startswith("Or "):
            found.append(Change(codes[0], _function_of(codes[0]), "there write" in sentence))
    return found


def _function_of(code: str) -> str:
    for begin, of in _BEGINS:
        if code.startswith(begin):
            return of
    tree = ast.parse(code, mode="eval").body
    if isinstance(tree, ast.BinOp) and isinstance(tree.left, ast.Name):
        return "div"
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
        return "mul"
    called = [it.func for it in ast.walk(tree) if isinstance(it, ast.Call)]
    named = [it.attr for it in called if isinstance(it, ast.Attribute) and _MODULE.fullmatch(ast.unparse(it.value))]
    return _SAME.get(named[0], named[0]) if named else ""


class Trial(TorchFunctionMode):
    """While it is active, the culprit's line is run as its remedy says.

    Args:
        culprit: whose remedy it is.
    """

    def __init__(self, culprit: Culprit) -> None:
        super().__init__()
        self._changes = changes_in(culprit.remedy)
        self._line = culprit.file, culprit.line
        self._made: set[str] = set()
        self._is_unsure = False

    @property
    def is_whole(self) -> bool:
        """Whether all that the remedy says has been done; not where torch's own code runs the operator, say."""
        return not self._is_unsure and bool(self._changes) and {it.code for it in self._changes} == self._made

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, or what is to be run instead."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_").removeprefix("linalg_")
        if func is Tensor.backward and kwargs.keys() <= _BACKWARD:
            return self._backward(*args, **kwargs)
        for change in self._changes:
            if _SAME.get(name, name) == change.of:
                if change.is_everywhere or self._is_here():
                    self._made.add(change.code)
                    return self._run(change.code, func, name, args, kwargs)
                # A checkpoint runs its function again without the line that has called it.
                self._is_unsure |= torch._C._current_autograd_node() is not None
        return func(*args, **kwargs)

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,  # noqa: FBT001 - torch's signature
        create_graph: bool | None = None,  # noqa: FBT001
        inputs: Any = None,
    ) -> None:
        """As torch does it, but so that hooks and the recomputation of checkpoints are changed too."""
        begin = torch.ones_like(loss) if gradient is None else gradient
        keep = bool(create_graph if retain_graph is None else retain_graph)
        of = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,), (begin,), keep, bool(create_graph), of, allow_unreachable=True, accumulate_grad=True
            )

    def _run(self, code: str, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if code.startswith("with "):  # around the line, whatever product that is
                tensor = next(it for it in args if isinstance(it, Tensor))
                scope = {"torch": torch, "x": tensor, "line": lambda: func(*args, **kwargs)}
                exec(re.sub("out = .*", "out = line()", code), scope)  # noqa: S102
                return scope["out"]
            return _run(code, name, args, kwargs)
        except Exception as error:
            # The remedy is not written for such a line; but a checkpoint ends its recomputation by an exception.
            self._is_unsure |= type(error).__module__ != "torch.utils.checkpoint"
            raise

    def _is_here(self) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if (shown_file(frame.f_code.co_filename), frame.f_lineno) == self._line:
                return True
            frame = frame.f_back
        return False


def _run(code: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a remedy's code, which is one of our own, on the arguments of the function that it replaces."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], (int, tuple)) else None)
    scope = _scope(code, name, args, kwargs, dim)
    code = re.sub(r"^torch\.where\(m, (x / .*), 0\.0\)$", r"\1", code)
    code = re.sub(r"(?<=\))(\[\d\]|\.U)$", "", code)  # all results, and not only the one that the remedy is about
    out = eval(code, scope)  # noqa: S307
    if name in ("rtruediv", "rdiv"):
        return out * args[1]
    is_kept = bool(kwargs.get("keepdim")) and isinstance(dim, int) and out.dim() < args[0].dim()
    return out.unsqueeze(dim) if is_kept else out


def _scope(code: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dim: Any) -> dict[str, Any]:
    """What the names in a remedy's code stand for."""
    x: Any = args[0]
    second: Any = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    if name in ("rpow", "rmatmul") or (name == "pow" and not isinstance(x, Tensor)):
        x, second = second, x
    scope: dict[str, Any] = {"torch": torch, "F": functional, **dict.fromkeys("ytpw", second), "x": x, "dim": dim}
    if name == "square":
        scope["p"] = 2
    elif name == "linear":
        scope["w"] = second.T
    elif name == "ctc_loss":
        scope |= {"n": args[2], "k": args[3]}
    if "masked_fill" in code:
        scope["m"] = x == -torch.inf
    elif code.endswith("* m"):
        is_mask = bool(torch.as_tensor(x).isfinite().all())
        scope |= {"x": second, "m": x} if is_mask else {"m": second}
    elif "dim" in code and not isinstance(dim, int):
        scope |= {"x": x.flatten(), "dim": 0}
    return scope


def tried(culprit: Culprit, is_in_order: Callable[[AbstractContextManager[object]], bool]) -> Culprit:
    """The same culprit, without its remedy if the step is still damaged with that in place.

    Args:
        culprit: of a damaged step.
        is_in_order: replays the step inside a context, and says whether no loss and no gradient is damaged.
    """
    if culprit.phase not in ("forward", "backward") or not culprit.remedy:
        return culprit
    trial = Trial(culprit)
    try:
        has_helped = is_in_order(trial)
    except Exception:  # noqa: BLE001 - code that does not fit its line, or with which the step does not run
        has_helped = False
    return culprit if has_helped or not trial.is_whole else replace(culprit, remedy="")
