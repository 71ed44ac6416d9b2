"""`alerts.jsonl` and `quarantine.jsonl` are as their schemas say, and what earlier versions wrote is read."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
from raw_loop import records

import lightning_gradguard
from lightning_gradguard import Action, Alert, Culprit
from lightning_gradguard.alert import Frame, ParameterReport
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.recovery.quarantine import _MAX_SAMPLES, Incident, QuarantineFile
from lightning_gradguard.sinks import JsonlSink

FRAME = Frame("net.py", 3, "Net.forward", "x / y")
CULPRIT = Culprit("forward", "net.0", "div", "net.py", 3, "x / y", (1, 2), 0, True, 0.0, "by 0", "Add eps.", frames=(FRAME,))


def schema(name):
    """A checker of lines."""
    content = json.loads(
        (Path(lightning_gradguard.__file__).parent / "files" / "schemas" / f"{name}.schema.json").read_text("utf-8")
    )
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def alert(**changed):
    """One with everything in it."""
    values = {
        "time": 1.5, "step": 3, "epoch": 0, "batch_idx": 3, "micro_batch": 0, "optimizer": 0, "rank": 0,
        "kind": "nonfinite", "action": Action.SKIP, "value": math.nan, "limit": math.inf,
        "parameters": (ParameterReport("w", math.nan, 1, 0),), "culprit": CULPRIT, "message": "NaN.", "remedy": "Look.",
    }  # fmt: skip
    return Alert(**{**values, **changed})


def lines_of(path):
    """The objects of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_alerts_that_are_written_fit_their_schema(tmp_path):
    """Those of a run, and one with a culprit and infinities."""
    sink = JsonlSink(tmp_path / "alerts.jsonl")
    for record in records():
        sink.write(record)
    lines = [*lines_of(tmp_path / "alerts.jsonl"), {"version": 1, **json.loads(json.dumps(alert().to_dict()))}]
    assert len(lines) == 2
    for line in lines:
        schema("alert").validate(line)


def test_schema_of_alerts_has_the_fields_of_the_class():
    """No more and no fewer, also in what is nested."""
    content = schema("alert").schema
    assert set(content["properties"]) == {"version", *(field.name for field in fields(Alert))}
    assert set(content["$defs"]["culprit"]["properties"]) == {field.name for field in fields(Culprit)}
    assert set(content["$defs"]["frame"]["properties"]) == {field.name for field in fields(Frame)}
    assert set(content["$defs"]["parameter"]["properties"]) == {field.name for field in fields(ParameterReport)}


def test_incidents_that_are_written_fit_their_schema(tmp_path):
    """With samples and without; more than a line holds become several lines, and all of them are read."""
    path = tmp_path / "quarantine.jsonl"
    many = tuple(range(_MAX_SAMPLES + 1))
    file = QuarantineFile(path)
    file.append([Incident(0, 1, 1, 0, "nonfinite", None), Incident(0, 1, 1, 0, "nonfinite", many)])
    lines = lines_of(path)
    assert len(lines) == 3
    for line in lines:
        schema("quarantine").validate(line)
    samples, left_out = file.read()
    assert samples == set(many)
    assert left_out.count == 0


def test_alert_that_was_written_comes_back_equal():
    """By way of JSON; NaN is NaN again."""
    before = alert(value=1.0)
    after = Alert.from_dict(json.loads(json.dumps(before.to_dict())))
    assert str(after) == str(before)
    assert after.culprit == before.culprit
    assert math.isnan(after.parameters[0].norm)


def test_alert_with_few_fields_and_unknown_ones_is_read():
    """As another version may write it."""
    found = Alert.from_dict({"step": 1, "kind": "mine", "action": "warn", "message": "m", "later": [1]})
    assert (found.step, found.culprit, found.parameters, found.remedy) == (1, None, (), "")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"step": None}, "step"),
        ({"step": True}, "step"),
        ({"kind": 5}, "kind"),
        ({"action": "explode"}, "action"),
        ({"action": []}, "action"),
        ({"value": "many"}, "value"),
        ({"value": 10**400}, "value"),
        ({"parameters": {"name": "w"}}, "parameters"),
        ({"parameters": [5]}, "parameters"),
        ({"parameters": [{"name": "w"}]}, "parameters"),
        ({"culprit": "me"}, "culprit"),
        ({"culprit": {"phase": "forward", "samples": ["a"]}}, "culprit"),
        ({"culprit": {}}, "culprit"),
    ],
)
def test_alert_with_a_wrong_type_is_refused_by_the_fields_name(changed, field):
    """Whoever reads the file is told which."""
    with pytest.raises(ValueError, match=f"`{field}` is not valid"):
        Alert.from_dict({**alert().to_dict(), **changed})


def test_lines_of_an_earlier_version_are_read(tmp_path):
    """They had no `version`."""
    path = tmp_path / "alerts.jsonl"
    path.write_text(json.dumps(alert().to_dict()) + '\n{"step": 1}\n', encoding="utf-8")
    reader = Reader(path, Alert.from_dict)
    (found,) = reader.read()
    assert found.culprit == CULPRIT
    assert str(reader.left_out) == "1 line left out, the first is line 2: `kind` is missing (1)"
