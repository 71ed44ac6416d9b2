"""What travels down the pipeline."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import pytest
from builders import measurement
from raw_loop import records

from lightning_gradguard import Culprit
from lightning_gradguard.alert import ParameterReport


def test_report_reads_like_a_mapping():
    """As its line of JSON does."""
    report = ParameterReport("w", 1.5, num_nan=2)
    assert dict(report) == {"name": "w", "norm": 1.5, "num_nan": 2, "num_inf": 0}
    assert report["name"] == "w"
    with pytest.raises(KeyError, match="keys"):
        report["keys"]


def test_alert_with_infinities_is_strict_json_that_float_reads():
    """NaN and both infinities, in nested places too."""
    (alert,) = records()[3].alerts
    odd = dataclasses.replace(
        alert,
        value=-math.inf,
        parameters=(ParameterReport("w", math.nan),),
        culprit=Culprit("data", samples=(1, 2), error=math.inf),
    )
    line = json.loads(json.dumps(odd.to_dict(), allow_nan=False))
    assert float(line["value"]) == -math.inf
    assert math.isnan(float(line["parameters"][0]["norm"]))
    assert line["culprit"]["samples"] == [1, 2]
    assert float(line["culprit"]["error"]) == math.inf
    assert line["action"] == "skip"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_record_copied_reads_the_same(clone):
    """Records go to other processes."""
    for record in records():
        assert repr(clone(record)) == repr(record)


@pytest.mark.parametrize("part", ["position", "decision", "totals"])
def test_record_parts_are_frozen(part):
    """A sink can't change what the next one gets."""
    whole = records()[0]
    piece = getattr(whole, part)
    name = dataclasses.fields(piece)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(piece, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError, match=part):
        setattr(whole, part, None)


def test_measurement_by_name_has_those_with_a_gradient():
    """In model order."""
    assert measurement([1.0, 2.0]).by_name == {"layers.0.weight": 1.0, "layers.1.weight": 2.0}
