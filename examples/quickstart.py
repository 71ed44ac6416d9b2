"""A character model of English text is trained until a broken batch would ruin it; the guard ends the run in time.

Run `python examples/quickstart.py`: about a minute on two cores, nothing is downloaded. The text is the language
reference that comes with Python itself, the one behind `help("for")`.
"""

import pydoc_data.topics

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard

MAX_STEPS = 1550
STEPS_AFTER_FAULT = 50
HIDDEN_SIZE = 128
SEQUENCE_LENGTH = 64
BATCH_SIZE = 32
TEXT = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
ALPHABET = sorted(set(TEXT))


class HelpText(LightningDataModule):
    """Python's help texts as sequences of character numbers; the last twentieth is for validation."""

    def setup(self, stage: str) -> None:
        """Cut the text into sequences."""
        number = {character: index for index, character in enumerate(ALPHABET)}
        numbers = torch.tensor([number[character] for character in TEXT])
        length = SEQUENCE_LENGTH + 1
        sequences = numbers[: len(numbers) // length * length].view(-1, length)
        num_training = len(sequences) * 19 // 20
        self.training = TensorDataset(sequences[:num_training])
        self.validation = TensorDataset(sequences[num_training:])

    def train_dataloader(self) -> DataLoader:
        """Shuffled sequences."""
        return DataLoader(self.training, BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The rest, in order."""
        return DataLoader(self.validation, 64)


class CharacterModel(LightningModule):
    """An LSTM that guesses the next character.

    Args:
        hidden_size: units of the LSTM.
        broken_at: step whose batch carries a broken weight; None: every batch is in order.
    """

    def __init__(self, hidden_size: int = HIDDEN_SIZE, broken_at: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 64)
        self.lstm = nn.LSTM(64, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, len(ALPHABET))
        self.broken_at = broken_at
        self.validation_losses: dict[int, float] = {}
        """By step."""

    def loss(self, sequences: Tensor) -> Tensor:
        """Cross entropy in nats a character."""
        hidden, _ = self.lstm(self.embedding(sequences[:, :-1]))
        return nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), sequences[:, 1:])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        if self.global_step == self.broken_at:
            loss = loss * 1e6  # a weight of a million where 1 was meant, as one bad row in a table of weights gives
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(*batch), prog_bar=True)

    def on_validation_end(self) -> None:
        """Note the loss, for the report."""
        self.validation_losses[self.global_step] = self.trainer.callback_metrics["val_loss"].item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    @torch.no_grad()
    def sample(self, start: str, length: int = 150) -> str:
        """Continue a text, character by character."""
        text, state = start, None
        inputs = torch.tensor([[ALPHABET.index(character) for character in start]])
        for _ in range(length):
            hidden, state = self.lstm(self.embedding(inputs), state)
            probabilities = (self.head(hidden[0, -1]) / 0.6).softmax(0)
            inputs = probabilities.multinomial(1)[None]
            text += ALPHABET[inputs.item()]
        return text


def main(log_dir: str = "logs", max_steps: int = MAX_STEPS, hidden_size: int = HIDDEN_SIZE) -> Trainer:
    """Train, be stopped, and say what happened."""
    seed_everything(0)
    broken_at = max_steps - STEPS_AFTER_FAULT
    model = CharacterModel(hidden_size, broken_at)

    guard = GradGuard(clip=0.5, explosion="stop")
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=TensorBoardLogger(log_dir, name="quickstart"),
        callbacks=[guard],
        log_every_n_steps=10,
        num_sanity_val_steps=-1,
        val_check_interval=broken_at // 5,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, HelpText())

    losses = model.validation_losses
    finite = all(parameter.isfinite().all() for parameter in model.parameters())
    print(f"\nThe run ended after {guard.num_steps} of {max_steps} steps; {guard.num_clipped} of them were clipped.")
    if (alert := guard.stopped_by) is not None:
        print(f"Stopped by an {alert.kind}: gradient norm {alert.value:.3g}, limit {alert.limit:.3g}.")
        print("That step was not applied: the weights are those from before it.")
    print(
        f"Validation loss: {losses[0]:.2f} untrained, {losses[broken_at]:.2f} before the broken batch, "
        f"{losses[trainer.global_step]:.2f} at the end. All weights are {'finite' if finite else 'NOT finite'}."
    )
    print(f"The model writes:\n\n{model.sample('The ')}\n")
    print(f"Alerts: {trainer.log_dir}/gradguard/alerts.jsonl")
    print(f"Look at it: tensorboard --logdir {log_dir}")
    return trainer


if __name__ == "__main__":
    main()
