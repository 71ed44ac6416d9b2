"""The numbers in remedies: what helps in float32 may vanish in float16."""

from __future__ import annotations

import torch

HALVES = (torch.float16, torch.bfloat16)
_FLOAT32 = {"eps": 1e-6, "small": 1e-8, "tiny": 1e-12, "mask": -1e9, "limit": 80.0, "limit2": 120.0, "square": 1e15}
_NUMBERS = {
    torch.float16: {"eps": 1e-3, "small": 1e-3, "tiny": 1e-6, "mask": -1e4, "limit": 10.0, "limit2": 15.0, "square": 100.0},
    torch.bfloat16: _FLOAT32 | {"eps": 1e-2},
    torch.float64: _FLOAT32 | {"limit": 700.0, "limit2": 1000.0, "square": 1e150},
}


_BEFORE_THE_CAST = ("eps", "small", "tiny", "mask")


def numbers_of(dtype: torch.dtype | None, half: torch.dtype | None = None) -> dict[str, float]:
    """The numbers that a remedy takes.

    Args:
        dtype: of the operator's result.
        half: a type of half precision that the step uses: the operator's input may have been cast back from it.

    Returns:
        eps: distance to the edge of a domain, relative to 1.
        small: takes the place of 0 where something is divided by it, or its logarithm taken.
        tiny: takes the place of 0 under a root.
        mask: takes the place of minus infinity in a mask.
        limit, limit2: largest exponent of e and of 2.
        square: largest number that is squared, with room for a sum.
    """
    numbers = _FLOAT32 if dtype is None else _NUMBERS.get(dtype, _FLOAT32)
    if half is None:
        return numbers
    return numbers | {name: max(numbers[name], numbers_of(half)[name]) for name in _BEFORE_THE_CAST}


def written(value: float) -> str:
    """As code has it.

    >>> written(1e-08), written(-1e9), written(80.0)
    ('1e-8', '-1e9', '80.0')
    """
    text = f"{value:.3g}"
    if "e" not in text:
        return str(value)
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"
