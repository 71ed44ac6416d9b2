"""When a known failure is the right one: what is asked of a damaged result and of the values that went in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lightning_gradguard.forensics.nonfinite.numbers import numbers_of
from lightning_gradguard.forensics.nonfinite.operands import Operand, Place
from lightning_gradguard.forensics.nonfinite.provenance import Provenance

Condition = Callable[[Provenance], bool]


def named(provenance: Provenance, name: str) -> Operand | None:
    """One of the operands; None if it is not known."""
    return next((operand for operand in provenance.operands if operand.name == name), None)


def value_of(provenance: Provenance, name: str) -> float | None:
    """An operand's value at the first damaged element; None if it is not known."""
    operand = named(provenance, name)
    return None if operand is None or operand.at is None else operand.at.value


def at(name: str, holds: Callable[[float], bool]) -> Condition:
    """An operand's value at the first damaged element; not fulfilled where that is not known."""

    def fits(provenance: Provenance) -> bool:
        value = value_of(provenance, name)
        return value is not None and holds(value)

    return fits


def zero(name: str) -> Condition:
    """An operand is 0."""
    return at(name, lambda value: value == 0)


def near_zero(name: str) -> Condition:
    """An operand is so small that dividing by it is no better than dividing by zero."""
    return at(name, lambda value: abs(value) < 1e-8)


def at_most(name: str, limit: float) -> Condition:
    """An operand is not above a limit."""
    return at(name, lambda value: value <= limit)


def at_least(name: str, limit: float) -> Condition:
    """An operand is not below a limit."""
    return at(name, lambda value: value >= limit)


def below(name: str, limit: float) -> Condition:
    """An operand is below a limit."""
    return at(name, lambda value: value < limit)


def outside(name: str, low: float, high: float) -> Condition:
    """An operand is not strictly between two limits."""
    return at(name, lambda value: value <= low or value >= high)


def between(name: str, low: float, high: float) -> Condition:
    """An operand is strictly between two limits."""
    return at(name, lambda value: low < value < high)


def whole_number(name: str) -> Condition:
    """An operand is an integer."""
    return at(name, lambda value: math.isfinite(value) and value == math.floor(value))


def broken(name: str) -> Condition:
    """An operand is finite and no integer."""
    return at(name, lambda value: math.isfinite(value) and value != math.floor(value))


def infinite(name: str) -> Condition:
    """An operand is one of the infinities."""
    return at(name, math.isinf)


def known(name: str) -> Condition:
    """An operand's value is known, whatever it is."""
    return at(name, lambda value: True)  # noqa: ARG005


def whole(name: str, holds: Callable[[Operand], bool]) -> Condition:
    """An operand as a whole; not fulfilled where it is not known."""

    def fits(provenance: Provenance) -> bool:
        operand = named(provenance, name)
        return operand is not None and holds(operand)

    return fits


def forward(provenance: Provenance) -> bool:
    """The forward pass made it, or an operator in a hook of the user's."""
    return not provenance.is_backward or provenance.is_hook


def backward(provenance: Provenance) -> bool:
    """The backward pass made it, in the derivative of an operator."""
    return not forward(provenance)


def fresh(provenance: Provenance) -> bool:
    """All that went in was finite."""
    return not provenance.parents and not written_down(provenance)


def written_down(provenance: Provenance) -> bool:
    """A number in the code is NaN or infinite."""
    numbers = [operand.at for operand in provenance.operands if operand.is_number and operand.at is not None]
    return any(not math.isfinite(place.value) for place in numbers)


def from_forward(provenance: Provenance) -> bool:
    """A backward operator has taken in damage of the forward pass."""
    return backward(provenance) and any(not parent.is_backward for parent in provenance.parents)


def is_nan(provenance: Provenance) -> bool:
    """NaN came out."""
    return provenance.flaw.has_nan


def is_inf(provenance: Provenance) -> bool:
    """Infinity came out, and no NaN."""
    return provenance.flaw.has_inf


def without_nan(provenance: Provenance) -> bool:
    """No NaN went in."""
    return not any(parent.flaw.has_nan for parent in provenance.parents)


def zero_times_infinity(provenance: Provenance) -> bool:
    """One factor is 0 and the other infinite."""
    factors = {abs(value) for name in ("self", "other") if (value := value_of(provenance, name)) is not None}
    return factors == {0.0, math.inf}


def half(provenance: Provenance) -> bool:
    """The result is float16."""
    return provenance.dtype is torch.float16


def wide(provenance: Provenance) -> bool:
    """The step has not used float16, whose tensors can't be clamped to a number beyond its largest."""
    return provenance.half is not torch.float16


def quotient_fits(provenance: Provenance) -> bool:
    """The dividend is still finite when divided by the number that the remedy puts in place of zero."""
    dividend, dtype = value_of(provenance, "self"), provenance.dtype or torch.float32
    return dividend is not None and abs(dividend) / numbers_of(dtype, provenance.half)["small"] < torch.finfo(dtype).max


def power_fits(provenance: Provenance) -> bool:
    """The power of the number that the remedy puts in place of zero is still finite."""
    exponent, dtype = value_of(provenance, "exponent"), provenance.dtype or torch.float32
    if exponent is None:
        return False
    return -exponent * math.log10(1 / numbers_of(dtype, provenance.half)["small"]) < math.log10(torch.finfo(dtype).max) - 1


