"""A real TensorBoard and a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest
from selenium import webdriver

ROOT = Path(__file__).parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


_END_S = 20.0


@contextlib.contextmanager
def plugin_path() -> Iterator[list[str]]:
    """Folders in which TensorBoard finds the package and its entry point, also where it is not installed from here."""
    group = "tensorboard_plugins"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    if set(declared) <= {entry.name for entry in entry_points(group=group)}:
        yield [str(ROOT)]
        return
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "gradguard_from_source-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradguard-from-source\nVersion: 0\n")
        lines = [f"{name} = {target}" for name, target in declared.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        yield [str(ROOT), folder]


@contextlib.contextmanager
def tensorboard(log_dir: Path, *, without: str | None = None, fast: bool = False) -> Iterator[str]:
    """A running TensorBoard; its address.

    Args:
        log_dir: what it shows.
        without: a package that it shall not find.
        fast: whether it reads with the data server in Rust.
    """
    options = ["--logdir", str(log_dir), "--port", "0", f"--load_fast={str(fast).lower()}", "--reload_interval", "2"]
    hide = f"sys.modules[{without!r}] = None; " if without else ""
    code = f"import sys; {hide}from tensorboard.main import run_main; sys.argv[0] = 'tensorboard'; run_main()"
    with plugin_path() as folders:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, "-W", "ignore", "-c", code, *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            seen = []
            for line in process.stderr:
                seen.append(line)
                if found := re.search(r"http://\S+?:\d+", line):
                    break
            else:
                raise RuntimeError("TensorBoard did not start:\n" + "".join(seen))
            try:
                yield found.group()
            finally:
                process.terminate()
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:  # it ends by an exception, which is lost where nothing may be raised
                    process.kill()


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 950) -> Iterator[webdriver.Chrome]:
    """Headless Chromium with a profile of its own that keeps the console's messages."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()
