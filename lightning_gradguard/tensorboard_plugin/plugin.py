"""The tab's server: TensorBoard finds it by the entry point `tensorboard_plugins`."""

from __future__ import annotations

import json
import math
import mimetypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard import errors
from tensorboard.backend import http_util
from tensorboard.backend.experiment_id import WSGI_ENVIRON_KEY
from tensorboard.context import from_environ
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from lightning_gradguard.tensorboard_plugin import alerts, assets, bundles, overview, rows, views
from lightning_gradguard.tensorboard_plugin.data import Series, Snapshot, Source
from lightning_gradguard.tensorboard_plugin.run import Run
from lightning_gradguard.tensorboard_plugin.wire import PLUGIN_NAME, Tag

_STATIC = Path(__file__).parent / "static"
_MAX_RUNS = 8
_SECONDS_PER_READ = 0.1
"""How long a request reads before it answers with what is there; the page asks again until all of it is."""

Answer = Callable[["Query"], dict[str, Any]]


class GradGuardPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """Reads runs as they are asked for, and keeps the last few of them.

    Args:
        context: TensorBoard's.
    """

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._log_dir = context.logdir
        self._runs: OrderedDict[tuple[str, str], Run] = OrderedDict()
        self._digests: dict[str, dict[str, overview.Digest]] = {}
        self._lock = threading.Lock()

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name and its first module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="GradGuard")

    def is_active(self) -> bool:
        """Always False: then TensorBoard looks whether there are summaries of `data_plugin_names`."""
        return False

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """What is answered under `data/plugin/gradguard/`."""
        files = {f"/static/{path.name}": _file(path) for path in sorted(_STATIC.iterdir()) if path.suffix in (".js", ".css")}
        answers: dict[str, Answer] = {
            "/layout": lambda query: views.layout(query.series.snapshot()),
            "/flow": lambda query: views.flow(query.window, query.alerts, query.nodes),
            "/norms": lambda query: views.norms(query.window, query.alerts),
            "/rows": lambda query: rows.rows(
                query.series.snapshot(), query.alerts, query.arguments.get("search", ""), query.arguments.get("sort", "")
            ),
            "/depth": lambda query: views.depth(query.series.snapshot(), query.number("step")),
            "/distribution": _distribution,
            "/alerts": _alerts,
            "/alert": _alert,
        }
        return {
            **files,
            "/plotly.min.js": _plotly,
            "/runs": self._answer(self._list_runs),
            "/overview": self._answer(lambda request: self._overview(request).table(_SECONDS_PER_READ)),
            "/curves": self._answer(lambda request: self._overview(request).curves(_names(request), _SECONDS_PER_READ)),
            **{route: self._answer(self._of_run(answer)) for route, answer in answers.items()},
        }

    def _answer(self, answer: Callable[[Request], dict[str, Any]]) -> Callable[..., Any]:
        @Request.application
        def app(request: Request) -> Response:
            # Already text: TensorBoard's own conversion goes through every number in Python.
            text = json.dumps(answer(request), allow_nan=False, separators=(",", ":"))
            response: Response = http_util.Respond(request, text, "application/json")
            return response

        return app

    def _of_run(self, answer: Answer) -> Callable[[Request], dict[str, Any]]:
        def app(request: Request) -> dict[str, Any]:
            experiment, name = _experiment(request), request.args.get("run", "")
            source = Source(self._provider, from_environ(request.environ), experiment, name)
            run = self._run(experiment, name)
            with run.lock:
                run.sync(source, _SECONDS_PER_READ)
                query = Query(request.args, run, source, bundles.folder_of(self._log_dir, name))
                found = {**answer(query), "layout": query.series.layout_key} if run.series else {}
                return {**found, "version": run.version, "progress": round(run.progress, 3), "is_empty": not run.series}

        return app

    def _run(self, experiment: str, name: str) -> Run:
        with self._lock:
            run = self._runs.setdefault((experiment, name), Run())
            self._runs.move_to_end((experiment, name))
            while len(self._runs) > _MAX_RUNS:
                self._runs.popitem(last=False)
            return run

    def _overview(self, request: Request) -> overview.Overview:
        experiment = _experiment(request)
        digests = self._digests.setdefault(experiment, {})
        return overview.Overview(self._provider, from_environ(request.environ), experiment, digests, self._lock)

    def _list_runs(self, request: Request) -> dict[str, Any]:
        experiment, context = _experiment(request), from_environ(request.environ)
        listed = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN_NAME)
        everything = self._provider.list_runs(context, experiment_id=experiment)
        runs = []
        for name, series in listed.items():
            tags = {parsed: about for tag, about in series.items() if (parsed := Tag.parse(tag)) is not None}
            if tags:
                runs.append(
                    {
                        "name": name,
                        "optimizers": sorted({tag.optimizer for tag in tags}),
                        "last_step": max(about.max_step for about in tags.values()),
                        "last_time": max(about.max_wall_time for about in tags.values()),
                        "has_alerts": any(tag.series == "alerts" for tag in tags),
                    }
                )
        return {
            "runs": sorted(runs, key=lambda run: str(run["name"])),
            "num_others": len(everything) - len(runs),
            "has_plotly": assets.plotly_path() is not None,
        }


