"""Damage inside networks of many makes: where it is born, and whose values it is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from benchmarks.forensics.labels import BATCH, INF, LENGTH, NAN, WIDTH, Step, Unit, case
from benchmarks.forensics.layouts import _Graph, noise


class InstanceNorm(nn.Module):
    """By hand, without an eps."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)  # <<


class _Images(Step):
    dark = 3

    def batch(self) -> Any:
        images = noise(BATCH, 3, 8, 8)
        images[self.dark] = 0.0
        return images, torch.zeros(BATCH, dtype=torch.long)


@case("forward", "down.norm", "div", samples=(3,), at=InstanceNorm)
class UNet(_Images):
    """A skip from the first to the last level."""

    def add(self) -> None:
        self.down = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, padding=1, bias=False), "norm": InstanceNorm()})
        self.low = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        high = self.down["norm"](self.down["conv"](batch[0]))
        low = self.up(F.relu(self.low(high)))
        return self.last(torch.cat([high, low], 1)).square().mean()


@case("forward", "", "log", samples=(5,))
class LargestFeaturesOfADarkImage(_Images):
    dark = 5

    def add(self) -> None:
        self.conv = nn.Conv2d(3, WIDTH, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.abs_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strength = self.conv(batch[0].abs()).relu().amax((2, 3))
        return F.cross_entropy(self.head(strength.log()), batch[1])  # <<


@case("forward", "", "log", samples=(1,))
class BoxesOfADetector(Step):
    """A true box of width 0 beside anchors; as many boxes an image as there are."""

    def add(self) -> None:
        self.conv = nn.Conv2d(3, 4, 3)

    def batch(self) -> Any:
        images = [{"image": noise(3, 9, 9, seed=n), "boxes": noise(2 + n, 4, seed=n).abs() + 0.2} for n in range(4)]
        images[1]["boxes"][2, 2] = 0.0
        return images

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = torch.stack([self.conv(it["image"]).mean((1, 2)) for it in batch])
        boxes = torch.cat([it["boxes"] for it in batch])
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor([len(it["boxes"]) for it in batch]))
        size = torch.log(boxes[:, 2:] / 0.5)  # <<
        return F.smooth_l1_loss(features[owner][:, 2:], size) + features[owner][:, :2].square().mean()


@case("forward", "", "_softmax", samples=(4,))
class PooledOverAnEmptySequence(Step):
    """Packing wants a length of at least one, so that the mask alone knows that there is nothing."""

    def add(self) -> None:
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.score = nn.Linear(2 * WIDTH, 1)

    def batch(self) -> Any:
        lengths = torch.tensor([7, 7, 6, 5, 0, 3, 2, 1])
        return noise(BATCH, 7, WIDTH), lengths, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, y = batch
        packed = pack_padded_sequence(x, lengths.clamp_min(1), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        is_padding = torch.arange(out.shape[1])[None] >= lengths[:, None]
        share = self.score(out)[..., 0].masked_fill(is_padding, -INF).softmax(1)  # <<
        return F.cross_entropy(self.head((share[..., None] * out)[..., :WIDTH].sum(1)), y)


class Causal(nn.Module):
    """Attention to earlier tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        is_open = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & keep[:, None]
        return (q @ k.transpose(1, 2)).masked_fill(~is_open, -INF).softmax(-1) @ v  # <<


@case("forward", "causal", "_softmax", samples=(2,), at=Causal, never=("finite inputs",))
class PaddedOnTheLeft(Step):
    """The first tokens of a text that is padded on its left see nothing; the loss ignores them."""

    def add(self) -> None:
        self.embedding = nn.Embedding(20, WIDTH)
        self.causal = Causal()

    def batch(self) -> Any:
        tokens = torch.randint(1, 20, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
        tokens[2, :2] = 0
        return {"tokens": tokens, "targets": torch.where(tokens == 0, -100, tokens % 4)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.causal(self.embedding(batch["tokens"]), batch["tokens"] != 0)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["targets"].flatten())


@case("forward", "", "div", samples=(5,))
class NodeWithoutNeighbours(_Graph):
    """A mean over none."""

    def batch(self) -> Any:
        batch = super().batch()
        has_target = batch.edge_index[1] != 21
        batch.edge_index, batch.edge_attr = batch.edge_index[:, has_target], batch.edge_attr[has_target]
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        row, col = batch.edge_index
        total = torch.zeros(len(batch.x), WIDTH).index_add(0, col, self.encoder(batch.x)[row])
        count = torch.zeros(len(batch.x)).index_add(0, col, torch.ones(len(col)))
        nodes = total / count[:, None]  # <<
        return F.cross_entropy(self.head(self.pooled(nodes, batch)), batch.y)


@case("none")
class DistancesByNormAreHealthy(Step):
    """torch gives the norm of nothing a gradient of zero."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"])
        return (hidden[:, None] - hidden[None]).norm(dim=-1).mean()


