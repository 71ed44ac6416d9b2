"""The tab in a browser, as a person sees it."""

from __future__ import annotations

from urllib.parse import quote

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

_READY = "return document.body && document.body.dataset.ready === 'true'"


class Page:
    """One window on a TensorBoard.

    Args:
        driver: of the browser.
        address: of the TensorBoard.
    """

    def __init__(self, driver, address: str) -> None:
        self.driver = driver
        self.address = address

    def open(self, *, dark: bool = False, **state) -> Page:
        """Load the tab, at a state that a link would have."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        parts = [f"p.gradguard.{key}={quote(str(value), safe='')}" for key, value in state.items()]
        self.driver.get(f"{self.address}/?darkMode={str(dark).lower()}#{'&'.join(['gradguard', *parts])}")
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "iframe"))
        self.driver.switch_to.frame(self.driver.find_element(By.CSS_SELECTOR, "iframe"))
        self.until(lambda: self.run(_READY))
        return self

    def open_alone(self, **state) -> Page:
        """Load the tab at such a state in a window of its own, without the TensorBoard around it: many times quicker."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        parts = [f"p.gradguard.{key}={quote(str(value), safe='')}" for key, value in state.items()]
        self.driver.get(f"{self.address}/data/plugin_entry.html?name=gradguard#{'&'.join(['gradguard', *parts])}")
        self.until(lambda: self.run(_READY))
        return self

    def resize(self, width: int, height: int) -> Page:
        """Make the window that large; unlike a real window it may be narrower than 500 pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        return self

    def until(self, condition, seconds: float = 240):
        """Wait until something is so."""
        # What is drawn anew while one looks is looked at again.
        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.05, ignored_exceptions=(StaleElementReferenceException,))
        return wait.until(lambda _: condition())

    def run(self, script: str, *arguments):
        """The outcome of a script in the tab."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str):
        """The elements of a kind."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def shown(self, selector: str):
        """An element, as soon as it is to be seen."""
        return self.until(lambda: next((element for element in self.all(selector) if element.is_displayed()), None))

    def text(self, selector: str = "body") -> str:
        """What is written there."""
        script = "return [...document.querySelectorAll(arguments[0])].find((e) => e.offsetParent !== null)?.innerText"
        return self.until(lambda: self.run(script, selector))

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a kind that reads so, found and clicked at once, since tables are drawn again."""
        script = """
            const found = [...document.querySelectorAll(arguments[0])].find((e) => e.innerText.includes(arguments[1]));
            found?.click();
            return Boolean(found);
        """
        self.until(lambda: self.run(script, selector, text))

    def view(self, name: str) -> Page:
        """Go to a view as people do."""
        self.shown(f"#tab-{name}").click()
        self.until(lambda: self.run("return document.getElementById('panel').dataset.view") == name)
        return self

    def plot(self, selector: str = "#panel .plot") -> dict:
        """What a plot has drawn: its traces, as far as the tests look at them, and the shapes over them."""
        self.until(lambda: self.run("return document.querySelector(arguments[0])?.dataset?.drawn", selector))
        script = """
            const plot = document.querySelector(arguments[0]);
            const count = (selector) => plot.querySelectorAll(selector).length;
            return {
                traces: plot.data.map((t) => ({
                    name: t.name, type: t.type, x: Array.from(t.x ?? []), y: Array.from(t.y ?? []), rows: t.z?.length,
                })),
                lines: count("path.js-line"), points: count("path.point"), shapes: count(".shapelayer path"),
                images: [...plot.querySelectorAll("image")].map((i) => i.getBoundingClientRect())
                    .map((r) => r.width * r.height),
                background: plot.layout.plot_bgcolor, label: plot.getAttribute("aria-label"),
            };
        """
        return self.run(script, selector)

    def url(self) -> str:
        """TensorBoard's own address."""
        return self.run("return window.parent.location.href")

    def leave(self) -> None:
        """Look at nothing, so that no page asks a server that is gone."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")

    def errors(self) -> list[str]:
        """What the console holds against the page; the icon is TensorBoard's, which is not there alone."""
        entries = [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [entry["message"] for entry in entries if "/favicon.ico" not in entry["message"]]
