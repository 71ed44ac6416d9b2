"""What the GradGuard tab of TensorBoard reads: one event a logged step."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_gradguard.layout import Floats, Layout
from lightning_gradguard.record import Histograms, Record
from lightning_gradguard.sinks.summaries import array, strings
from lightning_gradguard.tensorboard_plugin.wire import EVENTS_PER_TAG, Tag, encode, new_session


class TabSeries:
    """The values of the tab's event for each record, in tags of at most ten events; see `wire` for why."""

    def __init__(self) -> None:
        self._session = new_session()
        self._layouts: dict[int, Layout] = {}
        self._num_layouts: Counter[int] = Counter()
        self._num_events: Counter[tuple[int, int, str]] = Counter()

    def values(self, record: Record) -> list[Summary.Value]:
        """What is written of a record: nothing, unless scalars are due, or there is an alert, a skip or a histogram."""
        if not (record.scalars_due or record.alerts or record.decision.skip or record.histograms is not None):
            return []
        optimizer, layout = record.position.optimizer, record.measurement.layout
        values = []
        if self._layouts.get(optimizer) is not layout:
            self._layouts[optimizer] = layout
            self._num_layouts[optimizer] += 1
            about = {"names": layout.names, "numels": layout.numels.tolist(), "ndims": layout.ndims.tolist()}
            values.append(strings(*self._tag(record, "layout"), [json.dumps(about)]))
        values.append(array(*self._tag(record, "facts"), _facts(record)))
        codes = encode(record.measurement.norms, record.measurement.has_grad)
        values.append(array(*self._tag(record, "norms"), codes))
        if record.alerts:
            alerts = [json.dumps(alert.to_dict(), allow_nan=False) for alert in record.alerts]
            values.append(strings(*self._tag(record, "alerts"), alerts))
        if record.histograms is not None:
            values.append(array(*self._tag(record, "shares"), _shares(record.histograms, layout)))
        return values

    def _tag(self, record: Record, series: str) -> tuple[str, bool]:
        """The tag of the next event of a series, and whether it is the tag's first."""
        optimizer = record.position.optimizer
        layout = self._num_layouts[optimizer] - 1
        chunk, index = divmod(self._num_events[optimizer, layout, series], EVENTS_PER_TAG)
        self._num_events[optimizer, layout, series] += 1
        return str(Tag(self._session, optimizer, layout, series, chunk)), index == 0


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
            totals.num_clipped,
            totals.num_alerts,
        ],
        dtype=np.float64,
    )


def _shares(histograms: Histograms, layout: Layout) -> NDArray[np.float32]:
    shares = np.full((len(layout.names), 3), np.nan, dtype=np.float32)
    index = {name: number for number, name in enumerate(layout.names)}
    apart = np.stack([histograms.num_zero, histograms.num_nan, histograms.num_inf], axis=1)
    totals = histograms.counts.sum(axis=1, keepdims=True) + apart.sum(axis=1, keepdims=True)
    shares[[index[name] for name in histograms.names]] = apart / np.maximum(totals, 1.0)
    return shares
