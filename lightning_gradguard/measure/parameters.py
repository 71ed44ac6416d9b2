"""Which parameters are watched: those of an optimizer, under the names that the user gave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lightning_gradguard.layout import Layout, clean_name
from lightning_gradguard.measure.distributed import is_sharded
from lightning_gradguard.measure.name_filter import NameFilter


class WatchedParameters:
    """The parameters of one optimizer, in model order, each once.

    Follows the optimizer: `refresh()` notices groups that were added later, as fine-tuning callbacks do.

    Args:
        named_parameters: the model's parameters. A parameter that goes by two names (tied) keeps the first.
        optimizer: whose parameters are watched. None: all of `named_parameters`.
        only: which of them, by name. Its patterns must match some of `named_parameters`, not each optimizer's.

    Attributes:
        tensors: the watched parameters, in the order of `layout`.
        layout: their names and sizes.
        is_uniform: whether all share device and dtype; so do their gradients then.
        is_sharded: whether there are DTensors, also among the excluded ones.
        excluded, excluded_layout: the same of those that the filter leaves out.

    Raises:
        ValueError: if nothing is left to watch, or a pattern matches nothing.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.Tensor]],
        optimizer: torch.optim.Optimizer | None = None,
        only: NameFilter = NameFilter(),  # noqa: B008
    ) -> None:
        self._named = [_check(entry) for entry in named_parameters]
        self.optimizer = optimizer
        self.only = only
        self._group_sizes = self._sizes()
        self._collect()
        if self.everything:
            only.check(dict.fromkeys([name for name, _ in self._named] + [*self.layout.names, *self.excluded_layout.names]))
        else:
            raise ValueError(
                "`named_parameters` must hold at least one parameter, got none. "
                "Pass `model.named_parameters()`; an iterator can be used up only once."
            )

    @property
    def everything(self) -> list[torch.Tensor]:
        """All parameters of the optimizer, excluded ones included."""
        return [*self.tensors, *self.excluded]

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.everything[0].device

    def refresh(self) -> bool:
        """Look whether the optimizer's groups have changed; True if the layout is a new one."""
        if self._sizes() == self._group_sizes:
            return False
        self._group_sizes = self._sizes()
        self._collect()
        return True

    def _sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups] if self.optimizer else []

    def _collect(self) -> None:
        named = list(_each_once(self._named))
        if self.optimizer is not None:
            inside = {id(parameter): (where, parameter) for where, parameter in _of_optimizer(self.optimizer)}
            model_order = [(name, parameter) for name, parameter in named if id(parameter) in inside]
            known = {id(parameter) for _, parameter in model_order}
            # Parameters that the model doesn't list are trained all the same, so they are watched under a made-up name.
            unnamed = [(where, parameter) for key, (where, parameter) in inside.items() if key not in known]
            named = model_order + unnamed
        kept = [pair for pair in named if self.only.keeps(pair[0])]
        left_out = [] if self.only.keeps_all else [pair for pair in named if not self.only.keeps(pair[0])]
        self.tensors, self.layout = _split(kept)
        self.excluded, self.excluded_layout = _split(left_out)
        self.is_uniform = len({(tensor.device, tensor.dtype) for tensor in self.tensors}) <= 1
        self.is_sharded = is_sharded(self.everything)


def _split(named: list[tuple[str, torch.Tensor]]) -> tuple[list[torch.Tensor], Layout]:
    tensors = [parameter for _, parameter in named]
    return tensors, Layout.of((name for name, _ in named), (tuple(parameter.shape) for parameter in tensors))


def _check(entry: object) -> tuple[str, torch.Tensor]:
    match entry:
        case (str(name), torch.Tensor() as parameter):
            return clean_name(name), parameter
        case _:
            kind = type(entry).__name__
            raise ValueError(
                f"`named_parameters` must hold pairs of a name and a tensor, got a {kind}. Pass `model.named_parameters()`."
            )


def _each_once(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for name, parameter in named:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield f"param_groups[{group_index}][{index}]", parameter
