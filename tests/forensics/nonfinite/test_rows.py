"""Which sample the elements of a tensor belong to, operator by operator; and how batches are laid out."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.forensics.nonfinite import row_moves
from lightning_gradguard.forensics.nonfinite.layout import check_sample_dim, iterators_in, layout_of
from lightning_gradguard.forensics.nonfinite.operators import Operator
from lightning_gradguard.forensics.nonfinite.row_rules import _RULES, _along, _gathered
from lightning_gradguard.forensics.nonfinite.rows import Rows

B, T, D = 4, 3, 6


class Following(TorchDispatchMode):
    """Nothing but the rows."""

    def __init__(self, batch):
        super().__init__()
        self.rows = Rows(layout_of(batch))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        result = func(*args, **kwargs)
        number = node._sequence_nr() if node is not None else torch.autograd._get_sequence_nr() - 1
        self.rows.note(func, Operator(func), args, kwargs, result, is_backward=node is not None, sequence=number)
        return result


def samples(batch, function, where=None):
    """Of each entry along the first dimension of a function's result, or at one place."""
    follow = Following(batch)
    with follow:
        result = function(batch)
    if where is not None:
        is_bad = torch.zeros(result.shape, dtype=torch.bool)
        is_bad[where] = True
        return follow.rows.samples_at(result, is_bad)
    masks = [torch.zeros(result.shape, dtype=torch.bool) for _ in range(len(result))]
    for index, mask in enumerate(masks):
        mask[index] = True
    return [follow.rows.samples_at(result, mask) for mask in masks]


EACH = [(0,), (1,), (2,), (3,)]
ONES = torch.ones(D, D)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() * 2 + torch.ones(D),
        lambda x: x @ ONES,
        lambda x: F.linear(x, ONES, torch.ones(D)),
        lambda x: x.softmax(-1),
        lambda x: x.cumsum(1),
        lambda x: x.sum(1),
        lambda x: x.norm(dim=1, keepdim=True),
        lambda x: F.layer_norm(x, (D,)),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3)),
        lambda x: x.view(B, 2, 3).transpose(0, 2).transpose(0, 2).flatten(1),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
        lambda x: x - x.mean(0),
        lambda x: x / x.detach().std(0),
        lambda x: x.to(torch.float64).float(),
        lambda x: torch.linalg.inv(x[:, :4].reshape(B, 2, 2) + 5 * torch.eye(2)),
        lambda x: torch.cdist(x[:, None], torch.ones(1, 2, D).expand(B, 2, D)),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.sort(1)[0],
        lambda x: F.mse_loss(x, torch.zeros(B, D), reduction="none"),
        lambda x: F.cross_entropy(x, torch.zeros(B, dtype=torch.long), reduction="none"),
        lambda x: torch.zeros(B, D).add_(x),
        lambda x: torch.zeros(B, D).index_copy(0, torch.arange(B), x),
        lambda x: F.scaled_dot_product_attention(x.view(B, 1, 2, 3), x.view(B, 1, 2, 3), x.view(B, 1, 2, 3)),
        lambda x: F.embedding(x.long().clamp(0, 2), torch.ones(3, 2)),
        lambda x: x.as_strided((B, 2), (D, 1)),
        lambda x: F.one_hot(x.long().clamp(0, 2), 3).float() * 1.0,
        lambda x: torch.cdist(torch.ones(1, 2, D).expand(B, 2, D), x[:, None]),
        lambda x: x @ torch.ones(D),
        lambda x: x + torch.ones(2 * D).view(2, D)[0],
        lambda x: torch.zeros(B, D).index_copy_(0, torch.arange(B), x),
        lambda x: x.clone().tril_(D),
    ],
)
def test_rows_stay_with_their_samples(function):
    """Along the first dimension."""
    assert samples(torch.rand(B, D), function) == EACH


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.cat([x, x]), EACH * 2),
        (lambda x: torch.stack([x, x], 1).flatten(0, 1), [pair for pair in EACH for _ in range(2)]),
        (lambda x: x.repeat(2, 1), EACH * 2),
        (lambda x: x.repeat_interleave(2, 0), [pair for pair in EACH for _ in range(2)]),
        (lambda x: x.flip(0), EACH[::-1]),
        (lambda x: x.roll(1, 0), [(3,), (0,), (1,), (2,)]),
        (lambda x: x[torch.tensor([2, 2, 0])], [(2,), (2,), (0,)]),
        (lambda x: x.index_select(0, torch.tensor([3, 1])), [(3,), (1,)]),
        (lambda x: x[1:3], [(1,), (2,)]),
        (lambda x: x[torch.tensor([True, False, False, True])], [(0,), (3,)]),
        (lambda x: x[:, None].expand(B, T, D).transpose(0, 1).reshape(T * B, D), EACH * T),
        (lambda x: torch.ones(D, D) @ x.T, [(0, 1, 2, 3)] * D),
        (lambda x: x @ x.T, [None] * B),
        (lambda x: x.mean(0), [None] * D),
        (lambda x: torch.ones(3, D) * 2, [(), (), ()]),
        (torch.zeros_like, [(), (), (), ()]),
        (lambda x: torch.zeros(2, D).index_add(0, torch.tensor([0, 0, 1, 1]), x), [None, None]),
        (lambda x: torch.zeros(B, D).scatter_add(0, torch.tensor([[1] * D]), x[2:3]), [(), (2,), (), ()]),
        (lambda x: x.gather(0, torch.tensor([[3] * D, [0] * D])), [(3,), (0,)]),
        (lambda x: torch.zeros(3, D).index_put((torch.tensor([2, 0]),), x[:2]), [(1,), (), (0,)]),
        (lambda x: torch.zeros(B, D).scatter_add(0, torch.zeros(2, D, dtype=torch.long), x), [None, (), (), ()]),
        (lambda x: x.sum(1).topk(4)[0][:, None] * 1, None),
        (lambda x: F.pad(x, (0, 0, 1, 0)), [(), *EACH]),
    ],
)
def test_rows_go_where_their_samples_go(function, expected):
    """Concatenated, repeated, reordered, selected; None where several meet, () where there is none."""
    x = torch.rand(B, D) if expected is not None else torch.arange(B * D, dtype=torch.float32).view(B, D)
    assert samples(x, function) == (expected or EACH[::-1])


