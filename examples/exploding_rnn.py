"""A plain recurrent network whose gradients explode through time: only watched, with clipping, with skipping.

Run `python examples/exploding_rnn.py`: about half a minute. The network reads a handwritten digit of scikit-learn's pixel
by pixel, 64 steps, and its recurrent weights start out too large on purpose.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import Explosion, GradGuard, NonFinite

MAX_EPOCHS = 8
MAX_NORM = 20.0


class PixelReader(LightningModule):
    """A recurrent network with ReLU that reads one pixel at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 64, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(64, 10)
        # The identity keeps a signal's size from step to step; 5 % more, 64 times over, is a factor of 23.
        nn.init.eye_(self.rnn.weight_hh_l0).data.mul_(1.05)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        hidden, _ = self.rnn(images.unsqueeze(-1))
        return self.head(hidden[:, -1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("loss", nn.functional.cross_entropy(self(images), labels))
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(name: str, guard: GradGuard, log_dir: str, max_epochs: int) -> dict[str, float]:
    """Train with one guard; loss and accuracy on the test images."""
    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(log_dir, name="exploding_rnn", version=name),
        callbacks=[guard],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = PixelReader()
    trainer.fit(model, DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True))
    (results,) = trainer.test(model, DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=360), verbose=False)
    return results


def main(log_dir: str = "logs", max_epochs: int = MAX_EPOCHS) -> dict[str, tuple[dict[str, float], GradGuard]]:
    """Train three times from the same start, and compare."""
    guards = {
        # Every step is applied, whatever it does; one warning is enough.
        "watched": GradGuard(nonfinite=NonFinite("warn", cooldown=10_000, stop_after=None)),
        "clipped": GradGuard(clip=1.0),
        # Skipping is for the exception. Where every step explodes nothing is learned, so the run ends after ten.
        "skipped": GradGuard(explosion=Explosion("skip", max_norm=MAX_NORM, stop_after=10)),
    }
    results = {name: (train(name, guard, log_dir, max_epochs), guard) for name, guard in guards.items()}
    print()
    for name, (figures, guard) in results.items():
        print(
            f"{name}: test loss {figures['loss']:.2f}, {figures['accuracy']:.1%} right; {guard.num_steps} steps, "
            f"{guard.num_clipped} clipped, {guard.num_skipped} skipped, alerts: {len(guard.alerts)}."
        )
        if guard.alerts:
            print(f"  first: {guard.alerts[0].message}")
    print("Clipped, it learns, slowly. Skipping keeps the weights from harm, but learns nothing here.")
    print(f"\nAlerts: {log_dir}/exploding_rnn/*/gradguard/alerts.jsonl")
    print(f"Look at it: tensorboard --logdir {log_dir}/exploding_rnn")
    return results


if __name__ == "__main__":
    main()
