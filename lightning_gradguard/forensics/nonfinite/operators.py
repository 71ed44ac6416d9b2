"""What is known of an operator from its schema."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_gradguard.forensics.tensors import tensors_in

_FILLS = (
    "bernoulli_",
    "copy_",
    "exponential_",
    "fill_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
    "zero_",
)
_ARITHMETIC = (
    *("add_", "addmm_", "div_", "fmod_", "mul_", "pow_", "reciprocal_", "remainder_", "square_", "sub_", "xlogy_"),
    *("acos_", "acosh_", "asin_", "atanh_", "cosh_", "hypot_", "sinh_", "rsqrt_", "sqrt_", "cumprod_", "cumsum_"),
    *("digamma_", "erfinv_", "exp_", "exp2_", "expm1_", "lgamma_", "log_", "log10_", "log1p_", "log2_", "logit_"),
)
_CONSTANTS = ("full", "full_like", "lift_fresh", "lift_fresh_copy", "new_full", "scalar_tensor")


class Operator:
    """An operator.

    Args:
        func: one of `torch.ops`, with its overload.

    Attributes:
        name: without namespace and overload.
        is_view: whether the result is a part of what goes in.
        is_constant: whether it makes a tensor of values that somebody has written down.
        is_empty: whether it makes a tensor without values.
    """

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name: str = func.overloadpacket.__name__
        self._names = names = [argument.name for argument in schema.arguments]
        self._defaults = [(argument.name, argument.default_value) for argument in schema.arguments]
        self.is_constant = self.name in _CONSTANTS
        self.is_view = bool(func.is_view) and not self.is_constant
        self.is_empty = "empty" in self.name or self.name in ("set_", "resize_")
        self._written = [
            index for index, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write
        ]
        self._ignores_written = self.name in _FILLS or "out" in names
        self._statistics = [index for index, name in enumerate(names) if name in ("running_mean", "running_var")]
        self._training = next((index for index, name in enumerate(names) if name in ("training", "train")), None)

    def writes(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors that it changes in place."""
        return [tensor for index in self._written for tensor in tensors_in(_at(args, index))] if self._written else []

    def reads(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
        """The arguments that the result depends on."""
        # In training the running statistics are written, not read; the step's own damage is in them already.
        ignored = self._statistics if self._training is not None and _at(args, self._training) else []
        for index, value in enumerate(args):
            if index not in ignored and not (self._ignores_written and index in self._written):
                yield value
        yield from (value for name, value in kwargs.items() if name != "out")

    def overwrites(self, args: Sequence[Any]) -> list[Tensor]:
        """What it reads and writes over, if it works with the values in it, as `div_` does."""
        return [] if self._ignores_written or self.name not in _ARITHMETIC else self.writes(args)

    def named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The arguments with their names."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        yield from ((name, given.get(name, default)) for name, default in self._defaults if name != "out")

    def puts_infinity(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether somebody has written NaN or infinity down as its argument, as to `masked_fill`, or made it a constant."""
        return self.is_constant or any(_is_nonfinite_scalar(value) for value in (*args, *kwargs.values()))


def _at(args: Sequence[Any], index: int) -> Any:
    return args[index] if index < len(args) else None


def _is_nonfinite_scalar(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_nonfinite_scalar(entry) for entry in value)
    return isinstance(value, float) and not math.isfinite(value)
