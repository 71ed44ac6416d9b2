"""Single parts of the tab: alerts and source lines that a stranger's file may hold, and series without a step."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from answers import Tab
from recording import alert_at, layout_of, record_at, write_for_tab
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.context import RequestContext
from tensorboard.data.provider import TensorDatum
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import Action
from lightning_gradguard.sinks.summaries import array
from lightning_gradguard.sinks.tab import TabSeries
from lightning_gradguard.tensorboard_plugin import views
from lightning_gradguard.tensorboard_plugin.alerts import complete, done, read_alert
from lightning_gradguard.tensorboard_plugin.bundles import bundle_of, folder_of
from lightning_gradguard.tensorboard_plugin.data import Series
from lightning_gradguard.tensorboard_plugin.log_folder import read_runs
from lightning_gradguard.tensorboard_plugin.overview import Overview
from lightning_gradguard.tensorboard_plugin.source import frames
from lightning_gradguard.tensorboard_plugin.wire import Bins, Tag, pack_bins, unpack_bins

TAG = Tag("0f", 0, 0, "facts", 0)


def empty_series():
    """Of two parameters; nothing has been read."""
    return Series({(TAG.session, TAG.layout): {"names": ["a", "b"], "numels": [1, 1], "ndims": [1, 1]}})


@pytest.mark.parametrize("text", ["", "{half", "[1]", '{"step": null}', '{"rank": "first"}', "[" * 100_000])
def test_alert_that_can_not_be_read_is_none(text):
    """Whatever an event holds."""
    assert read_alert(text) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "nonfinite", "action": "skip"}, "the step was skipped"),
        ({"kind": "nonfinite", "action": "shout"}, "shout"),
        ({"kind": "checkpoint", "action": "skip"}, "reported"),
        ({"kind": "rollback", "step": 10, "value": 3}, "from step 10 back to the state after step 7"),
        ({"kind": "rollback", "step": 2, "value": 3}, "from step 2 back to the state before the first step"),
        ({"kind": "rollback", "step": 2, "value": "NaN"}, "training went back"),
    ],
)
def test_what_was_done_is_said_in_words(fields, said):
    """Also where a later version has other actions."""
    assert done(complete(fields)) == said


def test_source_is_shown_with_the_lines_around_it_where_it_is_the_one_that_ran(tmp_path, monkeypatch):
    """A log may name any file, and files change."""
    path = tmp_path / "net.py"
    path.write_text("a = 1\nb = a / 0\nc = 2\n")
    (tmp_path / "net.txt").write_text("b = a / 0\n")
    (tmp_path / "large.py").write_text("b = a / 0\n" + "#" * 2**20)

    def lines(file, line=2, source="b = a / 0"):
        (frame,) = frames({"frames": [{"file": str(file), "line": line, "source": source}]})
        return frame["lines"]

    alone = [(2, "b = a / 0")]
    assert lines(path) == [(1, "a = 1"), (2, "b = a / 0"), (3, "c = 2")]
    assert lines(path, source="b = a / 1") == [(2, "b = a / 1")]
    assert lines(path, line=9) == [(9, "b = a / 0")]
    assert lines(tmp_path / "gone.py") == lines(tmp_path / "net.txt") == lines(tmp_path / "large.py") == alone
    monkeypatch.chdir(tmp_path)
    assert lines("net.py") == alone
    assert frames({"frames": [{"file": str(path)}]})[0]["lines"] == []


def test_bundle_is_looked_for_in_the_runs_own_folder_only(tmp_path):
    """A log may be on another machine, and an alert may name any kind."""
    folder = tmp_path / "logs" / "run"
    (folder / "gradguard").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (folder / "gradguard" / "nonfinite-step3.bundle.pt").touch()
    log_dir = str(tmp_path / "logs")
    assert folder_of(log_dir, "run") == folder
    assert folder_of(log_dir, "../other") is folder_of("s3://logs", "run") is folder_of(None, "run") is None
    alert = complete({"kind": "nonfinite", "step": 3})
    assert bundle_of(folder, alert)["path"].endswith("nonfinite-step3.bundle.pt")
    assert bundle_of(folder, {**alert, "step": 4}) is bundle_of(folder, {**alert, "kind": "../x"}) is None


def test_series_without_a_step_has_empty_views():
    """As between the first event and the next look."""
    read = empty_series()
    read.add(TAG, (), ())
    assert views.depth(read.snapshot(), None) == {"step": None}
    shown = views.norms(read.snapshot(), ())
    assert (shown["num_steps"], shown["num_skipped"], shown["num_clipped"]) == (0, 0, 0)


def test_histograms_of_another_number_of_parameters_are_left_out():
    """And bytes that are none."""
    read = empty_series()
    for shares in (np.full((3, 4), 0.25), np.full((2, 4), 0.25)):
        read.add_bins(TAG, [TensorDatum(0, 0.0, pack_bins(Bins(2, -12, shares)))])
    read.add_bins(TAG, [TensorDatum(1, 0.0, np.zeros(3))])
    assert [step for step, _ in read.histograms(0)] == [0]


def test_bytes_that_are_no_histograms_are_an_error():
    """Not one of the packer's own."""
    packed = np.frombuffer(b"[2, -12, 1, 4]\nnothing", dtype=np.uint8)
    with pytest.raises(ValueError, match="These bytes are no histograms"):
        unpack_bins(packed)


