"""Vanishing gradients whose cause is easily mistaken: decay, time inside one kernel, branches, shared weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.detection.trainings.base import ONSET, Training
from benchmarks.detection.trainings.data import Batch, cancer, digits, sampled
from benchmarks.detection.trainings.networks import adam, cross_entropy, mlp, sgd
from benchmarks.diagnosis.trainings.base import MISTAKEN, register

vanishing = register(MISTAKEN, "vanishing")


def _noise(make: type[Optimizer], **settings: Any) -> Training:
    """Nothing to learn, so that a decay wins; at the start the weights are in order."""
    network = mlp([16] + [64] * 7 + [1])

    def batch(_: int) -> Batch:
        return torch.randn(64, 16), torch.randn(64, 1)

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(network(batch[0]), batch[1])

    return Training(network, make(network.parameters(), **settings), batch, loss)


@vanishing("decay", onset=30)
def decay_in_adam() -> Training:
    """L2 regularisation inside Adam."""
    return _noise(torch.optim.Adam, lr=1e-3, weight_decay=1e-2)


@vanishing("decay", onset=30)
def decay_in_adamw() -> Training:
    """Decoupled, two percent a step."""
    return _noise(torch.optim.AdamW, lr=1e-3, weight_decay=20.0)


@vanishing("decay", onset=30)
def decay_in_sgd() -> Training:
    """With momentum; one percent a step in all."""
    return _noise(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1)


def _last_state(rnn: nn.RNNBase, optimizer: Any, steps: int = 200) -> Training:
    """The sum of the first inputs is asked for after the last."""
    network = nn.ModuleDict({"embed": nn.Linear(4, 16), "rnn": rnn, "head": nn.Linear(16, 1)})

    def batch(_: int) -> Batch:
        x = torch.randn(8, steps, 4)
        return x, x[:, :5].sum((1, 2))[:, None]

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(network["head"](rnn(network["embed"](batch[0]))[0][:, -1]), batch[1])

    return Training(network, optimizer(network), batch, loss)


@vanishing("recurrence")
def tanh_net_over_time() -> Training:
    """`nn.RNN` over two hundred steps."""
    return _last_state(nn.RNN(16, 16, batch_first=True), lambda network: adam(network, 1e-3))


@vanishing("recurrence")
def lstm_that_forgets() -> Training:
    """Forget gates biased towards forgetting."""
    rnn = nn.LSTM(16, 16, batch_first=True)
    with torch.no_grad():
        rnn.bias_hh_l0[16:32] = -4.0
    return _last_state(rnn, lambda network: adam(network, 1e-3))


@vanishing("recurrence")
def gru_over_time() -> Training:
    """A GRU of two layers, at torch's initialisation."""
    return _last_state(nn.GRU(16, 16, 2, batch_first=True), lambda network: sgd(network, 1e-3))


@vanishing("recurrence")
def packed_sequences_over_time() -> Training:
    """Sequences of different lengths, packed."""
    network = nn.ModuleDict({"embed": nn.Linear(4, 16), "rnn": nn.RNN(16, 16, batch_first=True), "head": nn.Linear(16, 1)})

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(network["embed"](batch[0]), batch[1], batch_first=True)
        return F.mse_loss(network["head"](network["rnn"](packed)[1][0]), batch[0][:, :5].sum((1, 2))[:, None])

    def batch(_: int) -> tuple[Tensor, Tensor]:
        return torch.randn(8, 200, 4), torch.arange(200, 120, -10)

    return Training(network, adam(network, 1e-3), batch, loss)


@vanishing("recurrence")
def cells_of_lstm_in_a_loop() -> Training:
    """`nn.LSTMCell`, called by Python; forget gates biased towards forgetting."""
    cell, head = nn.LSTMCell(1, 16), nn.Linear(16, 10)
    with torch.no_grad():
        cell.bias_hh[16:32] = -4.0
    network = nn.ModuleDict({"cell": cell, "head": head})

    def loss(batch: Batch) -> Tensor:
        state = None
        for pixel in batch[0].unbind(1):
            state = cell(pixel[:, None], state)
        assert state is not None
        return F.cross_entropy(head(state[0]), batch[1])

    return Training(network, sgd(network, 0.01), sampled(digits(), 32), loss)


@vanishing("dead", onset=60)
def dead_block() -> Training:
    """The one hidden ReLU layer has been pushed down."""
    stem, block, head = nn.Linear(30, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 2)
    network = nn.Sequential(stem, block, head)
    training = Training(network, sgd(network, 0.01, 0.0), sampled(cancer(), 16), cross_entropy(network))

    def before(step: int) -> None:
        if step == 60:
            block[0].bias.data.fill_(-50.0)

    training.before = before
    return training


@vanishing("dead", onset=ONSET)
def dead_branch_beside_a_living_one() -> Training:
    """Of two parallel branches one is dead."""
    left, right, head = mlp([30, 32, 32]), mlp([30, 32, 32]), nn.Linear(32, 2)
    network = nn.ModuleDict({"left": left, "right": right, "head": head})

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(head(torch.relu(left(batch[0])) + torch.relu(right(batch[0]))), batch[1])

    def before(step: int) -> None:
        if step == ONSET:
            right[2].bias.data.fill_(-80.0)

    return Training(network, adam(network, 1e-3), sampled(cancer(), 32), loss, before=before)


@vanishing("activation")
def sigmoids_beside_each_other() -> Training:
    """Eight layers of four parallel sigmoids: the gradient passes eight, not thirty-two."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.sigmoid(branch(x)) for branch in self.branches]).mean(0)

    network = nn.Sequential(nn.Linear(64, 48), *(Wide() for _ in range(8)), nn.Linear(48, 10))
    return Training(network, adam(network, 1e-3), sampled(digits(), 32), cross_entropy(network))


@vanishing("activation")
def sigmoids_over_eight_views() -> Training:
    """One deep sigmoid network is applied to eight views beside each other: no recurrence."""
    network = nn.ModuleDict({"body": mlp([64] + [48] * 8, nn.Sigmoid), "head": nn.Linear(48, 10)})

    def loss(batch: Batch) -> Tensor:
        views = [network["body"](batch[0] + 0.1 * torch.randn_like(batch[0])) for _ in range(8)]
        return F.cross_entropy(network["head"](torch.stack(views).mean(0)), batch[1])

    return Training(network, adam(network, 1e-3), sampled(digits(), 32), loss)


@vanishing("init")
def small_weights_beside_a_wide_path() -> Training:
    """Ten layers with a fifth of the weights that they need, beside a single layer that is in order."""
    thin, wide, head = mlp([30] + [32] * 10), mlp([30, 32]), nn.Linear(32, 2)
    network = nn.ModuleDict({"thin": thin, "wide": wide, "head": head})
    for layer in thin:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.25 / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(head(thin(batch[0]) + wide(batch[0])), batch[1])

    return Training(network, adam(network, 1e-4), sampled(cancer(), 32), loss)


@vanishing("saturation", onset=ONSET)
def saturated_by_unscaled_inputs() -> Training:
    """From one step on the inputs come a thousand times larger, in front of four tanh layers."""
    network = mlp([64, 48, 48, 48, 48, 10], nn.Tanh)
    draw = sampled(digits(), 32)
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.weight *= 2.0

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs * (1000.0 if step >= ONSET else 1.0), targets

    return Training(network, adam(network, 1e-4), batch, cross_entropy(network))
