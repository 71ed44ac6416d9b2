"""Applies the remedy of an alert, as it is printed, to the line that failed."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradguard.alert import Culprit

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
    "bmm": "mm",
    "linear": "mm",
    "rmatmul": "mm",
}
"""Functions of torch by what they come to."""


@dataclass(frozen=True)
class Change:
    """One line of code instead of another.

    Attributes:
        code: the new one.
        of: what it replaces.
        is_everywhere: whether it is meant for other lines than the culprit's too.
    """

    code: str
    of: str
    is_everywhere: bool


def changes_in(remedy: str) -> list[Change]:
    """What a remedy's text says is to be written; of alternatives the first."""
    found = []
    for sentence in re.split(r"(?<=`\.) ", remedy):
        codes = re.findall(r"`([^`]*\(.*?)`\.", sentence)
        if codes and not sentence.startswith("Or "):
            found.append(Change(codes[0], _function_of(codes[0]), "there write" in sentence))
    return found


def _function_of(code: str) -> str:
    for begin, of in (("with ", "mm"), ("x.bfloat16", "half"), ("x.sum()", "mean"), ("torch.where(m, x /", "div")):
        if code.startswith(begin):
            return of
    tree = ast.parse(code, mode="eval").body
    if isinstance(tree, ast.BinOp) and isinstance(tree.left, ast.Name):
        return "div"
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
        return "mul"
    calls = [it.func for it in ast.walk(tree) if isinstance(it, ast.Call)]
    named = [it.attr for it in calls if isinstance(it, ast.Attribute) and _MODULE.fullmatch(ast.unparse(it.value))]
    return _SAME.get(named[0], named[0]) if named else ""


_MODULE = re.compile(r"F|torch(\.\w+)?")


class Applied(TorchFunctionMode):
    """While it is active, the culprit's line is run as its remedy says.

    Args:
        culprit: whose remedy it is.
    """

    def __init__(self, culprit: Culprit) -> None:
        super().__init__()
        self.changes = changes_in(culprit.remedy)
        self._line = culprit.file, culprit.line
        self.used: set[str] = set()
        """The changes that were made."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function, or what is to be run instead."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_").removeprefix("linalg_")
        if func is Tensor.backward and kwargs.keys() <= {"gradient", "retain_graph", "create_graph", "inputs"}:
            return self._backward(*args, **kwargs)
        for change in self.changes:
            if _SAME.get(name, name) == change.of and (change.is_everywhere or self._is_here()):
                self.used.add(change.code)
                return _run(change.code, name, args, kwargs)
        return func(*args, **kwargs)

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: Any = None,
        create_graph: Any = None,
        inputs: Any = None,
    ) -> None:
        """As torch does it, but with hooks and recomputation seen."""
        begin = torch.ones_like(loss) if gradient is None else gradient
        keep = bool(create_graph if retain_graph is None else retain_graph)
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,),
                (begin,),
                keep,
                bool(create_graph),
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _is_here(self) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if (frame.f_code.co_filename, frame.f_lineno) == self._line:
                return True
            frame = frame.f_back
        return False


def _run(code: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    second = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], (int, tuple)) else None)
    if name.startswith("r") and name in ("rpow", "rmatmul"):
        x, second = second, x
    scope: dict[str, Any] = {"torch": torch, "F": F, "x": x, "y": second, "t": second, "p": second, "w": second, "dim": dim}
    if name == "square":
        scope["p"] = 2
    if "ctc_loss" in code:
        scope |= {"n": args[2], "k": args[3]}
    if "softmax" in code or "masked_fill" in code:
        scope["m"] = x == -torch.inf
    if code.endswith("* m"):
        scope["x"], scope["m"] = (x, second) if not bool(torch.as_tensor(x).isfinite().all()) else (second, x)
    if name == "linear":
        scope["w"] = second.T
    if "dim" in code and not isinstance(dim, int) and isinstance(x, Tensor) and "masked_fill" not in code:
        scope |= {"x": x.flatten(), "dim": 0}
    code = re.sub(r"^torch\.where\(m, (x / .*), 0\.0\)$", r"\1", code)
    code = re.sub(r"(?<=\))(\[\d\]|\.U)$", "", code)
    if code.startswith("with "):
        exec(code, scope)
        return scope["out"]
    out = eval(code, scope)
    if name in ("rtruediv", "rdiv"):
        out = out * second
    return out.unsqueeze(dim) if kwargs.get("keepdim") and isinstance(dim, int) and out.dim() < x.dim() else out
