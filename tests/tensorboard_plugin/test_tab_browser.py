"""The tab in a real browser on a real TensorBoard: what is drawn, what a click does, and what the console says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from page import Page
from recording import alert_at, histograms_of, layout_of, record_at, write, write_for_tab
from selenium.webdriver.common.keys import Keys
from serving import CHROMIUM, DRIVER, ROOT, tensorboard

from lightning_gradguard import Culprit

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path"),
    pytest.mark.xdist_group("browser"),
    pytest.mark.timeout(900),  # on a machine with far more to do than it has cores, starting all this takes minutes
]
STEPS, FAULT = 130, 80
NAMES = ("stem.weight", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight")
HOSTILE = ("<img src=x onerror='window.parent.hacked=1'>", 'a/"b"\'\\&amp;', "x" * 500, "</script><b>bold</b>.weight")
CULPRIT = Culprit(
    "forward",
    "body.0",
    "aten::log",
    "model.py",
    12,
    "return x.log()",
    (3, 5),
    message="log of 0",
    remedy="Clamp it.",
    inputs=("zeros of (8,)",),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short quickstart, and runs that are harder to show."""
    folder = tmp_path_factory.mktemp("runs")
    code = f"import sys; sys.path.insert(0, 'examples'); import quickstart; quickstart.main({str(folder)!r}, {STEPS}, 16)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, cwd=ROOT, env=environment)
    plain, hostile = layout_of(*NAMES), layout_of(*HOSTILE)
    alerts = {
        step: (alert_at(step, "body.0.weight", kind="nonfinite" if step % 2 else "explosion", culprit=CULPRIT),)
        for step in (20, 31)
    }
    norms = [[0.0 if step > 30 else 1.0, float("nan") if step == 31 else 1.0, 1, 1, 1, 1] for step in range(60)]
    write(
        folder / "damaged",
        [
            record_at(
                step, plain, row, alerts=alerts.get(step, ()), skip=step == 31, histograms=histograms_of(plain, num_nan=step)
            )
            for step, row in enumerate(norms)
        ],
    )
    message = "<script>window.parent.hacked=1</script>" * 20
    alert = alert_at(3, *HOSTILE, kind="<b>kind</b>", message=message)
    write(
        folder / "hos'tile & <b>",
        [record_at(s, hostile, alerts=(alert,) if s == 3 else (), histograms=histograms_of(hostile)) for s in range(5)],
    )
    write_for_tab(folder / "many", [record_at(step, plain, alerts=(alert_at(step, "head.weight"),)) for step in range(1200)])
    return folder


@pytest.fixture(scope="module")
def address(runs):
    """A TensorBoard on them."""
    with tensorboard(runs) as found:
        yield found


@pytest.fixture
def page(driver, address):
    """A fresh look, at the end of which the console must hold no error."""
    driver.get("about:blank")  # ends what an earlier page still asks of a server that has gone
    found = Page(driver, address)
    found.leave()
    found.errors()
    yield found
    assert found.errors() == []


