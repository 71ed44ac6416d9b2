"""How far a step moves the weights, and what is said about it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from builders import measurement, mlp, through_checkpoint

from lightning_gradguard import Guard, UpdateRatio
from lightning_gradguard.measure.sample import sample, sample_stride
from lightning_gradguard.measure.updates import UpdateMeter


def made(optimizer_of=torch.optim.SGD, rate=0.01, detector=None, **settings):
    """A model of two layers, its optimizer and a guard that measures updates."""
    torch.manual_seed(0)
    model = mlp(3, 4, 2)
    optimizer = optimizer_of(model.parameters(), lr=rate, **settings)
    detectors = [detector or UpdateRatio(every_n_steps=1)]
    return model, optimizer, Guard(model.named_parameters(), optimizer=optimizer, detectors=detectors, explosion=None)


def trained(model, guard, optimizer, *, times=1.0):
    """One step, and the weights from before it."""
    optimizer.zero_grad()
    before = copy.deepcopy(list(model.parameters()))
    (times * model(torch.ones(4, 3)).square().sum()).backward()
    record = guard.step()
    optimizer.step()
    return record, before


def expected(before, after):
    """The ratio of a matrix, by its definition."""
    before, after = before.detach(), after.detach()
    return float((after - before).norm() / max(float(before.norm()), math.sqrt(len(before) / 3)))


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"fused": True}, {"foreach": True}])
def test_update_ratio_measured_equals_its_definition(settings):
    """Of the step before; vectors have none."""
    model, optimizer, guard = made(**settings)
    first, before = trained(model, guard, optimizer)
    assert first.measurement.update_ratios is None
    after = copy.deepcopy(list(model.parameters()))
    found = trained(model, guard, optimizer)[0].measurement.update_ratios
    assert found[[0, 2]] == pytest.approx([expected(before[index], after[index]) for index in (0, 2)], rel=1e-5)
    assert all(math.isnan(found[index]) for index in (1, 3))


def test_update_of_weights_that_begin_at_zero_is_measured_by_the_default_size():
    """The last layer of a residual branch: its first step would be infinitely large."""
    model, optimizer, guard = made(torch.optim.Adam, rate=1e-3)
    torch.nn.init.zeros_(model[2].weight)
    trained(model, guard, optimizer)
    found = trained(model, guard, optimizer)[0].measurement.update_ratios
    assert found[2] == pytest.approx(1e-3 * math.sqrt(8) / math.sqrt(2 / 3), rel=1e-3)


def test_update_of_a_skipped_step_is_not_measured():
    """The weights are where they were."""
    model, optimizer, guard = made()
    trained(model, guard, optimizer)
    with pytest.warns(UserWarning, match="Nonfinite"):
        trained(model, guard, optimizer, times=math.nan)
    assert trained(model, guard, optimizer)[0].measurement.update_ratios is None


def test_update_that_is_too_large_warns_at_the_next_step():
    """A rate of a thousand."""
    model, optimizer, guard = made(rate=1e3)
    trained(model, guard, optimizer)
    with pytest.warns(UserWarning, match=r"the step before has moved `\d\.weight` by .* times its size"):
        record, _ = trained(model, guard, optimizer)
    assert [verdict.kind for verdict in record.verdicts] == ["update_ratio"]
    assert record.alerts[0].parameters


def test_updates_are_measured_early_at_each_turn_and_after_a_finding():
    """In between nothing is copied."""
    model, optimizer, guard = made(detector=UpdateRatio(every_n_steps=7))
    measured = [step for step in range(40) if trained(model, guard, optimizer)[0].measurement.update_ratios is not None]
    assert measured == [*range(1, 10), 14, 21, 28, 35]
    detector = UpdateRatio()
    for _ in range(13):
        detector.observe(measurement([1.0]))
    assert not detector.needs_update()
    detector.observe(replace(measurement([1.0]), update_ratios=torch.tensor([0.5]).numpy()))
    assert detector.needs_update()


CALM = [1e-3] * 10
"""The first ten steps, for which other limits hold."""


def judged(detector, ratios):
    """The steps with a hit."""
    steps = [replace(measurement([1.0, 1.0]), update_ratios=torch.tensor([math.nan, ratio]).numpy()) for ratio in ratios]
    return [index for index, step in enumerate(steps) if detector.observe(step)]


def test_update_ratio_in_a_row_is_a_hit():
    """Three of 0.5, or one of 1.5; a step that was not applied is neither a hit nor a break."""
    assert judged(UpdateRatio(), [*CALM, 0.5, 0.5, 0.1, 0.5, 0.5, 0.0, 0.5, 0.5, 0.1]) == [16, 17]
    assert judged(UpdateRatio(), [*CALM, 0.1, 1.4, 0.1]) == [11]


def test_update_ratio_among_the_first_steps_has_wider_limits():
    """One of 1.6, or five in a row, as optimizers of Adam's family begin with long steps."""
    assert judged(UpdateRatio(), [0.9, 1.4, 0.1, 1.6, 0.1]) == [3]
    assert judged(UpdateRatio(), [0.5] * 7) == [4, 5, 6]
    assert judged(UpdateRatio(persistence=1), [0.5] * 4) == [2, 3]


def test_update_ratio_that_settles_is_no_hit():
    """Adagrad begins with long steps, each shorter than the one before; what stays high, or grows, is found."""
    for before in ([], CALM):
        assert judged(UpdateRatio(), [*before, 0.85, 0.48, 0.39, 0.32, 0.31, 0.27]) == []
    assert judged(UpdateRatio(), [*CALM, 0.4, 0.38, 0.35]) == [12]
    assert judged(UpdateRatio(), [*CALM, 0.31, 0.35, 0.4]) == [12]


