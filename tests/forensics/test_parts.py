"""State that is put back, batches of all shapes, and single tensors."""

from __future__ import annotations

import random
from collections import UserDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard.forensics.comparison import compare_gradients
from lightning_gradguard.forensics.nonfinite.layout import layout_of, leaves_of
from lightning_gradguard.forensics.nonfinite.proof import Proof
from lightning_gradguard.forensics.nonfinite.samples import Batch, exchanged
from lightning_gradguard.forensics.nonfinite.wording import rows_in_words
from lightning_gradguard.forensics.state import unchanged
from lightning_gradguard.forensics.tensors import describe, flaw_of, range_of

NAN, INF = float("nan"), float("inf")


class Own:
    """A user's object."""

    def __init__(self) -> None:
        self.values = {1, 2}
        self.queue = deque([1], maxlen=3)


class Rich(nn.Module):
    """Keeps whatever a module may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("wide", torch.zeros(1).expand(4, 5))
        self.own, self.array, self.pair = Own(), np.zeros(2), (torch.zeros(2), [1])
        self.dice, self.generator, self.old = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.many = list(range(20_000))

    def change(self) -> list[float]:
        """All of it, and draw."""
        drawn = [self.dice.random(), self.generator.random(), self.old.rand(), torch.rand(()).item(), random.random()]
        drawn.append(torch.rand((), generator=self.torch_generator).item())
        with torch.no_grad():
            self.weight.fill_(NAN)
            self.count += 1
            self.pair[0].fill_(-0.0)
        self.weight.requires_grad_(False)
        self.pair[1].append(2)
        self.own.values.add(3)
        self.own.queue.append(2)
        self.array += 1
        self.many.clear()
        self.new = 1
        self.own = None
        del self.old
        return drawn


def test_everything_that_a_module_keeps_is_put_back_in_place():
    """To the sign of a zero, and each object the same as before."""
    module = Rich()
    kept = [module.own, module.pair, module.pair[0], module.pair[1], module.array, module.own.queue, module.many]
    gradient = module.weight.grad = torch.ones(3)
    drawn = []
    for _ in range(2):
        with unchanged(module):
            assert module.weight.grad is None
            drawn.append(module.change())
    assert drawn[0] == drawn[1]
    now = [module.own, module.pair, module.pair[0], module.pair[1], module.array, module.own.queue, module.many]
    assert all(left is right for left, right in zip(kept, now, strict=True))
    assert module.weight.grad is gradient
    assert module.weight.requires_grad
    assert module.weight.tolist() == [0.0, 0.0, 0.0]
    assert not torch.signbit(module.pair[0]).any()
    assert (module.own.values, list(module.own.queue), module.pair[1], len(module.many)) == ({1, 2}, [1], [1], 20_000)
    assert not hasattr(module, "new")
    assert module.count == 0


def test_error_inside_puts_everything_back_too():
    """It is passed on."""
    module = Rich()

    def fail():
        with unchanged(module):
            module.change()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.weight.tolist() == [0.0, 0.0, 0.0]


@dataclass
class Data:
    x: torch.Tensor
    name: str = "a"


class Pair(NamedTuple):
    x: object
    y: object


class Bag:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda x: x, "batch"),
        (lambda x: {"a": [x]}, "batch['a'][0]"),
        (lambda x: Pair(x, 1), "batch.x"),
        (Data, "batch.x"),
        (Bag, "batch.x"),
    ],
)
def test_leaves_are_named_as_one_would_write_them(wrap, name):
    """Whatever holds them."""
    ((found, _),) = leaves_of(wrap(torch.zeros(4, 2)))
    assert found == name
    assert Batch.of(wrap(torch.zeros(4, 2))).size == 4


def test_batch_without_tensors_has_no_samples():
    """And no tensor has rows for them."""
    assert Batch.of(["text"]).rows_of(torch.tensor([NAN])) is None


@pytest.mark.parametrize(
    ("shape", "index", "rows"),
    [
        ((4, 3), (2, 0), (2,)),
        ((3, 4, 2), (0, 1, 0), (1,)),  # time first
        ((12, 2), (7, 0), (2,)),  # samples of three, flattened
        ((8, 3, 3), (5, 0, 0), (2,)),  # two heads of attention
        ((5,), (0,), None),
        ((), (), None),
    ],
)
def test_rows_of_a_damaged_tensor(shape, index, rows):
    """By its shape."""
    tensor = torch.zeros(shape)
    tensor[index] = INF
    assert Batch.of({"x": torch.zeros(4, 3)}).rows_of(tensor) == rows


def test_exchange_puts_samples_in_the_places_of_others():
    """In every tensor that has them; the rest stays."""
    x = torch.arange(4)
    batch = {"x": x, "more": Pair(x, [x, "a"]), "scale": torch.ones(()), "data": Data(x), "bag": Bag(x)}
    made = exchanged(batch, layout_of(batch), [0, 3, 2, 3])
    others = [made["more"].x, made["more"].y[0], made["data"].x, made["bag"].x]
    assert made["x"].tolist() == [0, 3, 2, 3]
    assert all(torch.equal(other, made["x"]) for other in others)
    assert made["scale"] == 1
    assert x.tolist() == [0, 1, 2, 3]


def test_exchange_hands_the_attributes_of_a_subclass_on():
    """Of tensors that carry some."""

    class Named(torch.Tensor):
        pass

    batch = torch.arange(4.0).as_subclass(Named)
    batch.names_of_rows = "abcd"
    made = exchanged(batch, layout_of(batch), [0, 0, 2, 3])
    assert type(made) is Named
    assert made.names_of_rows == "abcd"


@pytest.mark.parametrize("bad", [{0}, {7}, {2, 3}, {1, 6}, {0, 1, 2}])
def test_proof_finds_the_samples(bad):
    """Those without which the batch is in order; it holds for them, and for no others."""

    def is_bad(rows):
        return bool(bad & {*rows})

    assert Proof(is_bad, 8, 24).find() == tuple(sorted(bad))
    assert Proof(is_bad, 8, 24).holds(sorted(bad))
    assert not Proof(is_bad, 8, 24).holds([*bad, 5])
    assert not Proof(is_bad, 8, 24).holds([4])


def test_proof_does_not_hold_where_samples_fail_only_together():
    """Two that are equal, say: neither is enough."""
    assert not Proof(lambda rows: {1, 2} <= {*rows}, 8, 24).holds([1, 2])


def test_proof_does_not_hold_for_nobody_or_for_most_of_the_batch():
    """Nothing is run for that."""
    proof = Proof(lambda rows: pytest.fail("asked"), 8, 24)
    assert [proof.holds(suspects) for suspects in ([], [0, 1, 2, 3, 4])] == [False, False]


def test_exchange_in_a_mapping_of_its_own_kind_keeps_the_kind():
    """As tokenized texts have one."""
    batch = UserDict(x=torch.arange(3.0), names=["a"])
    other = exchanged(batch, layout_of(batch), [2, 1, 0])
    assert type(other) is UserDict
    assert other["x"].tolist() == [2.0, 1.0, 0.0]
    assert batch["x"].tolist() == [0.0, 1.0, 2.0]


def test_gradients_of_another_shape_or_that_are_gone_are_not_alike():
    """There is nothing to compare."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    assert compare_gradients({}, parameters) == (False, None)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    assert compare_gradients({id(parameters[0]): torch.ones(2)}, parameters) == (False, None)
    assert compare_gradients({id(it): torch.ones(3) for it in parameters}, parameters) == (False, None)
    assert compare_gradients({id(it): torch.ones(2) for it in parameters}, parameters) == (True, 0.0)


