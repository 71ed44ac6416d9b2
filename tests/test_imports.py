"""Importing the package is free, and its public names are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gradguard

SOURCE = ast.parse(Path(lightning_gradguard.__file__).read_text(encoding="utf-8"))


def test_import_loads_neither_torch_nor_lightning_nor_numpy():
    """In a fresh interpreter."""
    heavy = "{'torch', 'lightning', 'pytorch_lightning', 'numpy', 'tensorboard'}"
    code = f"import sys, lightning_gradguard; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_of_errors_and_actions_needs_no_torch():
    """What a launcher catches or checks costs no second."""
    code = "import sys; from lightning_gradguard import Action, GradientError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", lightning_gradguard.__all__)
def test_public_name_resolves_to_its_own(name):
    """Each has that name, a docstring, and stays resolved."""
    value = getattr(lightning_gradguard, name)
    assert value.__name__ == name
    assert value.__doc__
    assert vars(lightning_gradguard)[name] is value


def test_all_is_sorted_and_complete():
    """Exactly the lazily resolved names, and those that type checkers see."""
    for_type_checkers = {
        alias.name
        for node in ast.walk(SOURCE)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_gradguard")
        for alias in node.names
    }
    assert lightning_gradguard.__all__ == sorted(lightning_gradguard.__all__)
    assert set(lightning_gradguard.__all__) == set(lightning_gradguard._HOME) == for_type_checkers


def test_dir_lists_the_public_names():
    """For completion in a shell, before they are loaded."""
    assert set(lightning_gradguard.__all__) <= set(dir(lightning_gradguard))


def test_unknown_name_raises_attribute_error():
    """As any module does."""
    with pytest.raises(AttributeError, match="has no attribute 'GradGaurd'"):
        _ = lightning_gradguard.GradGaurd