QUICKSTART = "quickstart/version_0"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_view_is_drawn(dark, page):
    """On the quickstart, in both themes: maps, curves, marks and the table."""
    page.open(dark=dark, run=QUICKSTART)
    page.until(lambda: page.plot(".strip")["points"] == 2)  # the explosion, and the step that was skipped for it
    flow = page.plot(".heat")
    assert flow["traces"][0]["rows"] == len(page.all(".labels .row")) == 9
    assert max(flow["images"]) > 100_000
    assert page.run("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    norms = page.view("norms").plot()
    assert {"global norm", "after clipping", "explosion limit"} <= {trace["name"] for trace in norms["traces"]}
    assert norms["lines"] >= 4
    assert norms["points"] == 2
    depth = page.view("depth").plot()
    assert depth["points"] >= 7
    assert "7 parameters" in depth["label"]
    page.view("distribution")
    page.until(lambda: "no histogram" in page.text(".words"))  # the run is shorter than a hundred steps
    assert page.view("alerts").text("tbody tr").startswith(f"▸ {FAULT}")


def test_alert_says_when_where_why_and_what_to_try(page):
    """Above every view, without a click."""
    text = page.open(run=QUICKSTART).text(".incident")
    assert "explosion" in text
    assert f"at step {FAULT}" in text
    assert "the run stopped" in text
    assert "head.weight" in text
    assert "the limit was" in text
    assert "What to try" in text


def test_alert_clicked_opens_its_culprit_and_leads_to_its_step(page):
    """In the table, then in the map, the curves and the profile."""
    page.open(run="damaged", view="alerts")
    assert [row.text.split()[1] for row in page.all("tbody tr")] == ["31", "20"]
    page.shown("tbody tr button").click()
    details = page.text(".details")
    for part in (
        "body.0",
        "aten::log",
        "model.py:12",
        "3, 5",
        "return x.log()",
        "Clamp it.",
        "zeros of (8,)",
        "What to try",
    ):
        assert part in details
    page.run("[...document.querySelectorAll('.details button')].find((b) => b.textContent === 'In flow').click()")
    flow = page.plot(".heat")
    assert flow["shapes"] >= 2  # the step, and the cell that the alert names
    assert page.all(".row.guilty")
    assert page.view("norms").plot()["shapes"] == 1
    page.view("depth").plot()
    assert page.run("return document.getElementById('step').value") == "31"


def test_alerts_are_filtered_by_kind(page):
    """And all of them come back."""
    page.open(run="damaged", view="alerts")
    page.until(lambda: len(page.all(".filter")) == 3)
    page.all(".filter")[1].click()
    page.until(lambda: len(page.all("tbody tr")) == 1)
    page.all(".filter")[0].click()
    page.until(lambda: len(page.all("tbody tr")) == 2)


def test_thousands_of_alerts_are_paged(page):
    """A hundred at a time; the others are a click away."""
    page.open(run="many", view="alerts")
    page.until(lambda: "1 to 100 of 1,200" in page.run("return document.querySelector('#panel').innerText"))
    assert len(page.all("tbody tr")) == 100
    # While a run is read the table is drawn again and again, so it is found and clicked at once.
    page.run("[...document.querySelectorAll('.alerts .tools button')].find((b) => b.textContent === 'Older').click()")
    page.until(lambda: "101 to 200" in page.text("#panel"))


def test_damage_is_drawn_as_what_it_is(page):
    """NaN and zero have colours of their own, in the map, the profile and the shares."""
    page.open(run="damaged", step=31, view="depth")
    names = [trace["name"] for trace in page.plot()["traces"] if trace["x"]]
    assert {"NaN", "0 (or below 1e-22)"} <= set(names)
    page.view("flow")
    assert "3 cells with NaN or Inf" in page.plot(".heat")["label"]
    page.view("distribution").shown("#parameter")
    shares = {trace["name"]: trace for trace in page.plot()["traces"]}
    assert max(shares["NaN"]["y"]) > 0.4
    assert len(shares["exactly 0"]["x"]) == 60


def test_run_switched_shows_the_other(page):
    """And the address says so."""
    page.open(run=QUICKSTART).plot(".heat")
    page.run("const r = document.getElementById('run'); r.value = 'damaged'; r.dispatchEvent(new Event('change'))")
    page.until(lambda: "stem.weight" in page.text(".labels"))
    page.until(lambda: "at step 31" in page.text(".incident"))
    assert "run=damaged" in page.url()


def test_theme_switched_redraws(page):
    """Without loading anything anew."""
    page.open(run=QUICKSTART)
    before = page.plot(".heat")["background"]
    page.run("window.parent.document.body.classList.toggle('dark-mode')")
    page.until(lambda: page.plot(".heat")["background"] != before)


def test_link_opens_the_same_view(page):
    """What was clicked is in the address, and the address brings it back."""
    page.open(run="damaged")
    page.until(lambda: len(page.all(".labels .row")) == 9)
    next(row for row in page.all(".labels .row") if "bias" in row.text).click()
    page.view("distribution")
    page.until(lambda: "parameter=body.0.bias" in page.url())
    link = page.url()
    page.driver.switch_to.default_content()
    page.driver.get("about:blank")
    page.driver.get(link)
    page.driver.switch_to.frame(page.until(lambda: page.all("iframe"))[0])
    page.until(lambda: page.run("return document.getElementById('parameter')?.value") == "body.0.bias")
    assert page.run("return document.getElementById('run').value") == "damaged"


def test_modules_open_and_close_and_keys_move(page):
    """The tree and the views work without a mouse."""
    page.open(run="damaged")
    page.until(lambda: len(page.all(".labels .row")) == 9)
    body = next(row for row in page.all(".labels .row") if "body" in row.text)
    body.send_keys(Keys.ARROW_LEFT)
    page.until(lambda: len(page.all(".labels .row")) == 3)
    page.until(lambda: page.plot(".heat")["traces"][0]["rows"] == 3)
    assert "open=" in page.url()
    page.shown("#tab-flow").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.run("return document.activeElement.id") == "tab-norms")
    assert "view=norms" in page.url()


