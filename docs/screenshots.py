"""Takes the pictures of README.md and docs/: a real TensorBoard on the quickstart's run, in a real browser.

Run `python docs/screenshots.py` after `python examples/quickstart.py`; it needs the extras `docs` and `tensorboard-tab`,
Chromium and its driver.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

IMAGES = Path(__file__).parent / "images"
PORT = 6123
FILTER = "gradguard/(global_norm|clipped_norm|explosion_limit|num_skipped)"
VIEWS = {
    "timeseries": (f"tagFilter={quote(FILTER)}&smoothing=0", "timeseries", 1300),
    "custom_scalars": ("", "custom_scalars&_smoothingWeight=0", 940),
    "text": ("", "text", 930),
    "histograms": ("", "histograms", 900),
    "tab_runs": ("", "gradguard&p.gradguard.view=runs", 930),
    "tab_flow": ("", "gradguard&p.gradguard.step=1500", 930),
    "tab_change": ("", "gradguard&p.gradguard.colour=change&p.gradguard.from=1200&p.gradguard.to=1500", 930),
    "tab_norms": ("", "gradguard&p.gradguard.view=norms", 1100),
    "tab_distribution": ("", "gradguard&p.gradguard.view=distribution", 930),
    "tab_depth": ("darkMode=true", "gradguard&p.gradguard.view=depth", 930),
    "tab_alerts": ("darkMode=true", "gradguard&p.gradguard.view=alerts&p.gradguard.alert=first", 930),
}
"""By picture: TensorBoard's settings, its tab, and the height of the window in pixels. Smoothing would hide one step."""


@contextlib.contextmanager
def tensorboard(log_dir: str) -> Iterator[str]:
    """A running TensorBoard; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", log_dir, "--port", str(PORT), "--load_fast=false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "http://" in line:
                break
        try:
            yield f"http://localhost:{PORT}"
        finally:
            process.terminate()


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium with a profile of its own."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            yield driver
        finally:
            driver.quit()


def main(log_dir: str = "logs/quickstart", *names: str) -> None:
    """One picture of each view, or of those that are named."""
    IMAGES.mkdir(exist_ok=True)
    with tensorboard(log_dir) as address, browser() as driver:
        for name in names or VIEWS:
            settings, tab, height = VIEWS[name]
            driver.set_window_size(1500, height)
            driver.get("about:blank")
            driver.get(f"{address}/?{settings if 'darkMode' in settings else f'darkMode=false&{settings}'}#{tab}")
            WebDriverWait(driver, 30).until(lambda found: found.find_elements(By.CSS_SELECTOR, "tb-app-root, app-header"))
            WebDriverWait(driver, 60).until(_is_drawn)
            driver.save_screenshot(str(IMAGES / f"{name}.png"))


_TAB_IS_DRAWN = """
    const page = document.querySelector("iframe")?.contentDocument;
    if (!page?.body?.dataset.ready || page.querySelector(".status")?.innerText) return false;
    return Boolean(page.querySelector("#panel .plot[data-drawn], #panel tbody tr"));
"""


def _is_drawn(driver: webdriver.Chrome) -> bool:
    """Whether the tab says so; of TensorBoard's own pages, whether two pictures in a row are the same."""
    if "#gradguard" in driver.current_url:
        return bool(driver.execute_script(_TAB_IS_DRAWN))
    first = driver.get_screenshot_as_png()
    driver.execute_async_script("setTimeout(arguments[arguments.length - 1], 4000)")
    return driver.get_screenshot_as_png() == first


if __name__ == "__main__":
    main(*sys.argv[1:])
