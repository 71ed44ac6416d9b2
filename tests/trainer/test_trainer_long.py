"""Long and large runs, and several at once: memory stays flat, and nobody disturbs anybody."""

from __future__ import annotations

import threading
import tracemalloc
import warnings

import pytest
import torch
from torch import nn
from toys import Net, fit, make_batches, same, weights_of

from lightning_gradguard import Alert, GradGuard, Guard, NonFinite
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.report.reporter import MAX_ALERTS
from lightning_gradguard.sinks import JsonlSink


def steps_with_alerts(guard, model, number, *, every):
    """So many steps, and an alert at each of some."""
    x = torch.ones(1, 2)
    for step in range(number):
        model.zero_grad()
        (model(x).sum() * (torch.nan if step % every == 0 else 1.0)).backward()
        guard.step()


@pytest.mark.parametrize(
    ("num_steps", "every"), [(3000, 2), pytest.param(100_000, 50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_memory_is_flat_however_many_alerts_there_are(num_steps, every, tmp_path):
    """The last alerts are held; the file has all of them."""
    model = nn.Linear(2, 1)
    path = tmp_path / "alerts.jsonl"
    guard = Guard(
        model.named_parameters(),
        nonfinite=NonFinite("skip", cooldown=0, stop_after=None),
        sinks=[JsonlSink(path)],
        histogram_every_n_steps=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps_with_alerts(guard, model, num_steps, every=every)
        num_alerts = guard.totals.num_alerts
        assert num_alerts == num_steps // every
        assert len(guard.alerts) == MAX_ALERTS
        tracemalloc.start()
        steps_with_alerts(guard, model, num_steps // 2, every=every)
        before, _ = tracemalloc.get_traced_memory()
        steps_with_alerts(guard, model, num_steps // 2, every=every)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # The alerts that take the place of older ones were not traced, so the first half pays for all that are held.
    assert after - before < 50_000 or num_steps // 2 // every < MAX_ALERTS
    assert sum(1 for _ in Reader(path, Alert.from_dict).read()) == guard.totals.num_alerts


def test_two_trainers_in_threads_decide_as_each_alone(tmp_path):
    """Weights to the bit, and counts."""

    def train(name, model, results):
        guard = GradGuard(clip=1.0, max_replays=0)
        fit(tmp_path / name, model, guard, batches=make_batches(24), max_epochs=2)
        results[name] = (guard.num_steps, guard.num_skipped, guard.num_clipped, weights_of(model))

    faults = {"healthy": {}, "sick": {3: "nan", 9: "nan"}}
    torch.manual_seed(0)
    start = Net().state_dict()
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for together in (False, True):
            results = {}
            models = {name: Net(bad) for name, bad in faults.items()}
            for model in models.values():
                model.load_state_dict(start)
            threads = [threading.Thread(target=train, args=(name, model, results)) for name, model in models.items()]
            for thread in threads:
                thread.start()
                if not together:
                    thread.join()
            for thread in threads:
                thread.join()
            outcomes.append(results)
    assert outcomes[0].keys() == outcomes[1].keys() == faults.keys()
    assert all(same(outcomes[0][name], outcomes[1][name]) for name in faults)
    assert outcomes[0]["sick"][1] == 4
