"""Records in TensorBoard: one event for all scalars of a step, one for all its histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.layout import Floats
from lightning_gradguard.record import Alert, Histograms, Record
from lightning_gradguard.sinks.tags import DESCRIPTIONS, scalars, tag_prefix


class TensorBoardSink:
    """Writes scalars, histograms and alerts, and a custom-scalars page that shows the norm against its limits.

    Args:
        writer: gives the writer, which is asked for at the first record: making it creates a folder.
    """

    def __init__(self, writer: SummaryWriter | Callable[[], SummaryWriter]) -> None:
        self._writer = writer
        self._has_layout = False

    def write(self, record: Record) -> None:
        """Write what is due; a step with an alert is always written, so that its spike is in the picture."""
        step = record.position.log_step
        prefix = tag_prefix(record.position)
        if record.scalars_due or record.alerts:
            self._add_page(record)
            values = [_scalar(f"{prefix}/{name}", value, name) for name, value in scalars(record).items()]
            values.append(_log_norms(f"{prefix}/log10_norms", record.measurement.norms))
            self._add(values, step)
        if record.histograms is not None:
            self._add(list(_distributions(record.histograms, prefix)), step)
        if record.alerts:
            self._add([_text(f"{prefix}/alerts", _table(alert), "alerts") for alert in record.alerts], step)
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
        # `add_summary` of the file writer is the only way to several values in one event.
        self._open()._get_file_writer().add_summary(  # type: ignore[no-untyped-call]
            Summary(value=values), step
        )

    def _add_page(self, record: Record) -> None:
        if self._has_layout:
            return
        prefixes = [f"gradguard/{index}" for index in range(record.position.num_optimizers)]
        page = _page(prefixes if len(prefixes) > 1 else ["gradguard"])
        value = _text("custom_scalars__config__", page.SerializeToString(), "", plugin="custom_scalars")
        self._add([value], 0)
        self._has_layout = True

    def __repr__(self) -> str:
        return "TensorBoardSink()"


def _metadata(name: str, plugin: str) -> SummaryMetadata:
    return SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), summary_description=DESCRIPTIONS.get(name, "")
    )


def _scalar(tag: str, value: float, name: str) -> Summary.Value:
    return Summary.Value(tag=tag, simple_value=value, metadata=_metadata(name, "scalars"))


def _text(tag: str, text: str | bytes, name: str, plugin: str = "text") -> Summary.Value:
    content = text.encode() if isinstance(text, str) else text
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)] if plugin == "text" else [])
    tensor = TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=shape)
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata(name, plugin))


def _log_norms(tag: str, norms: Floats) -> Summary.Value:
    usable = norms[np.isfinite(norms) & (norms > 0)]
    edges = np.arange(-20, 9, 0.25)
    counts = np.histogram(np.clip(np.log10(usable), edges[0], edges[-1]), edges)[0]
    return Summary.Value(tag=tag, histo=_histogram(edges, counts), metadata=_metadata("log10_norms", "histograms"))


def _distributions(histograms: Histograms, prefix: str) -> Iterable[Summary.Value]:
    folder = "gradients" + prefix.removeprefix("gradguard")
    rows = zip(histograms.names, histograms.counts, histograms.num_zero, histograms.num_nan, histograms.num_inf, strict=True)
    for name, counts, num_zero, num_nan, num_inf in rows:
        metadata = _metadata("", "histograms")
        metadata.summary_description = (
            "log10 of the absolute gradient elements. Counted apart in the first of these histograms: "
            f"{num_zero:,.0f} zeros, {num_nan:,.0f} NaN, {num_inf:,.0f} Inf."
        )
        yield Summary.Value(tag=f"{folder}/{name}", histo=_histogram(histograms.edges, counts), metadata=metadata)


def _histogram(edges: Floats, counts: Floats) -> HistogramProto:
    """As TensorBoard stores it: the right edge of each bucket, from one empty bucket before the first full one."""
    full = np.flatnonzero(counts)
    if not len(full):
        return HistogramProto(min=0, max=0, num=0, sum=0, sum_squares=0, bucket_limit=[0.0], bucket=[0.0])
    first, last = full[0], full[-1]
    centers = (edges[first : last + 1] + edges[first + 1 : last + 2]) / 2
    inside = counts[first : last + 1]
    return HistogramProto(
        min=edges[first],
        max=edges[last + 1],
        num=inside.sum(),
        sum=inside @ centers,
        sum_squares=inside @ centers**2,
        bucket_limit=edges[first : last + 2].tolist(),
        bucket=[0.0, *inside.tolist()],
    )


def _page(prefixes: list[str]) -> layout_pb2.Layout:
    charts = [
        _chart(f"{prefix}: {title}", f"{prefix}/{pattern}")
        for prefix in prefixes
        for title, pattern in (
            ("norm and its limit", "(global_norm|clipped_norm|explosion_limit)$"),
            ("norms by group", "norm/.*"),
            ("clipping", "clip_coef$"),
            ("totals", "num_(skipped|clipped|alerts)$"),
        )
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="GradGuard", chart=charts)])


def _chart(title: str, pattern: str) -> layout_pb2.Chart:
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[pattern]))


def _table(alert: Alert) -> str:
    rows = "\n".join(
        f"| `{parameter.name}` | {parameter.norm:.3g} | {parameter.num_nan} | {parameter.num_inf} |"
        for parameter in alert.parameters
    )
    table = f"\n\n| parameter | norm | NaN | Inf |\n|---|---|---|---|\n{rows}" if rows else ""
    return f"**{alert.kind}** ({alert.action}): {alert.message}\n\n{alert.remedy}{table}"
