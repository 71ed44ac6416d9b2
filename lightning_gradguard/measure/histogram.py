"""How the gradient elements of every parameter are distributed over orders of magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.record import Histograms

# Half decades are what the eye takes in, and each bin is 16 bytes of an event, whose checksum TensorBoard takes in Python.
FIRST_DECADE, LAST_DECADE, BINS_PER_DECADE = -20, 8, 2
NUM_BINS = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE
# Behind the bins, each row counts what has no logarithm.
_ZERO, _NAN, _INF = NUM_BINS, NUM_BINS + 1, NUM_BINS + 2
ROW = NUM_BINS + 3

# A float32 without its sign, shifted right by this, leaves its exponent and the first six bits of its mantissa: a
# key that grows with the magnitude. A table from key to bin takes the place of a logarithm for each element.
_SHIFT = 17
_INF_KEY = 0x7F800000 >> _SHIFT
_NUM_KEYS = 1 << (31 - _SHIFT)


def _magnitudes(keys: Floats) -> Floats:
    """The smallest magnitude that has each key."""
    bits = (keys.astype(np.int64) << _SHIFT).astype(np.uint32)
    return bits.view(np.float32).astype(np.float64)


def _make_table() -> tuple[Floats, Tensor]:
    """Bin edges in decades, each moved to where the key changes (by at most 0.004), and the bin of each key."""
    keys = np.arange(1, _INF_KEY, dtype=np.float64)
    decades = np.log10(_magnitudes(keys))
    wanted = np.linspace(FIRST_DECADE, LAST_DECADE, NUM_BINS + 1)
    first_key = np.searchsorted(decades, wanted)
    table = np.full(_NUM_KEYS, _NAN, dtype=np.int32)
    table[0] = _ZERO
    table[1:_INF_KEY] = (np.searchsorted(first_key, np.arange(len(keys)), side="right") - 1).clip(0, NUM_BINS - 1)
    table[_INF_KEY] = _INF
    return decades[first_key], torch.from_numpy(table)


EDGES, _TABLE = _make_table()


class HistogramMeter:
    """Histograms of log10|g| for all parameters at once, in a handful of kernels.

    Tensors of up to `sample_size` elements are counted exactly, but for bin edges that lie up to 0.004 decades beside the
    halves of a decade, and magnitudes below 1.8e-40, which count as zero. Of larger tensors a sample of that many
    elements, drawn uniformly with replacement, is counted and scaled up, so the cost stops growing with the model. Each bin
    is then an unbiased estimate, and by the inequality of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant, the
    cumulative distribution is off by more than sqrt(ln(2 / 0.05) / (2 * sample_size)) anywhere with a probability of at
    most 5 %: 0.043 at 1,024. NaN and infinities of a sampled tensor can be missed; the alert of such a step counts them.

    Args:
        sample_size: elements looked at in a tensor, >= 1. None: all of them.

    References:
        P. Massart, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality", 1990.
    """

    def __init__(self, sample_size: int | None = 1024) -> None:
        self._sample_size = sample_size
        self._generators: dict[torch.device, torch.Generator] = {}
        self._tables: dict[torch.device, Tensor] = {}
        self._kept_rows: tuple[torch.device, list[int], Tensor] | None = None

    def count(self, gradients: Gradients, divisor: Tensor | None = None) -> Tensor:
        """Counts in each bin, [num_tensors, bins + zero, NaN, infinite], float32, on the device. No sync.

        Rank-local: where gradients are sharded, `measure` sums them with everything else. The training's random numbers
        are not touched.

        Args:
            gradients: of one optimizer.
            divisor: what its kernel is going to divide them by, scalar; None: nothing.
        """
        device = gradients.device
        samples = self._samples(gradients.tensors)
        sizes = [sample.numel() for sample in samples]
        elements = torch.cat([sample.to(device) for sample in samples])
        if divisor is not None:
            elements.div_(divisor)
        keys = elements.abs_().view(torch.int32) >> _SHIFT
        counts = _tally(self._table(device).index_select(0, keys) + self._rows(device, sizes), len(samples) * ROW)
        return counts.view(len(samples), ROW) * _factors(gradients.tensors, sizes).to(device, non_blocking=True)

    def read(self, counts: Tensor, present: Bools, layout: Layout, *, clipped: bool = False) -> Histograms:
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
            clipped=clipped,
        )

    def _samples(self, tensors: list[Tensor]) -> list[Tensor]:
        """What is looked at of each tensor, float32, flat.

        Tensors of one size share their random places: each is still sampled uniformly, at a fraction of the cost.
        """
        places: dict[tuple[torch.device, int], Tensor] = {}
        size = self._sample_size
        samples = []
        for tensor in tensors:
            flat, numel = tensor.reshape(-1), tensor.numel()
            if size is not None and numel > size:
                key = (tensor.device, numel)
                if key not in places:
                    places[key] = self._draw(*key, size)
                flat = flat.index_select(0, places[key])
            samples.append(flat if flat.dtype is torch.float32 else _to_float32(flat))
        return samples

    def _draw(self, device: torch.device, numel: int, size: int) -> Tensor:
        generator = None
        if device.type != "meta":
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(0)
            generator = self._generators[device]
        return torch.randint(numel, (size,), device=device, generator=generator)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = _TABLE.to(device)
        return self._tables[device]

    def _rows(self, device: torch.device, sizes: list[int]) -> Tensor:
        """Where the row of each element begins, int32 [sum(sizes)]; kept, since the sizes hardly ever change."""
        if self._kept_rows is None or self._kept_rows[:2] != (device, sizes):
            begins = torch.arange(0, len(sizes) * ROW, ROW, dtype=torch.int32)
            rows = torch.repeat_interleave(begins, torch.tensor(sizes), output_size=sum(sizes))
            self._kept_rows = (device, sizes, rows.to(device, non_blocking=True))
        return self._kept_rows[2]


def _to_float32(flat: Tensor) -> Tensor:
    if flat.is_complex():
        flat = flat.abs()
    if flat.dtype != torch.float64:
        return flat.float()
    # Finite values beyond float32 go to its ends instead of to infinity and zero.
    tiny, largest = 1e-37, torch.finfo(torch.float32).max
    finite = flat.abs().clamp(tiny, largest).where(flat != 0, 0.0)
    return finite.where(flat.isfinite(), flat).float()


def _tally(indices: Tensor, length: int) -> Tensor:
    """How often each index occurs, float32 [length]. No sync."""
    if indices.device.type == "cpu":
        return torch.bincount(indices, minlength=length).float()
    # `bincount` waits for a GPU, to find the largest index.
    counts = torch.zeros(length, device=indices.device)
    return counts.index_add_(0, indices, torch.ones((), device=indices.device).expand(indices.shape))


def _factors(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    """Elements of each tensor over elements looked at, float32 [num_tensors, 1]."""
    numels = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.float64)
    return (numels / torch.tensor(sizes).clamp(min=1)).clamp(min=1.0).float()[:, None]
