"""Trainings that meet NaN or infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training, sick
from benchmarks.detection.trainings.data import Batch, digits, sampled, scaled, sequences, text
from benchmarks.detection.trainings.networks import LanguageModel, adam, conv_net, cross_entropy, linears, mlp, sgd

NONFINITE, OVERFLOW = "NaN and infinity", "fp16 overflow"


@sick(NONFINITE, "nonfinite")
def nan_element() -> Training:
    """One element of one gradient at one step."""
    network = mlp([64, 64, 64, 10])
    training = Training(network, adam(network, 1e-3), sampled(digits(), 32), cross_entropy(network))

    def after(step: int) -> None:
        grad = linears(network)[1].weight.grad
        if step == ONSET and grad is not None:
            grad[3, 5] = math.nan

    training.after = after
    return training


@sick(NONFINITE, "nonfinite")
def inf_element() -> Training:
    """One element of a recurrent weight's gradient."""
    network = LanguageModel()
    training = Training(network, adam(network, 5e-3), sequences(text(), 16, 24), cross_entropy(network))

    def after(step: int) -> None:
        grad = network.rnn.weight_hh_l0.grad
        if step == ONSET and grad is not None:
            grad[0, 0] = -math.inf

    training.after = after
    return training


@sick(NONFINITE, "nonfinite")
def log_of_zero() -> Training:
    """A hand-made cross-entropy meets a probability that has underflowed."""
    network = mlp([64, 64, 64, 10])

    def loss(batch: Batch) -> Tensor:
        return -F.softmax(network(batch[0]), 1)[torch.arange(len(batch[1])), batch[1]].log().mean()

    draw = sampled(digits(), 32)
    return Training(
        network,
        adam(network, 1e-3),
        lambda step: scaled(draw(step), 1e4 if step == ONSET else 1.0),
        loss,
    )


@sick(NONFINITE, "nonfinite")
def nan_input() -> Training:
    """A missing value in one image of one batch; convolutions and BatchNorm spread it."""
    network = conv_net()
    draw = sampled(digits(), 32)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        if step == ONSET:
            inputs[2, 9] = math.nan
        return inputs, targets

    return Training(network, sgd(network, 0.05), batch, cross_entropy(network))


class _Overflowing(torch.autograd.Function):
    """Passes values on, and a gradient that fp16 can't hold whatever the scale."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, grad):
        return (grad / torch.zeros_like(grad)).to(grad.dtype)


@sick(OVERFLOW, "overflow", "nonfinite")
def fp16_backward() -> Training:
    """From one step on a division by zero in the backward pass: no scale is small enough."""
    network = mlp([64, 64, 64, 10])
    begun = []

    def loss(batch: Batch) -> Tensor:
        outputs = network(batch[0])
        return F.cross_entropy(_Overflowing.apply(outputs) if begun else outputs, batch[1])

    def before(step: int) -> None:
        if step == ONSET:
            begun.append(step)

    training = Training(network, adam(network, 1e-3), sampled(digits(), 32), loss, before=before)
    training.scaler, training.autocast = GradScaler("cpu", init_scale=2.0**12), True
    return training


@sick(OVERFLOW, "overflow", "nonfinite")
def fp16_forward() -> Training:
    """An activation passes 65,504."""
    network = mlp([64, 64, 64, 10])
    draw = sampled(digits(), 32)
    training = Training(
        network,
        adam(network, 1e-3),
        lambda step: scaled(draw(step), 1e6 if step >= ONSET else 1.0),
        cross_entropy(network),
    )
    training.scaler, training.autocast = GradScaler("cpu", init_scale=2.0**12), True
    return training
