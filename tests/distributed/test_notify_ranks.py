"""In a loop of one's own each rank has its sinks; one of them sends messages."""

from __future__ import annotations

import pytest
import torch
from message_server import serving
from ranks import on_ranks

from lightning_gradguard import Guard, Notify


def _train(url: str) -> int:
    model = torch.nn.Linear(2, 1)
    guard = Guard(model.named_parameters(), sinks=[Notify(url)])
    (model(torch.ones(4, 2)).sum() * torch.nan).backward()
    guard.step()
    guard.close()
    return len(guard.alerts)


@pytest.mark.slow
def test_notify_on_two_ranks_sends_one_message():
    """From the first one."""
    pytest.importorskip("apprise")
    with serving() as server:
        assert on_ranks(2, _train, server.url) == [1, 1]
        assert server.messages.get_nowait()["title"].startswith("GradGuard: nonfinite at step 0, skip")
        assert server.messages.empty()
