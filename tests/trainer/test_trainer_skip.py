"""A skipped step never happened: buffers, weights and the optimizer's state are as before it, in every regime."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning_package import Callback, ModelCheckpoint
from torch import nn
from toys import FEATURES, Net, Snapshots, fit, make_batches, make_trainer, same

from lightning_gradguard import Explosion, GradGuard, GradientWarning

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class Normalised(Net):
    """Batch normalisation before the network, a centre that is assigned, and a counter: a batch leaves its mark in each."""

    def __init__(self, faults=None, *, scale=()):
        super().__init__(faults)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.register_buffer("center", torch.zeros(FEATURES))
        self.register_buffer("adjacency", torch.eye(FEATURES).to_sparse())
        self.scale = scale
        self.after = []

    def training_step(self, batch, batch_idx):
        number, x, y = batch
        if int(number) in self.scale:
            x, y = x * 1e4, y * 1e4
        self.center = 0.9 * self.center + 0.1 * x.mean(0)
        return super().training_step((number, self.norm((self.adjacency @ x.T).T), y), batch_idx)

    def on_train_batch_end(self, *args):
        self.after.append(self.everything())

    def everything(self):
        """All that a step can change."""
        states = self.trainer.optimizers[0].state_dict()["state"]
        return copy.deepcopy({**self.state_dict(), **{f"{k}.{n}": v for k, s in states.items() for n, v in s.items()}})


class Taught(Normalised):
    """A frozen teacher beside, an average of the network."""

    def __init__(self, faults=None, **arguments):
        super().__init__(faults, **arguments)
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        for old, new in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
            old.data = 0.9 * old.data + 0.1 * (new.detach() + 1.0)
        return super().training_step(batch, batch_idx)


class Packed(torch.Tensor):
    """Stands for real numbers and answers to few operators, as weights that are quantised for LoRA."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone, torch.ops.aten._to_copy):
            return cls(func(args[0].values))
        raise NotImplementedError(func)


def equal(a, b):
    """Whether two of these are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key].to_dense(), b[key].to_dense()) for key in a)


@pytest.mark.smoke
@pytest.mark.parametrize("fault", ["nan", "nan_loss", "inf"])
def test_skipped_step_leaves_all_buffers_as_they_were(fault, tmp_path):
    """Finite ones as well: the forward pass was in order, the loss was not."""
    net = Normalised({5: fault})
    fit(tmp_path, net, GradGuard(), batches=make_batches(8))
    assert equal(net.after[5], net.after[4])
    assert not equal(net.after[6], net.after[5])


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_step_skipped_as_an_explosion_leaves_all_as_it_was(accumulate, tmp_path):
    """One batch x 1e4 would leave a variance of 1e7. Schedulers go on."""

    class Scheduled(Taught):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    first = 8 * accumulate
    net = Scheduled(scale=[first + accumulate // 2])
    guard = GradGuard(explosion=Explosion("skip", warmup_steps=6))
    fit(tmp_path, net, guard, batches=make_batches(first + 2 * accumulate), accumulate_grad_batches=accumulate)
    assert [alert.step for alert in guard.alerts if alert.action == "skip"] == [8]
    last = first + accumulate - 1
    assert equal(net.after[last], net.after[first - 1])
    assert not any(torch.equal(net.after[-1][key], net.after[last][key]) for key in ("body.weight", "teacher.weight"))
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**10)


@pytest.mark.parametrize("bad", [6, 7])
def test_skipped_window_of_micro_batches_leaves_no_trace_of_any(bad, tmp_path):
    """The whole window's effect is gone, whichever of its passes was bad."""
    net = Normalised({bad: "nan"})
    fit(tmp_path, net, GradGuard(), batches=make_batches(10), accumulate_grad_batches=2)
    assert equal(net.after[7], net.after[5])
    assert not equal(net.after[9], net.after[7])


def test_what_changes_between_two_steps_survives_a_skip(tmp_path):
    """A user's moving average of the step before is no part of the bad one."""

    class Averaging(Normalised):
        def on_train_batch_end(self, *args):
            self.center.add_(1.0)
            super().on_train_batch_end(*args)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen = self.center.clone()
            return loss

    net = Averaging({5: "nan"})
    fit(tmp_path, net, GradGuard(), batches=make_batches(6))
    assert torch.equal(net.after[5]["center"], net.after[4]["center"] + 1.0)


