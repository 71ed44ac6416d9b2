"""`gradguard explain`: every kind and cause has its text."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import lightning_gradguard.detectors
from lightning_gradguard import Detector
from lightning_gradguard.alert import KINDS
from lightning_gradguard.cli.commands import app
from lightning_gradguard.cli.explain import explanations

FORENSICS = Path(lightning_gradguard.__file__).parent / "forensics"


def call(*arguments):
    """Run the command in this process."""
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["explain", *arguments])


@pytest.mark.smoke
def test_every_detector_of_the_package_is_explained():
    """By its name, which is the kind of its alerts."""
    for module in pkgutil.iter_modules(lightning_gradguard.detectors.__path__):
        importlib.import_module(f"lightning_gradguard.detectors.{module.name}")
    own = {cls.name for cls in Detector.__subclasses__() if cls.__module__.startswith("lightning_gradguard.")}
    assert own <= set(KINDS) <= explanations().keys()


def test_every_cause_and_phase_is_explained():
    """Those that the sources name, and the four phases."""
    sources = "".join(path.read_text("utf-8") for path in FORENSICS.rglob("*.py"))
    causes = set(re.findall(r'Cause\(\s*"(\w+)"', sources))
    assert len(causes) >= 14
    assert causes | {"data", "weights", "forward", "backward"} <= explanations().keys()


def test_explanation_is_printed_at_80_columns():
    """Its name is not case-sensitive; without one, all are printed."""
    done = call("NonFinite")
    assert done.exit_code == 0
    assert "NaN or Inf" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(call().stdout) > 20 * len(explanations())


def test_misspelt_name_gets_the_nearest():
    """With exit code 2."""
    done = call("saturatoin")
    assert done.exit_code == 2
    assert "Did you mean 'saturation'?" in done.stderr
