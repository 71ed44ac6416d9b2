"""Runs for the tab, written by the real sink from records made by hand, so that their size is free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import Action, Alert, Culprit, Decision, Measurement, Position, Record
from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Layout
from lightning_gradguard.record import Histograms, Totals
from lightning_gradguard.sinks import TensorBoardSink
from lightning_gradguard.sinks.tab import TabSeries


def layout_of(*names: str) -> Layout:
    """Square matrices by these names; vectors where a name ends with "bias"."""
    return Layout.of(names, [(8,) if name.endswith("bias") else (8, 8) for name in names])


def alert_at(
    step: int,
    *names: str,
    kind: str = "explosion",
    message: str = "too large",
    culprit: Culprit | None = None,
    optimizer: int = 0,
) -> Alert:
    """An alert that names these parameters."""
    return Alert(
        time=1.7e9 + step,
        step=step,
        epoch=0,
        batch_idx=step,
        micro_batch=0,
        optimizer=optimizer,
        rank=0,
        kind=kind,
        action=Action.SKIP,
        value=100.0,
        limit=1.0,
        parameters=tuple(ParameterReport(name, 50.0) for name in names),
        culprit=culprit,
        message=message,
        remedy="Use `clip=`.",
    )


def record_at(
    step: int,
    layout: Layout,
    norms: Iterable[float] | None = None,
    *,
    alerts: tuple[Alert, ...] = (),
    num_alerts: int = 0,
    skip: bool = False,
    histograms: Histograms | None = None,
    optimizer: int = 0,
    num_optimizers: int = 1,
    due: bool = True,
) -> Record:
    """A record of these norms; one of each parameter where there are none."""
    values = np.ones(len(layout.names)) if norms is None else np.array(list(norms), dtype=np.float64)
    total = math.nan if np.isnan(values).any() else float(np.linalg.norm(values))
    measured = Measurement(layout, values, np.ones(len(values), dtype=np.bool_), total, loss=1.0)
    position = Position(step, optimizer=optimizer, num_optimizers=num_optimizers, log_step=step)
    totals = Totals(num_steps=step + 1, num_skipped=int(skip), num_alerts=num_alerts)
    decision = Decision(skip=skip)
    return Record(
        position, measured, (), decision, 0.5, total / 2, 10.0, alerts, totals, scalars_due=due, histograms=histograms
    )


def histograms_of(layout: Layout, *, num_nan: float = 0.0) -> Histograms:
    """Every parameter's elements in two bins, one of eight zero."""
    count = len(layout.names)
    counts = np.zeros((count, 112))
    counts[:, 60] = counts[:, 62] = 28.0
    apart = np.full(count, 8.0)
    edges = np.linspace(-20, 8, 113)
    return Histograms(
        layout.names, edges, counts, apart, np.full(count, num_nan), np.zeros(count), np.zeros(count, dtype=np.bool_)
    )


def write(folder: Path, records: Iterable[Record]) -> Path:
    """The event file of a run."""
    writer = SummaryWriter(str(folder))
    sink = TensorBoardSink(writer)
    for record in records:
        sink.write(record)
    writer.close()
    return folder


def write_for_tab(folder: Path, records: Iterable[Record]) -> Path:
    """The same without what the standard panels show: many times quicker."""
    series = TabSeries()
    with SummaryWriter(str(folder)) as writer:
        file = writer._get_file_writer()
        for record in records:
            if values := series.values(record):
                file.add_summary(Summary(value=values), record.position.log_step)
    return folder
