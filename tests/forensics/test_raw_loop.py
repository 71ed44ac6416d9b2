"""The culprit in a loop of one's own, from a function that runs the step again."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import Guard, GuardWarning, NonFinite

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
BAD_STEP, BAD_ROW = 2, 3


class Net(nn.Module):
    """Fails where an input is zero."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.scale(self.logs(x))))

    def logs(self, x):
        return x.log()


def batches(bad=(BAD_STEP,)):
    """A zero in one row of some."""
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        x = torch.rand(8, 4, generator=draw) + 0.1
        if step in bad:
            x[BAD_ROW, 1] = 0.0
        yield x, torch.zeros(8, 4)


def train(make_replay, net=None, bad=(BAD_STEP,), **settings):
    """Four steps; the alerts, and what is left of the model."""
    torch.manual_seed(0)
    net = Net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    now = {}

    def step():
        return F.mse_loss(net(now["x"]), now["y"])

    guard = Guard(
        net.named_parameters(), optimizer, named_buffers=net.named_buffers(), replay=make_replay(net, now, step), **settings
    )
    for x, y in batches(bad):
        now.update(x=x, y=y)
        optimizer.zero_grad()
        loss = step()
        guard.before_backward(loss)
        loss.backward()
        guard.step()
        optimizer.step()
    return guard.alerts, [value.clone() for value in net.state_dict().values()]


def check(alert, root):
    """The logarithm of row 3."""
    culprit = alert.culprit
    assert (culprit.phase, culprit.op, culprit.samples) == ("forward", "log", (BAD_ROW,))
    assert culprit.frames[0].function == "Net.logs"
    assert culprit.source == "return x.log()"
    assert culprit.reproduced
    assert f"in `{root}`" in culprit.message


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("make", "root"),
    [
        (lambda net, now, step: lambda: F.mse_loss(net(now["x"]), now["y"]), "Net.logs"),
        (
            lambda net, now, step: functools.partial(lambda net, now: F.mse_loss(net(now["x"]), now["y"]), net, now),
            "Net.logs",
        ),
        (lambda net, now, step: step, "Net.logs"),
    ],
)
def test_replay_function_names_the_culprit_and_leaves_no_trace(make, root):
    """However it refers to module and batch; dropout draws as it did."""
    alerts, left = train(make)
    check(alerts[0], root)
    plain = train(lambda *_: None)[1]
    assert all(torch.equal(a, b) for a, b in zip(left, plain, strict=True))


def test_replay_function_that_runs_backward_itself():
    """As accumulation and Fabric need it."""

    def make(net, now, step):
        def replay():
            for half in (slice(0, 4), slice(4, 8)):
                (F.mse_loss(net(now["x"][half]), now["y"][half]) / 2).backward()

        return replay

    culprit = train(make)[0][0].culprit
    assert (culprit.op, culprit.samples) == ("log", (BAD_ROW,))


def test_replay_of_a_method_finds_the_module_that_its_object_has():
    """A class that trains, with the model as an attribute."""

    class Loop:
        def __init__(self, net, now):
            self.net, self.now = net, now

        def loss(self):
            return F.mse_loss(self.net(self.now["x"]), self.now["y"])

    check(train(lambda net, now, step: Loop(net, now).loss)[0][0], "Net.logs")


def test_replay_names_damaged_data_as_the_variable():
    """There is no batch by that name."""

    def make(net, now, step):
        return lambda: F.mse_loss(net(now["x"] / (now["x"] > 0.0)), now["y"])

    alerts, _ = train(make)
    assert alerts[0].culprit.op == "div"
    assert "in `replay`" in alerts[0].culprit.message


def test_guard_without_replay_says_how_to_learn_the_culprit():
    """In the remedy of NaN, and of nothing else."""
    (alert,), _ = train(lambda *_: None)
    assert alert.culprit is None
    assert "`Guard(..., replay=lambda: loss_of(batch))`" in alert.remedy


@pytest.mark.parametrize(
    "replay", [lambda: torch.zeros((), requires_grad=True), functools.partial(torch.zeros, (), requires_grad=True)]
)
def test_replay_that_sees_no_module_says_so(replay):
    """Its state could not be put back; of a function that is not Python's nothing can be seen."""
    with pytest.warns(GuardWarning, match="`replay` refers to no module"):
        alerts, _ = train(lambda net, now, step: replay)
    assert alerts[0].culprit is None


def test_replay_is_refused_where_it_can_not_be_called():
    """With what it should be."""
    with pytest.raises(ValueError, match="`replay` must be a function without arguments"):
        Guard(nn.Linear(1, 1).named_parameters(), replay=3)


def test_replays_of_a_raw_loop_are_few():
    """Three; a step that ends the run is looked into all the same."""
    calls = []

    def make(net, now, step):
        return lambda: calls.append(1) or step_of(net, now)

    def step_of(net, now):
        return F.mse_loss(net(now["x"]), now["y"])

    alerts, _ = train(make, bad=(0, 1, 2, 3), nonfinite=NonFinite("skip", cooldown=0))
    assert [alert.culprit is not None for alert in alerts] == [True, True, True, False]
    assert len(calls) == 9, "one follows the damage, one the rows, and one tries the remedy"


