"""Rehearse a fault in your own set-up, to see what your guard makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gradguard.forensics.nonfinite.layout import leaves_of
from lightning_gradguard.forensics.state import is_run_again
from lightning_gradguard.layout import clean_name
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.policy import require_float, require_int

FaultName = Literal["nan", "inf", "explosion"]


@contextmanager
def inject(
    model: nn.Module,
    fault: FaultName,
    *,
    step: int,
    parameter: str | None = None,
    rank: int | None = None,
    factor: float = 1e6,
) -> Iterator[None]:
    """Damage one gradient in one backward pass, where a real fault would: before ranks sum, unscale and clip.

    A hook on the parameter does it; it is gone when the context ends. Under FSDP1, FSDP2 and tensor parallelism, which put
    other tensors in the parameter's place, the gradient that flows into the parameter's module is damaged instead, and so
    are those of the modules before it.

    Args:
        model: the module that is trained.
        fault: "nan" or "inf" puts one such element into the gradient; "explosion" multiplies it by `factor`.
        step: backward pass in which it happens, counting from 0 those that reach the parameter. With `n` micro-batches a
            step, those of optimizer step `s` are `n * s` to `n * s + n - 1`. Those of a guard's replays don't count.
        parameter: name of the parameter; None: the first that is trained.
        rank: the process on which it happens; None: all.
        factor: for "explosion", > 0.

    Raises:
        ValueError: for an unknown fault or parameter, and for values outside their range.

    >>> model = nn.Linear(3, 1)
    >>> with inject(model, "nan", step=1, parameter="bias"):
    ...     for _ in range(2):
    ...         model.zero_grad()
    ...         model(torch.ones(2, 3)).sum().backward()
    ...         print(model.bias.grad)
    tensor([2.])
    tensor([nan])
    """
    if fault not in ("nan", "inf", "explosion"):
        raise ValueError(f"`fault` must be 'nan', 'inf' or 'explosion', got {fault!r}.")
    require_int("step", step, at_least=0, remedy="0 is the first backward pass.")
    require_float("factor", factor, above=0.0, remedy="The default is 1e6.")
    if rank is not None:
        require_int("rank", rank, at_least=0, remedy="For all ranks pass None.")
    name, target = _find(model, parameter)
    owner, _, leaf = name.rpartition(".")
    damage = _Damage(fault, step, rank, factor, model.get_submodule(owner))

    def on_output(module: nn.Module, args: object, output: object) -> None:  # noqa: ARG001
        # `fit` shards after this function was called, so only now it shows whether the parameter is still the one trained.
        if getattr(module, leaf) is target and _takes_hooks(target):
            return
        # One tensor of all that it returns: each call of the hook counts as a backward pass.
        for _, tensor in leaves_of(output):
            if tensor.requires_grad:
                tensor.register_hook(damage)  # type: ignore[no-untyped-call]
                return

    handles = [model.get_submodule(owner).register_forward_hook(on_output)]
    if _takes_hooks(target):
        handles.append(target.register_hook(damage))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Damage:
    """The hook: counts backward passes and damages the gradient of one."""

    def __init__(self, fault: FaultName, step: int, rank: int | None, factor: float, owner: nn.Module) -> None:
        self._fault = fault
        self._step = step
        self._rank = rank
        self._factor = factor
        self._owner = owner
        self._num_seen = 0

    def __call__(self, grad: Tensor) -> Tensor:
        size = Ranks.current().size
        if self._rank is not None and self._rank >= size:  # how many there are may not have been known before
            raise ValueError(f"`rank` must be one of the {size} that there are, got {self._rank}. The first is 0.")
        if is_run_again(self._owner):
            return grad
        is_now = self._num_seen == self._step
        self._num_seen += 1
        if not is_now or self._rank not in (None, Ranks.current().rank):
            return grad
        if self._fault == "explosion":
            return grad * self._factor
        value = float(self._fault)
        if type(grad) is not Tensor:
            from torch.distributed.tensor import DTensor  # noqa: PLC0415

            if isinstance(grad, DTensor):
                # Writing into a DTensor is a collective, in which the other ranks would not take part.
                local = _with_first(grad.to_local(), value)
                mesh, shape, stride = grad.device_mesh, grad.shape, grad.stride()
                return DTensor.from_local(local, mesh, grad.placements, run_check=False, shape=shape, stride=stride)
        return _with_first(grad, value)


def _with_first(tensor: Tensor, value: float) -> Tensor:
    """A copy whose first element is `value`."""
    copy = tensor.clone()
    copy[(0,) * copy.dim()] = value
    return copy


def _find(model: nn.Module, parameter: str | None) -> tuple[str, nn.Parameter]:
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    for name, tensor in trained:
        if parameter is None or parameter in (name, clean_name(name)):
            return name, tensor
    names = ", ".join(name for name, _ in trained[:5])
    raise ValueError(f"`parameter` must name a parameter that is trained, got {parameter!r}. The model has {names}, ...")


def _takes_hooks(parameter: nn.Parameter) -> bool:
    # A DTensor parameter is not what autograd sees under FSDP2: the gathered one is, and it is made anew each time.
    return type(parameter.data) is torch.Tensor
