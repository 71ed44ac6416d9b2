"""Where the forward pass leaves damage behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.nonfinite.provenance_table import ProvenanceTable
from lightning_gradguard.forensics.nonfinite.source_location import SourceLocation
from lightning_gradguard.forensics.tensors import flaw_of


@dataclass(frozen=True)
class Drop:
    """An operator of the forward pass whose result is finite although damage went in.

    Attributes:
        order: number of the operator.
        op: aten operator.
        location: module and line.
        dropped: what went in.
        is_partial: whether only a part of a damaged tensor went in, that is finite itself.
    """

    order: int
    op: str
    location: SourceLocation
    dropped: Provenance
    is_partial: bool


class Drops(list[Drop]):
    """Those of a step, in order; of each damaged tensor the first."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[tuple[int, bool]] = set()

    def note(
        self,
        order: int,
        op: str,
        inputs: Iterable[tuple[Tensor, Provenance | None]],
        provenances: ProvenanceTable,
        here: Callable[[], SourceLocation],
    ) -> None:
        """An operator gave finite values; masks of minus infinity are made for that.

        Args:
            order: its number.
            op: its name.
            inputs: what went in, with its damage where it has been written over since.
            provenances: what is known of the rest.
            here: gives the place.
        """
        for tensor, earlier in inputs:
            provenance = earlier or provenances.get(tensor)
            if provenance is None or (provenance.is_sentinel and not provenance.flaw.has_nan):
                continue
            is_partial = earlier is None and flaw_of(tensor) is None
            if (id(provenance), is_partial) not in self._known:
                self._known.add((id(provenance), is_partial))
                self.append(Drop(order, op, here(), provenance, is_partial))