def test_rows_that_are_written_one_by_one_are_known():
    """Into another tensor, and over one another."""

    def fill(x):
        made = torch.zeros(B, D)
        for index in range(B):
            made[index] = x[B - 1 - index]
        made[2].zero_()
        return made

    assert samples(torch.rand(B, D), fill) == [(3,), (2,), (), (0,)]


def test_rows_of_packed_sequences_are_those_of_the_batch():
    """Sorted by length and flattened, and back."""
    batch = {"x": torch.rand(B, T, D), "lengths": torch.tensor([2, 3, 1, 3])}

    def pack(batch):
        return pack_padded_sequence(batch["x"], batch["lengths"], batch_first=True, enforce_sorted=False)

    order = pack(batch).sorted_indices.tolist()
    longest = [*order, *order[:3], *order[:2]]
    assert samples(batch, lambda batch: pack(batch).data) == [(index,) for index in longest]
    back = samples(batch, lambda batch: pad_packed_sequence(pack(batch), batch_first=True)[0][:, :1] * 1.0)
    assert back == EACH


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(0),
        lambda x: torch.zeros(B, D).index_add(0, torch.arange(B), x),
    ],
)
def test_rows_of_very_large_tensors_are_not_followed_element_by_element(function, monkeypatch):
    """It would take too long; then nothing is said of them."""
    monkeypatch.setattr(row_moves, "MAX_ELEMENTS", 4)
    assert samples(torch.rand(B, D), function) == [None] * B


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_a_recurrence_are_those_of_the_batch(layer, batch_first):
    """Whether time is first or second; it is told by the targets."""
    torch.manual_seed(0)
    net = layer(D, D, batch_first=batch_first)
    batch = {"x": torch.rand(B, T, D) if batch_first else torch.rand(T, B, D), "y": torch.zeros(B)}
    assert layout_of(batch).is_unique
    result = samples(batch, lambda batch: (net(batch["x"])[0] if batch_first else net(batch["x"])[0].transpose(0, 1)) * 1.0)
    assert result == EACH


