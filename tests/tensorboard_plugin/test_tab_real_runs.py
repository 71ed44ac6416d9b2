"""No picture lies: the tab in a browser on runs that a real Trainer has written."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from real_runs import GAN_FAULT, NAN_STEPS
from selenium.webdriver.common.keys import Keys
from serving import CHROMIUM, DRIVER

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path"),
    pytest.mark.xdist_group("browser"),
    pytest.mark.timeout(900),  # on a machine with far more to do than it has cores, starting all this takes minutes
]
FAULT = NAN_STEPS[0]

_OFFSETS = """
    const heat = document.querySelector('.heat');
    const axis = heat._fullLayout.yaxis, top = heat.querySelector('.main-svg').getBoundingClientRect().top + axis._offset;
    const middle = (element) => { const box = element.getBoundingClientRect(); return (box.top + box.bottom) / 2; };
    const rows = [...document.querySelectorAll('.labels .row')];
    const cells = rows.map((_, row) => top + axis.d2p(row));
    const boxes = [...heat.querySelectorAll('.shapelayer path')].map(middle);
    const guilty = cells.filter((_, row) => rows[row].classList.contains('guilty'));
    return {
        labels: rows.map((row, index) => middle(row) - cells[index]),
        boxes: guilty.map((at) => Math.min(...boxes.map((box) => Math.abs(box - at)))),
    };
"""


def row_offsets(page):
    """How far, in pixels, each label and each red box is from the centre of its row of cells."""
    return page.run(_OFFSETS)


SIZES = {"rows2": (1500, 950), "rows4": (400, 800), "rows7": (1500, 950), "rows12": (1280, 500)}


@pytest.mark.parametrize("run", SIZES)
def test_flow_labels_cells_and_boxes_share_their_rows(run, real_page):
    """At first opening, with an alert, whatever the window and the number of rows: within a pixel."""
    page = real_page.resize(*SIZES[run])
    (page.open if run == "rows7" else page.open_alone)(run=run, alert="begin")
    page.until(lambda: page.plot(".heat")["traces"][0]["rows"] == len(page.all(".labels .row")) > 4)
    offsets = row_offsets(page)
    assert max(map(abs, offsets["labels"])) <= 1.0
    assert offsets["boxes"]
    assert max(offsets["boxes"]) <= 1.5


def test_flow_rows_stay_together_when_the_window_changes(real_page):
    """Also while one looks."""
    page = real_page.resize(1500, 950).open_alone(run="rows7")
    drawn = page.run("return document.querySelector('.heat').dataset.drawn")
    page.resize(1100, 600)
    page.until(lambda: page.run("return document.querySelector('.heat').dataset.drawn") != drawn)
    assert max(map(abs, row_offsets(page)["labels"])) <= 1.0


def test_flow_click_on_a_label_outlines_the_row_beside_it(real_page):
    """The hit area of a name is its row."""
    page = real_page.open_alone(run="rows4")
    page.until(lambda: len(page.all(".labels .row")) > 4)
    page.all(".labels .row")[5].click()
    page.until(lambda: page.all(".row[aria-selected=true]"))
    box = """
        const heat = document.querySelector('.heat');
        const chosen = heat.layout.shapes.find((s) => s.xref === 'paper' && s.type === 'rect');
        return [chosen?.y0, [...document.querySelectorAll('.labels .row')].findIndex((r) => r.ariaSelected === 'true')];
    """
    page.until(lambda: page.run(box)[0] is not None)
    low, row = page.run(box)
    assert low == row - 0.5


def test_distribution_has_no_empty_rows_between_full_ones(real_page):
    """The bins are those that were counted: half decades, each next to the other."""
    page = real_page.open_alone(run="partial", view="distribution", parameter="layers.0.weight")
    page.plot()
    edges, full = page.run(
        "const [map] = document.querySelector('#panel .plot').data;"
        "return [Array.from(map.y), map.z.map((row) => row.some((share) => share > 0))]"
    )
    assert [after - before for before, after in pairwise(edges)] == [0.5] * len(full)
    assert all(full)
    assert "No NaN or Inf in its gradient at any of 12 logged steps" in page.text(".words")


def test_distribution_shows_bad_steps_between_the_histograms(real_page):
    """The histogram at step 99 is in order; the NaN at step 60 is in the picture and in the words all the same."""
    page = real_page.open_alone(run="damaged", view="distribution", parameter="head.weight")
    traces = {trace["name"]: trace for trace in page.plot()["traces"]}
    assert traces["NaN in the gradient"]["x"] == list(NAN_STEPS)
    assert f"NaN at 2 of 26 logged steps, first at step {FAULT}" in page.text(".words")
    assert "No NaN" not in page.text(".words")


def test_depth_draws_gaps_and_markers_for_what_has_no_logarithm(real_page):
    """No gradient and zero are neither 1 nor on a line; each has a marker that says which."""
    page = real_page.open_alone(run="partial", view="depth")
    traces = {trace["name"]: trace for trace in page.plot()["traces"]}
    assert len(traces["no gradient"]["x"]) == 2  # weight and bias of the frozen layer
    assert len(traces["0 (or below 1e-22)"]["x"]) == 2
    holes = {*traces["no gradient"]["x"], *traces["0 (or below 1e-22)"]["x"]}
    for name in ("median", "weights", "biases and other vectors"):
        drawn = {x for x, y in zip(traces[name]["x"], traces[name]["y"], strict=True) if y is not None}
        assert not drawn & holes
        assert 1.0 not in traces[name]["y"]
    band = [x for x, y in zip(*(traces["usual (10 to 90 %)"][axis] for axis in "xy"), strict=True) if y is not None]
    assert not set(band) & holes


def test_depth_of_a_damaged_step_has_markers_only(real_page):
    """All is NaN at the fault: no norm is drawn."""
    page = real_page.open_alone(run="damaged", view="depth", step=FAULT)
    traces = {trace["name"]: trace for trace in page.plot()["traces"]}
    assert len(traces["NaN"]["x"]) == 6
    assert "weights" not in traces


def test_headline_is_what_began_it_with_line_and_row(real_page):
    """Not the rollback that followed."""
    page = real_page.open_alone(run="damaged")
    text = page.text(".incident")
    assert "nonfinite" in text
    assert f"at step {FAULT}" in text
    assert "real_runs.py:" in text
    assert "row 3 of the batch" in text
    assert "loss = -(p.log() * batch[1]).mean()" in text
    assert page.run("const e = document.querySelector('.incident'); return e.scrollHeight - e.clientHeight") <= 0


def test_headline_of_a_rollback_says_from_where_to_where_and_why(real_page):
    """And nothing of a limit that it doesn't have."""
    page = real_page.open_alone(run="damaged")
    page.click(".headline button[aria-label='the alert after']")
    page.until(lambda: "rollback" in page.text(".headline"))
    text = page.text(".incident")
    assert f"from step {FAULT} back to the state after step 49" in text
    assert f"nonfinite at step {FAULT}" in text
    assert "limit" not in text


