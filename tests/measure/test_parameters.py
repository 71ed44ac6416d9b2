"""Which parameters are watched, and under which names."""

from __future__ import annotations

import pytest
import torch
from builders import mlp
from torch import nn

from lightning_gradguard.measure.parameters import WatchedParameters


def test_watched_without_optimizer_is_the_whole_model():
    """All named parameters, in model order."""
    model = mlp(3, 4, 2)
    watched = WatchedParameters(model.named_parameters())
    assert watched.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert watched.layout.numels.tolist() == [12, 4, 8, 2]
    assert all(a is b for a, b in zip(watched.tensors, model.parameters(), strict=True))


def test_watched_with_optimizer_is_its_share_in_model_order():
    """An optimizer may have some of the parameters, in any order of groups."""
    model = mlp(3, 4, 2)
    groups = [{"params": [model[2].bias]}, {"params": [model[0].weight]}]
    watched = WatchedParameters(model.named_parameters(), torch.optim.SGD(groups, lr=0.1))
    assert watched.layout.names == ("0.weight", "2.bias")


def test_watched_tied_parameter_is_watched_once():
    """It keeps its first name, and would otherwise be clipped twice."""
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3, bias=False), "decoder": nn.Linear(3, 3, bias=False)})
    model["decoder"].weight = model["encoder"].weight
    watched = WatchedParameters(model.named_parameters(remove_duplicate=False))
    assert watched.layout.names == ("encoder.weight",)
    assert len(watched.tensors) == 1


def test_watched_parameter_that_the_model_does_not_list_gets_a_name():
    """It is trained, so it is watched."""
    model, outside = mlp(3, 2), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [outside]}], lr=0.1)
    watched = WatchedParameters(model.named_parameters(), optimizer)
    assert watched.layout.names == ("0.weight", "0.bias", "param_groups[1][0]")


def test_watched_compiled_module_has_its_own_names():
    """What `torch.compile` puts in between is left out."""
    wrapped = nn.ModuleDict({"net": nn.ModuleDict({"_orig_mod": nn.Linear(2, 1)})})
    assert WatchedParameters(wrapped.named_parameters()).layout.names == ("net.weight", "net.bias")


def test_refresh_without_change_keeps_the_layout():
    """The common case costs nothing and says so."""
    model = mlp(3, 2)
    watched = WatchedParameters(model.named_parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
    layout = watched.layout
    assert not watched.refresh()
    assert watched.layout is layout


def test_refresh_after_a_new_group_watches_it():
    """As fine-tuning does when it thaws a part of the model."""
    model = mlp(3, 4, 2)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    watched = WatchedParameters(model.named_parameters(), optimizer)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert watched.refresh()
    assert watched.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert not watched.refresh()


def test_refresh_after_a_cast_soon_looks_at_each_dtype_again():
    """Part of a module is cast in the middle of training; its parameters are the same objects. It takes 16 steps at most."""
    model = mlp(3, 4, 2)
    watched = WatchedParameters(model.named_parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert watched.is_uniform
    assert watched.are_plain
    model[2].to(torch.bfloat16)
    assert sum(watched.refresh() for _ in range(16)) == 1
    assert not watched.is_uniform
    assert not watched.are_plain


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="a parameter's gradient has its dtype up to torch 2.8")
def test_gradients_of_a_dtype_of_their_own_are_not_uniform():
    """Their norm in bfloat16 would be wrong by a thousandth."""
    model = mlp(3, 2)
    model[0].bias.grad_dtype = torch.bfloat16
    watched = WatchedParameters(model.named_parameters())
    assert not watched.is_uniform
    assert not watched.are_plain


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_refresh_watches_parameters_of_lazy_modules_once_they_have_a_shape(has_optimizer):
    """Each at its own time."""
    model = nn.ModuleList([nn.LazyLinear(2), nn.LazyLinear(1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if has_optimizer else None
    watched = WatchedParameters(model.named_parameters(), optimizer)
    assert (watched.layout.names, len(watched.everything)) == ((), 4)
    model[0](torch.ones(1, 3))
    assert watched.refresh()
    assert watched.layout.names == ("0.weight", "0.bias")
    model[1](torch.ones(1, 2))
    assert watched.refresh()
    assert watched.layout.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert not watched.refresh()