def test_cell_clicked_chooses_step_and_parameter(page):
    """A click on the map is a selection for all views."""
    page.open(run="damaged").plot(".heat")
    page.run(
        "const heat = document.querySelector('.heat');"
        "heat.emit('plotly_click', {points: [{x: 20.5, y: heat.data[0].y.length - 1, curveNumber: 0}]})"
    )
    page.until(lambda: "step=20" in page.url())
    assert "parameter=head.weight" in page.url()
    page.until(lambda: page.all(".row[aria-selected=true]"))
    assert page.all(".row[aria-selected=true]")[0].text == "head.weight"


def test_stretch_zoomed_into_is_asked_for_in_detail(page):
    """And a double click shows all steps again."""
    page.open(run="many").plot(".heat")
    # Few steps need no choice of how columns are drawn together; it appears while the run is read.
    last = "return [...document.querySelectorAll('.tools select')].at(-1)?.innerText ?? ''"
    page.until(lambda: page.run(last).startswith("largest"))
    page.until(lambda: max(page.plot(".heat")["traces"][0]["x"]) > 1150)
    page.run("Plotly.relayout(document.querySelector('.heat'), {'xaxis.range': [100, 200]})")
    page.until(lambda: len(page.plot(".heat")["traces"][0]["x"]) == 102)
    page.run("document.querySelector('.heat').emit('plotly_doubleclick')")
    page.until(lambda: len(page.plot(".heat")["traces"][0]["x"]) > 400)


def test_hostile_names_and_texts_stay_text(page):
    """In each view; nothing of them becomes markup."""
    page.open(run="hos'tile & <b>")
    for view in ("flow", "norms", "depth", "distribution", "alerts"):
        page.view(view)
        if view != "alerts":
            page.plot()
    page.shown("tbody tr button").click()
    assert "<script>window.parent.hacked=1</script>" in page.text(".details")
    assert page.run("return window.parent.hacked") is None
    assert not page.all("img, #panel b, .incident b, #panel script")


def test_new_steps_appear_while_looking(page, runs):
    """A run that is being trained."""
    layout = layout_of(*NAMES)
    write_for_tab(runs / "live", [record_at(step, layout) for step in range(5)])
    page.until(
        lambda: "live" in str(page.open().run("return [...document.getElementById('run').options].map((o) => o.value)"))
    )
    page.open(run="live")
    assert "Nothing was found up to step 4" in page.text(".incident")
    write_for_tab(runs / "live", [record_at(step, layout) for step in range(5, 9)])
    reload = "window.parent.document.querySelector('app-header-reload button').click()"
    page.until(lambda: [page.run(reload), "up to step 8" in page.text(".incident")][1])
    assert "9 columns" in page.plot(".heat")["label"]
    page.view("runs").shown("tr[data-run=live]")
    write_for_tab(runs / "other", [record_at(step, layout) for step in range(3)])  # not the one that is chosen
    page.until(lambda: [page.run(reload), page.all("tr[data-run=other]")][1])


@pytest.mark.slow
def test_folder_without_our_data_says_what_to_do(driver, tmp_path):
    """A newcomer gets the two lines of code."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    with tensorboard(tmp_path, fast=True) as address:
        page = Page(driver, address).open()
        text = page.text("#panel")
    assert "one run here, without data of GradGuard" in text
    assert "Trainer(callbacks=[GradGuard(" in text


@pytest.mark.slow
def test_without_plotly_alerts_are_shown_and_the_rest_explained(driver, runs):
    """The extra is named; so is how to get it."""
    with tensorboard(runs, without="plotly", fast=True) as address:
        page = Page(driver, address).open(run="damaged")
        assert 'pip install "lightning-gradguard[tensorboard-tab]"' in page.text(".note")
        page.until(lambda: len(page.all("tbody tr")) == 2)