def test_two_optimizers_open_at_the_one_that_the_alert_is_about(real_page):
    """Its mark is in the first view, and headline, axis and mark have the same number; decisions are named as such."""
    page = real_page.open_alone(run="gan")
    text = page.text(".incident")
    assert f"at step {GAN_FAULT}" in text
    assert "optimizer 1" in text
    assert f"decision {2 * GAN_FAULT + 1} in alerts.jsonl" in text
    assert f"at step {2 * GAN_FAULT + 1}" not in text
    marks = {trace["name"]: trace["x"] for trace in page.plot(".strip")["traces"]}
    assert marks["explosion"] == marks["skip"] == [GAN_FAULT]
    assert page.all(".row.guilty")
    page.open_alone(run="gan", optimizer=0)
    assert [trace["x"] for trace in page.plot(".strip")["traces"] if trace["name"] == "explosion"] == [[GAN_FAULT]]


def test_layer_by_layer_is_a_table_and_names_are_code(real_page):
    """Not lines of Markdown."""
    page = real_page.open_alone(run="vanishing", view="alerts")
    page.click("tbody tr button")
    page.until(lambda: page.all(".culprit table"))
    assert "module" in page.text(".culprit thead")
    assert "|" not in page.text(".culprit table")
    assert page.all(".culprit td code")


def test_marks_differ_by_shape_and_say_their_kind(real_page):
    """Rollbacks and resumes have marks of their own."""
    shapes = (
        "return document.querySelector('.strip').data.filter((t) => t.yaxis === 'y9')"
        ".map((t) => [t.name, t.marker.symbol, t.text[0]])"
    )
    page = real_page.open_alone(run="damaged")
    page.plot(".strip")
    found = page.run(shapes)
    assert [name for name, _, _ in found] == ["nonfinite", "rollback", "skip"]
    assert len({symbol for _, symbol, _ in found}) == 3
    assert found[0][2].startswith(f"step {FAULT}: nonfinite, NaN or Inf in the gradients")
    page.open_alone(run="resumed").plot(".strip")
    ((name, _, text),) = page.run(shapes)
    assert name == "resume"
    assert text == "step 24: resume, training was taken up again from a checkpoint"