def test_replay_under_a_grad_scaler_compares_true_gradients():
    """They are unscaled by then."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = next(iter(batches(bad=(0,))))
    guard = Guard(net.named_parameters(), optimizer, scaler=scaler, overflow=None, replay=lambda: F.mse_loss(net(x), y))
    loss = scaler.scale(F.mse_loss(net(x), y))
    guard.before_backward(loss)
    loss.backward()
    alerts = guard.step().alerts
    assert [alert.culprit.op for alert in alerts if alert.kind == "nonfinite"] == ["log"]


def test_replay_draws_pythons_random_numbers_again():
    """As they were at the end of the step before."""
    torch.manual_seed(0)
    random.seed(3)
    net, x = nn.Linear(4, 4), torch.ones(8, 4)

    def loss_of(values):
        return (net(values) * random.random()).sum() / (0.0 * random.random())

    guard = Guard(net.named_parameters(), replay=lambda: loss_of(x))
    loss_of(x).backward()
    (alert,) = guard.step().alerts
    assert alert.culprit.op == "div"
    assert alert.culprit.reproduced


@pytest.mark.parametrize("kind", ["variable", "attribute", "argument"])
def test_replay_that_would_use_up_an_iterator_is_refused_and_says_so(kind):
    """A batch that a replay takes would be missing in the loop."""
    torch.manual_seed(0)
    net, left = Net(), iter([*batches(bad=(0,))])

    class Loop:
        def loss(self):
            return loss_of(self.stream)

    def loss_of(stream):
        x, y = next(stream)
        return F.mse_loss(net(x), y)

    def loss():
        return loss_of(left)

    loop = Loop()
    loop.stream, loop.other = left, left
    replay = {"variable": loss, "attribute": loop.loss, "argument": functools.partial(loss_of, left)}[kind]
    guard = Guard(net.named_parameters(), replay=replay)
    first = loss()
    guard.before_backward(first)
    first.backward()
    with pytest.warns(GuardWarning, match="is an iterator: running the step again would take the next batches"):
        guard.step()
    assert len([*left]) == 3


def test_iterator_that_the_function_does_not_use_is_no_reason_to_refuse():
    """An object may hold one beside the batch."""
    torch.manual_seed(0)

    class Loop:
        def __init__(self):
            self.net, self.stream = Net(), iter([*batches(bad=(0,))])
            self.batch = next(self.stream)

        def loss(self):
            return F.mse_loss(self.net(self.batch[0]), self.batch[1])

    loop = Loop()
    guard = Guard(loop.net.named_parameters(), replay=loop.loss)
    loss = loop.loss()
    guard.before_backward(loss)
    loss.backward()
    assert guard.step().alerts[0].culprit.op == "log"


def test_damage_that_the_step_does_not_make_again_is_said_to_come_from_elsewhere():
    """Here from a division of the gradients by a norm of zero, after the backward pass."""
    net = nn.Linear(4, 1)
    x = torch.ones(8, 4)

    def loss():
        return 0.0 * net(x).sum()

    guard = Guard(net.named_parameters(), replay=loss)
    first = loss()
    guard.before_backward(first)
    first.backward()
    for parameter in net.parameters():
        parameter.grad /= parameter.grad.norm()
    (alert,) = guard.step().alerts
    assert "cause: foreign; the same step run again gives the same loss and finite gradients" in alert.message
    assert "`on_after_backward`" in alert.remedy
    assert alert.culprit.op == ""


def test_replay_of_several_modules_finds_all_of_them():
    """Together they have the parameters that are watched."""
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 1)
    batch = torch.ones(8, 6)
    parameters = [*encoder.named_parameters("encoder"), *decoder.named_parameters("decoder")]

    def loss():
        return decoder(encoder(batch) / 0.0).square().mean()

    guard = Guard(parameters, replay=loss)
    loss().backward()
    guard.step()
    assert guard.alerts[0].culprit.op == "div"


def test_damage_that_the_replay_does_not_show_has_no_culprit():
    """Somebody has written to the gradients."""
    net = nn.Linear(6, 1)
    guard = Guard(net.named_parameters(), replay=functools.partial(_loss_of, net, torch.ones(8, 6)))
    _loss_of(net, torch.ones(8, 6)).backward()
    net.weight.grad[0, 0] = torch.nan
    guard.step()
    assert guard.alerts[0].culprit is None


def _loss_of(net, x):
    return net(x).square().mean()


def test_step_that_is_another_each_time_is_blamed_on_what_its_first_replay_shows():
    """The one that follows the rows sees something else, which is not mixed with it."""
    net, calls = nn.Linear(6, 1), []

    def loss():
        calls.append(1)
        hidden = net(torch.ones(8, 6)).square()
        return (hidden / 0.0 if len(calls) % 2 else torch.log(-hidden)).mean()

    guard = Guard(net.named_parameters(), replay=loss)
    loss().backward()
    guard.step()
    assert guard.alerts[0].culprit.op == "log"
    assert not guard.alerts[0].culprit.samples