@case("forward", "", "exp", samples=(3,))
class VarianceOfAnAutoencoder(Step):
    def add(self) -> None:
        self.decoder = nn.Linear(3, WIDTH)

    def batch(self) -> Any:
        batch = super().batch()
        batch["shift"] = torch.zeros(BATCH, 1)
        batch["shift"][3] = 100.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.encoder(batch["x"]).chunk(2, 1)
        log_variance = log_variance + batch["shift"]
        drawn = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)  # <<
        return F.l1_loss(self.decoder(drawn), batch["x"]) + divergence.mean()


@case("forward", "", "log", samples=(5,))
class TwoOptimizersByHand(Step):
    """A discriminator that is certain of a real image being none."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def add(self) -> None:
        self.generator = nn.Linear(3, WIDTH)
        self.critic = nn.Linear(WIDTH, 1)

    def batch(self) -> Any:
        batch = super().batch()
        batch["shift"] = torch.zeros(BATCH, 1)
        batch["shift"][5] = -200.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[misc]
        made = self.generator(torch.randn(BATCH, 3))
        real = torch.sigmoid(self.critic(batch["x"]) + batch["shift"])
        loss = -torch.log(real).mean() - torch.log(1 - torch.sigmoid(self.critic(made.detach()))).mean()  # <<
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.zero_grad()
        self.manual_backward(-torch.sigmoid(self.critic(made)).mean())
        second.step()

    def configure_optimizers(self) -> Any:
        of = torch.optim.SGD
        return [of(self.critic.parameters(), lr=0.01), of(self.generator.parameters(), lr=0.01)]


@case("none")
class EmptyBagIsHealthy(Step):
    """torch's mean of no embedding is zero."""

    def add(self) -> None:
        self.bag = nn.EmbeddingBag(10, WIDTH, mode="mean")

    def batch(self) -> Any:
        return torch.arange(9), torch.tensor([0, 2, 3, 3, 4, 5, 7, 8]), torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.bag(batch[0], batch[1])), batch[2])


class Router(nn.Module):
    """Sends each token to one of more experts than there are tokens' kinds; one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        with torch.no_grad():
            self.gate.bias[3] = -100.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.gate(x).softmax(1)
        best, chosen = share.max(1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            out = out.index_add(0, rows, best[rows, None] * expert(x[rows]))
        used = torch.bincount(chosen, minlength=4) / len(x)
        return out, (used * torch.log(used)).sum()  # <<


@case("forward", "router", "log mul", at=Router)
class ExpertWithoutTokens(Step):
    def add(self) -> None:
        self.router = Router()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, balance = self.router(self.encoder(batch["x"]))
        return F.cross_entropy(self.head(out), batch["y"]) + 0.01 * balance


class Coupling(nn.Module):
    """Half of the values scale and shift the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, 1)
        scale, shift = self.net(kept).chunk(2, 1)
        return torch.cat([changed * scale + shift, kept], 1), scale.abs().log().sum(1)  # <<


@case("forward", "flow.0", "log", samples=(2,), at=Coupling)
class NormalisingFlow(Step):
    def add(self) -> None:
        self.flow = nn.ModuleList(Coupling() for _ in range(3))

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][2, :3] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, volume = batch["x"], torch.zeros(BATCH)
        for step in self.flow:
            x, more = step(x)
            volume = volume + more
        return (0.5 * x.square().sum(1) - volume).mean()


