"""What the GradGuard tab of TensorBoard reads: one event a logged step."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_gradguard.layout import Floats, Layout
from lightning_gradguard.record import Histograms, Measurement, Record
from lightning_gradguard.sinks.summaries import array, strings
from lightning_gradguard.tensorboard_plugin.wire import EVENTS_PER_TAG, Bins, Tag, encode, new_session, pack_bins


class TabSeries:
    """The values of the tab's event for each record, in tags of at most ten events; see `wire` for why.

    Args:
        settings: of the guard, in words.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = settings
        self._session = new_session()
        self._last: Measurement | None = None
        self._layouts: dict[int, Layout] = {}
        self._num_layouts: Counter[int] = Counter()
        self._num_events: Counter[tuple[int, int, str]] = Counter()

    def values(self, record: Record) -> list[Summary.Value]:
        """What is written of a record: nothing, unless scalars are due, or something has happened at it."""
        if not (record.scalars_due or record.alerts or record.histograms is not None or _is_bad(record)):
            return []
        optimizer, layout = record.position.optimizer, record.measurement.layout
        values = []
        if self._last is record.measurement:  # a notice about a step that has been written already
            return [self._alerts(record)] if record.alerts else []
        self._last = record.measurement
        if self._layouts.get(optimizer) is not layout:
            self._layouts[optimizer] = layout
            self._num_layouts[optimizer] += 1
            about: dict[str, Any] = {"names": layout.names, "numels": layout.numels.tolist(), "ndims": layout.ndims.tolist()}
            if self._settings:
                about["settings"] = dict(self._settings)
            values.append(strings(*self._tag(record, "layout"), [json.dumps(about)]))
        values.append(array(*self._tag(record, "facts"), _facts(record)))
        codes = encode(record.measurement.norms, record.measurement.has_grad)
        values.append(array(*self._tag(record, "norms"), codes))
        if record.alerts:
            values.append(self._alerts(record))
        if record.histograms is not None:
            values.append(array(*self._tag(record, "bins"), pack_bins(_bins(record.histograms, layout))))
        return values

    def _alerts(self, record: Record) -> Summary.Value:
        return strings(*self._tag(record, "alerts"), [json.dumps(it.to_dict(), allow_nan=False) for it in record.alerts])

    def _tag(self, record: Record, series: str) -> tuple[str, bool]:
        """The tag of the next event of a series, and whether it is the tag's first."""
        optimizer = record.position.optimizer
        layout = self._num_layouts[optimizer] - 1
        chunk, index = divmod(self._num_events[optimizer, layout, series], EVENTS_PER_TAG)
        self._num_events[optimizer, layout, series] += 1
        return str(Tag(self._session, optimizer, layout, series, chunk)), index == 0


def _is_bad(record: Record) -> bool:
    """Whether the tab would say something false of the run without this step."""
    return record.decision.skip or not record.measurement.is_finite


def _facts(record: Record) -> Floats:
    measurement, totals = record.measurement, record.totals
    loss = np.nan if measurement.loss is None else measurement.loss
    return np.array(
        [
            record.position.step,
            measurement.global_norm,
            np.nan if record.clipped_norm is None else record.clipped_norm,
            np.nan if record.clip_coef is None else record.clip_coef,
            record.explosion_limit,
            loss,
            record.decision.skip,
            totals.num_skipped,
            totals.num_clipped if record.clip_coef is not None else math.nan,
            totals.num_alerts,
            *(math.nan if figure is None else figure for figure in _of_weights(measurement)),
        ],
        dtype=np.float64,
    )


def _of_weights(measurement: Measurement) -> tuple[float | None, float | None, float | None]:
    return measurement.learning_rate, measurement.weight_norm, measurement.update_ratio


def _bins(histograms: Histograms, layout: Layout) -> Bins:
    """Shares of each parameter's elements, in the bins that any of them has elements in."""
    apart = np.stack([histograms.num_zero, histograms.num_nan, histograms.num_inf], axis=1)
    counted = np.flatnonzero(histograms.counts.sum(axis=0))
    first, end = (int(counted[0]), int(counted[-1]) + 1) if len(counted) else (0, 0)
    counts = np.concatenate([apart, histograms.counts[:, first:end]], axis=1)
    shares = np.full((len(layout.names), counts.shape[1]), np.nan)
    index = {name: number for number, name in enumerate(layout.names)}
    shares[[index[name] for name in histograms.names]] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    per_decade = round((len(histograms.edges) - 1) / float(histograms.edges[-1] - histograms.edges[0]))
    is_open = (first == 0 < end, end == histograms.counts.shape[1])
    return Bins(per_decade, round(float(histograms.edges[first]) * per_decade), shares, histograms.clipped, is_open)
