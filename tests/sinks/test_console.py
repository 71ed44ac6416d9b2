"""What is seen of alerts on a terminal."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest
import tqdm
from raw_loop import records

from lightning_gradguard import Action, Culprit, GradientWarning
from lightning_gradguard.alert import KEPT
from lightning_gradguard.sinks import ConsoleSink
from lightning_gradguard.sinks.console import in_short

CULPRIT = Culprit("forward", "head", "aten::log", "m.py", 3, "torch.log(x)", message="`log` in `head`, m.py:3")


@pytest.fixture(scope="module")
def record():
    """A step that was skipped because of NaN, with a culprit and a bundle."""
    found = records()[3]
    (alert,) = found.alerts
    message = f"Nonfinite at step 3: `w` has 1 NaN element; {CULPRIT.in_words}. The step is skipped.{KEPT}a.bundle.pt`."
    return replace(found, alerts=(replace(alert, message=message, culprit=CULPRIT, remedy="Keep it above 0."),))


@pytest.fixture
def shown(monkeypatch):
    """The texts that a terminal gets; pytest itself would record the warnings, and show none."""
    texts = []

    def show(message, category, filename, lineno, *_):
        texts.append(warnings.formatwarning(message, category, filename, lineno))
        sys.stderr.write(texts[-1])

    monkeypatch.setattr(warnings, "showwarning", show)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield texts


def changed(record, **fields):
    """The record with another alert."""
    return replace(record, alerts=(replace(record.alerts[0], **fields),))


def test_console_shows_headline_culprit_and_remedy_on_lines_of_their_own(record, shown):
    """Neither the bundle nor the place of the warning; the culprit is not in the headline again."""
    ConsoleSink().write(record)
    (text,) = shown
    assert text == (
        "GradGuard: Nonfinite at step 3: `w` has 1 NaN element. The step is skipped.\n"
        "  culprit: `log` in `head`, m.py:3 (`torch.log(x)`)\n"
        "  try: Keep it above 0.\n"
        "  more: gradguard explain nonfinite\n"
    )


def test_console_names_the_cause_to_explain(record):
    """Of a detector of the user's own there is nothing to explain."""
    (alert,) = record.alerts
    alert = replace(alert, kind="vanishing", culprit=replace(CULPRIT, cause="saturation"))
    assert "  more: gradguard explain saturation\n" in in_short(alert, coloured=False)
    assert "more:" not in in_short(replace(alert, kind="mine"), coloured=False)


def test_console_warning_itself_is_the_whole_alert(record):
    """For whoever records, filters or matches warnings."""
    with pytest.warns(GradientWarning) as caught:
        ConsoleSink().write(record)
    (alert,) = record.alerts
    assert [str(each.message) for each in caught] == [f"{alert.message} {alert.remedy}"]


def test_console_long_run_is_not_flooded(record, shown):
    """Three of a kind at length, seven in a line, then each tenth; each is a warning all the same. The end is told."""
    sink = ConsoleSink()
    for step in range(100):
        sink.write(changed(record, step=step))
    assert len(shown) == 100
    assert [text.count("\n") for text in shown[:11]] == [4] * 3 + [1] * 7 + [0]
    assert "one in 10 of this kind is shown" in shown[9]
    assert sum(bool(text) for text in shown) == 10 + 9
    sink.write(changed(record, action=Action.STOP))
    assert shown[-1].count("\n") == 4
    sink.write(changed(record, kind="explosion"))
    assert shown[-1].count("\n") == 4


def test_console_control_characters_never_reach_the_terminal(record, shown):
    """Source lines and names may hold anything."""
    culprit = replace(CULPRIT, source="x\x1b[2J\n\x07")
    ConsoleSink().write(changed(record, culprit=culprit, remedy="a\u2028b", message="\x1b]0;x\x07Nonfinite: y."))
    assert not set(shown[0]) & {"\x1b", "\x07", "\u2028"}
    assert shown[0].count("\n") == 4


def test_console_colours_the_headline_only(record):
    """Where the terminal can."""
    headline, *rest = in_short(record.alerts[0], coloured=True).splitlines()
    assert headline.startswith("\x1b[1;33mGradGuard: Nonfinite at step 3\x1b[0m: ")
    assert "\x1b" not in "".join(rest)


@pytest.mark.usefixtures("shown")
def test_console_bar_of_tqdm_is_set_aside(record, capsys):
    """The alert begins on a line of its own, and the bar goes on below it."""
    with tqdm.tqdm(total=3, file=sys.stderr, ncols=40, ascii=True) as bar:
        bar.update()
        ConsoleSink().write(record)
        bar.update()
    before, _, after = capsys.readouterr().err.partition("GradGuard: ")
    assert before.endswith("\r")
    assert before.split("\r")[-2].strip() == ""
    assert after.index("explain nonfinite\n") < after.index("it/s")


@pytest.mark.usefixtures("shown")
def test_console_other_ways_to_show_warnings_are_left_alone(record, shown, monkeypatch):
    """Somebody's own format gets the whole text; and Python's is as it was afterwards."""
    usual = warnings.formatwarning
    ConsoleSink().write(record)
    assert warnings.formatwarning is usual
    monkeypatch.setattr(warnings, "formatwarning", lambda message, *_: f"own: {message}")
    ConsoleSink().write(record)
    assert shown[-1].startswith("own: Nonfinite at step 3: `w` has 1 NaN element; culprit:")


def test_console_without_tqdm_or_a_terminal_warns_all_the_same(record, shown, monkeypatch):
    """There are no bars then; a program without a console has no stderr."""
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "tqdm")
        ConsoleSink().write(record)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    monkeypatch.setattr(sys, "stderr", None)
    ConsoleSink().write(record)
    assert ["Nonfinite at step 3" in text for text in shown] == [True, True]


def test_console_format_that_somebody_sets_in_the_meantime_stays(record, monkeypatch):
    """As another thread may."""
    usual, other = warnings.formatwarning, lambda message, *_: f"other: {message}"
    monkeypatch.setattr(warnings, "formatwarning", usual)
    monkeypatch.setattr(warnings, "showwarning", lambda *_: setattr(warnings, "formatwarning", other))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ConsoleSink().write(record)
    assert warnings.formatwarning is other
