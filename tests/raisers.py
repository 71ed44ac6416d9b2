"""Training steps that don't bear NaN: each ends in an exception, of torch or of somebody else."""

from __future__ import annotations

from functools import partial

import torch
from lightning_package import LightningModule, MisconfigurationException
from torch import distributions, nn
from torch.nn import functional


class Raising(LightningModule):
    """A linear layer whose outputs go through something that does not bear NaN."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)
        self.table = nn.Embedding(8, 4)
        self.end = end

    def training_step(self, batch, batch_idx):
        h = self.layer(batch)
        return self.end(self, batch, h) + 0.01 * h.square().mean() + 0.0 * self.table.weight.sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def normal(module, x, h):
    """`expected parameter loc to satisfy the constraint Real()`."""
    return -distributions.Normal(h, 1.0).log_prob(torch.zeros_like(h)).mean()


def _categorical(module, x, h):
    return -distributions.Categorical(logits=h).log_prob(torch.zeros(len(h))).mean()


def _multivariate(module, x, h):
    return -distributions.MultivariateNormal(h, torch.eye(4)).log_prob(torch.zeros_like(h)).mean()


def _negative_binomial(module, x, h):
    return -distributions.NegativeBinomial(torch.ones(4), logits=h).log_prob(torch.ones_like(h)).mean()


def _multinomial(module, x, h):
    chosen = torch.multinomial(h.softmax(1), 1)
    return functional.cross_entropy(h, chosen.squeeze(1))


def _cross_entropy(module, x, h):
    return functional.binary_cross_entropy(h.sigmoid(), torch.zeros_like(h))


def _gram(h):
    return h @ h.T + torch.eye(len(h))


def _cholesky(module, x, h):
    return torch.linalg.cholesky(_gram(h)).mean()


def _eigh(module, x, h):
    return torch.linalg.eigh(_gram(h)).eigenvalues.mean()


def _svd(module, x, h):
    return torch.linalg.svd(_gram(h), full_matrices=False).S.mean()


def inverse(module, x, h):
    """Gives NaN without an error."""
    return torch.linalg.inv(_gram(h)).mean()


def _embedding(module, x, h):
    return module.table((x[:, 0].abs() % 8).long()).mean()


def _ctc(module, x, h):
    lengths = (3 + 0 * x[:, 0]).long()
    probabilities = h.log_softmax(1).expand(5, *h.shape)
    return functional.ctc_loss(probabilities, torch.ones(len(h), 2, dtype=torch.long), lengths, torch.full((len(h),), 2))


BY_TORCH = {
    it.__name__.strip("_"): it
    for it in (
        *(normal, _categorical, _multivariate, _negative_binomial, _multinomial, _cross_entropy),
        *(_cholesky, _eigh, _svd, inverse, _embedding, _ctc),
    )
}


def _asserted(module, x, h):
    loss = h.square().mean()
    assert torch.isfinite(loss)
    return loss


def _refused(module, x, h):
    if bool(h.isnan().any()):
        raise ValueError("NaN in the input")
    return h.square().mean()


def _read(module, x, h):
    loss = h.square().mean()
    if loss.item() != loss.item():
        raise RuntimeError("loss is nan")
    return loss


BY_OTHERS = {it.__name__.strip("_"): it for it in (_asserted, _refused, _read)}


def ending(error, words, module, x, h):
    """Raises where there is NaN, but for a reason of its own."""
    if bool(x.isnan().any()):
        raise error(*words)
    return h.square().mean()


NO_FAILURES = {
    "exit": partial(ending, SystemExit, (3,)),
    "keyboard": partial(ending, KeyboardInterrupt, ()),
    "misconfigured": partial(ending, MisconfigurationException, ("not like this",)),
    "memory": partial(ending, torch.OutOfMemoryError, ("CUDA out of memory. Tried to allocate 2.00 GiB.",)),
}
"""An end that was asked for, an error of settings, a lack of memory."""

lost_gpu = partial(ending, RuntimeError, ("CUDA error: device-side assert triggered",))
"""After which a process can't use its GPU any more."""