def test_rows_met_in_a_recurrence_raise_doubt_about_the_layout():
    """Tokens and targets of a language model may be [T, B] or [B, T]."""
    net = nn.GRU(D, D)
    batch = {"x": torch.rand(T, B, D), "y": torch.zeros(T, B)}
    usual = Following(batch)
    with usual:
        net(batch["x"])
    assert usual.rows.mixes
    assert not usual.rows.is_certain
    assert layout_of(batch).alternative.dims == {"batch['x']": 1, "batch['y']": 1}


def test_rows_of_gradients_are_those_of_what_they_belong_to():
    """Also where a node's operators don't tell, as those of a function by hand."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, 2.0)

    x = torch.rand(B, D)
    weight = torch.ones(D, requires_grad=True)
    follow = Following(x)
    with follow:
        hidden = x * weight
        seen = []
        hidden.register_hook(seen.append)
        Twice.apply(hidden).sum().backward()
    is_bad = torch.zeros(B, D, dtype=torch.bool)
    is_bad[2, 1] = True
    assert follow.rows.samples_at(seen[0], is_bad) == (2,)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Graph:
    def __init__(self, **parts):
        self._parts = parts

    def keys(self):
        return list(self._parts)

    def __getitem__(self, name):
        return self._parts[name]


def graph():
    """Two graphs of three and two nodes, of two and one edges."""
    return Graph(
        x=torch.rand(5, D),
        edge_index=torch.tensor([[0, 1, 3], [1, 2, 4]]),
        edge_attr=torch.rand(3),
        y=torch.zeros(2),
        batch=torch.tensor([0, 0, 0, 1, 1]),
        ptr=torch.tensor([0, 3, 5]),
    )


def test_layout_of_graphs_follows_their_vector():
    """Nodes, edges, and what there is one of for each graph."""
    layout = layout_of(graph())
    assert (layout.size, layout.is_unique, layout.can_exchange) == (2, True, False)
    assert layout.labels["batch.x"].flatten().tolist() == [1, 1, 1, 2, 2]
    assert layout.labels["batch.edge_attr"].flatten().tolist() == [1, 1, 2]
    assert layout.labels["batch.edge_index"].tolist() == [[1, 1, 2]]
    assert layout.labels["batch.y"].tolist() == [1, 2]
    assert "batch.ptr" not in layout.labels


def test_layout_of_graphs_needs_them_one_behind_the_other():
    """Else it is a vector that is called so by chance; what belongs to no graph has no label."""
    mixed = graph()
    mixed._parts["batch"] = torch.tensor([0, 1, 0, 1, 1])
    assert not layout_of(mixed).is_unique
    more = graph()
    more._parts["table"] = torch.rand(7, 2)
    assert "batch.table" not in layout_of(more).labels


def test_layout_of_packed_sequences_follows_their_lengths():
    """One time step lies behind the other, the longest sample first; what there is one of for each sample beside it."""
    packed = pack_padded_sequence(torch.rand(3, 4, D), torch.tensor([2, 4, 1]), batch_first=True, enforce_sorted=False)
    layout = layout_of({"x": packed, "y": torch.zeros(3)})
    assert (layout.size, layout.is_unique, layout.can_exchange) == (3, True, False)
    assert layout.labels["batch['x'].data"].flatten().tolist() == [2, 1, 3, 2, 1, 2, 2]
    assert layout.labels["batch['y']"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "size", "dims", "is_unique"),
    [
        (
            (torch.zeros(4, 4, 3), torch.zeros(4, 7), torch.zeros(4)),
            4,
            {"batch[0]": 0, "batch[1]": 0, "batch[2]": 0},
            False,
        ),
        (Pair(torch.zeros(4, 3), torch.zeros(4)), 4, {"batch.x": 0, "batch.y": 0}, True),
        ((torch.zeros(5, 4, 3), torch.zeros(4)), 4, {"batch[0]": 1, "batch[1]": 0}, True),
        ((torch.zeros(5, 4, 3), torch.zeros(5, 4)), 5, {"batch[0]": 0, "batch[1]": 0}, False),
        ((torch.zeros(4, 4, 3), torch.zeros(4)), 4, {"batch[0]": 0, "batch[1]": 0}, False),
        ((torch.zeros(4, 3, 4, 4), torch.zeros(4)), 4, {"batch[0]": 0, "batch[1]": 0}, True),
        ((torch.zeros(4, 7), torch.zeros(4), torch.zeros(9)), 4, {"batch[0]": 0, "batch[1]": 0}, False),
        (torch.zeros(4, 3), 4, {"batch": 0}, False),
        ({"text": "a", "scale": torch.ones(())}, 0, {}, False),
    ],
)
def test_layout_is_read_off_the_leaves(batch, size, dims, is_unique):
    """And said to be the only one where it is."""
    layout = layout_of(batch)
    assert (layout.size, dict(layout.dims), layout.is_unique) == (size, dims, is_unique)


def test_layout_of_lists_has_an_entry_for_each_sample():
    """Images of several sizes with their boxes; but not inputs beside targets."""
    images = [torch.zeros(3, 8 + index, 9) for index in range(4)]
    targets = [{"boxes": torch.zeros(index + 1, 4)} for index in range(4)]
    layout = layout_of((images, targets))
    assert layout.size == 4
    assert int(layout.labels["batch[1][2]['boxes']"]) == 3
    assert layout_of((torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(7, 4))).size == 4


def test_layout_of_flattened_targets_belongs_to_the_samples():
    """[B, T] tokens with [B * T] targets."""
    layout = layout_of({"x": torch.zeros(2, 3), "y": torch.zeros(6)})
    assert layout.labels["batch['y']"].tolist() == [1, 1, 1, 2, 2, 2]


def test_layout_is_what_the_user_says():
    """One dimension, or one for each leaf."""
    batch = {"x": torch.zeros(3, 5, 4), "y": torch.zeros(2, 4)}
    assert layout_of(batch, {"batch['x']": 2, "batch['y']": 1}).dims == {"batch['x']": 2, "batch['y']": 1}
    assert layout_of(batch, {"batch['x']": 2, "batch['y']": None}).size == 4
    assert layout_of({"x": torch.zeros(3, 5)}, 1).size == 5
    assert layout_of({"x": torch.zeros(3)}, 1).size == 0
    with pytest.raises(ValueError, match=r"names batch\['z'\], which the batch has not"):
        layout_of(batch, {"batch['z']": 0})


@pytest.mark.parametrize("value", [-1, True, "x", {"batch": "x"}])
def test_sample_dim_of_a_wrong_value_is_refused(value):
    """With what it must be."""
    with pytest.raises(ValueError, match="`sample_dim` must be an integer >= 0"):
        check_sample_dim(value)


def test_iterators_of_a_batch_are_named():
    """Lists are none."""
    assert [*iterators_in({"x": iter([1]), "y": [1, (i for i in range(2))]})] == ["batch['x']", "batch['y'][1]"]


def test_batch_that_refers_to_itself_is_read_all_the_same():
    """And one whose parts can't be read."""

    class Loop:
        def __init__(self):
            self.me, self.x = self, torch.zeros(4, 2)

    class Lazy:
        def keys(self):
            return ["x"]

        def __getitem__(self, name):
            raise KeyError(name)

    assert layout_of(Loop()).size == 4
    assert not any(iterators_in(Loop()))
    lists = [torch.zeros(4, 3), torch.zeros(5, 2)]
    lists.append(lists)
    assert {leaf.shape[0] for _, leaf in layout_of(lists).leaves} == {4, 5}
    assert layout_of(Lazy()).size == 0


@pytest.mark.skipif(not hasattr(torch.Tag, "reduction"), reason="this version of torch has no such tag")
def test_every_reduction_of_torch_has_a_rule_by_name():
    """Older versions of torch have no tag that tells; this one's says which there are."""
    tagged = {
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and _is_reduction(name.removeprefix("aten::"))
    }
    assert "sum" in tagged
    assert tagged <= {name for name, rule in _RULES.items() if rule in (_gathered, _along)} | {"linalg__powsum"}


def _is_reduction(name):
    packet, _, overload = name.partition(".")
    try:
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    except (AttributeError, RuntimeError):  # of a backend that is not here
        return False
    return torch.Tag.reduction in operator.tags
