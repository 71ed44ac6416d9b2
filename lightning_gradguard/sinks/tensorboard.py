"""Records in TensorBoard: one event for all scalars of a step, one for all its histograms, one for the GradGuard tab."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.alert import Alert
from lightning_gradguard.record import Histograms, Measurement, Record
from lightning_gradguard.sinks.event_files import LastingRecordWriter, make_lasting
from lightning_gradguard.sinks.summaries import custom_scalars, histograms_of, metadata, scalar, text
from lightning_gradguard.sinks.tab import TabSeries
from lightning_gradguard.sinks.tags import LoggedNorms, description, scalars, tag_prefix
from lightning_gradguard.wording import counted

_FREE_BYTES, _BYTES_PER_STEP = 40_000, 20
"""What the histograms of the standard panel may take: of large models they would be most of the file, so those are written
more rarely than they are counted. The GradGuard tab has all of them, in a hundredth of the room."""

_NORM_EDGES = np.arange(-20.0, 9.0, 0.25)


class TensorBoardSink:
    """Writes scalars, histograms and alerts, and a custom-scalars page that shows the norm against its limits.

    Args:
        writer: gives the writer, which is asked for at the first record: making it creates a folder.
        settings: of the guard, in words, for the report.
        norms: of what norms are scalars: "totals", "groups" or "all"; the GradGuard tab has all in any case.
    """

    wants_every_step = False

    def __init__(
        self,
        writer: SummaryWriter | Callable[[], SummaryWriter],
        settings: Mapping[str, str] | None = None,
        *,
        norms: LoggedNorms = "groups",
    ) -> None:
        self._writer = writer
        self._norms: LoggedNorms = norms
        self._described: set[str] = set()
        self._tab = TabSeries(settings)
        self._last: Measurement | None = None
        self._num_histogram_bytes = 0
        self._lasting: LastingRecordWriter | None = None

    def write(self, record: Record) -> None:
        """Write what is due; a step with an alert is always written, so that its spike is in the picture."""
        step = record.position.log_step
        prefix = tag_prefix(record.position)
        if (record.scalars_due or record.alerts) and record.measurement is not self._last:
            self._last = record.measurement  # a notice comes with the measurement of a step that has been written
            self._add(self._page(record), 0)
            self._add(self._scalars(record, prefix), step)
        if record.histograms is not None and self._num_histogram_bytes <= _FREE_BYTES + _BYTES_PER_STEP * step:
            distributions = self._distributions(record.histograms, prefix)
            self._num_histogram_bytes += sum(value.ByteSize() for value in distributions)
            self._add(distributions, step)
        self._add(self._tab.values(record), step)
        if record.alerts:
            tag = f"{prefix}/alerts"
            self._add([self._describe(text(tag, _table(alert)), "text") for alert in record.alerts], step)
            self._open().flush()
        self._raise_error()

    def close(self) -> None:
        """Write out what is buffered. The writer belongs to the logger, so it stays open."""
        if isinstance(self._writer, SummaryWriter):
            self._writer.flush()
            self._raise_error()

    def _open(self) -> SummaryWriter:
        if not isinstance(self._writer, SummaryWriter):
            self._writer = self._writer()
        self._lasting = make_lasting(self._writer)
        return self._writer

    def _raise_error(self) -> None:
        if self._lasting is not None:
            self._lasting.raise_error()

    def _add(self, values: list[Summary.Value], step: int) -> None:
        if values:
            # `add_summary` of the file writer is the only way to several values in one event.
            file_writer = self._open()._get_file_writer()  # type: ignore[no-untyped-call]
            file_writer.add_summary(Summary(value=values), step)

    def _describe(self, value: Summary.Value, plugin: str, about: str | None = None) -> Summary.Value:
        """Say at a tag's first value what it is; TensorBoard ignores it on later ones."""
        if value.tag not in self._described:
            self._described.add(value.tag)
            value.metadata.CopyFrom(metadata(plugin, description(value.tag) if about is None else about))
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
        values = [
            self._describe(scalar(f"{prefix}/{name}", value), "scalars")
            for name, value in scalars(record, self._norms).items()
        ]
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
        after = " after clipping" if histograms.clipped else ""
        apart = zip(histograms.num_zero, histograms.num_nan, histograms.num_inf, strict=True)
        values = zip(histograms_of(tags, histograms.edges, histograms.counts), apart, strict=True)
        return [
            self._describe(
                value,
                "histograms",
                f"log10 of the absolute gradient elements{after}. Counted apart in the first of these histograms: "
                f"{counted(int(num_zero), 'zero')}, {num_nan:,.0f} NaN, {num_inf:,.0f} Inf.",
            )
            for value, (num_zero, num_nan, num_inf) in values
        ]

    def __repr__(self) -> str:
        return "TensorBoardSink()"


def _table(alert: Alert) -> str:
    facts = {
        "what": f"{alert.kind}, {alert.action}",
        "step": _where(alert),
        "found": f"{alert.value:.4g}, limit {alert.limit:.4g}",
        **_culprit(alert),
        "what to try": alert.remedy,
    }
    lines = [f"**{_cell(alert.message)}**", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    if alert.parameters:
        lines += ["", "| parameter | norm | NaN | Inf |", "|---|---|---|---|"]
        lines += [f"| {_name(each.name)} | {each.norm:.3g} | {each.num_nan} | {each.num_inf} |" for each in alert.parameters]
    if alert.culprit is not None and alert.culprit.factors:
        lines += ["", *alert.culprit.factors]
    return "\n".join(lines)


def _culprit(alert: Alert) -> dict[str, str]:
    culprit = alert.culprit
    if culprit is None:
        return {}
    place = "" if culprit.file is None else f", {culprit.file}:{culprit.line}"
    samples = "" if culprit.samples is None else f", samples {', '.join(map(str, culprit.samples[:20]))}"
    return {"who": f"{culprit.phase}: {culprit.module or 'training_step'} {culprit.op}{place}{samples}"}


def _name(name: str) -> str:
    return f"`{name}`" if re.fullmatch(r"[\w.\[\]-]+", name) else _cell(name)


def _cell(text: str) -> str:
    """A text as a cell of a table: of Markdown only code in backticks, no HTML; TensorBoard also cleans what it shows."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one of them stands alone
        return _escaped(text)
    return "".join(_code(part) if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _code(text: str) -> str:
    """As code, where Markdown shows what is escaped as it is written; in quotes what can't do without."""
    return f'"{_escaped(text)}"' if re.search(r"[&<>|]", text) else f"`{' '.join(text.split())}`"


def _escaped(text: str) -> str:
    for character, escaped in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("*", "&#42;"),
        ("_", "&#95;"),
    ):
        text = text.replace(character, escaped)
    return re.sub(r"\s+", " ", text)


def _where(alert: Alert) -> str:
    if alert.epoch is None:
        return f"{alert.step}"
    batch = "" if alert.batch_idx is None else f", batch {alert.batch_idx}"
    return f"{alert.step} (epoch {alert.epoch}{batch})"
