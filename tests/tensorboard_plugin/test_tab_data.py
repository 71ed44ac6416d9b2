"""What the tab reads back from event files, through TensorBoard's own data provider with its default limits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from answers import unpack
from hypothesis import given
from hypothesis import strategies as st
from recording import alert_at, histograms_of, layout_of, record_at, write, write_for_tab

from lightning_gradguard import Culprit
from lightning_gradguard.tensorboard_plugin import wire
from lightning_gradguard.tensorboard_plugin.tree import Tree
from lightning_gradguard.tensorboard_plugin.wire import NO_GRADIENT, Tag, decode, encode

NAMES = ("stem.weight", "body.0.weight", "body.0.bias", "body.1.weight", "head.weight")
LAYOUT = layout_of(*NAMES)


def test_import_of_the_plugin_loads_neither_torch_nor_lightning():
    """TensorBoard starts as fast as before."""
    module = "lightning_gradguard.tensorboard_plugin.plugin"
    code = f"import sys, {module}; print({{'torch', 'lightning', 'plotly'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@given(st.lists(st.floats(1e-32, 1e32) | st.sampled_from([0.0, math.inf, math.nan]), min_size=1))
def test_codes_keep_norms_to_a_thousandth_of_a_decade(norms):
    """And zero, NaN and infinity as they are."""
    values = np.array(norms)
    np.testing.assert_allclose(decode(encode(values, np.ones(len(norms), dtype=bool))), values, rtol=1.2e-3)


def test_codes_put_the_worst_on_top():
    """So that the largest of several never hides damage."""
    norms = np.array([1.0, 0.0, 1.0, 1e300, math.inf, math.nan])
    has_grad = np.array([False, True, True, True, True, True])
    assert np.all(np.diff(encode(norms, has_grad).astype(int)) > 0)


@pytest.mark.parametrize("text", ["gradguard/global_norm", "gradguard_tab/a/0/0/other/1", "gradguard_tab/a/x/0/norms/1", ""])
def test_tag_of_others_is_none_of_ours(text):
    """It is passed over."""
    assert Tag.parse(text) is None


def test_tree_norms_are_roots_of_sums_of_squares():
    """For each module, with what has no gradient left out."""
    tree = Tree.of(NAMES)
    norms = np.array([[3.0, 4.0, 12.0, 1.0, 0.0]])
    has_grad = np.array([True, True, True, False, True])
    values = dict(zip(tree.paths, decode(tree.codes(encode(norms[0], has_grad)[None]))[0], strict=True))
    assert values["body.0"] == values["body"] == pytest.approx(math.hypot(4, 12), rel=2e-3)
    assert math.isnan(values["body.1.weight"])
    assert values["head.weight"] == 0.0


def test_tree_of_a_module_without_gradients_has_none():
    """Nothing is made up."""
    tree = Tree.of(NAMES)
    codes = tree.codes(np.full((2, 5), NO_GRADIENT, dtype=np.int16))
    assert (codes == NO_GRADIENT).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tree_damage_reaches_the_module(bad):
    """A NaN parameter makes a NaN module."""
    tree = Tree.of(NAMES)
    codes = encode(np.array([1.0, 1.0, bad, 1.0, 1.0]), np.ones(5, dtype=bool))
    body = decode(tree.codes(codes[None]))[0][tree.paths.index("body")]
    assert str(body) == str(bad)


def test_tree_takes_names_of_any_kind():
    """Deeper than Python's stack, a parameter by the name of a module, the same name twice, and none at all."""
    deep = ".".join("a" * 3000)
    tree = Tree.of([deep, "b", "b.c", "d", "d"])
    assert sorted(tree.parameters[tree.is_leaf]) == [0, 1, 2, 3, 4]
    assert Tree.of([]).labels == ()