class Scale(nn.Module):
    """A row over its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()  # <<


class _Row(Step):
    row = 1

    def add(self) -> None:
        self.body = nn.Linear(WIDTH, WIDTH, bias=False)

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][self.row] = 0.0
        return batch


@case("forward", "block.1", "rsqrt", samples=(1,), at=Scale)
class CheckpointedBlock(_Row):
    def add(self) -> None:
        super().add()
        self.block = nn.Sequential(nn.Dropout(0.1), Scale(), nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.block, self.body(batch["x"]), use_reentrant=False)
        return F.cross_entropy(self.head(hidden), batch["y"])


@case("forward", "block.1", "rsqrt", samples=(1,), at=Scale)
class CheckpointedBlockReentrant(CheckpointedBlock):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.block, self.body(batch["x"]), use_reentrant=True)
        return F.cross_entropy(self.head(hidden), batch["y"])


@case("forward", "", "log", samples=(2,))
class CompiledByDynamo(_Row):
    row = 2

    def add(self) -> None:
        super().add()
        self.core = torch.compile(self._core, backend="eager")

    def _core(self, hidden: Tensor) -> Tensor:
        return torch.log(hidden.square().sum(1, keepdim=True))  # <<

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.core(self.body(batch["x"])).expand(-1, WIDTH)), batch["y"])


@case("forward", "net.1", "rsqrt", samples=(1,), at=Scale)
class FunctionalCall(_Row):
    """Weights are averaged with a copy and handed in."""

    def add(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), Scale())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = {name: 0.5 * it + 0.5 * it.detach() for name, it in self.net.named_parameters()}
        return F.cross_entropy(self.head(torch.func.functional_call(self.net, weights, (batch["x"],))), batch["y"])


@case("forward", "", "div", samples=(6,))
class VmapOverSamples(_Row):
    row = 6

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def unit(row: Tensor) -> Tensor:
            return row / row.norm()  # <<

        return F.cross_entropy(self.head(torch.func.vmap(unit)(self.body(batch["x"]))), batch["y"])


@case("weights", "embedding.weight")
class TiedWeightsWithNan(Step):
    def add(self) -> None:
        self.embedding = nn.Embedding(10, WIDTH)
        self.out = nn.Linear(WIDTH, 10, bias=False)
        self.out.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight[7, 1] = NAN

    def batch(self) -> Any:
        return {"tokens": torch.arange(BATCH) % 5, "y": torch.arange(BATCH) % 5}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.out(self.embedding(batch["tokens"])), batch["y"])


@case("data", "batch['meta']", samples=(1, 6))
class OneOfThreeInputs(Step):
    def add(self) -> None:
        self.conv = nn.Conv2d(1, 3, 3)
        self.embedding = nn.Embedding(10, 3)
        self.fuse = nn.Linear(3 + 3 + WIDTH, WIDTH)

    def batch(self) -> Any:
        meta = noise(BATCH, WIDTH)
        meta[1, 0], meta[6, 2] = NAN, INF
        images, tokens = noise(BATCH, 1, 5, 5), torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 10
        return {"image": images, "tokens": tokens, "meta": meta, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [self.conv(batch["image"]).mean((2, 3)), self.embedding(batch["tokens"]).mean(1), batch["meta"]]
        return F.cross_entropy(self.head(self.fuse(torch.cat(parts, 1)).relu()), batch["y"])


@case("forward", "", "div", samples=(5,))
class TimeFirstMeanOverNothing(Step):
    def add(self) -> None:
        self.rnn = nn.RNN(WIDTH, WIDTH)

    def batch(self) -> Any:
        return noise(12, BATCH, WIDTH), torch.tensor([3, 12, 7, 5, 9, 0, 2, 8]), torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, y = batch
        keep = torch.arange(12)[:, None] < lengths[None]
        mean = (self.rnn(x)[0] * keep[..., None]).sum(0) / lengths[:, None]  # <<
        return F.cross_entropy(self.head(mean), y)


@case("forward", "", "log", samples=(4,))
class ContrastOfPatches(Step):
    def add(self) -> None:
        self.embed = nn.Linear(17, WIDTH)

    def batch(self) -> Any:
        images = noise(BATCH, 1, 8, 8)
        images[4, :, 4:, :4] = 0.0
        return images, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        patches = F.unfold(batch[0], 4, stride=4).transpose(1, 2).reshape(-1, 16)
        contrast = torch.log(patches.var(1, keepdim=True))  # <<
        tokens = self.embed(torch.cat([patches, contrast], 1)).view(BATCH, 4, WIDTH)
        return F.cross_entropy(self.head(tokens.mean(1)), batch[1])


@case("forward", "", "log", has_open_samples=True)
class BatchOfOne(Step):
    def batch(self) -> Any:
        x = noise(1, WIDTH).abs() + 0.1
        x[0, 4] = 0.0
        return {"x": x, "y": torch.zeros(1, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(batch["x"].log())), batch["y"])  # <<


@case("forward", "", "div")
class AsManyFeaturesAsSamples(Step):
    """A column is divided by zero: that is a feature's, not a sample's."""

    def add(self) -> None:
        deviation = torch.ones(BATCH)
        deviation[3] = 0.0
        self.register_buffer("deviation", deviation)
        self.body = nn.Linear(BATCH, WIDTH)

    def batch(self) -> Any:
        return {"x": noise(BATCH, BATCH), "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch["x"] / self.deviation)), batch["y"])  # <<


@case("forward", "", "log")
class AsManyPositionsAsSamples(Step):
    """A learned factor of each position; one is zero, for all samples."""

    def add(self) -> None:
        self.factor = nn.Parameter(torch.arange(BATCH).float())

    def batch(self) -> Any:
        return noise(BATCH, BATCH, WIDTH), torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.log(self.factor)  # <<
        return F.cross_entropy(self.head((batch[0] * weight[:, None]).mean(1)), batch[1])


@case("forward", "", "pow", samples=(2,))
class SamplesAsNodesOfOneGraph(Step):
    """The batch brings its own adjacency matrix of samples by samples; one has no edge."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["adjacency"] = (noise(BATCH, BATCH) > -0.5).float().triu(1)
        batch["adjacency"][0, :] = 1.0
        batch["adjacency"] = (batch["adjacency"] + batch["adjacency"].T).clamp_max(1.0)
        batch["adjacency"][2], batch["adjacency"][:, 2] = 0.0, 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = batch["adjacency"].sum(1).pow(-0.5)  # <<
        spread = scale[:, None] * batch["adjacency"] * scale[None]
        return F.cross_entropy(self.head(spread @ self.encoder(batch["x"])), batch["y"])


