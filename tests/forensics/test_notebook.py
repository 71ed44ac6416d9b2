"""In Jupyter and IPython a culprit is named by its cell, as their own tracebacks do."""

from __future__ import annotations

import pytest

pytest.importorskip("IPython")

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

CELLS = (
    """import torch
from torch import nn
from lightning_gradguard import Guard

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale(x.log())
""",
    """net = Net()
guard = Guard(net.named_parameters(), torch.optim.SGD(net.parameters(), 0.1), replay=lambda: net(x).mean())
x = torch.ones(8, 4)
x[3, 1] = 0.0
net(x).mean().backward()
guard.step()
""",
)


@pytest.fixture
def shell():
    """One in this process, without a history on the disk."""
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_culprit_in_a_cell_is_named_by_the_cell(shell):
    """With its line and its text, and not by a temporary file that is on no disk."""
    for cell in CELLS:
        shell.run_cell(cell, store_history=True).raise_error()
    (alert,) = shell.user_ns["guard"].alerts
    culprit = alert.culprit
    assert "`log` in `replay`, cell In[1], line 11, got 0 at [3, 1]" in culprit.message
    assert (culprit.file, culprit.line, culprit.source) == ("In[1]", 11, "return self.scale(x.log())")
    assert {frame.file for frame in culprit.frames} == {"In[1]", "In[2]"}
