"""The measurement of a plain step, made at little cost."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.record import Measurement


class OnePass(Measurement):
    """A `Measurement` of one backward pass whose gradients and loss are finite, made in a fraction of the time."""

    @classmethod
    def of(cls, layout: Layout, norms: list[float], has_grad: Bools, global_norm: float, loss: float) -> Measurement:
        """From plain values.

        Args:
            layout: names and sizes of the parameters.
            norms: 2-norm of each gradient, [num_parameters]; an array is made of them once somebody asks for it.
            has_grad: all true, [num_parameters].
            global_norm: 2-norm over all gradients.
            loss: of the pass.
        """
        made = object.__new__(cls)
        # What is left out has its default from the class.
        vars(made).update(
            layout=layout,
            has_grad=has_grad,
            global_norm=global_norm,
            loss=loss,
            other_norms={},
            largest_norm=max(norms),
            listed=norms,
        )
        return made

    @cached_property
    def norms(self) -> Floats:
        """2-norm of each parameter's gradient, float64 [num_parameters]."""
        norms: Floats = np.array(vars(self)["listed"])
        return norms