@case("forward", "norm", samples=(6,))
class RmsNormWithoutEps(_Row):
    row = 6

    def add(self) -> None:
        super().add()
        self.norm = nn.RMSNorm(WIDTH, eps=0.0)

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return self.norm(self.body(batch["x"]))  # <<


@case("forward", "norm", "native_group_norm", samples=(2,))
class GroupNormWithoutEps(_Images):
    dark = 2

    def add(self) -> None:
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.GroupNorm(2, 4, eps=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.norm(self.conv(batch[0])).square().mean()  # <<


@case("none")
class DecoderWithoutMemoryIsHealthy(Step):
    """Where no attention weights are asked for, torch's kernels give zeros for a sample that is all padding."""

    def add(self) -> None:
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def batch(self) -> Any:
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[3] = True
        return noise(BATCH, LENGTH, WIDTH), padding

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.decoder(batch[0], batch[0], memory_key_padding_mask=batch[1]).square().mean()


@case("forward", "", "div", samples=(6,))
class MeanOfAnEmptySet(Step):
    """Elements of all sets, and to which set each belongs; one has none."""

    def batch(self) -> Any:
        owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 7, 7])
        return {"elements": noise(12, WIDTH), "owner": owner, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        total = torch.zeros(BATCH, WIDTH).index_add(0, batch["owner"], self.encoder(batch["elements"]))
        mean = total / torch.bincount(batch["owner"], minlength=BATCH)[:, None]  # <<
        return F.cross_entropy(self.head(mean), batch["y"])


@case("weights", "norm.running_var")
class FrozenNormWithNan(Step):
    def add(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.running_var[2] = NAN

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        self.norm.eval()
        return self.norm(hidden)


@case("forward", "unit", "div", samples=(0, 7), at=Unit)
class UnitOfTwoRows(_Row):
    """The first and the last."""

    row = 0

    def add(self) -> None:
        super().add()
        self.unit = Unit()

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][7] = 0.0
        return batch

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return self.unit(self.body(batch["x"]))
