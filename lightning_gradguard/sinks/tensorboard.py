"""Records in TensorBoard: one event for all scalars of a step, one for all its histograms, one for the GradGuard tab."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.record import Alert, Histograms, Record
from lightning_gradguard.sinks.summaries import custom_scalars, histograms_of, metadata, scalar, text
from lightning_gradguard.sinks.tab import TabSeries
from lightning_gradguard.sinks.tags import DESCRIPTIONS, scalars, tag_prefix

_NORM_EDGES = np.arange(-20.0, 9.0, 0.25)


class TensorBoardSink:
    """Writes scalars, histograms and alerts, and a custom-scalars page that shows the norm against its limits.

    Args:
        writer: gives the writer, which is asked for at the first record: making it creates a folder.
    """

    def __init__(self, writer: SummaryWriter | Callable[[], SummaryWriter]) -> None:
        self._writer = writer
        self._described: set[str] = set()
        self._tab = TabSeries()

    def write(self, record: Record) -> None:
        """Write what is due; a step with an alert is always written, so that its spike is in the picture."""
        step = record.position.log_step
        prefix = tag_prefix(record.position)
        if record.scalars_due or record.alerts:
            self._add(self._page(record), 0)
            self._add(self._scalars(record, prefix), step)
        if record.histograms is not None:
            self._add(self._distributions(record.histograms, prefix), step)
        self._add(self._tab.values(record), step)
        if record.alerts:
            tag = f"{prefix}/alerts"
            self._add([self._describe(text(tag, _table(alert)), "text") for alert in record.alerts], step)
            self._open().flush()

    def close(self) -> None:
        """Write out what is buffered. The writer belongs to the logger, so it stays open."""
        if isinstance(self._writer, SummaryWriter):
            self._writer.flush()

    def _open(self) -> SummaryWriter:
        if not isinstance(self._writer, SummaryWriter):
            self._writer = self._writer()
        return self._writer

    def _add(self, values: list[Summary.Value], step: int) -> None:
        if values:
            # `add_summary` of the file writer is the only way to several values in one event.
            file_writer = self._open()._get_file_writer()  # type: ignore[no-untyped-call]
            file_writer.add_summary(Summary(value=values), step)

    def _describe(self, value: Summary.Value, plugin: str, description: str | None = None) -> Summary.Value:
        """Say at a tag's first value what it is; TensorBoard ignores it on later ones."""
        if value.tag not in self._described:
            self._described.add(value.tag)
            name = value.tag.rpartition("/")[2]
            about = DESCRIPTIONS.get(name, "") if description is None else description
            value.metadata.CopyFrom(metadata(plugin, about))
        return value

    def _page(self, record: Record) -> list[Summary.Value]:
        number = record.position.num_optimizers
        prefixes = [f"gradguard/{index}" for index in range(number)] if number > 1 else ["gradguard"]
        page = custom_scalars(prefixes)
        if page.tag in self._described:
            return []
        self._described.add(page.tag)
        return [page]

    def _scalars(self, record: Record, prefix: str) -> list[Summary.Value]:
        values = [self._describe(scalar(f"{prefix}/{name}", value), "scalars") for name, value in scalars(record).items()]
        norms = record.measurement.norms
        usable = norms[np.isfinite(norms) & (norms > 0)]
        counts = np.histogram(np.log10(usable).clip(_NORM_EDGES[0], _NORM_EDGES[-1]), _NORM_EDGES)[0].astype(np.float64)
        values.extend(
            self._describe(value, "histograms")
            for value in histograms_of([f"{prefix}/log10_norms"], _NORM_EDGES, counts[None, :])
        )
        return values

    def _distributions(self, histograms: Histograms, prefix: str) -> list[Summary.Value]:
        folder = "gradients" + prefix.removeprefix("gradguard")
        tags = [f"{folder}/{name}" for name in histograms.names]
        apart = zip(histograms.num_zero, histograms.num_nan, histograms.num_inf, strict=True)
        values = zip(histograms_of(tags, histograms.edges, histograms.counts), apart, strict=True)
        return [
            self._describe(
                value,
                "histograms",
                "log10 of the absolute gradient elements. Counted apart in the first of these histograms: "
                f"{num_zero:,.0f} zeros, {num_nan:,.0f} NaN, {num_inf:,.0f} Inf.",
            )
            for value, (num_zero, num_nan, num_inf) in values
        ]

    def __repr__(self) -> str:
        return "TensorBoardSink()"


def _table(alert: Alert) -> str:
    rows = "\n".join(
        f"| `{parameter.name}` | {parameter.norm:.3g} | {parameter.num_nan} | {parameter.num_inf} |"
        for parameter in alert.parameters
    )
    table = f"\n\n| parameter | norm | NaN | Inf |\n|---|---|---|---|\n{rows}" if rows else ""
    factors = "" if alert.culprit is None or not alert.culprit.factors else "\n\n" + "\n".join(alert.culprit.factors)
    return f"**{alert.kind}** ({alert.action}): {alert.message}\n\n{alert.remedy}{table}{factors}"
