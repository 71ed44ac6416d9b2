"""A deep sigmoid network on handwritten digits: the alert names where the gradient is lost. With ReLU there is none.

Run `python examples/vanishing_sigmoid.py`: a few seconds. The digits are scikit-learn's, which come with it.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard

MAX_EPOCHS = 15
NUM_LAYERS = 10
WIDTH = 64


class DeepNetwork(LightningModule):
    """Ten linear layers with an activation between them.

    Args:
        activation: `nn.Sigmoid` or `nn.ReLU`.
    """

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        hidden = [module for _ in range(NUM_LAYERS - 1) for module in (nn.Linear(WIDTH, WIDTH), activation())]
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 x 8 pixels: the first 1,437 to learn from, the last 360 to be tested on."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def train(activation: type[nn.Module], log_dir: str, max_epochs: int) -> tuple[float, GradGuard]:
    """Train with one activation; accuracy on the test images, and the guard."""
    seed_everything(0, verbose=False)
    training, testing = digits()
    guard = GradGuard()
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(log_dir, name="vanishing_sigmoid", version=activation.__name__.lower()),
        callbacks=[guard],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = DeepNetwork(activation)
    trainer.fit(model, DataLoader(training, batch_size=32, shuffle=True))
    (results,) = trainer.test(model, DataLoader(testing, batch_size=360), verbose=False)
    return results["accuracy"], guard


def main(log_dir: str = "logs", max_epochs: int = MAX_EPOCHS) -> dict[str, tuple[float, GradGuard]]:
    """Train both, and compare."""
    results = {activation.__name__: train(activation, log_dir, max_epochs) for activation in (nn.Sigmoid, nn.ReLU)}
    print()
    for name, (accuracy, guard) in results.items():
        print(f"{name}: {accuracy:.1%} of the test images right, alerts in {guard.num_steps} steps: {len(guard.alerts)}.")
        for alert in guard.alerts[:1]:
            print(f"  {alert.message}\n  {alert.remedy}")
    print(f"\nAlerts: {log_dir}/vanishing_sigmoid/sigmoid/gradguard/alerts.jsonl")
    print(f"Look at it: tensorboard --logdir {log_dir}/vanishing_sigmoid")
    return results


if __name__ == "__main__":
    main()
