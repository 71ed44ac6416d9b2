"""A training that one bad row would ruin, and the alert that names row and line: the tutorial's (docs/tutorial.md).

Run `python examples/first_alert.py`: a few seconds. `--cured` trains the same with another head.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard


class Head(nn.Module):
    """The logarithm of a probability, as one writes it first."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.log(torch.sigmoid(logits))


class CuredHead(nn.Module):
    """The same in one operator, which is finite for every finite input."""

    def forward(self, logits: Tensor) -> Tensor:
        return nn.functional.logsigmoid(logits)


class Model(LightningModule):
    """Logistic regression.

    Args:
        head: makes the logarithm of a probability out of a logit.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(8, 1)
        self.head = head

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return -self.head(self.body(batch[0])).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def cured() -> Model:
    """The model with the other head: what `gradguard replay` runs the bad step on."""
    return Model(CuredHead())


def main(head: nn.Module) -> GradGuard:
    """Train on 64 rows, of which one was written in another unit."""
    seed_everything(0)
    rows = torch.randn(64, 8)
    rows[31] = -10_000.0
    model = Model(head)
    nn.init.constant_(model.body.weight, 0.1)

    guard = GradGuard(clip=1.0)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], enable_checkpointing=False, logger=False)
    trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=8))
    print(f"{guard.num_steps} steps, {guard.num_skipped} skipped, alerts: {len(guard.alerts)}")
    return guard


if __name__ == "__main__":
    main(CuredHead() if "--cured" in sys.argv else Head())