def test_tree_is_one_tab_stop_and_cells_are_reached_by_keys(real_page):
    """Arrows move inside; a cell is read out and chosen by Enter."""
    page = real_page.open_alone(run="rows2")
    page.until(lambda: len(page.all(".labels .row")) > 4)
    assert len(page.all(".labels [tabindex='0']")) == 1
    page.shown(".labels [tabindex='0']").send_keys(Keys.ARROW_DOWN)
    second = "return document.activeElement === document.querySelectorAll('.labels .row')[1]"
    page.until(lambda: page.run(second))
    assert len(page.all(".labels [tabindex='0']")) == 1
    page.run("document.querySelector('.heat').focus()")
    page.shown(".heat").send_keys(Keys.ARROW_DOWN)
    page.until(lambda: "norm" in page.text(".readout"))
    page.shown(".heat").send_keys(Keys.ENTER)
    page.until(lambda: "step=" in page.url())


def test_phone_and_4k_use_their_room(real_page):
    """Nothing is wider than a phone; on a large screen the rows are higher than on a small one."""
    page = real_page.resize(400, 800).open_alone(run="damaged")
    for view in ("flow", "norms", "depth", "distribution"):
        page.view(view).plot()
        assert page.run("return document.documentElement.scrollWidth") <= 400
    assert page.view("flow").run("return document.querySelector('.labels').offsetWidth") < 150
    page.resize(3840, 2160).open_alone(run="rows12")
    page.plot(".heat")
    assert page.run("return document.querySelector('.scroll').offsetHeight") > 1200


def test_norms_have_what_one_looks_at_first_on_one_axis(real_page):
    """Loss, learning rate, weights and how far they move, steps clipped and skipped; the limit says how far off it is."""
    page = real_page.open_alone(run="damaged", view="norms")
    traces = {trace["name"]: trace for trace in page.plot()["traces"]}
    for name in (
        "loss",
        "learning rate",
        "update over weights, of the step before",
        "weight norm",
        "clipped so far",
        "skipped so far",
    ):
        numbers = [y for y in traces[name]["y"] if isinstance(y, (int, float))]
        assert len(numbers) > 15
        assert all(math.isfinite(y) for y in numbers)
    limit = page.run(
        "return document.querySelector('#panel .plot').data.find((t) => t.name === 'explosion limit').text.at(-1)"
    )
    assert limit.endswith("times the norm here")


@pytest.mark.parametrize("run", ["damaged", "resumed"])
def test_norms_each_axis_has_numbers_written_out(real_page, run):
    """A bare 5 below a 1 would be 0.5; and a narrow range has numbers, too."""
    page = real_page.open_alone(run=run, view="norms")
    page.plot()
    ticks = page.run(
        "return [...document.querySelectorAll('#panel .plot g[class*=tick] text')]"
        ".map((text) => [text.parentNode.getAttribute('class'), text.textContent])"
    )
    axes = {name: [float(text) for other, text in ticks if other == name] for name, _ in ticks if name != "xtick"}
    assert axes.keys() == {"ytick", *(f"y{number}tick" for number in range(2, 8))}
    assert all(len(numbers) > 1 and numbers == sorted(numbers) for numbers in axes.values())


def test_runs_are_one_row_each_and_drawn_together(real_page):
    """State, last norm, alerts by kind, the first of them, and the culprit in a word."""
    page = real_page.open_alone(view="runs")
    page.until(lambda: len(page.all(".overview tbody tr")) == 9)
    damaged = page.text("[data-run=damaged]")
    assert "nonfinite" in damaged
    assert "log in training_step" in damaged
    assert f"{FAULT}" in damaged
    page.until(lambda: len({trace["name"] for trace in page.plot()["traces"]}) == 9)
    page.click("[data-run=gan] input")
    page.until(lambda: "gan" not in {trace["name"] for trace in page.plot()["traces"]})
    page.click("[data-run=gan] .link")
    page.until(lambda: "run=gan" in page.url())
    page.until(lambda: "explosion" in page.text(".incident"))


def test_parameters_are_searched_and_sorted(real_page):
    """By a part of the name, by a pattern, by norm."""
    page = real_page.open_alone(run="rows4")
    page.until(lambda: len(page.all(".labels .row")) > 4)
    page.shown("#search").send_keys("*.bias")
    names = "return [...document.querySelectorAll('.labels .row .text')].map((e) => e.innerText.split('.').at(-1))"
    page.until(lambda: set(page.run(names)) == {"bias"})
    assert "5 parameters" in page.text(".flow")
    page.open_alone(run="rows4", search="LAYERS.1", sort="norm")
    page.until(lambda: len(page.all(".labels .row")) == 2)
    assert page.plot(".heat")["traces"][0]["rows"] == 2


def test_bundle_is_named_with_the_command_that_replays_it(real_page):
    """To be copied."""
    page = real_page.open_alone(run="rows2", view="alerts")
    page.click("tbody tr button", f"{FAULT}")
    page.until(lambda: page.all(".bundle"))
    text = page.text(".bundle")
    assert f"nonfinite-step{FAULT}.bundle.pt" in text
    assert "gradguard replay " in text
    assert "--module package.module:function" in text
