"""How long the views of the GradGuard tab take at 1,000 parameters and 20,000 steps, and how large the report is.

The views need Chromium, its driver, selenium (extra `docs`) and plotly (extra `tensorboard-tab`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from benchmarks._report import begin, parser, table
from lightning_gradguard import Action, Alert, Decision, Measurement, Position, Record
from lightning_gradguard.cli.report.content import read
from lightning_gradguard.cli.report.render import to_html
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.histogram import EDGES
from lightning_gradguard.record import Histograms, Totals
from lightning_gradguard.sinks.tab import TabSeries

NUM_PARAMETERS, NUM_STEPS, NUM_ALERTS, HISTOGRAM_EVERY = 1000, 20_000, 20, 100
BAR_SECONDS, BAR_MB = 5.0, 5.0
ROUNDS, MAX_SECONDS = 3, 120.0
VIEWS = ("flow", "norms", "distribution", "depth", "alerts", "runs")
_READY = "return document.body?.dataset.ready === 'true'"
_DRAWN = """
    const panel = document.getElementById("panel");
    if (panel?.dataset.view !== arguments[0] || document.querySelector(".status")?.innerText) return false;
    const plots = [...panel.querySelectorAll(".plot")].filter((plot) => !plot.hidden);
    return plots.every((plot) => plot.dataset.drawn) && Boolean(plots.length || panel.querySelector("tbody tr"));
"""
_CLICK = "document.getElementById(`tab-${arguments[0]}`).click()"


def write_run(folder: Path, num_parameters: int, num_steps: int) -> None:
    """An event file with what the tab reads: norms at every step, histograms at every hundredth, an alert now and then."""
    names = [
        f"decoder.layers.{index // 10}.{('mlp', 'attention')[index % 2]}.{index % 10}.weight"
        for index in range(num_parameters)
    ]
    layout = Layout.of(names, [(64, 64)] * num_parameters)
    every = num_steps // NUM_ALERTS
    drawn = np.random.default_rng(0).lognormal(size=(64, num_parameters))
    has_grad = np.ones(num_parameters, dtype=np.bool_)
    counts = np.random.default_rng(1).poisson(100.0, (num_parameters, len(EDGES) - 1)).astype(np.float64)
    nothing = np.zeros(num_parameters)
    histograms = Histograms(layout.names, EDGES, counts, nothing, nothing, nothing, nothing.astype(np.bool_))
    series = TabSeries({"clip": "None"})
    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        for step in range(num_steps):
            norms = drawn[step % 64] * (1.0 + step / num_steps)
            total = float(np.linalg.norm(norms))
            alerts = (_alert(step, total),) if step % every == every // 2 else ()
            record = Record(
                Position(step, log_step=step),
                Measurement(layout, norms, has_grad, total, loss=1.0),
                (),
                Decision(),
                1.0,
                total,
                10.0 * total,
                alerts,
                Totals(num_steps=step + 1),
                scalars_due=True,
                histograms=histograms if step % HISTOGRAM_EVERY == HISTOGRAM_EVERY - 1 else None,
            )
            writer._get_file_writer().add_summary(Summary(value=series.values(record)), step)  # type: ignore[no-untyped-call]


def _alert(step: int, norm: float) -> Alert:
    return Alert(
        1.7e9 + step, step, 0, step, 0, 0, 0, "explosion", Action.WARN, norm, norm / 2, (), None, "Too large.", "Clip."
    )


@contextlib.contextmanager
def tensorboard(log_dir: Path) -> Iterator[str]:
    """A TensorBoard that has read all; its address."""
    options = ["--port", "0", "--load_fast=false", "--reload_task=blocking", "--reload_interval=0"]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(found.group() for line in process.stderr if (found := re.search(r"http://\S+?:\d+", line)))
        finally:
            process.terminate()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium with a profile of its own."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        switches = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,950")
        for argument in (*switches, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def _wait(driver: Any, script: str, *arguments: str) -> None:
    deadline = time.perf_counter() + MAX_SECONDS
    while not driver.execute_script(script, *arguments):
        if time.perf_counter() > deadline:
            raise TimeoutError(f"The tab was not there after {MAX_SECONDS:g} s: {[script, *arguments]}")
        time.sleep(0.01)


def draw_views(driver: Any, address: str) -> dict[str, float]:
    """Seconds from the tab's opening, and then from each click, to a view that is drawn."""
    seconds = {}
    driver.get("about:blank")
    begin_at = time.perf_counter()
    driver.get(f"{address}/data/plugin_entry.html?name=gradguard#gradguard&p.gradguard.view={VIEWS[0]}")
    _wait(driver, _READY)
    for index, view in enumerate(VIEWS):
        if index:
            begin_at = time.perf_counter()
            driver.execute_script(_CLICK, view)
        _wait(driver, _DRAWN, view)
        seconds[view] = time.perf_counter() - begin_at
    return seconds


def measure_views(log_dir: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each view, each round with a TensorBoard that has answered nothing yet."""
    found: dict[str, list[float]] = {view: [] for view in VIEWS}
    with browser() as driver:
        for _ in range(rounds):
            with tensorboard(log_dir) as address:
                for view, seconds in draw_views(driver, address).items():
                    found[view].append(seconds)
                driver.get("about:blank")  # asks nothing of a server that is gone
    return found


def main() -> None:
    """Write a run, look at all its views, and write its report."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    num_parameters, num_steps = (20, 200) if chosen.quick else (NUM_PARAMETERS, NUM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        log_dir = Path(folder)
        write_run(log_dir / "run", num_parameters, num_steps)
        size = len(to_html(read(log_dir), "run").encode()) / 1e6
        rows = [["report, MB", f"{size:.2f}", "", f"{'met' if size < BAR_MB else 'missed'}: below {BAR_MB:g} MB"]]
        has_browser = bool(shutil.which("chromium") and shutil.which("chromedriver"))
        if has_browser and importlib.util.find_spec("selenium") and importlib.util.find_spec("plotly"):
            found = measure_views(log_dir, 1 if chosen.quick else ROUNDS)
            found["all views"] = [sum(seconds) for seconds in zip(*found.values(), strict=True)]
            met = {
                "all views": f"{'met' if max(found['all views']) <= BAR_SECONDS else 'missed'}: at most {BAR_SECONDS:g} s"
            }
            for name, seconds in found.items():
                rows.append([f"{name}, s", f"{np.median(seconds):.2f}", f"{max(seconds):.2f}", met.get(name, "")])
    title = f"{num_parameters:,} parameters, {num_steps:,} steps, one TensorBoard a round that has read the file"
    console.print(table(title, ["", "median", "largest", ""], rows))


if __name__ == "__main__":
    main()