def test_update_ratio_that_comes_near_is_measured_at_each_step():
    """What grows is found soon after."""
    detector = UpdateRatio()
    for step in range(1, 161):
        detector.observe(measurement([1.0]))
        assert detector.needs_update() == (step < 10 or step == 150 or (step % 10 == 0 and step <= 100))
    judged(detector, [0.12])
    assert detector.needs_update()
    judged(detector, [0.05])
    assert not detector.needs_update()


def test_update_ratio_state_of_an_earlier_version_is_taken():
    """It did not know the last ratio."""
    detector = UpdateRatio()
    detector.load_state_dict({"num_seen": 40, "num_high": 0, "num_low": 0})
    assert detector.state_dict()["num_seen"] == 40


def test_update_ratio_too_small_in_a_row_is_a_hit_if_asked_for():
    """A rate of almost zero."""
    assert judged(UpdateRatio(min_ratio=1e-6), [1e-3, 1e-8, 1e-8, 1e-8, 1e-3]) == [3]
    assert judged(UpdateRatio(), [1e-8] * 10) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_ratio": 0.0}, "`max_ratio` must be"),
        ({"lasting_ratio": 2.0}, "`lasting_ratio` must be"),
        ({"min_ratio": -1.0}, "`min_ratio` must be"),
        ({"persistence": 0}, "`persistence` must be an integer >= 1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer >= 1"),
    ],
)
def test_update_ratio_bad_values_are_refused(settings, match):
    """With the constraint."""
    with pytest.raises(ValueError, match=match):
        UpdateRatio(**settings)


@pytest.mark.parametrize("at", [1, 2, 7])
def test_update_of_a_resumed_run_is_that_of_one_that_ran_through(at):
    """The update between the last step and the checkpoint is in the checkpoint."""
    runs = []
    for is_resumed in (False, True):
        model, optimizer, guard = made(torch.optim.Adam, rate=0.05, detector=UpdateRatio(every_n_steps=2))
        ratios = []
        for step in range(20):
            if is_resumed and step == at:
                state = through_checkpoint(guard.state_dict())
                guard = Guard(
                    model.named_parameters(),
                    optimizer=optimizer,
                    detectors=[UpdateRatio(every_n_steps=2)],
                    explosion=None,
                )
                guard.load_state_dict(state)
            ratios.append(str(trained(model, guard, optimizer)[0].measurement.update_ratios))
        runs.append(ratios)
    assert runs[0] == runs[1]


def test_update_meter_with_other_parameters_by_now_knows_nothing():
    """A callback has added some; also after a checkpoint."""
    few, many = [torch.ones(2, 2)], [torch.ones(2, 2), torch.ones(2, 2)]
    meter = UpdateMeter()
    meter.start_(few)
    assert meter.read_(many) is None
    meter.start_(few)
    state = meter.state_dict(few)
    assert state["ratios"] == [0.0]
    meter.load_state_dict(state)
    assert meter.read_(many) is None
    assert meter.read_(few) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_update_meter_takes_every_dtype(dtype):
    """A tenth of the weight."""
    weight = torch.full((4, 4), 2.0).to(dtype)
    meter = UpdateMeter()
    meter.start_([weight])
    weight += 0.25
    assert float(meter.read_([weight])) == pytest.approx(0.125)


@pytest.mark.parametrize("shape", [(64, 128), (257, 384), (16, 8, 3, 3), (3000, 50)])
def test_update_meter_of_a_large_matrix_estimates_its_ratio(shape):
    """From a sample, to a few percent, for a dense update; also where its memory is laid out otherwise."""
    torch.manual_seed(0)
    for weight in (torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))):
        before, meter = weight.clone(), UpdateMeter()
        parameters = [weight, torch.ones(3)]
        meter.start_(parameters)
        weight.add_(torch.randn(shape), alpha=0.1)
        found = meter.read_(parameters)
        assert float(found[0]) == pytest.approx(expected(before, weight), rel=0.15)
        assert found[1].isnan()


@pytest.mark.parametrize("numel", [1, 511, 512, 8_192, 100_000])
def test_sample_is_spread_over_rows_and_columns(numel):
    """Enough elements, from each column of the matrix that has more columns than that."""
    stride = sample_stride(numel, (numel // 32, 32), 512)
    taken = sample(torch.arange(numel), stride)
    assert min(numel, 512) <= len(taken) <= 2 * 512 + 1
    assert len(set((taken % 32).tolist())) == min(numel, 32)


def test_update_meter_leaves_out_what_holds_no_plain_numbers():
    """Integers have no update."""
    parameters = [torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2)]
    meter = UpdateMeter()
    meter.start_(parameters)
    parameters[1] += 1.0
    found = meter.read_(parameters)
    assert found[0].isnan()
    assert float(found[1]) == pytest.approx(1.0)


def test_update_of_matrices_of_several_precisions_is_measured_together():
    """Each by its own definition."""
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 2).double()]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    meter = UpdateMeter()
    meter.start_(parameters)
    before = copy.deepcopy(parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.25).add_(0.1)
    found = meter.read_(parameters)
    assert found[[0, 2]].tolist() == pytest.approx(
        [expected(before[index], parameters[index]) for index in (0, 2)], rel=1e-4
    )


def test_update_of_a_matrix_of_another_size_by_now_is_not_known():
    """Somebody has put other data into it."""
    layer = torch.nn.Linear(3, 4)
    parameters = list(layer.parameters())
    meter = UpdateMeter()
    meter.start_(parameters)
    layer.weight.data = torch.ones(5, 3)
    assert meter.read_(parameters) is None