def test_run_of_thousand_steps_is_read_back_complete(tab):
    """Every step and every alert, although TensorBoard keeps ten events of a tag."""
    steps = range(0, 10_000, 10)
    alerts = {step: (alert_at(step, "head.weight"),) for step in steps if step % 100 == 0}
    write_for_tab(tab.folder / "run", [record_at(step, LAYOUT, alerts=alerts.get(step, ())) for step in steps])
    answer = tab.reload().ask("/norms")
    assert answer["steps"] == list(steps)
    assert tab.ask("/alerts")["total"] == len(alerts)


@pytest.mark.smoke
def test_flow_holds_each_norm(tab):
    """What was measured, by node and step."""
    norms = [[1.0, 2.0, 3.0, 4.0, 5.0 + step] for step in range(12)]
    write(tab.folder / "run", [record_at(step, LAYOUT, row) for step, row in enumerate(norms)])
    answer, largest, smallest = tab.reload().flow()
    rows = tab.ask("/layout")["parameters"]
    for parameter in range(5):
        expected = [row[parameter] for row in norms]
        np.testing.assert_allclose(decode(largest[rows.index(parameter)]), expected, rtol=2e-3)
    assert smallest is None
    assert answer["edges"] == [*range(12), 12.0]


def test_flow_downsampled_loses_no_extreme(tab):
    """Of 3,000 steps with one spike, one hole and one NaN, each is in a column."""
    norms = np.ones((3000, 5))
    norms[1234, 1], norms[1235, 1], norms[2000, 4] = 1e6, 0.0, math.nan
    write_for_tab(tab.folder / "run", [record_at(step, LAYOUT, row) for step, row in enumerate(norms)])
    answer, largest, smallest = tab.reload().flow()
    rows = tab.ask("/layout")["parameters"]
    body, head = rows.index(1), rows.index(4)
    assert largest.shape[1] <= 500
    assert decode(largest)[body].max() == pytest.approx(1e6, rel=2e-3)
    assert decode(smallest)[body].min() == 0.0
    assert np.isnan(decode(largest)[head]).sum() == 1
    column = int(np.searchsorted(answer["edges"], 2000, side="right")) - 1
    assert math.isnan(decode(largest)[head, column])


def test_flow_of_a_range_is_exact_again(tab):
    """Zooming brings back single steps."""
    write_for_tab(tab.folder / "run", [record_at(step, LAYOUT) for step in range(3000)])
    answer, largest, smallest = tab.reload().flow(**{"from": 100, "to": 199})
    assert answer["edges"][:3] == [100, 101, 102]
    assert largest.shape[1] == 100
    assert smallest is None
    assert tab.flow(**{"from": 5000})[0]["edges"] == []


def test_norms_downsampled_keep_spikes_alerts_and_skips(tab):
    """Of 6,000 steps, those are among the points."""
    norms = np.ones((6_000, 5))
    norms[3777, 0] = 1e5
    alerts = {4000: (alert_at(4000, "head.weight"),)}
    records = [
        record_at(step, LAYOUT, row, alerts=alerts.get(step, ()), skip=step == 4_345) for step, row in enumerate(norms)
    ]
    write_for_tab(tab.folder / "run", records)
    answer = tab.reload().ask("/norms")
    assert {0, 3777, 4000, 4_345, 5_999} <= set(answer["steps"])
    assert len(answer["steps"]) <= 4000
    assert answer["num_steps"] == 6_000
    assert answer["skipped"] == [4_345]


def test_norms_that_are_not_finite_go_by_name(tab):
    """Strict JSON has no NaN."""
    write(tab.folder / "run", [record_at(0, LAYOUT, [1, 1, 1, 1, math.nan]), record_at(1, LAYOUT)])
    assert tab.reload().ask("/norms")["global_norm"][0] == "nan"


def test_skipped_step_is_written_although_not_due(tab):
    """Skips are marked where they were."""
    write(tab.folder / "run", [record_at(step, LAYOUT, skip=step == 3, due=step % 5 == 4) for step in range(10)])
    assert tab.reload().ask("/norms")["steps"] == [3, 4, 9]


