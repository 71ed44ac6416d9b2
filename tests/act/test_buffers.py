"""Buffers as they were before a step: values, tensors, layouts."""

from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from torch import nn

from lightning_gradguard.act import buffers, frozen
from lightning_gradguard.act.buffers import Buffers


class Holder(nn.Module):
    """A module with one buffer."""

    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("buffer", buffer)


def test_restore_batch_norm_goes_back_to_what_was_remembered():
    """Finite statistics and the counter as well, in the module's own tensors."""
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(4, 2))
    kept = Buffers(module=norm)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    own = dict(norm.named_buffers())
    norm(1e4 * torch.randn(4, 2))
    kept.restore_()
    for name, value in norm.named_buffers():
        assert torch.equal(value, before[name])
        assert value is own[name]


def test_restore_assigned_buffer_puts_the_tensor_itself_back():
    """With its old value, also if both have happened: changed in place, then replaced."""
    module = Holder(torch.zeros(3))
    kept, own = Buffers(module=module), module.buffer
    module.buffer.add_(1.0)
    module.buffer = torch.full((5,), math.nan)
    kept.restore_()
    assert module.buffer is own
    assert module.buffer.tolist() == [0.0, 0.0, 0.0]


def test_restore_buffer_set_to_none_and_one_that_was_none():
    """Either way it is what it was."""
    module = nn.Module()
    module.register_buffer("set", torch.ones(2))
    module.register_buffer("unset", None)
    kept = Buffers(module=module)
    module.set, module.unset = None, torch.ones(1)
    kept.restore_()
    assert module.set.tolist() == [1.0, 1.0]
    assert module.unset is None


@pytest.mark.parametrize("before", [torch.arange(3.0), torch.ones(1)], ids=["other", "one that could be repeated"])
def test_restore_buffer_of_another_shape_by_now_is_replaced(before):
    """Nothing can be written into it. Observers of quantisation begin with one element, and resize it."""
    module = Holder(before.clone())
    kept = Buffers(module=module)
    module.buffer.resize_(7)
    kept.restore_()
    assert torch.equal(module.buffer, before)


def test_buffers_of_lazy_modules_are_kept_from_the_first_step_on_that_they_have_a_shape_in():
    """Before it there is nothing to copy."""
    module = nn.LazyBatchNorm1d(affine=False)
    kept = Buffers(module=module)
    module(torch.randn(4, 2))
    kept.restore_()
    kept.remember()
    mean = module.running_mean.clone()
    module(torch.randn(4, 2))
    kept.restore_()
    assert torch.equal(module.running_mean, mean)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        pytest.param(
            lambda: torch.eye(3).to_sparse_csr(), marks=pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
        ),
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.ones(3, dtype=torch.bool),
        lambda: torch.ones(3).to_mkldnn(),
        lambda: torch.ones(0),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    ],
    ids=["coo", "csr", "fp8", "complex", "bool", "mkldnn", "empty", "nested", "conj", "negated"],
)
def test_restore_any_layout_and_dtype(make):
    """What was assigned instead is gone."""
    module = Holder(make())
    kept, own = Buffers(module=module), module.buffer
    kept.remember()
    module.buffer = make()
    kept.restore_()
    assert module.buffer is own


def test_restore_expanded_buffer_writes_its_memory_once():
    """One element stands for all."""
    base = torch.ones(1)
    module = Holder(base.expand(4, 3))
    kept = Buffers(module=module)
    base.fill_(math.nan)
    kept.restore_()
    assert torch.equal(module.buffer, torch.ones(4, 3))


def test_restore_buffer_shared_between_modules():
    """It is put back for both."""
    shared = torch.zeros(2)
    module = nn.ModuleList([Holder(shared), Holder(shared)])
    kept = Buffers(module=module)
    module[1].buffer.add_(1.0)
    kept.restore_()
    assert module[0].buffer is module[1].buffer is shared
    assert shared.tolist() == [0.0, 0.0]


def test_remember_follows_modules_and_buffers_that_are_added():
    """From the next step on."""
    module = nn.Sequential(Holder(torch.zeros(1)))
    kept = Buffers(module=module)
    module.append(nn.BatchNorm1d(2))
    module[0].register_buffer("late", torch.zeros(1))
    kept.remember()
    module[0].late.fill_(5.0)
    module[1](torch.randn(4, 2))
    kept.restore_()
    assert module[0].late.item() == 0.0
    assert module[1].running_mean.tolist() == [0.0, 0.0]


