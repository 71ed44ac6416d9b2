"""torch's own mechanisms: functions by hand, hooks, complex and sparse numbers, half precision, solvers, windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

from benchmarks.forensics.architectures import Scale
from benchmarks.forensics.labels import BATCH, INF, LENGTH, WIDTH, Sequences, Step, case
from benchmarks.forensics.layouts import noise
from benchmarks.forensics.objectives import at


class SafeLog(torch.autograd.Function):
    """Written the newer way; safe in its forward pass alone."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp_min(1e-8).log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / ctx.saved_tensors[0]  # <<


@case("backward", "", "SafeLogBackward", samples=(4,), at=SafeLog)
class FunctionWithAContextOfItsOwn(Step):
    def batch(self) -> Any:
        return {**super().batch(), "scale": at(4, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strength = self.head(self.encoder(batch["x"])).square() * batch["scale"]
        return SafeLog.apply(strength).mean()


@case("forward", "", "log", samples=(2,))
class LogarithmOfAComplexZero(Step):
    def batch(self) -> Any:
        wave = noise(BATCH, 16)
        wave[2] = 0.0
        return wave, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        cepstrum = torch.log(torch.fft.fft(batch[0]))  # <<
        return F.cross_entropy(self.head(self.encoder(cepstrum.real[:, :WIDTH])), batch[1])


@case("none")
class MagnitudeAndAngleOfSilenceAreHealthy(Step):
    """torch gives both a gradient of zero at zero."""

    def batch(self) -> Any:
        return {**super().batch(), "gate": at(2, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spectrum = torch.fft.rfft(self.encoder(batch["x"]) * batch["gate"])
        return spectrum.abs().mean() + spectrum.angle().mean()


@case("backward", "", "SqrtBackward0", samples=(4,), needs_remedy=True)
class MagnitudeByHandOfSilence(Step):
    def add(self) -> None:
        self.filter = nn.Parameter(torch.ones(16))

    def batch(self) -> Any:
        wave = noise(BATCH, 16)
        wave[4] = 0.0
        return wave

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spectrum = torch.fft.rfft(batch * self.filter)
        return torch.sqrt(spectrum.real.square() + spectrum.imag.square()).mean()  # <<


@case("forward", "", "pow", has_open_samples=True)
class IsolatedNodeOfASparseMatrix(Step):
    """Its degree is zero; the rows of the batch are nodes of one graph."""

    def batch(self) -> Any:
        edges = torch.tensor([[0, 1, 2, 3, 4, 6, 7, 0], [1, 2, 3, 4, 6, 7, 0, 3]])
        return {**super().batch(), "edges": edges}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        edges = torch.cat([batch["edges"], batch["edges"].flip(0)], 1)
        matrix = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (BATCH, BATCH))
        scale = torch.sparse.sum(matrix, 1).to_dense().pow(-0.5)[:, None]  # <<
        hidden = scale * torch.sparse.mm(matrix, scale * self.encoder(batch["x"]))
        return F.cross_entropy(self.head(hidden), batch["y"])


@case("forward", "", "bmm", samples=(3,), says=("float16",))
class EinsumBeyondFloat16(Step):
    def add(self) -> None:
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def batch(self) -> Any:
        x = noise(BATCH, LENGTH, WIDTH)
        x[3] *= 400.0
        return x, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = batch[0] * self.gain
        with torch.autocast("cpu", torch.float16):
            scores = torch.einsum("bik,bjk->bij", hidden, hidden)  # <<
        return F.cross_entropy(self.head((scores.float().softmax(-1) @ hidden).mean(1)), batch[1])


class HalfVariance(nn.Module):
    """A mean square in the type of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.half()
        variance = half.pow(2).mean(-1, keepdim=True)
        return (half * torch.rsqrt(variance + 1e-3)).float()


@case("none")
class MeanSquareBeyondFloat16(Step):
    """What is divided by an infinite root is zero, and so is its gradient. First labelled as a failure."""

    def add(self) -> None:
        self.norm = HalfVariance()

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][4] *= 1000.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.norm(batch["x"]))), batch["y"])


class Frequencies(nn.Module):
    """Of positions, worked out in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1]).half()[:, None]
        frequency = torch.pow(10000.0, torch.arange(x.shape[2] // 2).half())  # <<
        angle = (position * frequency).float()
        return x + torch.cat([angle.sin(), angle.cos()], -1)


@case("forward", "positions", "pow", at=Frequencies)
class PositionsBeyondFloat16(Step):
    def add(self) -> None:
        self.positions = Frequencies()

    def batch(self) -> Any:
        return {"x": noise(BATCH, LENGTH, WIDTH), "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.positions(batch["x"])).mean(1)), batch["y"])


@case("none")
class PeriodsBeyondFloat16AreHealthy(Step):
    """An infinite period turns by nothing."""

    def batch(self) -> Any:
        return {"x": noise(BATCH, LENGTH, WIDTH), "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        period = torch.pow(10000.0, torch.arange(WIDTH).half())
        angle = (torch.arange(LENGTH).half()[:, None] / period).float()
        return F.cross_entropy(self.head(self.encoder(batch["x"] + angle.sin()).mean(1)), batch["y"])


@case("none")
class ZeroVectorNormalizedIsHealthy(Step):
    """`F.normalize` has an eps."""

    def batch(self) -> Any:
        return {**super().batch(), "scale": at(1, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(F.normalize(self.encoder(batch["x"]) * batch["scale"])), batch["y"])


@case("backward", "", "SqrtBackward0", samples=(2,), needs_remedy=True)
class CompiledRootAtZero(Step):
    """The backward pass of what dynamo has taken over."""

    def add(self) -> None:
        self.length = torch.compile(self._length, backend="eager")

    def _length(self, hidden: Tensor) -> Tensor:
        return hidden.square().sum(1).sqrt()  # <<

    def batch(self) -> Any:
        return {**super().batch(), "scale": at(2, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.length(self.encoder(batch["x"]) * batch["scale"]).mean()


@case("forward", "blocks.2", "rsqrt", samples=(6,), at=Scale, needs_remedy=True)
class CheckpointsOneAfterTheOther(Step):
    def add(self) -> None:
        body = [nn.Linear(WIDTH, WIDTH, bias=False), nn.Dropout(0.1), Scale(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        self.blocks = nn.Sequential(*body)

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][6] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint_sequential(self.blocks, 2, batch["x"], use_reentrant=False)
        return F.cross_entropy(self.head(hidden), batch["y"])


@case("none")
class TransformerWithoutASourceIsHealthy(Sequences):
    """All of one source is padding; torch's kernels give zeros for it."""

    def add(self) -> None:
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 8, batch_first=True)

    def batch(self) -> Any:
        batch = super().batch()
        batch["keep"][3] = False
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        is_padding = ~batch["keep"]
        masks = {"src_key_padding_mask": is_padding, "memory_key_padding_mask": is_padding}
        hidden = self.transformer(batch["x"], batch["x"], **masks)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["y"].flatten())


@case("forward", "", "div", samples=(2,), needs_remedy=True)
class AxisOfNoRotation(Step):
    """A quaternion of the identity, as an axis and an angle."""

    def batch(self) -> Any:
        quaternion = F.normalize(noise(BATCH, 4))
        quaternion[2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        return {**super().batch(), "quaternion": quaternion}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        half = torch.acos(batch["quaternion"][:, :1])
        axis = batch["quaternion"][:, 1:] / half.sin()  # <<
        return (self.head(self.encoder(batch["x"]))[:, :3] - 2 * half * axis).square().mean()


@case("forward", "", "log", samples=(5,))
class DeterminantByCholesky(Step):
    """Of a covariance that is zero."""

    def batch(self) -> Any:
        root = noise(BATCH, 3, 3)
        covariance = root @ root.transpose(1, 2) + torch.eye(3)
        covariance[5] = 0.0
        return {**super().batch(), "covariance": covariance}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(batch["covariance"])
        volume = 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)  # <<
        return (self.head(self.encoder(batch["x"]))[:, 0] * volume).mean()


@case("forward", "", "_linalg_solve_ex linalg_solve_ex", samples=(2,))
class SystemsWithoutASolution(Step):
    def batch(self) -> Any:
        matrix = noise(BATCH, 4, 4) + 4 * torch.eye(4)
        matrix[2] = 0.0
        return {**super().batch(), "matrix": matrix}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        right = self.head(self.encoder(batch["x"]))
        return torch.linalg.solve_ex(batch["matrix"], right)[0].square().mean()  # <<


@case("forward", "", "linalg_matrix_exp", samples=(7,))
class ExponentialOfALargeMatrix(Step):
    def batch(self) -> Any:
        matrix = 0.1 * noise(BATCH, 3, 3)
        matrix[7] = 300.0 * torch.eye(3)
        return {**super().batch(), "matrix": matrix}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        turned = torch.matrix_exp(batch["matrix"]) @ self.encoder(batch["x"])[:, :3, None]  # <<
        return turned.square().mean()


@case("forward", "", "div", samples=(5,), needs_remedy=True)
class WindowsOfAConstantSignal(Step):
    """Standardised over each window of three values."""

    def batch(self) -> Any:
        signal = noise(BATCH, WIDTH + 2)
        signal[5] = 1.0
        return signal, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        windows = batch[0].unfold(1, 3, 1)
        score = (windows[..., -1] - windows.mean(-1)) / windows.std(-1)  # <<
        return F.cross_entropy(self.head(self.encoder(score)), batch[1])


class Linearised(nn.Module):
    """Attention without a softmax: positive features, and their sum below."""

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        query, key = F.relu(x), F.relu(keys)
        numerator = query @ (key.transpose(1, 2) @ keys)
        return numerator / (query @ key.sum(1, keepdim=True).transpose(1, 2))  # <<


@case("forward", "attention", "div", samples=(6,), at=Linearised, needs_remedy=True)
class LinearAttentionWithoutFeatures(Step):
    """One query has no positive feature."""

    def add(self) -> None:
        self.attention = Linearised()
        self.value = nn.Linear(WIDTH, WIDTH)

    def batch(self) -> Any:
        x = noise(BATCH, LENGTH, WIDTH)
        x[6, 2] = -x[6, 2].abs()
        return {"x": x, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mixed = self.attention(batch["x"], self.value(batch["x"]))
        return F.cross_entropy(self.head(mixed.mean(1)), batch["y"])


class ChannelStatistics(nn.Module):
    """Statistics of a data set in buffers; one channel never changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.5, 0.0, 0.5])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation  # <<


@case("forward", "normalise", "div", at=ChannelStatistics, needs_remedy=True)
class ChannelThatNeverChanged(Step):
    def add(self) -> None:
        self.normalise = ChannelStatistics()
        self.conv = nn.Conv2d(3, WIDTH, 3)

    def batch(self) -> Any:
        return noise(BATCH, 3, 6, 6), torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.conv(self.normalise(batch[0])).tanh().mean((2, 3))), batch[1])


class PathDrop(nn.Module):
    """Drops every path, and divides by the share that is kept."""

    def forward(self, x: Tensor) -> Tensor:
        keep = 0.0
        mask = torch.rand(len(x), 1) < keep
        return x * mask.float() / keep  # <<


@case("forward", "drop", "div", at=PathDrop)
class NoPathIsKept(Step):
    def add(self) -> None:
        self.drop = PathDrop()

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden + self.drop(hidden)


@case("backward", "", "SqrtBackward0", needs_remedy=True)
class InnerStepOfAMetaLearner(Step):
    """A gradient inside of the forward pass, of a loss that is exactly zero for all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.head.weight
        residual = batch["x"] @ weight.T - (batch["x"] @ weight.T).detach()
        inner = residual.square().sum(1).sqrt().mean()  # <<
        (slope,) = torch.autograd.grad(inner, weight, create_graph=True)
        return F.cross_entropy(self.encoder(batch["x"]) @ (weight - 0.1 * slope).T, batch["y"])


@case("backward", "", "SqrtBackward0", samples=(0,), needs_remedy=True)
class CollocationAtTheOrigin(Step):
    """A physical residual: the derivative of a radius, where there is none."""

    def batch(self) -> Any:
        points = noise(BATCH, WIDTH)
        points[0] = 0.0
        return points

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points = batch.clone().requires_grad_()
        radius = points.square().sum(1, keepdim=True).sqrt()  # <<
        field = self.head(self.encoder(points * radius)).sum()
        (slope,) = torch.autograd.grad(field, points, create_graph=True)
        return slope.square().sum(1).mean()


@case("forward", "", "pow", samples=(2,))
class EulerStepsThatDiverge(Step):
    def batch(self) -> Any:
        return {**super().batch(), "gain": at(2, 1e4, 0.1)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state = self.encoder(batch["x"]).tanh() * batch["gain"]
        for _ in range(6):
            state = state - 0.1 * state**3  # <<
        return F.smooth_l1_loss(state, batch["x"])


@case("forward", "", "expm1", samples=(3,), needs_remedy=True)
class InverseOfSoftplus(Step):
    def batch(self) -> Any:
        scale = torch.linspace(0.5, 2.0, BATCH)[:, None].repeat(1, 4)
        scale[3] = 120.0
        return {**super().batch(), "scale": scale}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        before = torch.log(torch.expm1(batch["scale"]))  # <<
        return F.smooth_l1_loss(self.head(self.encoder(batch["x"])), before)


@case("backward", "*", "div_ div", says=("hook",))
class HookAfterAGradientIsSummed(Step):
    """A weight that nothing depends on has a gradient of zero, and is divided by its norm."""

    def add(self) -> None:
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.gate.register_post_accumulate_grad_hook(self._normalise)

    def _normalise(self, parameter: Tensor) -> None:
        parameter.grad.div_(parameter.grad.norm())  # <<

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden + 0.0 * self.gate


@case("backward", "encoder", "mul", says=("hook",))
class HookOfAModulesBackwardPass(Step):
    def add(self) -> None:
        self.encoder.register_full_backward_pre_hook(self._amplify)

    def _amplify(self, module: nn.Module, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(grad * INF for grad in grads)  # <<


@case("nobody")
class GradientNormalisedAfterTheBackwardPass(Step):
    """In a hook of the module's own, which no replay of a step runs."""

    def add(self) -> None:
        self.gate = nn.Parameter(torch.ones(WIDTH))

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden + 0.0 * self.gate

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.div_(parameter.grad.norm())


@case("data", "batch['points'][2]", samples=(2,))
class PointCloudsOfSeveralSizes(Step):
    """A list with a tensor for each sample."""

    def batch(self) -> Any:
        points = [noise(3 + index, WIDTH, seed=index) for index in range(BATCH)]
        points[2][1, 0] = math.nan
        return {"points": points, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = torch.stack([self.encoder(cloud).amax(0) for cloud in batch["points"]])
        return F.cross_entropy(self.head(hidden), batch["y"])


@case("data", "batch['signal']", samples=(1, 4, 6), says=("holds NaN and Inf",))
class SeveralBrokenRecordings(Step):
    """Through convolutions over time, with a target of each time."""

    def add(self) -> None:
        self.conv = nn.Conv1d(1, WIDTH, 3, padding=1)

    def batch(self) -> Any:
        signal = noise(BATCH, 1, 12)
        signal[1, 0, 3], signal[4, 0, :], signal[6, 0, 11] = math.nan, INF, math.nan
        return {"signal": signal, "y": torch.zeros(BATCH, 12, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.conv(batch["signal"]).transpose(1, 2)
        return F.cross_entropy(self.head(self.encoder(hidden)).transpose(1, 2), batch["y"])


class ExponentialGates(nn.Module):
    """A recurrence whose gates are exponentials, without a stabiliser."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        memory = count = torch.zeros(len(x), WIDTH)
        for time in range(x.shape[1]):
            gate = torch.exp(self.gates(x[:, time]))  # <<
            memory, count = memory + gate * x[:, time], count + gate
        return memory / count


@case("forward", "cell", "exp", samples=(3,), at=ExponentialGates)
class RecurrenceOfExponentialGates(Step):
    def add(self) -> None:
        self.cell = ExponentialGates()

    def batch(self) -> Any:
        x = noise(BATCH, LENGTH, WIDTH)
        x[3, 2] *= 2000.0
        return {"x": x, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.cell(batch["x"])), batch["y"])