class Query:
    """What a request asks of a run.

    Args:
        arguments: of the address.
        run: what has been read of it.
        source: where more can be read.
        folder: of the run's event files, if it lies on this machine.
    """

    def __init__(self, arguments: Mapping[str, str], run: Run, source: Source, folder: Path | None) -> None:
        self.arguments = arguments
        self.run = run
        self.source = source
        self.folder = folder

    @property
    def optimizer(self) -> int:
        """The optimizer asked for, or that of the alert to begin with, or the first."""
        wanted = self.number("optimizer")
        if wanted is None and (alert := alerts.headline(self.alerts)) is not None:
            wanted = alert["optimizer"]
        return int(wanted) if wanted in self.run.series else min(self.run.series)

    @property
    def series(self) -> Series:
        """Its steps."""
        return self.run.series[self.optimizer]

    @property
    def window(self) -> Snapshot:
        """Its steps in the range asked for."""
        return self.series.snapshot().between(self.number("from"), self.number("to"))

    @property
    def alerts(self) -> list[alerts.Alert]:
        """The alerts of all optimizers, oldest first."""
        return sorted(self.run.alerts.values(), key=lambda alert: (alert["time"], alert["id"]))

    @property
    def nodes(self) -> list[int]:
        """The rows asked for."""
        given = self.arguments.get("nodes", "")
        return [int(node) for node in given.split(",") if node.isdecimal() and len(node) < 10]

    def number(self, name: str) -> float | None:
        """A number of the address; None if it is not there, or none."""
        try:
            value = float(self.arguments.get(name, ""))
        except ValueError:
            return None
        return value if math.isfinite(value) else None


def _experiment(request: Request) -> str:
    # What `tensorboard.plugin_util` does, without the HTML sanitizer that it loads and that warns of its own age.
    return str(request.environ.get(WSGI_ENVIRON_KEY, ""))


def _names(request: Request) -> list[str]:
    """The runs asked for: a list in JSON, since a name may hold anything."""
    try:
        names = json.loads(request.args.get("runs", "[]"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _alerts(query: Query) -> dict[str, Any]:
    return alerts.alerts_page(query.alerts, query.arguments.get("kind") or None, int(query.number("offset") or 0))


def _alert(query: Query) -> dict[str, Any]:
    """One alert: by its id, or the one to begin with."""
    known = query.alerts
    alert = query.run.alerts.get(query.arguments.get("id", "")) or alerts.headline(known)
    steps = query.series.snapshot().steps
    return {
        "alert": None if alert is None else alerts.full(alert, known) | {"bundle": bundles.bundle_of(query.folder, alert)},
        "num_alerts": len(known),
        "last_step": int(steps[-1]) if len(steps) else None,
        "optimizer": query.optimizer,
    }


def _distribution(query: Query) -> dict[str, Any]:
    series = query.series
    wanted = query.number("parameter")
    index = int(wanted) if wanted is not None and 0 <= wanted < len(series.names) else 0
    return {"parameter": index, **views.distribution(series.histograms(index), series.snapshot(), index)}


def _file(path: Path) -> Callable[..., Any]:
    kind = mimetypes.types_map.get(path.suffix, "text/plain")

    @Request.application
    def app(request: Request) -> Response:
        response: Response = http_util.Respond(request, path.read_text(encoding="utf-8"), kind)
        return response

    return app


@Request.application
def _plotly(request: Request) -> Response:
    path = assets.plotly_path()
    if path is None:
        raise errors.NotFoundError("The extra `tensorboard-tab` is not installed.")
    response: Response = http_util.Respond(
        request, assets.compressed(path), "text/javascript; charset=utf-8", content_encoding="gzip", expires=3600
    )
    return response
