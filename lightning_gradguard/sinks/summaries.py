"""TensorBoard's protocol buffers: scalars, texts, histograms, the custom-scalars page, and what the GradGuard tab reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_INT16, DT_STRING, DT_UINT8
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_gradguard.layout import Floats
from lightning_gradguard.tensorboard_plugin.wire import PLUGIN_NAME

_TYPES = {
    np.dtype(np.float64): DT_DOUBLE,
    np.dtype(np.float32): DT_FLOAT,
    np.dtype(np.int16): DT_INT16,
    np.dtype(np.uint8): DT_UINT8,
}


def metadata(plugin: str, description: str = "") -> SummaryMetadata:
    """Which plugin shows a tag, and what it says about it."""
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), summary_description=description)


def scalar(tag: str, value: float) -> Summary.Value:
    """One scalar."""
    return Summary.Value(tag=tag, simple_value=value)


def text(tag: str, content: str) -> Summary.Value:
    """One text, in Markdown."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[content.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, tensor=tensor)


def array(tag: str, is_first: bool, values: NDArray[Any]) -> Summary.Value:  # noqa: FBT001
    """Numbers for the GradGuard tab; float64, float32, int16 or uint8."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in values.shape])
    content = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return _of_tab(tag, is_first, TensorProto(dtype=_TYPES[values.dtype], tensor_content=content, tensor_shape=shape))


def strings(tag: str, is_first: bool, texts: Sequence[str]) -> Summary.Value:  # noqa: FBT001
    """Texts for the GradGuard tab."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(texts))])
    content = [text.encode() for text in texts]
    return _of_tab(tag, is_first, TensorProto(dtype=DT_STRING, string_val=content, tensor_shape=shape))


def _of_tab(tag: str, is_first: bool, tensor: TensorProto) -> Summary.Value:  # noqa: FBT001
    if not is_first:  # TensorBoard ignores the metadata of later ones
        return Summary.Value(tag=tag, tensor=tensor)
    about = metadata(PLUGIN_NAME)
    about.data_class = DATA_CLASS_TENSOR
    return Summary.Value(tag=tag, tensor=tensor, metadata=about)


def histograms_of(tags: Sequence[str], edges: Floats, counts: Floats) -> Iterator[Summary.Value]:
    """One histogram for each row.

    As TensorBoard stores it, a bucket is known by its right edge, and the first by the smallest value as well. What it
    doesn't read is left out, and what can be computed for all rows at once is, since there may be thousands.

    Args:
        tags: [num_rows].
        edges: bin edges, [num_bins + 1].
        counts: [num_rows, num_bins].
    """
    full = counts > 0
    first = full.argmax(axis=1)
    last = counts.shape[1] - full[:, ::-1].argmax(axis=1)
    totals = counts.sum(axis=1)
    limits = edges.tolist()
    for row, tag in enumerate(tags):
        if not totals[row]:
            yield Summary.Value(tag=tag, histo=HistogramProto(bucket_limit=[0.0], bucket=[0.0]))
            continue
        begin, end = first[row], last[row]
        histo = HistogramProto(
            min=limits[begin],
            max=limits[end],
            num=totals[row],
            bucket_limit=limits[begin + 1 : end + 1],
            bucket=counts[row, begin:end].tolist(),
        )
        yield Summary.Value(tag=tag, histo=histo)


def custom_scalars(prefixes: Sequence[str]) -> Summary.Value:
    """The "GradGuard" page of TensorBoard's custom scalars: the norm against its limits, groups together."""
    page = _page(prefixes).SerializeToString()
    tensor = TensorProto(dtype=DT_STRING, string_val=[page], tensor_shape=TensorShapeProto())
    return Summary.Value(tag="custom_scalars__config__", tensor=tensor, metadata=metadata("custom_scalars"))


def _page(prefixes: Sequence[str]) -> layout_pb2.Layout:
    charts = [
        _chart(f"{prefix}: {title}", f"{prefix}/{pattern}")
        for prefix in prefixes
        for title, pattern in (
            ("norm and its limit", "(global_norm|clipped_norm|explosion_limit)$"),
            ("limit over norm", "limit_ratio$"),
            ("norms by group", "norm/.*"),
            ("clipping", "clip_coef$"),
            ("totals", "num_(skipped|clipped|alerts)$"),
        )
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="GradGuard", chart=charts)])


def _chart(title: str, pattern: str) -> layout_pb2.Chart:
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[pattern]))