def power_overflows(provenance: Provenance) -> bool:
    """A base beyond the largest whose power fits, and that is above 1."""
    bound = power_bound(provenance)
    return bound is not None and at("self", lambda value: abs(value) > bound)(provenance)


def power_bound(provenance: Provenance) -> float | None:
    """Largest base whose power is well inside the type, rounded down; None where no bound above 1 helps."""
    exponent, dtype = value_of(provenance, "exponent"), provenance.dtype or torch.float32
    if exponent is None or exponent <= 1:
        return None
    bound = float(_well_inside(dtype) ** (1 / exponent))
    step = 10.0 ** (math.floor(math.log10(bound)) - 1)
    bound = float(f"{math.floor(bound / step) * step:.2g}")
    return bound if bound > 1 else None


def exponent_overflows(provenance: Provenance) -> bool:
    """An exponent beyond the largest for which the power of a number in the code fits."""
    top = exponent_bound(provenance)
    return top is not None and at("exponent", lambda value: value > top)(provenance)


def exponent_bound(provenance: Provenance) -> float | None:
    """Largest exponent for which the power of a number in the code is well inside the type; None for no such number."""
    base, dtype = named(provenance, "self"), provenance.dtype or torch.float32
    if base is None or base.at is None or not base.is_number or base.at.value <= 1:
        return None
    return float(math.floor(math.log(_well_inside(dtype)) / math.log(base.at.value)))


def _well_inside(dtype: torch.dtype) -> float:
    """A number that leaves room for sums, where the type has any to spare."""
    return torch.finfo(dtype).max * (0.25 if dtype is torch.float16 else 1e-4)


def beyond_limit(provenance: Provenance) -> bool:
    """An exponent that is too large, and no other infinity."""
    limit = numbers_of(provenance.dtype)["limit2" if provenance.op.startswith("exp2") else "limit"]
    return at("self", lambda value: limit <= abs(value) < math.inf)(provenance)


def norm_fits(provenance: Provenance) -> bool:
    """A norm overflows only on the way: it fits into the type itself."""
    bound = max((2 * abs(peak.value) * operand.size for operand, peak in _peaks(provenance)), default=math.inf)
    return provenance.dtype is torch.float32 and bound < torch.finfo(torch.float32).max


def single(provenance: Provenance) -> bool:
    """Only one value went in, or equal ones: of those the deviation would be 0."""
    values = named(provenance, "self")
    if values is None or values.size == 0:
        return False
    return values.size == 1 or (values.line is not None and values.line.low == values.line.high)


def no_target(provenance: Provenance) -> bool:
    """Every target is `ignore_index`."""
    target, ignored = named(provenance, "target"), value_of(provenance, "ignore_index")
    return target is not None and target.span is not None and target.span.low == target.span.high == ignored


def empty(name: str) -> Condition:
    """An operand has no elements."""
    return whole(name, lambda operand: operand.size == 0)


def ties(name: str) -> Condition:
    """A spectrum has equal values."""
    return whole(name, lambda operand: operand.has_ties)


def zero_eps(provenance: Provenance) -> bool:
    """Nothing is added to a variance."""
    return zero("eps")(provenance)


def holds_zero(name: str) -> Condition:
    """The smallest value of an operand is 0."""
    return whole(name, lambda operand: operand.span is not None and operand.span.low == 0)


def no_variance(provenance: Provenance) -> bool:
    """Divided by a deviation of 0, as `eps` is 0, and nothing is so large that its square overflows."""
    return zero_eps(provenance) and is_nan(provenance) and not _squares_overflow(provenance)


def overflows(provenance: Provenance) -> bool:
    """Infinity of finite values, or NaN of such that are large enough for their products to overflow."""
    return largest(provenance) is not None and (is_inf(provenance) or _squares_overflow(provenance))


def has_minus_inf(name: str) -> Condition:
    """An operand holds minus infinity, and nothing else that is not finite."""
    return whole(
        name, lambda operand: operand.span is not None and operand.span.low == -math.inf and operand.span.high < math.inf
    )


def masked_row(name: str) -> Condition:
    """The row of an operand that the damage is in holds nothing but minus infinity."""
    return whole(name, lambda operand: operand.line is not None and operand.line.high == -math.inf)


def is_tensor(name: str) -> Condition:
    """An operand is a tensor, and no number in the code."""
    return whole(name, lambda operand: not operand.is_number)


def largest(provenance: Provenance) -> tuple[Operand, Place] | None:
    """The tensor that holds the largest value of all, and where; None if none is known, or if that is not finite."""
    found = max(_peaks(provenance), key=lambda pair: abs(pair[1].value), default=None)
    return found if found is not None and math.isfinite(found[1].value) else None


def _peaks(provenance: Provenance) -> list[tuple[Operand, Place]]:
    return [(operand, operand.peak) for operand in provenance.operands if operand.peak is not None and not operand.is_number]


def _squares_overflow(provenance: Provenance) -> bool:
    found = largest(provenance)
    return found is not None and found[1].value ** 2 * found[0].size >= torch.finfo(provenance.dtype or torch.float32).max
