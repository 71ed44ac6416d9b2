"""Adaptive clippers on sharded gradients clip as they do on whole ones, with whatever part of a unit a rank holds."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_gradguard import AGC, AdaGC, AutoClip, ClipNorm, ClipParameterNorm, Grouped, Guard, ZClip

CLIPPERS = {
    "agc": AGC(0.1, exclude=["p3"]),
    "autoclip": AutoClip(40.0, window=3),
    "zclip": ZClip(warmup_steps=2, max_norm=2.0),
    "adagc": AdaGC(warmup_steps=2, max_norm=2.0),
    "parameter-norm": ClipParameterNorm(0.5),
    "parameter-norm-1": ClipParameterNorm(0.5, 1.0),
    "parameter-norm-inf": ClipParameterNorm(0.5, float("inf")),
    "grouped": Grouped({"p[01]": AGC(0.1), "p[23]": ClipNorm(0.5, 1.0), "p4": AutoClip(40.0)}),
}
NUM_STEPS = 5
SHAPES = ((5, 3), (3, 4), (7,), (1, 4), (2, 3, 4), (4,))


def placements(num_ranks):
    """How each of the parameters lies on a mesh of as many ranks; None: a plain tensor on each."""
    if num_ranks == 2:
        return (2,), [[Shard(0)], [Shard(1)], [Shard(0)], [Shard(0)], [Shard(2)], None]
    return (2, 2), [
        [Shard(0), Shard(1)],
        [Shard(1), Replicate()],
        [Shard(0), Replicate()],
        [Replicate(), Shard(0)],
        [Shard(0), Shard(2)],
        [Replicate(), Replicate()],
    ]


def whole(tensor):
    """All of a tensor, on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(one, other):
    """How far other norms, relatively, and histograms, in elements, lie apart; both are there at every second step."""
    assert (one.histograms is None) == (other.histograms is None) == (one.position.step % 2 == 0)
    if one.histograms is not None:
        yield float(np.abs(one.histograms.counts.cumsum(1) - other.histograms.counts.cumsum(1)).max())
        for norm_type in (1.0, math.inf):
            norms = one.measurement.other_norms[norm_type]
            yield 1e4 * float((np.abs(norms - other.measurement.other_norms[norm_type]) / norms).max())


def play(num_ranks):
    """Clip the same gradients sharded and whole, step after step: largest differences for each clipper."""
    shape, layouts = placements(num_ranks)
    mesh = init_device_mesh("cpu", shape)

    def spread(tensor, layout):
        return tensor.clone() if layout is None else distribute_tensor(tensor, mesh, layout)

    found = {}
    for key, clipper in CLIPPERS.items():
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(size, generator=generator) for size in SHAPES]
        plain = [nn.Parameter(value.clone()) for value in values]
        sharded = [nn.Parameter(spread(value, layout)) for value, layout in zip(values, layouts, strict=True)]
        guards = [
            Guard(
                [(f"p{index}", it) for index, it in enumerate(side)],
                clip=copy.deepcopy(clipper),
                explosion=None,
                log_every_n_steps=2,
                log_norm_types=[1.0, math.inf],
                histogram_every_n_steps=2,
                histograms_of="clipped",
            )
            for side in (plain, sharded)
        ]
        error, coefs, logged = 0.0, [], 0.0
        for step in range(NUM_STEPS):
            grads = [torch.randn(size, generator=generator) * (step + 1) ** 2 for size in SHAPES]
            for parameter, other, grad, layout in zip(plain, sharded, grads, layouts, strict=True):
                parameter.grad = grad.clone()
                other.grad = spread(grad, layout)
            records = [guard.step() for guard in guards]
            error = max(
                error,
                abs(records[0].clip_coef - records[1].clip_coef),
                *(float((a.grad - whole(b.grad)).abs().max()) for a, b in zip(plain, sharded, strict=True)),
            )
            coefs.append(records[1].clip_coef)
            logged = max([logged, *differences(*records)])
        found[key] = {"error": error, "coefs": coefs, "logged": logged}
    distributed.barrier()
    return found


@functools.cache
def played(num_ranks):
    """All scenarios in one process group."""
    return on_ranks(num_ranks, play, num_ranks)


@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_adaptive_clipper_on_shards_equals_the_one_on_whole_gradients(num_ranks, clipper):
    """By rows, by columns, by both on a 2-D mesh, vectors, empty shards, replicas, plain tensors."""
    ranks = [found[clipper] for found in played(num_ranks)]
    assert max(found["error"] for found in ranks) < 1e-5
    assert all(found["coefs"] == ranks[0]["coefs"] for found in ranks)
    assert min(ranks[0]["coefs"]) < 1.0


@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_logged_on_shards_equals_what_is_logged_on_whole_gradients(num_ranks, clipper):
    """Histograms after clipping, but for an element on the edge of two bins, and norms of type 1 and infinity, to 1e-4."""
    assert max(found[clipper]["logged"] for found in played(num_ranks)) <= 1.0
