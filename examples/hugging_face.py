"""Hugging Face's Trainer with a guard: a callback of twenty lines.

A GPT-2 of 60,000 weights learns to count; one layer's gradient is spoiled at step 20. Run `python examples/hugging_face.py`:
some seconds. It needs `transformers` and `accelerate` (extra `examples`).
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lightning_gradguard import Guard
from lightning_gradguard.testing import inject


class GradGuardCallback(TrainerCallback):
    """Asks a guard before each step of the optimizer.

    Args:
        **settings: of `Guard`. Say `max_grad_norm=0` in the TrainingArguments where `clip` is one of them.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.guard: Guard | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        # `optimizer` is accelerate's; the guard wants the one that it wraps.
        self.guard = Guard(
            model.named_parameters(),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            named_buffers=model.named_buffers(),
            log_every_n_steps=args.logging_steps,
            **self.settings,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.guard.step()
        control.should_training_stop |= self.guard.stopped_by is not None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.guard.flush()
        self.guard.close()


def counting(num_texts: int) -> list[dict[str, Tensor]]:
    """Texts that count upwards from a random number."""
    texts = (torch.randint(0, 32, (1,)) + torch.arange(16) for _ in range(num_texts))
    return [{"input_ids": text, "labels": text} for text in texts]


def main(num_steps: int = 60) -> Guard:
    """Train, with a fault at step 20."""
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    callback = GradGuardCallback(clip=1.0, explosion="skip")
    with tempfile.TemporaryDirectory() as folder, inject(model, "nan", step=20, parameter="transformer.h.0.mlp.c_fc.weight"):
        arguments = TrainingArguments(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            max_grad_norm=0.0,  # the guard clips
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=counting(512), callbacks=[callback]).train()
    guard = callback.guard
    print(f"{guard.num_steps} steps, {guard.totals.num_skipped} skipped, alerts: {len(guard.alerts)}")
    return guard


if __name__ == "__main__":
    main()
