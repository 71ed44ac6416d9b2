"""Whose gradients: what the Trainer's optimizers will step, also where these change during the fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import FEATURES, Net, fit, make_batches, same, seeded, weights_of

from lightning_gradguard import GradGuard

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class Changing(Net):
    """Does something to its optimizers before the batch of a number."""

    def __init__(self, change, faults=None):
        super().__init__(faults)
        self.change = change

    def on_train_batch_start(self, batch, batch_idx):
        if int(batch[0]) == 6:
            self.change(self)


def new_head(net):
    """The usual fine-tuning: another head, in the place of the old one."""
    net.head = nn.Linear(8, 1)
    net.trainer.optimizers[0].param_groups[0]["params"][2:] = list(net.head.parameters())


def new_optimizer(net):
    """One that a callback sets."""
    net.trainer.optimizers = [torch.optim.SGD(net.parameters(), lr=0.01)]


def set_up_anew(net):
    """As some callbacks do after they have frozen layers."""
    net.trainer.strategy.setup_optimizers(net.trainer)


def reordered(net):
    """Same parameters, in another order and in two groups."""
    (group,) = net.trainer.optimizers[0].param_groups
    params = group["params"]
    group["params"] = params[2:]
    net.trainer.optimizers[0].add_param_group({"params": params[:2]})


def frozen(net):
    """A part is no longer trained."""
    net.body.requires_grad_(requires_grad=False)


CHANGES = [new_head, new_optimizer, set_up_anew, reordered, frozen]


@pytest.mark.smoke
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_change_during_the_fit_is_followed_from_that_step_on(change, tmp_path):
    """The NaN after it is skipped, weights stay finite, and counts go on."""
    net = Changing(change, {9: "nan"})
    guard = GradGuard(clip=0.5)
    fit(tmp_path, net, guard, batches=make_batches(12))
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert [alert.step for alert in guard.alerts] == [9]
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_new_head_goes_by_the_modules_current_names(tmp_path):
    """And its gradients are what is measured."""
    net = Changing(new_head, {9: "nan"})
    guard = GradGuard()
    fit(tmp_path, net, guard, batches=make_batches(12))
    assert guard.last.measurement.names == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert {report.name for report in guard.alerts[0].parameters} <= set(guard.last.measurement.names)


def test_module_that_grows_is_watched_with_what_it_has_grown(tmp_path):
    """A group is added in the middle."""

    def grow(net):
        net.extra = nn.Linear(FEATURES, 1)
        net.trainer.optimizers[0].add_param_group({"params": list(net.extra.parameters())})

    class Growing(Changing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (self.extra(batch[1]).square().mean() if hasattr(self, "extra") else 0.0)

    guard = GradGuard()
    fit(tmp_path, Growing(grow), guard, batches=make_batches(12))
    assert "extra.weight" in guard.last.measurement.names
    assert guard.last.measurement.by_name["extra.weight"] > 0.0


def test_healthy_history_survives_an_optimizer_that_is_replaced(tmp_path):
    """The limit is there at once, and counts what came before."""
    records = []
    fit(tmp_path, Changing(new_optimizer), GradGuard(sinks=[records.append]), batches=make_batches(40), max_epochs=1)
    plain = []
    fit(tmp_path, Changing(lambda net: None), GradGuard(sinks=[plain.append]), batches=make_batches(40), max_epochs=1)
    assert records[-1].explosion_limit < float("inf")
    assert [record.totals.num_steps for record in records] == [record.totals.num_steps for record in plain]


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_no_optimizer_at_all_trains_on_with_a_note(tmp_path):
    """`configure_optimizers` may return None."""

    class Without(Net):
        def configure_optimizers(self):
            return None

    guard = GradGuard()
    trainer = fit(tmp_path, Without(), guard, batches=make_batches(4))
    assert trainer.global_step == 4
    assert (guard.num_steps, guard.alerts) == (0, [])


def test_parameter_of_two_optimizers_is_watched_in_both(tmp_path):
    """Either step is looked at."""

    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for index, optimizer in enumerate(self.optimizers()):
                loss = super().training_step(batch, batch_idx) * (torch.nan if (batch_idx, index) == (2, 1) else 1.0)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.01), torch.optim.Adam(self.head.parameters(), 0.01)]

    net, guard = Shared(), GradGuard()
    fit(tmp_path, net, guard, batches=make_batches(4))
    assert (guard.num_steps, guard.num_skipped) == (8, 1)
    assert guard.alerts[0].optimizer == 1


def test_optimizer_without_groups_has_all_parameters_watched(tmp_path):
    """Nothing says which of them it steps."""

    class Bare(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.01)
            self.own, self.param_groups = self.param_groups, []

        def step(self, closure=None):
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for parameter in self.own[0]["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                        parameter.grad = None
            return loss

    class Net2(Net):
        def configure_optimizers(self):
            return Bare(self.parameters())

    net, guard = Net2({2: "nan"}), GradGuard()
    fit(tmp_path, net, guard, batches=make_batches(4))
    assert guard.num_skipped == 1
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_second_fit_with_another_module_starts_without_the_first_ones_history(tmp_path):
    """Whether the Trainer is the same or another."""
    guard = GradGuard()
    trainer = fit(tmp_path, Net({2: "nan"}), guard, batches=make_batches(4))
    trainer.fit_loop.max_epochs += 1
    other = seeded(Net)
    trainer.fit(other, make_batches(4))
    assert (guard.num_steps, guard.alerts) == (4, [])
    plain = seeded(Net)
    fit(tmp_path, plain, batches=make_batches(4))
    assert same(weights_of(other), weights_of(plain))


def test_optimizer_that_joins_has_a_guard_and_the_first_one_keeps_its_own(tmp_path):
    """Counts go on."""

    def join(net):
        net.trainer.optimizers = [*net.trainer.optimizers, torch.optim.SGD(net.head.parameters(), lr=0.01)]

    guard = GradGuard()
    fit(tmp_path, Changing(join, {8: "nan"}), guard)
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert [(alert.step, alert.optimizer) for alert in guard.alerts] == [(8, 0)]
    assert guard.last.position.num_optimizers == 2


def test_optimizer_that_the_trainer_does_not_know_is_guarded_when_it_steps(tmp_path):
    """As a module's own, which it steps by the strategy."""

    class OwnOptimizer(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.trainer.strategy.optimizer_step(self.own, lambda: None)
            self.own.zero_grad()

        def configure_optimizers(self):
            self.own = torch.optim.SGD(self.head.parameters(), lr=0.01)
            return torch.optim.SGD(self.body.parameters(), lr=0.01)

    net, guard = OwnOptimizer({5: "nan"}), GradGuard(max_replays=0)
    fit(tmp_path, net, guard)
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert net.head.weight.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*[Uu]ninitialized parameters")
@pytest.mark.parametrize("arguments", [{"clip": 1e9}, {"nonfinite": "rollback", "include": ["body.*"]}])
def test_lazy_modules_train_as_without_a_guard_and_are_guarded(arguments, tmp_path):
    """Parameters and buffers have no shape before the first forward pass."""

    class Lazy(Net):
        def __init__(self, faults=None):
            super().__init__(faults)
            self.norm = nn.LazyBatchNorm1d(affine=False)
            self.body, self.head = nn.LazyLinear(8), nn.LazyLinear(1)

        def training_step(self, batch, batch_idx):
            number, x, y = batch
            return super().training_step((number, self.norm(x), y), batch_idx)

    guarded, plain = seeded(Lazy), seeded(Lazy)
    torch.manual_seed(1)
    fit(tmp_path, guarded, GradGuard(**arguments), batches=make_batches(6))
    torch.manual_seed(1)
    fit(tmp_path, plain, batches=make_batches(6))
    assert same(weights_of(guarded), weights_of(plain))
    guard = GradGuard(**arguments)
    fit(tmp_path, Lazy({4: "nan"}), guard, batches=make_batches(6))
    assert guard.num_skipped == 1
    assert guard.alerts[0].parameters[0]["name"].startswith("body")