def test_second_optimizer_that_is_skipped_keeps_what_the_first_has_done(tmp_path):
    """In a batch with two steps only the second is undone."""

    class Two(Normalised):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for index, optimizer in enumerate(self.optimizers()):
                loss = super().training_step(batch, batch_idx)
                if batch_idx == 3 and index == 1:
                    loss = loss * torch.nan
                self.marks = [*getattr(self, "marks", []), {k: v.clone() for k, v in self.norm.state_dict().items()}]
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body.parameters(), 0.01), torch.optim.SGD(self.head.parameters(), 0.01)]

        def everything(self):
            return copy.deepcopy(self.state_dict())

    net = Two()
    guard = GradGuard()
    fit(tmp_path, net, guard, batches=make_batches(5))
    assert guard.num_skipped == 1
    assert same({k: net.after[3][f"norm.{k}"] for k in net.marks[6]}, net.marks[6])


def test_second_step_of_a_batch_that_is_skipped_keeps_what_the_first_has_done(tmp_path):
    """Of one optimizer, stepped twice by hand."""

    class Twice(Normalised):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.marks = []

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for is_second in (False, True):
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss * torch.nan if batch_idx == 3 and is_second else loss)
                optimizer.step()
                self.marks.append(copy.deepcopy(self.state_dict()))

    net = Twice()
    guard = GradGuard(max_replays=0)
    fit(tmp_path, net, guard, batches=make_batches(5))
    assert guard.num_skipped == 1
    assert equal(net.marks[7], net.marks[6])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher_that_the_skipped_step_has_moved_goes_back(accumulate, tmp_path):
    """As those of MoCo and BYOL, which `training_step` averages; also by assignment to `.data`."""
    net = Taught({5: "nan"})
    fit(tmp_path, net, GradGuard(), batches=make_batches(8), accumulate_grad_batches=accumulate)
    assert equal(net.after[5], net.after[5 - accumulate])
    assert not equal(net.after[7], net.after[5])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
        lambda: torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
        ),
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        lambda: Packed(torch.ones(2, 2, dtype=torch.int8)),
    ],
    ids=["conj", "negated", "quantised", "float zero points", "nested", "sparse", "fp8", "packed"],
)
@pytest.mark.parametrize("is_parameter", [False, True])
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*quantized")
def test_module_with_odd_buffers_or_frozen_parameters_trains_and_its_bad_step_is_replayed(make, is_parameter, tmp_path):
    """Each of these ended the training, the process, or the search for the culprit."""
    net = Normalised({5: "nan_loss"})
    if is_parameter:
        net.odd = nn.Parameter(make(), requires_grad=False)
        net.everything = lambda: {name: value.clone() for name, value in net.state_dict().items() if name != "odd"}
    else:
        net.register_buffer("odd", make(), persistent=False)
    guard = GradGuard()
    fit(tmp_path, net, guard, batches=make_batches(7))
    assert guard.num_skipped == 1
    assert equal(net.after[5], net.after[4])


@pytest.mark.parametrize("action", ["stop", "raise"])
def test_stronger_actions_leave_buffers_as_they_were_too(action, tmp_path):
    """They skip as well."""
    net = Normalised({5: "nan"})
    try:
        fit(tmp_path, net, GradGuard(nonfinite=action), batches=make_batches(8))
    except RuntimeError:
        net.after.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(net.after[5][key].to_dense(), net.after[4][key].to_dense()) for key in net.state_dict())


def test_warned_step_is_applied_with_all_that_it_has_done(tmp_path):
    """Nothing is put back where nothing is skipped."""
    net = Normalised({5: "inf"})
    with pytest.warns(GradientWarning, match="The step is applied"):
        fit(tmp_path, net, GradGuard(nonfinite="warn"), batches=make_batches(6))
    assert net.after[5]["norm.num_batches_tracked"] == 6


