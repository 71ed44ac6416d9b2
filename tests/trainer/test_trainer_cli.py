"""Configuration from YAML with LightningCLI."""

from __future__ import annotations

import logging

import pytest
from lightning_package import LightningCLI, LightningDataModule, logs
from toys import Net, make_batches, read_alerts

from lightning_gradguard import GradGuard, GradientWarning

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  log_every_n_steps: 4
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_gradguard.GradGuard
      init_args:
        clip: {clip}
        nonfinite: {nonfinite}
        explosion:
          class_path: lightning_gradguard.Explosion
          init_args:
            action: skip
            max_norm: 1000.0
            patience: 1
            cooldown: 0
        vanishing: null
        log_norm_types: [1, .inf]
        histogram_every_n_steps: 4
        histograms_of: clipped
model:
  class_path: toys.Net
  init_args:
    faults:
      5: huge
"""


class Data(LightningDataModule):
    """Twelve batches."""

    def train_dataloader(self):
        return make_batches(12)


def _run(root, *arguments, clip="0.5", nonfinite="warn"):
    """Fit as the command line would; the guard."""
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root, clip=clip, nonfinite=nonfinite))
    cli = LightningCLI(
        Net,
        Data,
        subclass_mode_model=True,
        save_config_callback=None,
        args=["fit", f"--config={path}", *arguments],
        seed_everything_default=False,
    )
    (guard,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, GradGuard)]
    return guard


@pytest.fixture(autouse=True)
def _quiet_cli():
    """`seed_everything` prints what it does."""
    before = [(log, log.level) for log in logs()]
    for log, _ in before:
        log.setLevel(logging.WARNING)
    yield
    for log, level in before:
        log.setLevel(level)


@pytest.mark.smoke
def test_cli_reads_a_guard_with_class_path_detectors(tmp_path):
    """Numbers, names, nested detectors and null arrive as configured."""
    with pytest.warns(GradientWarning, match="above max_norm=1000"):
        guard = _run(tmp_path)
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert guard.num_clipped > 0
    assert [line["kind"] for line in read_alerts(tmp_path)] == ["explosion"]
    assert guard.last.histograms.clipped
    assert list(guard.last.measurement.other_norms) == [1.0, float("inf")]


def test_cli_reads_a_clipper_with_class_path(tmp_path):
    """A clipper of a class instead of a number."""
    clip = "{class_path: lightning_gradguard.ClipValue, init_args: {clip_value: 0.01}}"
    with pytest.warns(GradientWarning, match="above max_norm"):
        guard = _run(tmp_path, clip=clip)
    assert guard.num_clipped == 11


def test_cli_command_line_overrides_the_file(tmp_path):
    """The last word has the command line."""
    with pytest.warns(GradientWarning, match="above max_norm"):
        guard = _run(tmp_path, "--trainer.callbacks.init_args.clip=null")
    assert guard.num_clipped == 0


def test_cli_wrong_action_is_refused_with_the_names(tmp_path, capsys):
    """The command line ends with a message that lists what is allowed."""
    with pytest.raises(SystemExit):
        _run(tmp_path, nonfinite="explode")
    assert "skip" in capsys.readouterr().err