def test_remember_follows_a_buffer_that_takes_anothers_place():
    """Though their number is the same."""
    module = Holder(torch.zeros(1))
    kept = Buffers(module=module)
    del module.buffer
    module.register_buffer("other", torch.zeros(1))
    kept.remember()
    module.other.fill_(math.nan)
    kept.restore_()
    assert module.other.item() == 0.0


class _Renaming(nn.Module):
    """Keeps an average under a name that counts; `where` says what it goes by."""

    def __init__(self, where):
        super().__init__()
        self.where, self.number = where, 0
        self.register_buffer("mean_0", torch.zeros(2))
        if where == "buffer":
            self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        if self.where == "name":
            (name,) = self._buffers
            number = int(name[5:])
        else:
            number = int(self.count) if self.where == "buffer" else self.number
        self.register_buffer(f"mean_{number + 1}", getattr(self, f"mean_{number}") + x)
        delattr(self, f"mean_{number}")
        self.number += 1
        if self.where == "buffer":
            self.count += 1
        return getattr(self, f"mean_{number + 1}")


@pytest.mark.parametrize("where", ["attribute", "buffer", "name"])
def test_restore_buffer_that_has_another_name_by_now_goes_on_from_its_value(where):
    """Whichever name the module asks for next."""
    module = _Renaming(where)
    kept = Buffers(module=module)
    for x in (1.0, 2.0):
        kept.remember()
        module(x)
    kept.remember()
    module(math.nan)
    kept.restore_()
    kept.remember()
    assert module(4.0).tolist() == [7.0, 7.0]
    assert len(module._buffers) == (2 if where == "buffer" else 1)


def _in_place(parameter):
    parameter.add_(1.0)


def _assigned(parameter):
    parameter.data = parameter.data + 1.0


def _uncounted(parameter):
    parameter.data.add_(1.0)


def _frozen_pair():
    return nn.ModuleDict({"teacher": nn.Linear(2, 2), "base": nn.Linear(2, 2)}).requires_grad_(False)


@pytest.mark.parametrize("move", [_in_place, _assigned, _uncounted])
@pytest.mark.parametrize("is_selected", [False, True])
@pytest.mark.parametrize("num_steps", [1, 20])
@torch.no_grad()
def test_frozen_parameter_that_a_step_moves_goes_back(move, is_selected, num_steps):
    """A teacher, from the first step on; also where no version counter shows it."""
    module = _frozen_pair()
    kept = Buffers(module=module)
    for _ in range(num_steps):
        kept.remember()
        before = module["teacher"].weight.clone()
        move(module["teacher"].weight)
        kept.look()
    kept.select_(torch.tensor(1.0)) if is_selected else kept.restore_()
    assert torch.equal(module["teacher"].weight, before)


@pytest.mark.parametrize("delay", [0, 3])
@torch.no_grad()
def test_frozen_parameter_goes_back_while_its_device_has_yet_to_say_whether_it_moves(delay, monkeypatch):
    """The host does not wait for a GPU's answer, and keeps what it has asked about until then."""
    monkeypatch.setattr(frozen, "_AT_ONCE", ())
    asked = count()
    monkeypatch.setattr(frozen._Trial, "has_arrived", property(lambda trial: next(asked) >= delay))
    module = _frozen_pair()
    kept = Buffers(module=module)
    for _ in range(12):
        kept.remember()
        before = module["teacher"].weight.clone()
        _uncounted(module["teacher"].weight)
        kept.look()
        kept.restore_()
        assert torch.equal(module["teacher"].weight, before)


@torch.no_grad()
def test_frozen_parameters_that_never_move_are_not_copied_for_long(monkeypatch):
    """Nor many at a time."""
    monkeypatch.setattr(frozen, "_BUDGET", 4 * 6)
    module = _frozen_pair()
    module["teacher"].bias.fill_(math.nan)
    kept = Buffers(module=module)
    sizes = []
    for _ in range(60):
        kept.remember()
        module["base"].bias.data.add_(1.0)
        kept.look()
        sizes.append(sum(saved.numel() for _, saved in kept._frozen.pairs()))
    assert max(sizes) == 2 + 6  # one that moves, and a portion of the others
    assert sizes[-1] == 2


