"""Follows the damage through the micro-batches of one run of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_gradguard.forensics.nonfinite.blame import Blame, find_culprit
from lightning_gradguard.forensics.nonfinite.layout import Layout, SampleDim, layout_of
from lightning_gradguard.forensics.nonfinite.raised import DamageUntilRaise
from lightning_gradguard.forensics.nonfinite.rows import Rows
from lightning_gradguard.forensics.nonfinite.samples import Batch


class Search:
    """The first micro-batch that shows damage is blamed.

    Args:
        module: the one that is trained.
        sample_dim: what the user says about where samples lie.
        follow_rows: whether to look at which sample each value belongs to, which takes longer.
        is_other: whether batches are read in the way that is not the usual one, where there are two.
    """

    def __init__(
        self, module: nn.Module, sample_dim: SampleDim = None, *, follow_rows: bool = False, is_other: bool = False
    ) -> None:
        self._module = module
        self._sample_dim = sample_dim
        self._follows_rows = follow_rows
        self._is_other = is_other
        self._damage: DamageUntilRaise | None = None
        self.blame: Blame | None = None
        """Who is to blame; None if nothing is damaged."""
        self.batch: Any = None
        """That of the micro-batch that is blamed."""
        self.layout = Layout()
        """Of that batch."""
        self.rows: Rows | None = None
        """What has followed its rows; None if nothing has."""
        self.is_raised_by_operator = False
        """Whether an exception has ended it that came out of one of torch's operators."""

    def forget(self) -> None:
        """Another optimizer has stepped: its loss is no concern of this one."""
        if self._damage is not None:
            self._damage.losses.clear()

    @contextmanager
    def watch(self, batch: Any, kept: Iterable[tuple[str, Tensor]] = ()) -> Iterator[None]:
        """Watch one micro-batch, forward and backward; where an exception ends it, the damage on the way there is blamed.

        Args:
            batch: what is trained on.
            kept: tensors that are neither parameters nor buffers, with their names.
        """
        if self.blame is not None:
            yield
            return
        self.batch = batch
        layout = layout_of(batch, self._sample_dim)
        self.layout = layout = layout.alternative or layout if self._is_other else layout
        self.rows = Rows(layout) if self._follows_rows else None
        guess = Batch.from_layout(layout)
        self._damage = damage = DamageUntilRaise(self._module, guess, self.rows)
        damage.label(layout.leaves, "data")
        damage.label(self._module.named_parameters(), "weights")
        damage.label(self._module.named_buffers(), "state")
        damage.label(kept, "state")
        try:
            with damage.watch():
                yield
        except Exception as error:
            self.is_raised_by_operator = damage.is_raised_by_operator(error)
            if damage.losses or (root := damage.root_of(error)) is None:
                self.blame = find_culprit(damage.losses, [], guess, damage.drops)
            else:
                roots = ([], [root]) if root.is_backward else ([root], [])
                self.blame = find_culprit(*roots, guess, damage.drops)
            raise
        grads = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        damaged = [provenance for grad in grads if (provenance := damage.provenance_of(grad)) is not None]
        self.blame = find_culprit(damage.losses, damaged, guess, damage.drops)
