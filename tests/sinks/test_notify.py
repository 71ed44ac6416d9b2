"""Alerts as messages: to a server on this machine that takes them, refuses them, or never answers."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import time
import warnings
from dataclasses import replace

import pytest
from message_server import ENOUGH_S, SECRET, serving
from raw_loop import records

from lightning_gradguard import Action, Culprit, Notify, SinkWarning
from lightning_gradguard.sinks.base import SafeSink
from lightning_gradguard.sinks.notify import _Outbox

pytest.importorskip("apprise")


@pytest.fixture(scope="module")
def record():
    """A step that was skipped because of NaN, with one alert that has a culprit."""
    found = records()[3]
    (alert,) = found.alerts
    culprit = Culprit("forward", "head", "aten::log", "model.py", 20, message="`log` in `head`, model.py:20")
    message = f"Nonfinite at step 3: culprit: {culprit.message}. The step is skipped."
    return replace(found, alerts=(replace(alert, culprit=culprit, message=message),))


def with_action(record, action, step=3):
    """The same record, with another action."""
    (alert,) = record.alerts
    return replace(record, alerts=(replace(alert, action=Action(action), step=step),))


def test_notify_sends_headline_culprit_and_run(record):
    """What somebody has to know who looks at a telephone."""
    with serving() as server:
        sink = Notify(server.url, run="run 7")
        sink.write(record)
        message = server.messages.get(timeout=ENOUGH_S)
        sink.close()
    assert message["title"] == "GradGuard: nonfinite at step 3, skip (run 7)"
    assert "`log` in `head`, model.py:20" in message["message"]
    assert record.alerts[0].remedy in message["message"]
    assert message["message"].endswith("Run: run 7")
    assert message["type"] == "warning"


def test_notify_below_its_level_sends_nothing(record):
    """Warnings are for the console; what ends the run is a failure."""
    with serving() as server:
        sink = Notify(server.url)
        for action in ("log", "warn", "stop"):
            sink.write(with_action(record, action))
        sink.close()
        assert server.messages.get_nowait()["type"] == "failure"
        assert server.messages.empty()


def test_notify_alerts_of_an_interval_come_in_one_message(record):
    """The first at once, the others together; of many the gravest are told, and how many there are."""
    with serving() as server:
        sink = Notify(server.url, interval_s=3600.0)
        sink.write(with_action(record, "skip", step=0))
        server.messages.get(timeout=ENOUGH_S)
        for step in range(1, 20):
            sink.write(with_action(record, "stop" if step == 19 else "skip", step=step))
        assert server.messages.empty()
        sink.close()
        message = server.messages.get_nowait()
        assert message["title"].startswith("GradGuard: nonfinite at step 19, stop")
        assert "And 14 more" in message["message"]
        assert server.messages.empty()


def test_notify_interval_ends_and_the_next_message_is_sent(record):
    """Without waiting for the end of training."""
    with serving() as server:
        sink = Notify(server.url, interval_s=0.05)
        for _ in range(3):
            sink.write(record)
            server.messages.get(timeout=ENOUGH_S)
        sink.close()


def test_notify_service_that_refuses_is_one_warning_and_gets_the_alert_later(record):
    """It is told again with the next message; nothing is lost."""
    with serving(500, 500, 200) as server:
        sink = SafeSink(Notify(server.url, interval_s=0.05))
        sink.write(record)
        for _ in range(3):
            server.messages.get(timeout=ENOUGH_S)
        with pytest.warns(SinkWarning, match=r"Notify\(JSON\) failed.*JSON did not take a message") as caught:
            sink.close()
    assert len(caught) == 1


def test_notify_service_that_hangs_neither_delays_a_step_nor_the_end(record):
    """Writing returns at once, closing when its time is over; a second time it does not wait for it at all."""
    with serving() as server:
        server.may_answer.clear()
        sink = SafeSink(Notify(server.url, max_wait_s=0.3))
        begun = time.monotonic()
        sink.write(record)
        sink.write(record)
        assert time.monotonic() - begun < 0.25
        begun = time.monotonic()
        with pytest.warns(SinkWarning, match="JSON did not answer in time"):
            sink.close()
        assert time.monotonic() - begun < 2.0
        begun = time.monotonic()
        sink.close()
        assert time.monotonic() - begun < 0.25


def test_notify_one_service_that_hangs_keeps_no_other_waiting(record):
    """Each has a thread of its own."""
    with serving() as hanging, serving() as server:
        hanging.may_answer.clear()
        sink = Notify([hanging.url, server.url], max_wait_s=0.2)
        sink.write(record)
        assert server.messages.get(timeout=ENOUGH_S)
        with pytest.raises(OSError, match=r"^JSON did not answer in time$"):
            sink.close()


def test_notify_key_is_in_no_log_warning_or_error(record, caplog, monkeypatch):
    """Whatever level the logs have, and whatever goes wrong."""
    caplog.set_level(1)
    for name in ("apprise", "urllib3.connectionpool"):
        monkeypatch.setattr(logging.getLogger(name), "level", 1)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with serving(500) as server:
            url = server.url
            said.append(repr(Notify(url)))
            sink = SafeSink(Notify(url))
            sink.write(record)
            server.messages.get(timeout=ENOUGH_S)
            sink.close()
        gone = SafeSink(Notify(url))
        gone.write(record)
        gone.close()
    said += [str(warning.message) for warning in caught]
    for bad in (f"slack://{SECRET}", f"nothing://{SECRET}@host", SECRET, f"{SECRET}:{SECRET}"):
        with pytest.raises(ValueError, match="number 1") as error:
            Notify(bad)
        said.append(str(error.value))
    assert len(said) == 1 + 2 + 4
    assert not [text for text in [*said, caplog.text] if SECRET in text]


def test_notify_without_addresses_takes_those_of_the_environment(monkeypatch):
    """As apprise's own command does; without any it says what is missing."""
    monkeypatch.setenv("APPRISE_URLS", "json://localhost/a,b, xml://localhost/c\njson://localhost")
    assert repr(Notify()) == "Notify(JSON, XML, JSON)"
    monkeypatch.delenv("APPRISE_URLS")
    with pytest.raises(ValueError, match="APPRISE_URLS, where there is none"):
        Notify()
    with pytest.raises(ValueError, match="got none from `urls`"):
        Notify([])