class _Reading(Net):
    """Hooks of its own read gradients without asking whether there are any."""

    def __init__(self, hook, *args):
        super().__init__(*args)
        setattr(self, hook, getattr(self, f"_{hook}"))
        self.seen = []

    def _read(self):
        self.seen.append([float(parameter.grad.norm()) for parameter in self.parameters()])

    def _on_before_optimizer_step(self, optimizer):
        self._read()

    def _on_train_batch_end(self, outputs, batch, batch_idx):
        self._read()

    def _configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self._read()

    def _optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure=closure)
        self._read()


_HOOKS = ["on_before_optimizer_step", "on_train_batch_end", "configure_gradient_clipping", "optimizer_step"]


@pytest.mark.parametrize("hook", _HOOKS)
def test_hooks_that_read_gradients_find_those_of_a_skipped_step(hook, tmp_path):
    """As without a guard; the optimizer does not, and neither does the next batch."""
    guard, kept = GradGuard(), Snapshots()
    trainer = make_trainer(tmp_path, guard, kept, accumulate_grad_batches=2)
    module = _Reading(hook, {3: "nan"})
    trainer.fit(module, make_batches(8))
    assert guard.num_skipped == 1
    assert same(kept.weights[3], kept.weights[1])
    assert same(kept.optimizers[3], kept.optimizers[1])
    assert not same(kept.weights[5], kept.weights[3])
    damaged = [any(map(math.isnan, norms)) for norms in module.seen]
    assert damaged == ([False] * 3 + [True] + [False] * 4 if hook == "on_train_batch_end" else [False, True, False, False])
    assert not {"_after_closure", "optimizer_step"} & set(vars(trainer.precision_plugin))


class _Scheduled(_Reading):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_scheduler_step(self, scheduler, metric):
        self._read()


def test_only_hook_that_reads_gradients_finds_those_of_a_skipped_step(tmp_path):
    """Also where the module has no other, and there are no callbacks of the user's."""
    module = _Scheduled("lr_scheduler_step", {3: "nan"})
    fit(tmp_path, module, GradGuard(), batches=make_batches(6))
    assert [any(map(math.isnan, norms)) for norms in module.seen] == [number == 3 for number in range(6)]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_start", "on_save_checkpoint", "on_fit_end"])
def test_any_later_hook_of_a_callback_finds_gradients_of_a_skipped_step(hook, tmp_path):
    """Lightning's checkpoint reads none itself, but has others told of it."""
    seen, callback = [], Callback()
    setattr(callback, hook, lambda _, module, *rest: seen.append([it.grad is not None for it in module.parameters()]))
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, Net({1: "nan"}), GradGuard(), callback, checkpoint, batches=make_batches(2), max_epochs=2)
    assert all(seen[-1])


def test_without_such_hooks_nothing_stands_in_for_methods_of_the_plugin(tmp_path):
    """Also beside a checkpoint, for whose hook the guard stands in."""

    class Looking(Net):
        def training_step(self, batch, batch_idx):
            found.update(vars(self.trainer.precision_plugin))
            return super().training_step(batch, batch_idx)

    found = {}
    fit(tmp_path, Looking(), GradGuard(), ModelCheckpoint(tmp_path), batches=make_batches(2))
    assert not {"_after_closure", "optimizer_step"} & set(found)


def test_gradients_of_a_skipped_step_are_not_added_to(tmp_path):
    """Where a module zeroes gradients by itself and is not due to: what follows begins at nothing."""
    module, guard = Net({1: "nan"}), GradGuard()
    module.optimizer_zero_grad = lambda epoch, batch_idx, optimizer: None
    make_trainer(tmp_path, guard).fit(module, make_batches(4))
    assert guard.num_skipped == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_buffers_of_a_script_module_are_put_back(tmp_path):
    """Its collections are of a kind of their own."""
    module, guard = Net({2: "nan"}), GradGuard()
    module.body = torch.jit.script(torch.nn.Sequential(module.body, torch.nn.BatchNorm1d(8)))
    statistics = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: statistics.append(module.body[1].running_mean.clone())
    make_trainer(tmp_path, guard).fit(module, make_batches(4))
    assert guard.num_skipped == 1
    assert torch.equal(statistics[2], statistics[1])
    assert not torch.equal(statistics[3], statistics[2])
