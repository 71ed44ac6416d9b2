"""Names, sizes and groups of parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.layout import Layout, Partition, clean_name, module_of

KEYS = st.lists(st.sampled_from("abcd"), max_size=12)
NORMS = st.floats(0.0, 1e300)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("weight", "weight"),
        ("_orig_mod.weight", "weight"),
        ("net._orig_mod.0._orig_mod.bias", "net.0.bias"),
        ("my_orig_mod.bias", "my_orig_mod.bias"),
    ],
)
def test_clean_name_compiled_module_drops_the_wrapper(raw, clean):
    """`torch.compile` puts `_orig_mod` into paths; the user didn't."""
    assert clean_name(raw) == clean


@pytest.mark.parametrize(("name", "module"), [("scale", ""), ("a.weight", "a"), ("a.b.0.weight", "a.b.0")])
def test_module_of_gives_the_path_of_the_owner(name, module):
    """The last part is the parameter."""
    assert module_of(name) == module


def test_layout_of_shapes_counts_elements_and_dimensions():
    """A scalar has one element, an empty tensor none."""
    layout = Layout.of("abcd", [(), (0, 3), (4,), (2, 3, 4)])
    assert layout.numels.tolist() == [1, 0, 4, 24]
    assert layout.ndims.tolist() == [0, 2, 1, 3]


def test_groups_are_top_level_modules_in_model_order():
    """Parameters of the root go by their own name; members need not be neighbours."""
    layout = Layout.of(["b.x", "a.x", "scale", "b.y.z"], [(1,)] * 4)
    assert layout.groups.names == ("b", "a", "scale")
    assert layout.groups.norms(np.array([3.0, 1.0, 2.0, 4.0])).tolist() == [5.0, 1.0, 2.0]


def test_subgroups_with_one_top_level_module_go_one_level_deeper():
    """`net.0`, `net.1` where all is `net`; what has no deeper level belongs to none."""
    layout = Layout.of(["net.0.weight", "net.0.bias", "net.1.weight", "net.scale"], [(1,)] * 4)
    assert layout.groups.names == ("net",)
    assert layout.subgroups.names == ("net.0", "net.1")


def test_subgroups_with_several_top_level_modules_are_empty():
    """The groups already say it."""
    assert Layout.of(["a.0.weight", "b.0.weight"], [(1,)] * 2).subgroups.names == ()


def test_weights_leave_out_vectors():
    """Biases and gains live on another scale."""
    layout = Layout.of(["a.weight", "a.bias", "b.gain", "c.kernel"], [(2, 2), (2,), (2,), (1, 1, 3, 3)])
    assert layout.weights.names == ("a", "c")
    assert layout.weights.totals(layout.numels).tolist() == [4, 9]


def test_partition_without_groups_gives_empty_arrays():
    """A model of vectors only has no weights."""
    empty = Partition.by_key(["a"], keep=np.array([False]))
    assert empty.norms(np.ones(1)).shape == empty.totals(np.ones(1, dtype=np.int64)).shape == (0,)
    assert empty.any(np.ones(1, dtype=np.bool_)).shape == (0,)


@examples
@given(KEYS, st.data())
def test_partition_statistics_equal_a_loop_over_members(keys, data):
    """Sums, norms and flags, against `math.hypot` and plain Python."""
    norms = data.draw(st.lists(NORMS, min_size=len(keys), max_size=len(keys)))
    flags = data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    partition = Partition.by_key(keys)
    members = {key: [index for index, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)}
    assert partition.names == tuple(members)
    assert partition.totals(np.arange(len(keys))).tolist() == [sum(group) for group in members.values()]
    assert partition.any(np.array(flags, dtype=np.bool_)).tolist() == [
        any(flags[index] for index in group) for group in members.values()
    ]
    expected = [math.hypot(*(norms[index] for index in group)) for group in members.values()]
    assert partition.norms(np.array(norms)).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_partition_norms_at_the_ends_of_float64_are_exact(size):
    """Neither a square that overflows nor one that underflows gets in the way."""
    assert Partition.by_key("aab").norms(np.array([3 * size, 4 * size, 1.0])) == pytest.approx([5 * size, 1.0])


def test_partition_norms_of_nonfinite_members_stay_in_their_group():
    """NaN and infinity show in their own group only."""
    norms = Partition.by_key("aabbcc").norms(np.array([math.nan, 1.0, math.inf, 1e200, 3.0, 4.0]))
    assert math.isnan(norms[0])
    assert norms[1:].tolist() == [math.inf, 5.0]
