"""Real data that needs no download: scikit-learn's bundled sets, and the English text that CPython ships."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@cache
def digits() -> Batch:
    """1,797 images of 8 x 8 in [0, 1], and their labels."""
    found = datasets.load_digits()
    return torch.tensor(found.data / 16.0, dtype=torch.float32), torch.tensor(found.target)


@cache
def diabetes() -> Batch:
    """442 patients with ten standardised features, and the standardised course of their illness."""
    found = datasets.load_diabetes(scaled=False)
    return _standard(found.data), _standard(found.target[:, None])


@cache
def cancer() -> Batch:
    """569 cell samples with thirty standardised features, and whether they are benign."""
    found = datasets.load_breast_cancer()
    return _standard(found.data), torch.tensor(found.target)


@cache
def text() -> Tensor:
    """Characters of CPython's own help texts, as numbers below 96."""
    characters = " ".join(topics.values()).encode("ascii", "replace")
    return torch.tensor(np.clip(np.frombuffer(characters, dtype=np.uint8).astype(np.int64) - 31, 0, 95))


@cache
def words() -> Tensor:
    """The same text as numbers of words, most frequent first, below 2,000."""
    found = " ".join(topics.values()).split()
    names, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(names))
    return torch.tensor(np.minimum(ranks[inverse], 1_999))


def sampled(data: Batch, size: int) -> Callable[[int], Batch]:
    """Batches drawn at random."""
    inputs, targets = data

    def batch(_: int) -> Batch:
        rows = torch.randint(len(inputs), (size,))
        return inputs[rows], targets[rows]

    return batch


def scaled(batch: Batch, factor: float) -> Batch:
    """The same with inputs in another unit."""
    return batch[0] * factor, batch[1]


def sequences(stream: Tensor, size: int, length: int) -> Callable[[int], Batch]:
    """Stretches of a stream, and the same shifted by one."""

    def batch(_: int) -> Batch:
        places = torch.randint(len(stream) - length - 1, (size, 1)) + torch.arange(length + 1)
        return stream[places[:, :-1]], stream[places[:, 1:]]

    return batch


def _standard(values: np.ndarray) -> Tensor:
    return torch.tensor((values - values.mean(0)) / values.std(0), dtype=torch.float32)