@torch.no_grad()
def test_frozen_parameter_that_sets_out_late_is_seen(monkeypatch):
    """After a hundred steps at the latest; also one that was trained before."""
    monkeypatch.setattr(frozen, "_PERIOD", 20)
    module = _frozen_pair()
    module["base"].requires_grad_(True)
    kept = Buffers(module=module)
    for step in range(61):
        kept.remember()
        module["base"].requires_grad_(False)
        before = [it.clone() for it in module.parameters()]
        for parameter in module.parameters() if step > 15 else []:
            parameter.data.add_(1.0)
        kept.look()
    kept.restore_()
    assert all(map(torch.equal, module.parameters(), before))


@torch.no_grad()
def test_frozen_parameter_that_moves_between_steps_or_is_trained_by_now_is_left_alone():
    """There is nothing to put back, and what an optimizer has done must stay."""
    module = nn.Linear(2, 2).requires_grad_(False)
    kept = Buffers(module=module)
    for _ in range(20):
        kept.remember()
        kept.look()
        module.weight.add_(1.0)
    assert not list(kept._frozen.pairs())
    for _ in range(2):
        kept.remember()
        module.bias.add_(1.0)
        kept.look()
    module.requires_grad_(True)
    kept.remember()
    module.bias.add_(1.0)
    after = module.bias.clone()
    module.requires_grad_(False)
    kept.restore_()
    assert torch.equal(module.bias, after)


def test_restore_is_no_change_in_place_for_a_graph_that_holds_the_buffer():
    """A second backward pass through it, as of a generator, still runs."""
    module = Holder(torch.full((2,), 3.0))
    kept = Buffers(module=module)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * module.buffer).sum()
    kept.restore_()
    loss.backward()
    assert weight.grad.tolist() == [3.0, 3.0]


def test_large_buffer_is_copied_again_only_after_a_change(monkeypatch):
    """A table that never changes costs one copy in all."""
    monkeypatch.setattr(buffers, "_LARGE", 2)
    module = Holder(torch.zeros(8))
    kept = Buffers(module=module)
    module.buffer.add_(1.0)
    kept.remember()
    module.buffer.add_(1.0)
    kept.restore_()
    assert module.buffer.tolist() == [1.0] * 8


def test_huge_buffer_is_not_copied_before_it_has_changed(monkeypatch):
    """A data set kept as a buffer takes no memory twice."""
    monkeypatch.setattr(buffers, "_HUGE", 4)
    module = Holder(torch.zeros(8))
    kept = Buffers(module=module)
    module.buffer.add_(1.0)
    kept.restore_()  # the first change can't be undone
    kept.remember()
    module.buffer.add_(1.0)
    kept.restore_()
    assert module.buffer.tolist() == [1.0] * 8


@pytest.mark.parametrize("is_bad", [True, False])
def test_select_puts_back_only_where_the_step_is_bad(is_bad):
    """NaN as well, and counters."""
    norm = nn.BatchNorm1d(2)
    norm.register_buffer("empty", torch.zeros(0))
    kept = Buffers(module=norm)
    norm(torch.full((4, 2), math.nan))
    assert kept.can_select
    kept.select_(torch.tensor(is_bad))
    assert norm.running_mean.isnan().any() != is_bad
    assert norm.num_batches_tracked.item() == (0 if is_bad else 1)


def test_select_on_meta_reads_nothing():
    """The device does it by itself."""
    module = nn.BatchNorm1d(2).to("meta")
    kept = Buffers(module=module)
    kept.remember()
    kept.select_(torch.empty((), dtype=torch.bool, device="meta"))


def test_select_is_not_for_buffers_of_another_layout_or_shape():
    """Those wait for the host."""
    assert not Buffers(module=Holder(torch.eye(2).to_sparse())).can_select
    module = Holder(torch.zeros(2))
    kept = Buffers(module=module)
    module.buffer = torch.zeros(3)
    assert not kept.can_select


def test_repair_puts_back_only_what_is_not_finite():
    """What was infinite before, as a mask of attention is, is no damage."""
    module = nn.ModuleList([Holder(torch.tensor([0.0, -math.inf])), Holder(torch.zeros(2)), Holder(torch.zeros(2))])
    kept = Buffers(module=module)
    module[1].buffer[0] = math.nan
    module[2].buffer += 1.0
    kept.repair_()
    assert [part.buffer.tolist() for part in module] == [[0.0, -math.inf], [0.0, 0.0], [1.0, 1.0]]


def test_buffers_given_by_name_are_put_back_in_place():
    """As in a loop of one's own."""
    mean = torch.ones(1)
    kept = Buffers([("mean", mean)])
    mean.fill_(7.0)
    kept.note_boundary()
    mean.fill_(math.nan)
    kept.restore_()
    assert mean.item() == 7.0
