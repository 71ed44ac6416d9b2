"""Gradients that no longer reach a part of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.detectors.depth import Depth, slopes
from lightning_gradguard.detectors.level import Level
from lightning_gradguard.detectors.lives import Lives
from lightning_gradguard.layout import Bools, Floats
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Measurement, Verdict
from lightning_gradguard.wording import counted

_MIN_DEPTH = 4
_MIN_DECADES = 2.0
_MIN_SQUARED, _MAX_SQUARED = 1e-140, 1e140


class Vanishing(Detector):
    """Fires when gradients stay away from some modules for many steps.

    Four symptoms, each of which must last for `persistence` steps without a break; a module counts by the rms of
    its matrices' and kernels' gradient elements, and what is frozen (has no gradient) does not count at all:

    - *decay*: over the depth of the model, in the order of its modules, the rms falls towards the input, either by
      `slope` decades a module (and two decades in all), or so that the first two modules both lie below `min_ratio` of the
      last two. It needs four modules.
    - *dead*: a module's gradient is exactly zero while that of another parameter is not, as behind dead ReLU units or a
      `detach()`, or where all weights are zero and only the last bias learns. One that has rested before, as an embedding
      that few batches look up, must be zero for longer than is likely for it.
    - *floor*: the whole gradient is below `min_norm`, while the loss is not zero, as where fp16 has underflowed. Nothing is
      learned as long as it lasts, so it is reported again after 25, 50, 100, 200, ... steps.
    - *sunk*: the whole gradient has fallen to a ten-thousandth of what it was, and the loss has not fallen with it, as that
      of a generator whose discriminator has won. It needs the loss, and counts whole blocks of 16 steps.

    A module whose gradient has been zero since the first step has not died: it may be a branch that is not in use. Where
    that is so for at most half of the modules, it is one note, which is only logged.

    The first two compare modules with each other, so a model that has converged, whose gradients are small everywhere, does
    not fire, and multiplying the loss by a constant changes no verdict.

    Why these defaults: over 51 healthy and 36 vanishing trainings, 20 steps of first/last < 0.001 raised no false alarm
    (0.01 one, 0.1 eight), nor did a slope of 0.2 decades a layer with two decades in all. Recurrent nets look as if they
    vanished in their first steps and then train; hence the warm-up of 30 steps.

    Args:
        action: what happens on a hit.
        min_ratio: first modules' rms over the last modules', in (0, 1).
        slope: decades a module, > 0, by which the rms may fall towards the input.
        min_norm: floor for the global norm, > 0. It is far below anything that training still feels.
        persistence: steps that a symptom must last before it is a hit, >= 1.
        warmup_steps: steps before which no decay is reported, >= 0.
        patience, cooldown, stop_after: see `Detector`; they count from the first hit on.

    Raises:
        ValueError: for values outside these ranges.

    References:
        X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010
        (back-propagated gradients by depth).

    >>> Vanishing("stop", persistence=50).policy.action.value
    'stop'
    """

    name = "vanishing"

    def __init__(
        self,
        action: Action | ActionName = "warn",
        *,
        min_ratio: float = 1e-3,
        slope: float = 0.3,
        min_norm: float = 1e-12,
        persistence: int = 20,
        warmup_steps: int = 30,
        patience: int = 1,
        cooldown: int = 200,
        stop_after: int | None = None,
    ) -> None:
        super().__init__(action, patience=patience, cooldown=cooldown, stop_after=stop_after)
        require_float("min_ratio", min_ratio, above=0.0, up_to=1.0, remedy="The default is 1e-3.")
        require_float("slope", slope, above=0.0, remedy="The default is 0.3 decades a module.")
        require_float("min_norm", min_norm, above=0.0, remedy="The default is 1e-12.")
        require_int("persistence", persistence, at_least=1, remedy="The default is 20.")
        require_int("warmup_steps", warmup_steps, at_least=0, remedy="The default is 30.")
        self._min_ratio = min_ratio
        self._slope = slope
        self._min_norm = min_norm
        self._persistence = persistence
        self._warmup_steps = warmup_steps
        # A least-squares line rises at most 1.5 times as far as what it is fitted to.
        self._even_decades = min(_MIN_DECADES / 1.5, -math.log10(min_ratio))
        self._num_seen = 0
        self._lives = Lives(persistence)
        self._level = Level(persistence)
        self._may_note = True
        """Whether a step like the last one may still call for a note."""
        self._had_grad = np.zeros(0, dtype=np.bool_)
        """Which parameters had a gradient at the last step that was looked at."""
        self._lasting: dict[str, int] = {}
        """For how many steps in a row each symptom has been there; a dead module goes by `dead:<path>`."""

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if a symptom has lasted long enough. Steps that are not finite are passed over."""
        if not measurement.is_finite or not measurement.has_grad.any():
            return None
        self._num_seen += 1
        self._had_grad, self._may_note = measurement.has_grad, False
        self._level.add(measurement.global_norm, measurement.loss)
        depth = Depth(measurement)
        symptoms = []
        if depth.is_even(self._even_decades):
            self._lives.see_even()
        else:
            unused = self._lives.see(depth)
            self._may_note = self._lives.may_note(depth)
            if unused and not self._lives.is_noted and self._num_seen >= self._persistence:
                self._lives.is_noted = True
                return self._note(unused, depth)
            symptoms = [f"dead:{module}" for module in depth.dead if module not in unused]
            if self._fade(depth.decades[None, :]).any():
                symptoms.append("decay")
        if measurement.global_norm < self._min_norm and measurement.loss != 0.0:
            symptoms.append("floor")
        self._lasting = {symptom: self._lasting.get(symptom, 0) + 1 for symptom in symptoms}
        lasting = [name for name, steps in self._lasting.items() if steps >= self._persistence and self._is_new(name, depth)]
        if lasting or self._level.is_lost:
            return self._verdict(lasting, depth, measurement)
        return None

    def deferral(self) -> Deferral | None:
        """Until a symptom can have lasted for long enough; none while a note may be due."""
        num_steps = min(self._persistence - max(self._lasting.values(), default=0), self._level.num_left) - 1
        if self._may_note:
            num_steps = min(num_steps, self._persistence - self._num_seen - 1)
        return Deferral(num_steps) if num_steps > 0 else None

    def can_defer(self, measurement: Measurement) -> bool:
        """Whether the same parameters have a gradient as before: one that gets its first may be due for a note."""
        return measurement.has_grad is self._had_grad or bool(np.array_equal(measurement.has_grad, self._had_grad))

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """Count the symptoms; where no step has any, at once."""
        layout = measurements[0].layout
        # A module that has never lived may have begun to, also after the note about it.
        is_told = self._lives.has_no_unlived(layout.weights.any(measurements[0].has_grad))
        is_plain = is_told and not self._lasting and all(it.layout is layout for it in measurements)
        if is_plain and self._have_no_symptom(measurements):
            self._num_seen += len(measurements)
            for measurement in measurements:
                self._level.add(measurement.global_norm, measurement.loss)
            return
        for measurement in measurements:
            self.observe(measurement)

    def state_dict(self) -> dict[str, Any]:
        """How long each symptom has lasted, which modules have had a gradient, and how large it was."""
        return {
            "num_seen": self._num_seen,
            "lasting": dict(self._lasting),
            **self._lives.state_dict(),
            "level": self._level.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._num_seen = state["num_seen"]
        self._lasting = dict(state["lasting"])
        self._lives.load_state_dict(state)
        if "level" in state:  # an earlier version kept none
            self._level.load_state_dict(state["level"])
        self._may_note, self._had_grad = True, np.zeros(0, dtype=np.bool_)

    def _have_no_symptom(self, measurements: Sequence[Measurement]) -> bool:
        """Whether that is so for each of some steps in which the same parameters of the same model have a gradient."""
        layout, has_grad = measurements[0].layout, measurements[0].has_grad
        if not has_grad.any() or min(it.global_norm for it in measurements) < self._min_norm:
            return False
        members = np.stack([it.norms for it in measurements])[:, layout.weights.indices]
        if not members.size:
            return True
        if members.max() > _MAX_SQUARED:
            return False
        each = members / layout.member_roots
        are_even = each.max(axis=1) < 10.0**self._even_decades * each.min(axis=1)
        if are_even.any():
            self._lives.see_even()
            if are_even.all():
                return True
        trained = layout.weights.any(has_grad)
        rms = np.sqrt(np.add.reduceat(members * members, layout.weights.starts, axis=1))[:, trained]
        rms /= layout.weight_roots[trained]
        if rms.min() < _MIN_SQUARED:  # zero, or its square may be
            return False
        return not self._fade(np.log10(rms)).any()

    def _is_new(self, symptom: str, depth: Depth) -> bool:
        """Whether a symptom that lasts is more than a module that rests, or than what recurrent nets begin with."""
        if symptom == "decay":
            return self._num_seen > self._warmup_steps
        module = symptom.removeprefix("dead:")
        return symptom == "floor" or not self._lives.is_resting(module, self._lasting[symptom], self._num_seen, depth)

    def _note(self, unused: Sequence[str], depth: Depth) -> Verdict:
        others = f" and {counted(len(unused) - 1, 'other module')}" if len(unused) > 1 else ""
        return Verdict(
            self.name,
            value=0.0,
            limit=math.ulp(0.0),
            message=(
                f"the weight gradient of `{unused[0]}`{others} has been exactly zero since the first of "
                f"{counted(self._num_seen, 'step')}"
            ),
            remedy=(
                "If this branch is meant to learn, look whether its output reaches the loss and whether its input is all "
                "zeros; else freeze or remove it."
            ),
            parameters=depth.reports(unused),
            is_note=True,
        )

    def _fade(self, decades: Floats) -> Bools:
        """Whether the gradient fades in each of some steps, from log10 of the rms by depth, [num_steps, num_modules]."""
        depth = decades.shape[1]
        if depth < _MIN_DEPTH:
            return np.zeros(len(decades), dtype=np.bool_)
        by_ends = decades[:, :2].max(axis=1) - decades[:, -2:].max(axis=1) < math.log10(self._min_ratio)
        lines = slopes(decades)
        fades: Bools = by_ends | ((lines > self._slope) & (lines * (depth - 1) > _MIN_DECADES))
        return fades

    def _verdict(self, lasting: list[str], depth: Depth, measurement: Measurement) -> Verdict:
        dead = tuple(symptom.removeprefix("dead:") for symptom in lasting if symptom.startswith("dead:"))
        for_steps = counted(max((self._lasting[symptom] for symptom in lasting), default=0), "step")
        if not lasting:
            value, limit, modules = self._level.norm_ends[1], self._level.limit, depth.modules
            message = self._level.describe()
            remedy = (
                "If another network is trained against this one, it may have won: let it take fewer or smaller steps, or "
                "use a loss that doesn't saturate. Else look for units that are saturated."
            )
        elif "floor" in lasting:
            value, limit, modules = measurement.global_norm, self._min_norm, depth.modules
            message = f"the global gradient norm is {value:.3g} and has been below {limit:g} for {for_steps}"
            remedy = "Check that the loss depends on the parameters, and the initialisation for zeros and saturation."
        elif dead:
            value, limit = 0.0, math.ulp(0.0)
            modules = dead[::-1]
            others = f" and {counted(len(dead) - 1, 'module')} before it" if len(dead) > 1 else ""
            message = f"the weight gradient of `{dead[-1]}`{others} has been exactly zero for {for_steps}"
            remedy = (
                "Look behind this module for units that never fire (dead ReLU), a `detach()`, or a branch whose output "
                "is not used, and before it for an input of zeros."
            )
        else:
            value, limit = 10.0 ** (depth.decades[0] - depth.decades[-1]), self._min_ratio
            modules = depth.modules
            message = depth.describe()
            remedy = (
                "Use ReLU-like activations, residual connections or normalisation, and an initialisation that keeps the "
                "variance."
            )
        return Verdict(self.name, value, limit, message, remedy, depth.reports(modules), is_dire="floor" in lasting)
