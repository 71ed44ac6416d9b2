"""What the tests prove on a CPU and on the meta device, seen on a CUDA device. Each check returns what it has looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._triton import has_triton

from benchmarks.gpu.loop import Fault, LeftOutError, Loop, MakeOptimizer, expect, no_sync, normalized, quiet, same
from lightning_gradguard import Guard

SETTLED, STEPS = 6, 30
LOG_EVERY, HISTOGRAM_EVERY = 5, 10
FAULTS: tuple[Fault, ...] = ("nan", "huge")
MAX_NORM = 1e-3
"""Clips every healthy step."""
CYCLES, SHORT = 10**9, 0.1
"""Of the device's clock, half a second or so; and what the host may need for a step meanwhile, in seconds."""

FUSED: dict[str, MakeOptimizer] = {
    "AdamW": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1, fused=True),
    "SGD": lambda network: torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True
    ),
    "Adagrad": lambda network: torch.optim.Adagrad(network.parameters(), lr=0.01, weight_decay=0.1, fused=True),
}
OTHERS: dict[str, MakeOptimizer] = {
    "foreach AdamW": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1, foreach=True),
    "foreach SGD": lambda network: torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, foreach=True),
    "RMSprop": lambda network: torch.optim.RMSprop(network.parameters(), lr=1e-3, momentum=0.9),
}


def healthy_steps(device: torch.device) -> str:
    """Measure, judge, clip and log without a wait, in a loop; scalars and histograms are due in between."""
    loop = Loop(device, FUSED["AdamW"], clip=MAX_NORM, log_every_n_steps=LOG_EVERY, histogram_every_n_steps=HISTOGRAM_EVERY)
    for _ in range(SETTLED):
        loop.step()
    with no_sync(device):
        for _ in range(STEPS):
            loop.step()
    loop.guard.flush()
    expect(loop.guard.totals.num_clipped == SETTLED + STEPS, "not every step was clipped")
    return f"{STEPS} steps, {STEPS // LOG_EVERY} with scalars, {STEPS // HISTOGRAM_EVERY} with histograms"


def sync_is_noticed(device: torch.device) -> str:
    """The check above can fail."""
    if device.type != "cuda":
        raise LeftOutError("nothing waits on a CPU")
    try:
        with no_sync(device):
            torch.ones((), device=device).item()
    except RuntimeError:
        return "`.item()` raises"
    raise AssertionError("`.item()` went unnoticed")


def host_runs_ahead(device: torch.device) -> str:
    """A healthy step is queued while the device is still busy: what waits for an event shows here, and only here."""
    if device.type != "cuda":
        raise LeftOutError("a CPU does a step at once")
    loop = Loop(device, FUSED["AdamW"], clip=MAX_NORM)
    for _ in range(SETTLED):
        loop.step()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)  # private; torch's own tests keep a device busy by it
    busy.record()
    begin = time.perf_counter()
    loop.step()
    took, is_ahead = time.perf_counter() - begin, not busy.query()
    torch.cuda.synchronize()
    expect(is_ahead and took < SHORT, f"the host waited, {took:.3f} s")
    return f"a step was queued in {took * 1e3:.1f} ms, behind a kernel that was still running"


def deferred_skip(device: torch.device) -> str:
    """Weights and optimizer state bit by bit as before a step that the device has skipped, before the host knows."""
    optimizers = _made_here(device)
    for name, make in optimizers.items():
        for fault in FAULTS:
            _skip(Loop(device, make, clip=MAX_NORM), fault, f"fused {name}, {fault}", is_deferred=True)
    return f"{_listed(optimizers)}; {' and '.join(FAULTS)}"


def skip_on_the_host(device: torch.device) -> str:
    """The same where the host decides: optimizers that are not fused."""
    others = dict(OTHERS)
    if device.type == "cuda":
        others["capturable AdamW"] = lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3, capturable=True)
    for name, make in others.items():
        for fault in FAULTS:
            _skip(Loop(device, make, clip=MAX_NORM), fault, f"{name}, {fault}")
    return f"{', '.join(others)}; {' and '.join(FAULTS)}"


