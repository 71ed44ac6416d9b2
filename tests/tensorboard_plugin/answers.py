"""The tab's server over event files, without a server."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.data_ingester import DEFAULT_SIZE_GUIDANCE, DEFAULT_TENSOR_SIZE_GUIDANCE
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from lightning_gradguard.tensorboard_plugin.plugin import GradGuardPlugin


class Tab:
    """TensorBoard's own reading of a folder, with its default limits, and the tab's answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.multiplexer = EventMultiplexer(
            size_guidance=DEFAULT_SIZE_GUIDANCE, tensor_size_guidance=DEFAULT_TENSOR_SIZE_GUIDANCE
        )
        provider = MultiplexerDataProvider(self.multiplexer, str(folder))
        self.plugin = GradGuardPlugin(TBContext(data_provider=provider))
        self.apps = self.plugin.get_plugin_apps()

    def reload(self) -> Tab:
        """Read what is new, as TensorBoard does every few seconds."""
        self.multiplexer.AddRunsFromDirectory(str(self.folder))
        self.multiplexer.Reload()
        return self

    def get(self, route: str, **query):
        """The answer to one request."""
        return Client(self.apps[route]).get(route, query_string=query)

    def ask(self, route: str, run: str = "run", **query) -> dict:
        """The answer to a request about a run, once all of it has been read."""
        while (answer := self.get(route, run=run, **query).json).get("progress", 1) < 1:
            pass
        return answer

    def flow(self, run: str = "run", **query) -> tuple[dict, np.ndarray, np.ndarray | None]:
        """The heat map: the answer, and its largest and smallest codes by row and column."""
        layout = self.ask("/layout", run)
        answer = self.ask("/flow", run, **{"nodes": ",".join(map(str, range(len(layout["labels"])))), **query})
        width = max(len(answer["edges"]) - 1, 0)
        unpacked = [None if answer[name] is None else unpack(answer[name], width) for name in ("largest", "smallest")]
        return answer, *unpacked


def unpack(text: str, width: int | None = None) -> np.ndarray:
    """Codes, by row and column."""
    codes = np.frombuffer(base64.b64decode(text), dtype="<i2")
    return codes if width is None else codes.reshape(-1, max(width, 1))