def two_runs(folder):
    """A healthy one, and one that was stopped."""
    layout = layout_of("a", "b", "c")
    norms = [[2.0, 3.0 + step, 1.0] for step in range(40)]
    write_for_tab(folder / "good", [record_at(step, layout, values) for step, values in enumerate(norms)])
    alerts = alert_at(3, "c"), replace(alert_at(3, "b", kind="nonfinite"), action=Action.STOP)
    bad = [record_at(step, layout, values) for step, values in enumerate(norms[:3])]
    write_for_tab(folder / "bad", [*bad, record_at(3, layout, norms[3], alerts=alerts, num_alerts=2)])


def test_overview_has_a_row_for_each_run(tab):
    """With what began it, and whether it is over."""
    two_runs(tab.folder)
    answer = tab.reload().get("/overview").json
    assert answer["progress"] == 1.0
    bad, good = answer["runs"]
    assert (bad["name"], bad["last_step"], bad["first_alert"], bad["state"]) == ("bad", 3, 3, "stopped by nonfinite")
    assert (bad["kinds"], bad["culprit"]) == ({"explosion": 1, "nonfinite": 1}, "nonfinite in b")
    assert (good["name"], good["last_step"], good["kinds"], good["culprit"]) == ("good", 39, {}, None)
    assert good["is_live"]
    assert good["state"].startswith("wrote ")
    assert tab.get("/overview").json["runs"][0] == bad


@pytest.mark.parametrize(
    ("asked", "names"),
    [('["good", "none", 1]', ["good"]), ("[]", []), ("{half", []), ('{"good": 1}', [])],
)
def test_curves_are_those_of_the_runs_that_are_asked_for(asked, names, tab):
    """Anything else asks for none."""
    two_runs(tab.folder)
    runs = tab.reload().get("/curves", runs=asked).json["runs"]
    assert [run["name"] for run in runs] == names
    assert all(run["steps"] == list(range(40)) and run["global_norm"][0] == 3.74166 for run in runs)


@pytest.mark.parametrize(
    ("run", "query", "names"),
    [
        ("good", {}, ["a", "b", "c"]),
        ("good", {"search": "B"}, ["b"]),
        ("good", {"search": "[ac]"}, ["a", "c"]),
        ("good", {"sort": "norm"}, ["b", "a", "c"]),
        ("good", {"sort": "change"}, ["b", "a", "c"]),
        ("bad", {"sort": "alert"}, ["c", "b"]),
    ],
)
def test_rows_are_searched_and_sorted(run, query, names, tab):
    """By name, size, change, or what alerts have named."""
    two_runs(tab.folder)
    answer = tab.reload().ask("/rows", run, **query)
    labels = tab.ask("/layout", run)["labels"]
    assert [labels[node] for node in answer["nodes"]] == names
    assert answer["num_found"] == len(names)


def test_notice_about_a_step_that_was_written_adds_the_alert_alone():
    """As of a rollback, which follows its step."""
    writer, layout = TabSeries(), layout_of("a", "b")
    record = record_at(5, layout)
    assert len(writer.values(record)) > 1
    (value,) = writer.values(replace(record, alerts=(alert_at(5, "a", kind="rollback"),)))
    assert "/alerts/" in value.tag
    assert writer.values(record) == []


def test_run_with_tags_of_a_later_version_alone_is_not_listed(tab):
    """There is nothing in it that could be shown."""
    with SummaryWriter(str(tab.folder / "odd")) as writer:
        values = [array("gradguard_tab/later", True, np.zeros(1, dtype=np.float32))]
        writer._get_file_writer().add_summary(Summary(value=values), 0)
    assert tab.reload().get("/runs").json["runs"] == []
    assert tab.get("/overview").json["runs"] == []
    assert list(read_runs(tab.folder)) == []


def test_overview_of_a_run_that_another_has_replaced_is_that_of_the_other(tab):
    """As after the folder was deleted."""
    layout = layout_of("a")
    write_for_tab(tab.folder / "run", [record_at(step, layout) for step in range(5)])
    assert tab.reload().get("/overview").json["runs"][0]["last_step"] == 4
    for file in (tab.folder / "run").iterdir():
        file.unlink()
    write_for_tab(tab.folder / "run", [record_at(step, layout) for step in range(2)])
    tab.plugin._provider = Tab(tab.folder).reload().plugin._provider
    assert tab.get("/overview").json["runs"][0]["last_step"] == 1


def test_overview_says_how_much_has_been_read_where_time_is_short(tab):
    """The rest comes with the next requests."""
    two_runs(tab.folder)
    tab.reload()
    overview = Overview(tab.plugin._provider, RequestContext(), "", {}, threading.Lock())
    begun = overview.table(-1.0)
    assert begun["progress"] < 1.0
    assert [run["last_step"] for run in begun["runs"]] == [None, None]
    assert overview.table(60.0)["progress"] == 1.0
    for digest in overview._digests.values():
        digest.last_time -= 3600.0
    rows = [digest.row(name) for name, digest in sorted(overview._digests.items())]
    assert [row["state"] for row in rows] == ["stopped by nonfinite", "no news"]
