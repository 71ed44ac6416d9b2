"""What is measured around one optimizer's steps: losses before, gradients at, histograms and updates after."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.histogram import HistogramMeter
from lightning_gradguard.measure.logged import Logged
from lightning_gradguard.measure.measurement import Facts, measure
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import Scaling
from lightning_gradguard.measure.signs import MicroBatch
from lightning_gradguard.measure.updates import UpdateMeter
from lightning_gradguard.measure.weights import WeightMeter, learning_rate
from lightning_gradguard.record import Histograms, Position

# Backward passes that are remembered between two steps; more than any accumulation window, so only a loop that
# never steps reaches it.
_MAX_MICRO_BATCHES = 4096


class MeasuredStep(NamedTuple):
    """A step whose gradients have been measured; the figures are still on the device.

    Attributes:
        position: where in the training.
        gradients: what was measured.
        facts: what was found.
        layout: names and sizes of the parameters.
        clipped_histogram: counts their elements once they are clipped; None where that is not wanted.
    """

    position: Position
    gradients: Gradients
    facts: Facts
    layout: Layout
    clipped_histogram: HistogramMeter | None = None


class StepMeter:
    """Measures one optimizer's steps. Never waits for the device.

    Args:
        parameters: whose gradients.
        scaling: brings the gradients of fp16 training to their true size; None in any other precision.
        logged: what is measured for the logs alone.
    """

    def __init__(self, parameters: WatchedParameters, scaling: Scaling | None, logged: Logged) -> None:
        self.parameters = parameters
        self._scaling = scaling
        self._updates = UpdateMeter()
        self._weights = WeightMeter()
        self.logged = logged
        self._log_step = 0
        self._histograms = HistogramMeter()
        self._histograms_are_clipped = logged.histograms_of == "clipped"
        self._micro_batches: deque[MicroBatch] = deque(maxlen=_MAX_MICRO_BATCHES)
        self._has_rivals = False  # other optimizers, whose backward passes are told of as well

    def before_backward(self, loss: Tensor | None) -> None:
        """Note a backward pass that is about to begin; from the second one on measure what the ones before have left.

        Rank-local.
        """
        scale = self._scaling.scale if self._scaling is not None and self._scaling.scales_losses else None
        sofar = None
        if self._micro_batches or self._has_rivals:
            with torch.no_grad():
                sofar = self._gradients().local_total_norm()
            sofar = sofar if scale is None else sofar / scale
        if self._micro_batches:
            self._micro_batches[-1] = self._micro_batches[-1]._replace(total_norm=sofar)
            sofar = None
        if loss is None or loss.numel() != 1:
            self._micro_batches.append(MicroBatch(norm_before=sofar))
            return
        value = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
        self._micro_batches.append(MicroBatch(value if scale is None else value / scale, norm_before=sofar))

    def measure(
        self,
        position: Position,
        updates: Tensor | None = None,
        *,
        with_histogram: bool = False,
        owns_losses: bool = False,
    ) -> MeasuredStep:
        """Measure the gradients. One pass over them, at most one collective; with a scaler they are unscaled first.

        Args:
            position: where in the training.
            updates: from `read_update_`.
            with_histogram: whether their elements are counted, too; before clipping they are counted now.
            owns_losses: whether the losses are this optimizer's although there are others.
        """
        self._has_rivals = position.num_optimizers > 1
        scale = None
        if self._scaling is not None:
            scale = self._scaling.scale
            self._scaling.unscale_()
        gradients = self._gradients()
        meter = self._histograms if with_histogram and gradients.tensors else None
        histogram = None if meter is None or self._histograms_are_clipped else meter.count(gradients)
        self._log_step = position.log_step
        is_logged = self.logged.weights_are_due(position.log_step)
        weights = self._weights.read_(self.parameters.tensors) if is_logged else None
        self._weights.forget()
        facts = measure(
            gradients,
            self._micro_batches,
            loss_scale=scale,
            histogram=histogram,
            some_are_foreign=self._has_rivals and not owns_losses,
            updates=updates,
            weights=weights,
            learning_rate=learning_rate(self.parameters.optimizer) if is_logged else None,
            norm_types=self.logged.norms_due(position.log_step),
        )
        self._micro_batches.clear()
        clipped_histogram = meter if self._histograms_are_clipped else None
        return MeasuredStep(position, gradients, facts, self.parameters.layout, clipped_histogram)

    @property
    def only_loss(self) -> Tensor | None:
        """The loss of the step's only backward pass, as it is; None if there are more, or it is not known."""
        return self._micro_batches[0].loss if len(self._micro_batches) == 1 else None

    def note_measured(self, position: Position) -> None:
        """A step has been measured in another way, at which nothing is logged."""
        self._log_step = position.log_step
        self._micro_batches.clear()

    def forget(self) -> None:
        """The backward passes so far belong to no step."""
        self._micro_batches.clear()

    def start_(self, *, with_update: bool) -> None:
        """Before a step that is applied: keep what tells how far it moves the weights, if the next one is logged.

        Args:
            with_update: whether its update is measured for each parameter, too.
        """
        if self.logged.weights_are_due(self._log_step + 1):
            self._weights.start_(self.parameters.tensors)
        if with_update:
            self._updates.start_(self.parameters.tensors)

    def read_update_(self) -> Tensor | None:
        """After it: how far it has moved each parameter; None if that was not measured, or the parameters are others now."""
        updates = self._updates.read_(self.parameters.tensors)
        return None if self.parameters.refresh() else updates

    def histograms(self, counts: Tensor | None, present: Bools) -> Histograms | None:
        """What was counted, once it is on the host; None where nothing was."""
        if counts is None:
            return None
        return self._histograms.read(counts, present, self.parameters.layout, clipped=self._histograms_are_clipped)

    def state_dict(self) -> dict[str, Any]:
        """The update that was measured last, in plain types."""
        return self._updates.state_dict(self.parameters.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._updates.load_state_dict(state)

    def _gradients(self) -> Gradients:
        watched = self.parameters
        others = None
        if watched.excluded:
            others = Gradients(watched.excluded, sharded=watched.is_sharded, names=watched.excluded_layout.names)
        return Gradients(
            watched.tensors,
            sharded=watched.is_sharded,
            is_uniform=watched.is_uniform,
            names=watched.layout.names,
            others=others,
        )