def first_step(device: torch.device) -> str:
    """A fault in the very first step, where fused SGD would leave its momentum uninitialised."""
    optimizers = _made_here(device)
    for name, make in optimizers.items():
        loop = Loop(device, make)
        before = loop.state()["model"]
        with quiet():
            loop.step("nan")
            loop.guard.flush()
        expect(same(before, loop.state()["model"]), f"fused {name} has moved")
        loop.step()
        expect(all(bool(value.isfinite().all()) for value in loop.network.state_dict().values()), f"{name} is damaged")
    return _listed(optimizers)


def running_statistics(device: torch.device) -> str:
    """BatchNorm's mean, variance and counter as before the step that the device has skipped."""
    for fault in FAULTS:
        loop = Loop(device, FUSED["AdamW"], network=normalized, clip=MAX_NORM)
        _skip(loop, fault, f"BatchNorm, {fault}", is_deferred=True)
    return f"mean, variance and counter; {' and '.join(FAULTS)}"


def clipping(device: torch.device) -> str:
    """Clipping inside the kernel, which writes the gradients back, against `clip_grad_norm_` before it."""
    worst = 0.0
    optimizers = _made_here(device)
    for name, make in optimizers.items():
        ours, plain = Loop(device, make, clip=MAX_NORM), Loop(device, make)
        network = plain.network
        plain.optimizer.register_step_pre_hook(lambda *_, network=network: _clip(network))
        for _ in range(SETTLED):
            ours.step()
            plain.step()
        left, right = (_gradient(each.network) for each in (ours, plain))
        difference = float((left - right).norm() / right.norm())
        expect(difference <= 1e-4, f"{name}: gradients differ by {difference:.1e}")
        # By itself, too: weights that have moved apart by a rounding or two give other gradients.
        ratio = float(left.norm()) / MAX_NORM
        expect(abs(ratio - 1.0) <= 1e-5, f"{name}: clipped to {ratio} times the limit")
        worst = max(worst, difference)
    return f"{_listed(optimizers)}; gradients in step {SETTLED} differ by {worst:.1e} at most, relative"


def grad_scaler(device: torch.device) -> str:
    """fp16: overflows lower the scale and are no alert, norms are true, and a NaN is skipped."""
    for name in ("AdamW", "SGD"):
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
        loop = Loop(device, FUSED[name], scaler=scaler)
        with quiet():
            expect(_settle(loop, scaler) > 0, f"{name}: nothing overflowed, or an overflow was applied")
            loop.guard.flush()
            expect(not loop.guard.alerts, f"{name}: an overflow is an alert")
            assert loop.guard.last is not None
            gradients = [parameter.grad for parameter in loop.network.parameters() if parameter.grad is not None]
            ratio = loop.guard.last.measurement.global_norm / float(nn.utils.get_total_norm(gradients))
            expect(abs(ratio - 1.0) < 1e-5, f"{name}: {ratio} times the norm of the gradients")
            before = loop.state()["model"]
            loop.step("nan")
            loop.guard.flush()
            expect(same(before, loop.state()["model"]), f"{name}: a NaN was applied")
    return "fused AdamW and SGD; overflows, norm, NaN"


def _settle(loop: Loop, scaler: torch.amp.GradScaler) -> int:
    """Train until the scale fits; how many steps overflowed, -1 if one of them moved the weights."""
    for num_overflows in range(40):
        before, scale = loop.state()["model"], scaler.get_scale()
        loop.step()
        if scaler.get_scale() >= scale:
            return num_overflows
        if not same(before, loop.state()["model"]):
            break
    return -1


def compiled(device: torch.device) -> str:
    """`torch.compile`: the names that the user gave, and an exact skip."""
    if device.type == "cuda" and not has_triton():
        raise LeftOutError("Triton is not there")
    backend = "inductor" if device.type == "cuda" else "eager"
    loop = Loop(device, FUSED["AdamW"], wrap=lambda network: torch.compile(network, backend=backend), clip=MAX_NORM)
    _skip(loop, "nan", "compiled", is_deferred=True)
    assert loop.guard.last is not None
    names = [name for name, _ in loop.network.named_parameters()]
    expect(list(loop.guard.last.measurement.names) == names, "names differ")
    return f"backend {backend}"


