"""The guard without Lightning: a plain loop with gradient accumulation, and a NaN in one batch.

Run `python examples/raw_loop.py`: a second or two.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import Guard
from lightning_gradguard.sinks import JsonlSink, TensorBoardSink

NUM_STEPS = 150
BAD_STEP = 100
MICRO_BATCHES = 4


def main(log_dir: str = "logs", num_steps: int = NUM_STEPS, bad_step: int = BAD_STEP) -> Guard:
    """Train on the digits; the third of four micro-batches of one step holds a NaN."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    folder = f"{log_dir}/raw_loop"
    guard = Guard(
        model.named_parameters(),
        optimizer=optimizer,
        clip=1.0,
        log_every_n_steps=10,
        sinks=[TensorBoardSink(SummaryWriter(folder)), JsonlSink(f"{folder}/gradguard/alerts.jsonl")],
        named_buffers=model.named_buffers(),  # so that the NaN does not stay in the batch norm's running mean
    )
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            rows = torch.randint(len(images), (16,))
            inputs = images[rows]
            if step == bad_step and micro_batch == 2:
                inputs[5, 20] = torch.nan
            loss = nn.functional.cross_entropy(model(inputs), labels[rows]) / MICRO_BATCHES
            guard.before_backward(loss)  # so that an alert can say which of the four it was
            loss.backward()
        before = [parameter.detach().clone() for parameter in model.parameters()] if step == bad_step else []
        record = guard.step()  # measures, judges, clips or skips
        optimizer.step()  # finds no gradients where the step was skipped
        if step == bad_step:
            same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
            print(f"Step {step}: {record.decision.action}, weights {'unchanged' if same else 'CHANGED'}.")
        if guard.stopped_by is not None:
            break
    guard.close()

    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    totals = guard.totals
    print(f"\n{totals.num_steps} steps, {totals.num_clipped} clipped, {totals.num_skipped} skipped.")
    print(f"{accuracy:.1%} of the images it learned from are recognised.")
    print(f"Alert: micro-batch {guard.alerts[0].micro_batch} (from 0). {guard.alerts[0].message}")
    print(f"Alerts: {folder}/gradguard/alerts.jsonl")
    print(f"Look at it: tensorboard --logdir {folder}")
    return guard


if __name__ == "__main__":
    main()
