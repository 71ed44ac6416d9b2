"""A small transformer, trained before on long texts and fine-tuned on short ones, of which one is empty.

Attention over an empty text has nothing to attend to: its softmax is 0 / 0. One such row would make all weights NaN. The
guard names softmax, line and row, and skips the step. Run `python examples/transformer_finetuning.py`: some seconds.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard

VOCABULARY, LENGTH, WIDTH = 64, 24, 32


class Attention(nn.Module):
    """Self-attention with one head, as one writes it first."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        scores = self.queries(x) @ self.keys(x).transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(is_padding[:, None, :], float("-inf"))
        return torch.softmax(scores, dim=-1) @ self.values(x)


class Block(nn.Module):
    """A layer of a transformer, with normalisation first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), is_padding)
        return x + self.mlp(self.second(x))


class Classifier(LightningModule):
    """Whether a text has more of the vocabulary's first half than of its second."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 1)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        is_padding = tokens == 0
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, is_padding)
        words = (~is_padding)[..., None]
        mean = (x * words).sum(1) / words.sum(1).clamp_min(1)
        return nn.functional.binary_cross_entropy_with_logits(self.head(mean)[:, 0], labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def texts(lengths: Tensor) -> DataLoader:
    """Random texts of these lengths, padded with 0."""
    tokens = torch.randint(1, VOCABULARY, (len(lengths), LENGTH))
    tokens[torch.arange(LENGTH) >= lengths[:, None]] = 0
    labels = ((tokens > 0) & (tokens < VOCABULARY // 2)).sum(1) * 2 > (tokens > 0).sum(1)
    return DataLoader(TensorDataset(tokens, labels.float()), batch_size=16)


def fit(model: Classifier, data: DataLoader, epochs: int) -> GradGuard:
    """Train with a guard."""
    guard = GradGuard(clip=1.0)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[guard], enable_checkpointing=False, logger=False)
    trainer.fit(model, data)
    return guard


def main(pretraining_epochs: int = 4) -> GradGuard:
    """Pretrain, then fine-tune with a tenth of the learning rate."""
    seed_everything(0)
    before = Classifier(lr=3e-3)
    fit(before, texts(torch.full((512,), LENGTH)), pretraining_epochs)

    model = Classifier(lr=3e-4)
    model.load_state_dict(before.state_dict())
    lengths = torch.randint(1, LENGTH, (256,))
    lengths[101] = 0
    guard = fit(model, texts(lengths), epochs=1)
    print(f"{guard.num_steps} steps, {guard.num_skipped} skipped; all weights are finite: {is_finite(model)}")
    return guard


def is_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


if __name__ == "__main__":
    main()
