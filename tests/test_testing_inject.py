"""The injector that users rehearse a fault with."""

from __future__ import annotations

import pytest
import torch
from builders import mlp

from lightning_gradguard.testing import inject


def _gradients(model, num_passes: int) -> list[torch.Tensor]:
    seen = []
    for _ in range(num_passes):
        model.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        seen.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return seen


@pytest.mark.parametrize(("fault", "is_it"), [("nan", torch.isnan), ("inf", torch.isinf)])
def test_inject_nonfinite_damages_one_element_in_one_pass(fault, is_it):
    """Of the first trained parameter, if none is named."""
    model = mlp(3, 4, 1)
    with inject(model, fault, step=2):
        counts = [int(is_it(grad).sum()) for grad in _gradients(model, 4)]
    assert counts == [0, 0, 1, 0]


def test_inject_explosion_multiplies_the_gradient_of_the_named_parameter():
    """And leaves the others as they are."""
    model = mlp(3, 4, 1)
    with inject(model, "explosion", step=1, parameter="2.bias", factor=100.0):
        before, after = _gradients(model, 2)
    assert torch.equal(after[:-1], before[:-1])
    assert float(after[-1]) == pytest.approx(100.0 * float(before[-1]))


def test_inject_on_a_rank_that_does_not_exist_is_refused():
    """Alone, this process is rank 0; how many there are is known at the first backward pass."""
    model = mlp(3, 4, 1)
    with inject(model, "nan", step=0, rank=1), pytest.raises(ValueError, match="`rank` must be one of the 1 that there are"):
        list(_gradients(model, 2))


class _Recurrent(torch.nn.Module):
    """Its own parameter, and a tuple and a mapping for an output, as an RNN or a variational autoencoder has."""

    def __init__(self):
        super().__init__()
        self.start = torch.nn.Parameter(torch.zeros(4))
        self.cell = torch.nn.GRU(3, 4)

    def forward(self, x):
        output, hidden = self.cell(x[None], self.start.expand(1, len(x), 4).contiguous())
        return "name", {"output": output, "hidden": hidden}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("parameter", ["start", "cell.weight_ih_l0"])
def test_inject_into_a_module_that_returns_more_than_a_tensor_damages_one_pass(parameter, replaced):
    """Its parameter's gradient; where another tensor has come into the parameter's place, that of what it returns."""
    model = _Recurrent()
    found = []
    with inject(model, "nan", step=1, parameter=parameter):
        if replaced:  # as sharding does, once the context has been entered
            owner = model if parameter == "start" else model.cell
            setattr(owner, parameter.split(".")[-1], torch.nn.Parameter(model.get_parameter(parameter).detach().clone()))
        for _ in range(3):
            model.zero_grad()
            (model(torch.ones(2, 3))[1]["output"]).sum().backward()
            found.append(bool(model.get_parameter(parameter).grad.isnan().any()))
    assert found == [False, True, False]


def test_inject_ends_with_the_context_and_leaves_no_hook():
    """Also when the training in it fails."""
    model = mlp(3, 4, 1)
    with pytest.raises(ZeroDivisionError), inject(model, "nan", step=0):
        raise ZeroDivisionError
    assert all(bool(grad.isfinite().all()) for grad in _gradients(model, 2))
    assert not any(module._forward_hooks for module in model.modules())


def test_inject_takes_the_name_without_what_compilation_adds():
    """`torch.compile` puts `_orig_mod` into names."""
    model = torch.nn.Sequential(torch.compile(torch.nn.Linear(3, 1), backend="eager"))
    with inject(model, "nan", step=0, parameter="0.weight"):
        (grad,) = _gradients(model, 1)
    assert int(grad.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fault": "zero", "step": 0}, "`fault` must be 'nan', 'inf' or 'explosion', got 'zero'"),
        ({"fault": "nan", "step": -1}, "`step` must be"),
        ({"fault": "nan", "step": 0, "parameter": "nose"}, "`parameter` must name a parameter that is trained, got 'nose'"),
        ({"fault": "explosion", "step": 0, "factor": 0.0}, "`factor` must be"),
    ],
)
def test_inject_bad_input_is_refused_with_the_remedy(settings, match):
    """Before anything is hooked."""
    with pytest.raises(ValueError, match=match), inject(mlp(3, 1), **settings):
        pass
