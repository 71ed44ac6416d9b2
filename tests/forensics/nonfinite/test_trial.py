"""A remedy is tried before it is printed: one that leaves the step damaged is not told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lines import fit
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import Guard


class Overflow(LightningModule):
    """What the remedy bounds is still large enough for a square to overflow, or is not."""

    def __init__(self, squared):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.squared = squared

    def training_step(self, batch, batch_idx):
        out = torch.exp(batch * self.scale)
        return (out.square() if self.squared else out.clamp_max(1e30)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


X = torch.tensor([[1.0], [2.0], [200.0]])


@pytest.mark.filterwarnings("ignore")
def test_remedy_that_moves_the_overflow_to_the_next_operator_is_not_told():
    """The exponential of 80 is finite, and its square is not."""
    (alert,) = fit(Overflow(squared=True), X).alerts
    assert alert.culprit.op == "exp"
    assert alert.remedy == ""


@pytest.mark.filterwarnings("ignore")
def test_remedy_that_ends_the_failure_is_told():
    """Where nothing else overflows."""
    (alert,) = fit(Overflow(squared=False), X).alerts
    assert alert.remedy == "Bound the exponent: `torch.exp(x.clamp_max(80.0))`."


class Log(torch.autograd.Function):
    """A logarithm whose derivative is written by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.log(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.saved_tensors[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [Log.apply, torch.log])
def test_remedy_in_a_raw_loop_is_tried_too(function):
    """Of a derivative written by hand nothing is known; that of torch's own logarithm is in order."""
    net, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 2.0], [0.0, 0.0]])

    def loss():
        return function(net(x).square()).mean()

    guard = Guard(net.named_parameters(), torch.optim.SGD(net.parameters(), 0.1), replay=loss)
    loss().backward()
    (alert,) = guard.step().alerts
    assert alert.culprit.op == "log"
    assert alert.remedy == ("" if function == Log.apply else "Keep the input above 0: `torch.log(x.clamp_min(1e-8))`.")


class Normed(LightningModule):
    """Something of torch's own that is made of several operators, on rows of zeros."""

    def __init__(self, run):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.run = run

    def training_step(self, batch, batch_idx):
        return self.run(batch * self.scale).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_remedy_is_for_the_function_that_the_line_calls():
    """An eps of RMSNorm, and not a clamp that would have to be written into torch."""
    (alert,) = fit(Normed(nn.RMSNorm(2, eps=0.0)), torch.tensor([[1.0, 2.0], [0.0, 0.0]])).alerts
    assert alert.culprit.op == "rsqrt"
    assert alert.remedy == "Give it an eps: `F.rms_norm(x, x.shape[-1:], eps=1e-6)`."


@pytest.mark.filterwarnings("ignore")
def test_operator_inside_a_distribution_has_no_remedy_for_the_line():
    """The line says nothing of a logarithm."""
    density = lambda x: torch.distributions.Pareto(1.0, 2.0, validate_args=False).log_prob(x)  # noqa: E731
    (alert,) = fit(Normed(density), torch.tensor([[1.0, 2.0], [0.0, 0.0]])).alerts
    assert alert.culprit.op == "log"
    assert alert.remedy == ""


@pytest.mark.filterwarnings("ignore")
def test_deviation_of_a_batch_of_one_is_no_samples_fault():
    """Of more samples it would be finite."""
    (alert,) = fit(Normed(lambda x: x / x.std(0)), torch.tensor([[1.0, 2.0]])).alerts
    assert alert.culprit.op == "std"
    assert alert.culprit.samples is None
    assert "row" not in alert.culprit.message


@pytest.mark.filterwarnings("ignore")
def test_value_just_outside_a_domain_is_not_written_as_its_border():
    """1.0000012 is not 1."""
    (alert,) = fit(Normed(torch.acos), torch.tensor([[0.5, 0.5], [0.2, 1.0000012]])).alerts
    assert "got 1.0000012 at [1, 1], which is not inside (-1, 1)" in alert.message


@pytest.mark.filterwarnings("ignore")
def test_cross_entropy_keeps_its_remedy():
    """It is what the line calls."""
    (alert,) = fit(Normed(lambda x: F.cross_entropy(x, torch.tensor([-100, -100]))), torch.ones(2, 2)).alerts
    assert "reduction='sum'" in alert.remedy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_of_sample", [True, False])
def test_infinity_from_numpy_is_said_to_come_from_outside(is_of_sample):
    """A row's number may come from its sample or from its place; replays with samples exchanged tell."""

    def weighted(x):
        of = x.detach()[:, 0] if is_of_sample else torch.tensor([1.0, 1.0, 0.0, 1.0])
        with np.errstate(divide="ignore"):
            weight = torch.from_numpy(1.0 / of.numpy())
        return x[:, 1] * weight

    (alert,) = fit(Normed(weighted), torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 2.0], [2.0, 1.0]])).alerts
    assert alert.culprit.op == "mul"
    assert "was given a tensor from before the step, or from outside of torch, that holds Inf" in alert.message
    assert alert.culprit.samples == ((2,) if is_of_sample else None)
    assert alert.remedy == ""