def test_marks_count_alerts_and_skips_by_column(tab):
    """With the alert that a click opens."""
    alerts = (alert_at(4, "head.weight"), alert_at(4, "stem.weight", kind="vanishing"))
    write(
        tab.folder / "run",
        [record_at(step, LAYOUT, alerts=alerts if step == 4 else (), skip=step == 4) for step in range(8)],
    )
    marks = tab.reload().flow()[0]["marks"]
    assert [(mark["column"], mark["x"], mark["kind"], mark["count"]) for mark in marks] == [
        (4, 4, "explosion", 1),
        (4, 4, "skip", 1),
        (4, 4, "vanishing", 1),
    ]
    assert tab.ask("/alert", id=marks[2]["id"])["alert"]["kind"] == "vanishing"


def test_alerts_come_in_pages_newest_first_and_by_kind(tab):
    """Thousands of them stay small."""
    kinds = ("explosion", "nonfinite", "vanishing")
    records = [
        record_at(step, LAYOUT, alerts=(alert_at(step, "head.weight", kind=kinds[step % 3]),)) for step in range(1500)
    ]
    write_for_tab(tab.folder / "run", records)
    page = tab.reload().ask("/alerts")
    assert page["kinds"] == {"explosion": 500, "nonfinite": 500, "vanishing": 500}
    assert [alert["step"] for alert in page["alerts"][:3]] == [1499, 1498, 1497]
    chosen = tab.ask("/alerts", kind="vanishing", offset=100)
    assert {alert["kind"] for alert in chosen["alerts"]} == {"vanishing"}
    assert chosen["alerts"][0]["step"] == 1499 - 300
    assert tab.ask("/alerts", offset=-5)["offset"] == 0


def test_alert_brings_everything_that_is_known(tab):
    """Its culprit with samples and remedy, and no more than fifty parameters."""
    culprit = Culprit(
        "forward", "body.0", "aten::log", "model.py", 12, "x.log()", (3, 5), message="log of 0", remedy="clamp"
    )
    names = [f"p{index}" for index in range(80)]
    write(tab.folder / "run", [record_at(0, LAYOUT, alerts=(alert_at(0, *names, culprit=culprit),))])
    alert = tab.reload().ask("/alert")["alert"]
    assert alert["culprit"]["samples"] == [3, 5]
    assert alert["culprit"]["file"] == "model.py"
    assert alert["where"] == "p0"
    assert len(alert["parameters"]) == 50


def test_alert_of_unknown_id_is_the_one_to_begin_with(tab):
    """An old link still opens something."""
    write(tab.folder / "run", [record_at(step, LAYOUT, alerts=(alert_at(step, "p"),)) for step in range(3)])
    assert tab.reload().ask("/alert", id="nonsense")["alert"]["step"] == 0


def test_depth_is_the_logged_step_next_to_the_one_asked_for(tab):
    """With what is usual beside it."""
    records = [record_at(step, LAYOUT, [1.0, 1.0, 1.0, 1.0, 100.0 if step == 50 else 1.0]) for step in range(0, 100, 10)]
    write(tab.folder / "run", records)
    answer = tab.reload().ask("/depth", step=52)
    assert answer["step"] == 50
    assert (answer["first_step"], answer["last_step"]) == (0, 90)
    assert decode(unpack(answer["codes"])).tolist() == pytest.approx([1, 1, 1, 1, 100], rel=2e-3)
    assert decode(unpack(answer["quantiles"][1])).tolist() == pytest.approx([1] * 5)
    assert tab.ask("/depth", step="nonsense")["step"] == 90


def test_distribution_has_the_bins_that_were_counted_and_the_shares(tab):
    """Here quarters of a decade, with the parts of zero and NaN apart."""
    records = [
        record_at(step, LAYOUT, histograms=histograms_of(LAYOUT, num_nan=8.0 if step == 20 else 0.0))
        for step in (10, 20, 30)
    ]
    write(tab.folder / "run", records)
    answer = tab.reload().ask("/distribution", parameter=1)
    assert answer["steps"] == [10, 20, 30]
    assert answer["edges"] == [-5.0, -4.75, -4.5, -4.25]
    assert answer["shares"][0] == pytest.approx([28 / 64, 0.0, 28 / 64], abs=0.004)
    assert answer["zero"] == pytest.approx([8 / 64, 8 / 72, 8 / 64], abs=0.004)
    assert answer["nan"] == pytest.approx([0, 8 / 72, 0], abs=0.004)
    assert tab.ask("/distribution", parameter=999)["parameter"] == 0


