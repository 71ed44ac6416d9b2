"""Gradients by depth: the rms of each module's matrices, in the order of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import compress

import numpy as np

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Bools, Floats
from lightning_gradguard.record import Measurement


def lost_at(measurement: Measurement) -> str:
    """The module that an alert about a decay calls the one where the gradient is lost; "" where there is no gradient."""
    depth = Depth(measurement)
    return depth.lost if depth.modules else ""


class Depth:
    """Gradient rms by depth at one step. Everything is computed when it is asked for, which healthy steps do not."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def is_even(self, decades: float) -> bool:
        """Whether no rms of a parameter is zero, or further than so many decades from another. A few calls of numpy."""
        layout = self._measurement.layout
        each = self._measurement.norms[layout.weights.indices] / layout.member_roots
        return len(each) > 0 and each.max() < 10.0**decades * each.min()

    @cached_property
    def decades(self) -> Floats:
        """log10 of the rms of the modules with a gradient that is not zero, in model order."""
        return np.log10(self._norms[self.alive] / self._measurement.layout.weight_roots[self.alive])

    @cached_property
    def slope(self) -> float:
        """Decades a module by which it grows towards the output (least squares)."""
        return float(slopes(self.decades[None, :])[0])

    @cached_property
    def _norms(self) -> Floats:
        return self._measurement.layout.weights.norms(self._measurement.norms)

    @property
    def names(self) -> tuple[str, ...]:
        """All modules with a matrix or kernel, in model order."""
        return self._measurement.layout.weights.names

    @cached_property
    def trained(self) -> Bools:
        """Which of them have a gradient."""
        return self._measurement.layout.weights.any(self._measurement.has_grad)

    @cached_property
    def alive(self) -> Bools:
        """Which of them have one that is not zero."""
        return self.trained & (self._norms > 0)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Those with a gradient that is not zero, in model order."""
        return tuple(compress(self.names, self.alive.tolist()))

    @cached_property
    def dead(self) -> tuple[str, ...]:
        """Modules whose gradient is exactly zero; empty if everything is."""
        if len(self.decades) == int(self.trained.sum()) or self._measurement.global_norm == 0.0:
            return ()
        return tuple(compress(self.names, (self.trained & ~self.alive).tolist()))

    @property
    def lost(self) -> str:
        """The module where the gradient falls below a thousandth of the last one's, on its way from the output."""
        pairs = reversed(list(zip(self.modules, self.decades, strict=True)))
        return next((module for module, decades in pairs if decades < self.decades[-1] - 3.0), self.modules[0])

    def describe(self) -> str:
        """The decay in words, with the module where the gradient is lost."""
        first, last = self.decades[0], self.decades[-1]
        return (
            f"the gradient fades towards the input: from an rms of {10.0**last:.1e} in `{self.modules[-1]}` to "
            f"{10.0**first:.1e} in `{self.modules[0]}`, {self.slope:.2g} decades a module, and it is lost at `{self.lost}`"
        )

    def reports(self, modules: Sequence[str], count: int = 5) -> tuple[ParameterReport, ...]:
        """The parameters of these modules that are matrices or kernels."""
        wanted = {f"{module}." if module else "" for module in modules[:count]}
        names, norms = self._measurement.names, self._measurement.norms
        return tuple(
            ParameterReport(names[index], float(norms[index]))
            for index in np.flatnonzero((self._measurement.layout.ndims >= 2) & self._measurement.has_grad)
            if names[index].rpartition(".")[0] + "." * ("." in names[index]) in wanted
        )


def slopes(values: Floats) -> Floats:
    """That of the least-squares line through each row, of two values or more."""
    depth = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    slopes: Floats = values @ depth / (depth @ depth)
    return slopes
