"""Single parameters whose gradients leave their history while the global norm hides it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.record import Measurement, Verdict
from lightning_gradguard.statistics.baselines import LogBaselines
from lightning_gradguard.wording import counted

_LOG_ABOVE_HIGHEST = math.log(4.0)
_LOG_MIN_USUAL_SHARE = math.log(1e-5)
_MIN_OUTSIDE = 3


class ParameterOutliers:
    """Finds the parameters that are out of line; `Explosion` asks it where the global norm is within its limit.

    A healthy network has parameters whose gradients leap to fifty times their usual norm: embeddings of positions that begin
    to be used, biases of attention whose gradient is zero but for rounding. So it takes four things together: the norm is
    above the parameter's own limit and has left its history against the rest, too (`LogBaselines.exceeded`); it carries so
    much of the global norm that it matters; its usual share of the global norm is more than a rounding error; and it is four
    times above everything in the window, or outside for the third step in a row.

    Args:
        baselines: of the parameters' norms.
        min_share: share of the global norm that a parameter must carry.
        adapt_after: findings in a row after which the new level is taken for normal.
        kind: of the verdicts.
    """

    def __init__(self, baselines: LogBaselines, *, min_share: float, adapt_after: int, kind: str) -> None:
        self._baselines = baselines
        self._min_share = min_share
        self._adapt_after = adapt_after
        self._kind = kind
        self._outside: dict[int, int] = {}
        """Parameters that are outside their history, and for how many steps in a row."""
        self._num_found = 0

    def observe(self, measurement: Measurement) -> Verdict | None:
        """An advisory verdict if parameters are out of line."""
        if not self._is_one_heavy(measurement):
            self._num_found, self._outside = 0, {}
            return None
        outside = self._baselines.exceeded(measurement.log_norms, _log(measurement.global_norm))
        if not len(outside):
            self._num_found = 0
            if self._outside:
                self._outside = {}
            return None
        found = self._out_of_line(outside, measurement)
        if not len(found):
            self._num_found = 0
            return None
        verdict = self._verdict(found, measurement)
        self._num_found += 1
        if self._num_found >= self._adapt_after:
            self._baselines.forget(found)
            self._num_found = 0
        return verdict

    def learn(self, measurement: Measurement) -> None:
        """Take the norms into the history."""
        self._baselines.add(measurement.log_norms, _log(measurement.global_norm))

    @property
    def num_left(self) -> int:
        """Steps until the limits change, >= 1."""
        return self._baselines.num_left

    def can_defer(self, measurement: Measurement) -> bool:
        """Whether no parameter is above its limit, or none carries enough to matter."""
        return not (self._is_one_heavy(measurement) and self._baselines.may_be_exceeded(measurement.norms))

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """Take in steps that nothing was found at, and that were applied."""
        self._num_found, self._outside = 0, {}
        with np.errstate(divide="ignore"):
            logs = np.log(np.stack([measurement.norms for measurement in measurements]))
            totals = np.log([measurement.global_norm for measurement in measurements])
        self._baselines.add_each(logs, totals)

    def forget(self) -> None:
        """Start again without history."""
        self._baselines.forget(np.arange(len(self._baselines.limits())))

    def state_dict(self) -> dict[str, Any]:
        """History, and what is outside it."""
        return {**self._baselines.state_dict(), "outside": dict(self._outside), "num_found": self._num_found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, also from one of a version that counted nothing here."""
        self._baselines.load_state_dict(state)
        self._outside = dict(state.get("outside", {}))
        self._num_found = state.get("num_found", 0)

    def _is_one_heavy(self, measurement: Measurement) -> bool:
        return measurement.layout.names != () and measurement.largest_norm >= self._min_share * measurement.global_norm

    def _out_of_line(self, outside: NDArray[np.int64], measurement: Measurement) -> NDArray[np.int64]:
        heavy = outside[measurement.norms[outside] >= self._min_share * measurement.global_norm]
        heavy = heavy[self._baselines.usual_shares(heavy) > _LOG_MIN_USUAL_SHARE]
        self._outside = {index: self._outside.get(index, 0) + 1 for index in heavy.tolist()}
        stays = np.array([steps >= _MIN_OUTSIDE for steps in self._outside.values()], dtype=np.bool_)
        leaps = measurement.log_norms[heavy] > self._baselines.highest(heavy) + _LOG_ABOVE_HIGHEST
        return heavy[leaps | stays]

    def _verdict(self, found: NDArray[np.int64], measurement: Measurement) -> Verdict:
        limits = self._baselines.limits()
        worst = found[np.argmax(measurement.log_norms[found] - limits[found])]
        norm, usual = float(measurement.norms[worst]), math.exp(self._baselines.median(worst))
        count = len(found) - 1
        others = f", as {'is' if count == 1 else 'are'} {counted(count, 'other')}" if count else ""
        return Verdict(
            kind=self._kind,
            value=norm,
            limit=math.exp(min(limits[worst], 700.0)),
            message=(
                f"the gradient of `{measurement.names[worst]}` has norm {norm:.3g}, {norm / usual:.3g} times its usual "
                f"{usual:.3g}{others}, while the global norm {measurement.global_norm:.3g} is within its limit"
            ),
            remedy=(
                "Look at what feeds this parameter: an outlier in the batch, a layer that diverges. If it lasts, lower the "
                "learning rate of its group."
            ),
            parameters=tuple(
                ParameterReport(measurement.names[index], float(measurement.norms[index]))
                for index in sorted(found, key=lambda index: -measurement.norms[index])[:5]
            ),
            micro_batch=measurement.last_micro_batch,
            is_advisory=True,
        )


def _log(norm: float) -> float:
    return math.log(norm) if norm > 0.0 else -math.inf