def test_distribution_counts_the_histograms_that_are_of_clipped_gradients(tab):
    """A run that was taken up again may have both."""
    before = histograms_of(LAYOUT)
    records = [record_at(step, LAYOUT, histograms=replace(before, clipped=step > 10)) for step in (10, 20, 30)]
    write(tab.folder / "run", records)
    answer = tab.reload().ask("/distribution")
    assert (answer["num_histograms"], answer["num_clipped"]) == (3, 2)


@pytest.mark.parametrize("end", [0, 1])
def test_distribution_says_which_row_holds_what_lies_beyond(end, tab):
    """Of the parameter that is asked for: the bins are those of all."""
    counted = histograms_of(LAYOUT)
    counts = counted.counts.copy()
    counts[1, -end] = 5.0
    write(tab.folder / "run", [record_at(10, LAYOUT, histograms=replace(counted, counts=counts))])
    tab.reload()
    assert tab.ask("/distribution", parameter=0)["is_open"] == [False, False]
    answer = tab.ask("/distribution", parameter=1)
    assert answer["is_open"] == [end == 0, end == 1]
    assert answer["edges"][-1 if end else 0] == (8.0 if end else -20.0)


def test_distribution_without_histograms_is_empty(tab):
    """The page then says what to do."""
    write(tab.folder / "run", [record_at(0, LAYOUT)])
    assert tab.reload().ask("/distribution")["steps"] == []


def test_two_optimizers_are_kept_apart(tab):
    """Each has its tree, its norms and its marks; the table has the alerts of both."""
    layouts = (layout_of("generator.weight"), layout_of("critic.weight"))
    records = [
        record_at(
            step,
            layouts[step % 2],
            [1.0 + step % 2],
            alerts=(alert_at(step, "critic.weight", optimizer=1),) if step == 5 else (),
            histograms=histograms_of(layouts[step % 2]),
            optimizer=step % 2,
            num_optimizers=2,
        )
        for step in range(10)
    ]
    write(tab.folder / "run", records)
    assert tab.reload().get("/runs").json["runs"][0]["optimizers"] == [0, 1]
    assert tab.ask("/layout", optimizer=1)["paths"] == ["critic.weight"]
    # The alert is marked in both views, and says whose it is; the first look is at the optimizer that it is about.
    assert [tab.ask("/norms", optimizer=index)["marks"][0]["optimizers"] for index in (0, 1)] == [[1], [1]]
    assert tab.ask("/layout")["paths"] == ["critic.weight"]
    assert tab.ask("/alerts")["total"] == 1
    assert tab.ask("/layout", optimizer=7)["paths"] == ["generator.weight"]