def test_array_that_has_become_read_only_is_left_as_it_is():
    """Nobody can have written to it since."""
    module = Rich()
    with unchanged(module):
        module.array.flags.writeable = False
    assert module.array.tolist() == [0.0, 0.0]


def test_proof_gives_up_where_no_samples_are_to_blame():
    """Or where it would take too long."""
    assert Proof(lambda rows: True, 8, 24).find() is None
    proof = Proof(lambda rows: 3 in rows, 1024, 4)
    assert proof.find() is None
    assert proof.is_exhausted
    assert not proof.holds([3])


def test_description_of_a_tensor():
    """Range of what is finite, and what is not."""
    assert describe(torch.tensor([1.0, NAN, INF, 3.0])) == "float32 [4] 1 to 3, 1 NaN, 1 Inf"
    assert describe(torch.zeros(2, dtype=torch.long)) == "int64 [2]"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_flaws_of_unusual_tensors():
    """Complex, sparse, float8, empty, on the meta device, and far too large to be walked over."""
    assert flaw_of(torch.tensor([complex(0.0, NAN)])).has_nan
    assert flaw_of(torch.tensor([[0.0, INF]]).to_sparse()).has_inf
    assert flaw_of(torch.tensor([[1.0, INF]]).to_sparse_csr()) is None
    assert flaw_of(torch.tensor([1.0]).to(torch.float8_e4m3fn)) is None
    assert flaw_of(torch.zeros(0)) is None
    assert flaw_of(torch.zeros(2, device="meta")) is None
    assert flaw_of(torch.tensor([-INF]).expand(10**12, 1)).is_negative
    assert str(range_of(torch.tensor([1.0, 2.0]))) == "1 to 2"


def test_many_rows_are_cut_short():
    """A sentence stays one."""
    assert rows_in_words(range(8)) == " in rows 0, 1, 2, 3, 4 and 3 more"
