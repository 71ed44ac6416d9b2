"""Runs in a folder, read as TensorBoard reads them, but without a server and to the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from lightning_gradguard.tensorboard_plugin.data import Source
from lightning_gradguard.tensorboard_plugin.run import Run
from lightning_gradguard.tensorboard_plugin.wire import EVENTS_PER_TAG, PLUGIN_NAME

_NOTHING = {
    "scalars": 1,
    "histograms": 1,
    "images": 1,
    "audio": 1,
    "graph": 1,
    "distributions": 1,
    "compressedHistograms": 1,
}


def read_runs(log_dir: Path) -> Iterator[tuple[str, Run]]:
    """Name and content of each run with data of GradGuard, by name; event files only are read."""
    sizes = {**_NOTHING, "tensors": EVENTS_PER_TAG}
    multiplexer = EventMultiplexer(size_guidance=sizes, tensor_size_guidance={PLUGIN_NAME: EVENTS_PER_TAG + 1})
    multiplexer.AddRunsFromDirectory(str(log_dir))
    multiplexer.Reload()
    provider, context = MultiplexerDataProvider(multiplexer, str(log_dir)), RequestContext()
    for name in sorted(provider.list_tensors(context, experiment_id="", plugin_name=PLUGIN_NAME)):
        run = Run()
        run.sync(Source(provider, context, "", name), float("inf"))
        if run.series or run.alerts:
            yield name, run