def test_live_run_grows(tab):
    """What is written after the first look appears at the next, and only that is read."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    from lightning_gradguard.sinks import TensorBoardSink  # noqa: PLC0415

    writer = SummaryWriter(str(tab.folder / "run"))
    sink = TensorBoardSink(writer)
    seen = []
    for begin in range(0, 60, 7):
        for step in range(begin, begin + 7):
            sink.write(record_at(step, LAYOUT, alerts=(alert_at(step, "head.weight"),) if step % 3 == 0 else ()))
        writer.flush()
        answer = tab.reload().ask("/norms")
        assert answer["steps"] == list(range(begin + 7))
        assert tab.ask("/alerts")["total"] == begin // 3 + 3
        seen.append(answer["version"])
    assert tab.ask("/norms")["version"] == seen[-1]
    assert seen == sorted(set(seen))
    writer.close()


def test_resumed_run_takes_the_place_of_what_it_repeats(tab):
    """Steps from the checkpoint on are those of the second session; alerts of both stay."""
    first = [record_at(step, LAYOUT, [1.0] * 5, alerts=(alert_at(step, "p"),) if step == 18 else ()) for step in range(20)]
    second = [record_at(step, LAYOUT, [2.0] * 5) for step in range(15, 30)]
    write(tab.folder / "run", first)
    write(tab.folder / "run", second)
    answer, largest, _ = tab.reload().flow()
    assert answer["edges"][:-1] == list(range(30))
    assert decode(largest[0]).tolist() == pytest.approx([1.0] * 15 + [2.0] * 15, rel=2e-3)
    assert tab.ask("/alerts")["total"] == 1


def test_parameters_that_change_are_all_shown(tab):
    """Unfreezing gives a second layout: before it, the new ones have no gradient."""
    smaller = layout_of("head.weight")
    write(
        tab.folder / "run",
        [*(record_at(step, smaller) for step in range(3)), *(record_at(step, LAYOUT) for step in range(3, 6))],
    )
    answer, largest, _ = tab.reload().flow()
    paths = tab.ask("/layout")["paths"]
    assert set(NAMES) <= set(paths)
    assert (largest[paths.index("stem.weight")][:3] == NO_GRADIENT).all()
    assert decode(largest[paths.index("head.weight")]).tolist() == pytest.approx([1.0] * 6)
    assert answer["last"] == 5


def test_layout_that_appears_while_looking_is_taken_in(tab):
    """What has been read by then is read again."""
    folder = write(tab.folder / "run", [record_at(step, layout_of("head.weight")) for step in range(3)])
    assert tab.reload().ask("/layout")["paths"] == ["head.weight"]
    # TensorBoard orders files by their names, which begin with the second.
    now = time.time() // 1
    while time.time() // 1 == now:
        time.sleep(0.02)
    write(folder, [record_at(step, LAYOUT) for step in range(3, 6)])
    # Within one file TensorBoard goes on; here it is a second file, so it is loaded from the start.
    assert len(tab.reload().flow()[0]["edges"]) == 7
    assert set(NAMES) <= set(tab.ask("/layout")["paths"])


def test_run_replaced_by_another_is_read_anew(tab):
    """Its tags are gone, so what was read of them is forgotten."""
    write(tab.folder / "run", [record_at(step, LAYOUT) for step in range(5)])
    assert tab.reload().ask("/norms")["steps"] == list(range(5))
    for file in (tab.folder / "run").iterdir():
        file.unlink()
    write(tab.folder / "run", [record_at(step, layout_of("other.weight")) for step in range(2)])
    from answers import Tab  # noqa: PLC0415

    fresh = Tab(tab.folder).reload()
    tab.plugin._provider = fresh.plugin._provider
    assert tab.ask("/norms")["steps"] == [0, 1]


def test_run_cut_off_in_the_middle_shows_what_is_whole(tab):
    """A full disk or a killed job leaves half an event."""
    folder = write(tab.folder / "run", [record_at(step, LAYOUT) for step in range(50)])
    (file,) = folder.iterdir()
    os.truncate(file, file.stat().st_size * 2 // 3)
    steps = tab.reload().ask("/norms")["steps"]
    assert 20 < len(steps) < 50
    assert steps == list(range(len(steps)))


def test_run_without_our_data_is_not_listed(tab):
    """It is counted, so that the page can say so."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    with SummaryWriter(str(tab.folder / "other")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    assert tab.reload().get("/runs").json["runs"] == []
    assert tab.get("/runs").json["num_others"] == 1
    assert tab.ask("/norms", "other")["is_empty"]


