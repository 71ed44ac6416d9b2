"""`testing.everywhere`: a guard in every Trainer that a test suite makes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lightning_package import NAME, Callback, Trainer
from toys import Net, make_batches, make_trainer

from lightning_gradguard import GradGuard
from lightning_gradguard.testing import everywhere
from lightning_gradguard.testing.pytest_plugin import read_keywords

pytestmark = pytest.mark.filterwarnings("ignore")


def _guards(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, GradGuard)]


def test_every_trainer_of_the_context_has_a_guard_of_its_own(tmp_path):
    """It skips as any guard does; before and after there is none."""
    made = [make_trainer(tmp_path)]
    with everywhere():
        made += [make_trainer(tmp_path), make_trainer(tmp_path)]
    made.append(make_trainer(tmp_path))
    assert [len(_guards(trainer)) for trainer in made] == [0, 1, 1, 0]
    (first,), (second,) = _guards(made[1]), _guards(made[2])
    assert first is not second
    made[1].fit(Net({2: "nan"}), make_batches(4))
    assert (first.num_steps, first.num_skipped) == (4, 1)


def test_guards_are_made_as_asked_and_the_innermost_context_counts(tmp_path):
    """Whatever makes them."""
    outer, inner = GradGuard(), GradGuard(nonfinite="stop")
    with everywhere(lambda: outer):
        with everywhere(lambda: inner):
            assert _guards(make_trainer(tmp_path)) == [inner]
        assert _guards(make_trainer(tmp_path)) == [outer]


def test_trainer_with_a_guard_keeps_its_own_alone(tmp_path):
    """The other one leaves in `setup`; all other callbacks are told of the fit all the same."""
    own = GradGuard(clip=0.1)
    with everywhere():
        trainer = make_trainer(tmp_path, own)
    trainer.fit(Net(), make_batches(3))
    assert _guards(trainer) == [own]
    assert own.num_steps == 3


def test_list_of_callbacks_that_several_trainers_share_is_no_second_guard(tmp_path):
    """Lightning adds what entry points give to the user's own list."""
    callbacks = [Callback()]
    with everywhere():
        for _ in range(4):
            trainer = Trainer(callbacks=callbacks, max_epochs=1, logger=False, default_root_dir=tmp_path, accelerator="cpu")
            trainer.fit(Net(), make_batches(2))
            assert len(_guards(trainer)) == 1


def test_context_ends_with_an_error(tmp_path):
    """Nothing is left of it."""
    before = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), everywhere():
        raise ZeroDivisionError
    assert sys.meta_path == before
    assert _guards(Trainer(default_root_dir=tmp_path, logger=False)) == []


SUITE = """
from {package} import Trainer

def test_trainer():
    (guard,) = [each for each in Trainer(logger=False, accelerator="cpu").callbacks if type(each).__name__ == "GradGuard"]
    assert "max_norm=2.0" in guard._settings.in_words()["clip"]
"""


def test_pytest_option_puts_guards_into_a_suite_that_knows_nothing_of_them(tmp_path):
    """Lightning is imported by the suite."""
    (tmp_path / "test_suite.py").write_text(SUITE.format(package=NAME))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "lightning_gradguard.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--gradguard", "clip=2.0", "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["1.0", "clip=", "clip=print()", "clip=1) + (2", "x"])
def test_keywords_of_any_other_kind_are_refused(text):
    """Nothing of them is run."""
    with pytest.raises(ValueError, match="must hold keywords"):
        read_keywords(text)