@pytest.mark.parametrize("setting", [{"interval_s": 0}, {"max_wait_s": -1.0}, {"level": "shout"}])
def test_notify_setting_that_is_wrong_is_named(setting):
    """With its range or its choices."""
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must be"):
        Notify("json://localhost", **setting)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda sink: pickle.loads(pickle.dumps(sink))])
def test_notify_copy_sends_what_it_gets_itself(make, record):
    """A guard is copied and pickled with its sinks, also while a thread is running."""
    with serving() as server:
        sink = Notify(server.url, run="run 7", interval_s=3600.0)
        sink.write(record)
        sink.write(record)
        other = make(sink)
        other.close()
        server.messages.get(timeout=ENOUGH_S)
        assert server.messages.empty()
        other.write(record)
        assert "run 7" in server.messages.get(timeout=ENOUGH_S)["title"]
        other.close()
        sink.close()


class Raises:
    """A service that fails with an error of its own, which may hold the key."""

    service_name = "own"

    def notify(self, **message):
        raise KeyError(SECRET)


def test_notify_service_that_raises_is_one_that_did_not_take_it(record):
    """Its words are not shown."""
    outbox = _Outbox(Raises(), 1.0)
    outbox.put("run 7", record.alerts)
    outbox.hurry()
    outbox.wait(time.monotonic() + ENOUGH_S)
    assert outbox.take_error() == "own did not take a message"


def test_notify_without_apprise_says_what_to_install(monkeypatch):
    """When it is made, and not when there is something to tell."""
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-gradguard\[notify\]"'):
        Notify("json://localhost")