def test_layout_missing_from_the_file_leaves_the_alerts(tab):
    """Norms without names are passed over."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    from lightning_gradguard.sinks.summaries import array, strings  # noqa: PLC0415

    alert = json.dumps(alert_at(3, "p").to_dict())
    with SummaryWriter(str(tab.folder / "run")) as writer:
        values = [
            array("gradguard_tab/a/0/0/norms/0", True, np.zeros(3, dtype=np.int16)),
            array("gradguard_tab/a/0/0/facts/0", True, np.zeros(len(wire.FACTS))),
            strings("gradguard_tab/a/0/0/alerts/0", True, [alert]),
        ]
        writer._get_file_writer().add_summary(Summary(value=values), 3)
    assert tab.reload().ask("/norms")["is_empty"]


def test_event_of_another_shape_is_left_out(tab):
    """As a later version of the package might write."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    from lightning_gradguard.sinks.summaries import array  # noqa: PLC0415
    from lightning_gradguard.sinks.tab import TabSeries  # noqa: PLC0415

    series = TabSeries()
    with SummaryWriter(str(tab.folder / "run")) as writer:
        file = writer._get_file_writer()
        for step in range(3):
            values = series.values(record_at(step, LAYOUT, histograms=histograms_of(LAYOUT)))
            if step == 1:
                odd = np.zeros(1, dtype=np.float32)
                values = [array(value.tag, False, odd) for value in values]
            file.add_summary(Summary(value=values), step)
    assert tab.reload().ask("/norms")["steps"] == [0, 2]
    assert tab.ask("/distribution")["steps"] == [0, 2]


def test_hostile_names_are_read_back_as_they_are(tab):
    """HTML, quotes, slashes, line breaks, and 500 characters."""
    names = ("<img src=x onerror=alert(1)>", "a/b\\c'\"&", "line\nbreak", "x" * 500, "ünï.ço∂e")
    layout = layout_of(*names)
    alert = replace(alert_at(0, *names), message="<script>alert(1)</script>" * 20, remedy="`<b>`")
    write(tab.folder / "run", [record_at(0, layout, alerts=(alert,))])
    assert set(names) <= set(tab.reload().ask("/layout")["paths"])
    assert tab.ask("/alert")["alert"]["message"] == alert.message


def test_answers_at_full_size_are_small(tab):
    """2,000 parameters: no view has more than 2 MB."""
    layout = layout_of(*(f"layers.{index // 2}.{'weight' if index % 2 else 'bias'}" for index in range(2000)))
    rng = np.random.default_rng(0)
    records = [
        record_at(step, layout, rng.lognormal(size=2000), alerts=(alert_at(step, "layers.0.bias"),)) for step in range(700)
    ]
    write_for_tab(tab.folder / "run", records)
    nodes = ",".join(map(str, range(len(tab.reload().ask("/layout")["labels"]))))
    for route, query in {
        "/layout": {},
        "/flow": {"nodes": nodes},
        "/norms": {},
        "/depth": {},
        "/alerts": {},
        "/alert": {},
    }.items():
        assert len(tab.get(route, run="run", **query).data) < 2e6


@pytest.mark.parametrize("nodes", ["", "x", "1,-3,9999999999,2", "4000"])
def test_flow_of_rows_that_are_not_there_has_none(nodes, tab):
    """A link to another model opens, too."""
    write(tab.folder / "run", [record_at(0, LAYOUT)])
    assert len(tab.reload().ask("/flow", nodes=nodes)["nodes"]) <= 2


def test_oldest_runs_are_forgotten(tab):
    """Memory is for the last few that were looked at."""
    for index in range(10):
        write(tab.folder / f"run{index}", [record_at(0, LAYOUT)])
    tab.reload()
    for index in range(10):
        assert tab.ask("/norms", f"run{index}")["steps"] == [0]
    assert len(tab.plugin._runs) == 8


def test_files_of_the_page_are_served(tab):
    """With their types; nothing is read from outside the folder."""
    answer = tab.get("/static/index.js")
    assert answer.status_code == 200
    assert "javascript" in answer.content_type
    assert b"export async function render" in answer.data
    assert "css" in tab.get("/static/style.css").content_type
    assert tab.get("/plotly.min.js").status_code == 200


@pytest.mark.smoke
def test_plugin_is_found_by_its_data(tab):
    """TensorBoard looks for summaries of the plugin's name."""
    assert not tab.plugin.is_active()
    assert tab.plugin.data_plugin_names() == ("gradguard",)
    assert tab.plugin.frontend_metadata().es_module_path in tab.apps
