"""How the gradient elements of every parameter are distributed over orders of magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Layout
from lightning_gradguard.measurement import Gradients
from lightning_gradguard.record import Histograms

FIRST_DECADE, LAST_DECADE, BINS_PER_DECADE = -20, 8, 4
NUM_BINS = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE
EDGES = np.linspace(FIRST_DECADE, LAST_DECADE, NUM_BINS + 1)
# Behind the bins, each row counts what has no logarithm.
_ZERO, _NAN, _INF = NUM_BINS, NUM_BINS + 1, NUM_BINS + 2
_ROW = NUM_BINS + 3


class HistogramMeter:
    """Histograms of log10|g| for all parameters at once.

    Tensors of up to `sample_size` elements are counted exactly. Of larger ones a sample of that many elements, drawn
    uniformly with replacement, is counted and scaled up, so the cost stops growing with the model. Each bin is then an
    unbiased estimate, and by the inequality of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant, the cumulative
    distribution is off by more than sqrt(ln(2 / 0.05) / (2 * sample_size)) anywhere with a probability of at most 5 %:
    0.021 at 4,096.
    NaN and infinities of a sampled tensor can be missed; the alert of such a step counts them exactly.

    Args:
        sample_size: elements looked at in a tensor, >= 1. None: all of them.

    References:
        P. Massart, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality", 1990.
    """

    def __init__(self, sample_size: int | None = 4096) -> None:
        self._sample_size = sample_size
        self._generators: dict[torch.device, torch.Generator] = {}

    def count(self, gradients: Gradients) -> Tensor:
        """Counts in each bin, [num_tensors, bins + zero, NaN, infinite], float32, on the device. No sync.

        Rank-local: where gradients are sharded, `measure` sums them with everything else. The training's random numbers
        are not touched.
        """
        samples = [self._sample(tensor.reshape(-1)) for tensor in gradients.tensors]
        dtype = torch.float64 if any(sample.dtype == torch.float64 for sample in samples) else torch.float32
        device = samples[0].device
        magnitudes = torch.cat([sample.to(device, dtype) for sample in samples])
        sizes = torch.tensor([sample.numel() for sample in samples])
        rows = torch.repeat_interleave(torch.arange(len(samples)) * _ROW, sizes).to(device, non_blocking=True)
        counts = torch.zeros(len(samples) * _ROW, device=device)
        counts.index_add_(0, rows + _bins(magnitudes), torch.ones((), device=device).expand(rows.shape))
        return counts.view(len(samples), _ROW) * self._factors(gradients).to(device, non_blocking=True)

    def read(self, counts: Tensor, present: Bools, layout: Layout) -> Histograms:
        """Bring the counts of the parameters that have a gradient to the host; one sync unless they are there."""
        values = counts.to("cpu", torch.float64).numpy()
        indices = np.flatnonzero(present)
        size = self._sample_size
        return Histograms(
            names=tuple(layout.names[index] for index in indices),
            edges=EDGES,
            counts=values[:, :NUM_BINS],
            num_zero=values[:, _ZERO],
            num_nan=values[:, _NAN],
            num_inf=values[:, _INF],
            sampled=np.zeros(len(indices), dtype=np.bool_) if size is None else layout.numels[indices] > size,
        )

    def _factors(self, gradients: Gradients) -> Tensor:
        """Elements of each tensor over elements looked at, float32 [num_tensors, 1]."""
        size = self._sample_size
        numels = torch.tensor([tensor.numel() for tensor in gradients.tensors], dtype=torch.float32)
        return (numels / numels.clamp(1, size)).clamp(min=1.0)[:, None]

    def _sample(self, flat: Tensor) -> Tensor:
        numel = flat.numel()
        if self._sample_size is not None and numel > self._sample_size:
            # float64, since float32 can't reach every element of a tensor beyond 2^24.
            uniform = torch.rand(self._sample_size, dtype=torch.float64, device=flat.device, generator=self._generator(flat))
            flat = flat[(uniform * numel).long()]
        return flat.float().abs() if flat.dtype.itemsize < 4 else flat.abs()

    def _generator(self, tensor: Tensor) -> torch.Generator | None:
        if tensor.device.type == "meta":
            return None
        if tensor.device not in self._generators:
            self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(0)
        return self._generators[tensor.device]


def _bins(magnitudes: Tensor) -> Tensor:
    """Bin of each element, int64; zero, NaN and infinity have their own."""
    scaled = (magnitudes.log10() - FIRST_DECADE) * BINS_PER_DECADE
    bins = scaled.clamp(0, NUM_BINS - 1).nan_to_num(_NAN).long()
    bins = torch.where(magnitudes == 0, _ZERO, bins)
    return torch.where(magnitudes.isinf(), _INF, bins)