def captured(device: torch.device) -> str:
    """A forward and backward pass that is replayed from a CUDA graph."""
    if device.type != "cuda":
        raise LeftOutError("a CPU has no graphs")
    sample = torch.randn(32, 16, device=device)
    loop = Loop(
        device,
        FUSED["AdamW"],
        wrap=lambda network: torch.cuda.make_graphed_callables(network, (sample,)),
        clip=MAX_NORM,
    )
    for fault in FAULTS:
        _skip(loop, fault, f"captured, {fault}", is_deferred=True)
    return "make_graphed_callables"


def memory(device: torch.device) -> str:
    """What a step of the guard allocates at most, over 100 M gradient elements; `clip_grad_norm_` beside it."""
    if device.type != "cuda":
        raise LeftOutError("the peak of an allocator is CUDA's")
    network = nn.ModuleList(nn.Linear(1000, 1000, bias=False, device=device) for _ in range(100))
    gradients = 0
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
        gradients += parameter.grad.nbytes
    guard = Guard(network.named_parameters(), optimizer=FUSED["AdamW"](network), clip=MAX_NORM, histogram_every_n_steps=None)
    guard.step()
    ours, theirs = _peak(guard.step), _peak(lambda: nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM))
    expect(ours < gradients / 10, f"{ours:,} bytes")
    return f"{ours:,} bytes, `clip_grad_norm_` {theirs:,}; the gradients have {gradients:,}"


def _gradient(network: nn.Module) -> torch.Tensor:
    """All of it, flat."""
    return torch.cat([it.grad.flatten() for it in network.parameters() if it.grad is not None]).double()


def _clip(network: nn.Module) -> None:
    nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)


def _peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _skip(loop: Loop, fault: Fault, title: str, *, is_deferred: bool = False) -> None:
    """Train, have a step skipped, and train on."""
    with quiet():
        for _ in range(SETTLED):
            loop.step()
        before = loop.state()
        loop.step(fault)
        expect(loop.guard.is_pending == is_deferred, f"{title}: {'not ' if is_deferred else ''}left to the device")
        expect(same(before, loop.state()), f"{title}: the step has left something")
        num_skipped = loop.guard.totals.num_skipped
        loop.step()
        loop.guard.flush()
    expect(not same(before, loop.state()), f"{title}: training has not gone on")
    expect(loop.guard.totals.num_skipped == num_skipped + is_deferred, f"{title}: the skip was not counted")
    finite = all(bool(value.isfinite().all()) for value in loop.network.state_dict().values())
    expect(finite, f"{title}: weights are damaged")


def _made_here(device: torch.device) -> dict[str, MakeOptimizer]:
    """The fused optimizers that this torch has for the device."""
    made = {}
    for name, make in FUSED.items():
        probe = nn.Linear(1, 1, device=device)
        probe(torch.ones(1, 1, device=device)).sum().backward()
        try:
            make(probe).step()
        except (NotImplementedError, RuntimeError):
            continue
        made[name] = make
    return made


def _listed(optimizers: Iterable[str]) -> str:
    """Those that were looked at, and those that this torch doesn't have for the device."""
    missing = [name for name in FUSED if name not in optimizers]
    return ", ".join(optimizers) + (f" (no fused {' or '.join(missing)} here)" if missing else "")


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "no sync on healthy steps, in a loop": healthy_steps,
    "a sync would be noticed": sync_is_noticed,
    "the host runs ahead of the device": host_runs_ahead,
    "skip left to the device, fused": deferred_skip,
    "skip by the host, not fused": skip_on_the_host,
    "skip of the very first step, fused": first_step,
    "running statistics of a skipped step": running_statistics,
    "clipping in the kernel": clipping,
    "fp16 with a GradScaler": grad_scaler,
    "`torch.compile`": compiled,
    "captured passes": captured,
    "memory of a step": memory,
}
"""By title."""
