"""What a known failure is, and how it is put into words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_gradguard.forensics.nonfinite.conditions import Condition, exponent_bound, largest, named, power_bound
from lightning_gradguard.forensics.nonfinite.numbers import numbers_of, written
from lightning_gradguard.forensics.nonfinite.operands import number
from lightning_gradguard.forensics.nonfinite.provenance import Provenance


@dataclass(frozen=True)
class Fix:
    """A change that makes the failing line safe, forward and backward.

    In its code `x`, `y`, `w` and `m` are what the line works on, `{op}` is the function and `{small}` and the like are
    numbers that fit the type. The tests run `before`, which fails, and then `after`.

    Attributes:
        advice: what it does, as the beginning of a sentence.
        before: code that fails.
        after: the same, changed.
        within: a function of `torch.nn.functional` that runs the operator; where it is what the failing line calls, this fix
            is told and no other.
    """

    advice: str
    before: str
    after: str
    within: str = ""


@dataclass(frozen=True)
class KnownFailure:
    """One way to make NaN or infinity.

    Attributes:
        name: what it is called in the table.
        ops: aten operators and autograd nodes, without leading and trailing underscores and without "Backward0", in lower
            case.
        when: what has to be true of the damaged result and of the values that went in; all of it.
        happened: what it did, in the past tense, as in "`log` in `head` got 0"; may hold operands' names in braces.
        fixes: what makes the line safe; none is known where it is empty.
    """

    name: str
    ops: frozenset[str]
    when: tuple[Condition, ...]
    happened: str
    fixes: tuple[Fix, ...] = ()

    def fits(self, provenance: Provenance) -> bool:
        """Whether it is this one, once the operator is one of its own."""
        return all(condition(provenance) for condition in self.when)

    def sentence(self, provenance: Provenance) -> str:
        """What happened, with the values that were there."""
        dtype = provenance.dtype or torch.float32
        found = largest(provenance)
        words: dict[str, object] = {operand.name: operand.at for operand in provenance.operands}
        words |= {
            "largest": "" if found is None else f"; the largest value that went in: {found[1]} of `{found[0].name}`",
            "max": number(torch.finfo(dtype).max),
            "dtype": str(dtype).removeprefix("torch."),
            "what": "NaN" if provenance.flaw.has_nan else "Inf",
        }
        return self.happened.format_map(words)

    def remedy(self, key: str, provenance: Provenance, source: str) -> str:
        """The fixes in words; "" if there are none.

        Args:
            key: the operator's name, as in `ops`.
            provenance: the damaged result, for its type and its operands.
            source: the failing line.
        """
        via = provenance.location.via
        own = [fix for fix in self.fixes if fix.within and (fix.within == via or _calls(source, fix.within))]
        chosen = own or [fix for fix in self.fixes if not fix.within and _is_of_line(fix, via, key)]
        return " ".join(f"{fix.advice}: `{code(fix.after, key, provenance)}`." for fix in chosen)


def _is_of_line(fix: Fix, via: str, key: str) -> bool:
    """Whether a fix changes what the line says: of what torch runs inside a function of its own a user can't change it."""
    return not via or f"{via}(" in fix.before or key.startswith(via)


def _calls(source: str, function: str) -> bool:
    return f"F.{function}(" in source or f"functional.{function}(" in source


def code(template: str, key: str, provenance: Provenance) -> str:
    """A fix's code with its function and its numbers filled in."""
    numbers = numbers_of(provenance.dtype, provenance.half)
    words = {name: written(value) for name, value in numbers.items()} | {
        "op": key.replace("special_", "special.", 1) if key.startswith("special_") else key,
        "limit": written(numbers["limit2" if key == "exp2" else "limit"]),
        "exponent": _number(provenance, "exponent") or "y",
        "base": _number(provenance, "self") or "w",
    }
    for name, bound in (("bound", power_bound(provenance)), ("top", exponent_bound(provenance))):
        if bound is not None:
            words[name] = written(bound)
    for name, text in words.items():
        template = template.replace("{" + name + "}", text)
    return template


def _number(provenance: Provenance, name: str) -> str | None:
    """An operand that is a number in the code, as it may be written there."""
    operand = named(provenance, name)
    return number(operand.at.value) if operand is not None and operand.at is not None and operand.is_number else None


STEEP = {
    "sqrt": "torch.sqrt(x.clamp_min({tiny}))",
    "pow": "torch.pow(x.clamp_min({small}), p)",
    "acos": "torch.acos(x.clamp_max(1 - {eps}))",
    "acosh": "torch.acosh(x.clamp_min(1 + {eps}))",
}
"""Operators whose slope is infinite where they give 0, and how to write them where that 0 makes another fail: a clamp after
them passes on a gradient of 0, and 0 times infinity is NaN."""
