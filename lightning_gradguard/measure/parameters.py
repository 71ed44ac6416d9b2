"""Which parameters are watched: those of an optimizer, under the names that the user gave them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.parameter import is_lazy

from lightning_gradguard.layout import Layout, clean_name
from lightning_gradguard.measure.distributed import is_sharded
from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.shards import FlatShard, Parameter

_LOOK_AT_DTYPES_EVERY = 16


class WatchedParameters:
    """The parameters of one optimizer, in model order, each once.

    Follows the optimizer: `refresh()` notices groups that were added later, as fine-tuning callbacks do, and parameters that
    were replaced. Of an optimizer without parameters of its own all of `named_parameters` are watched.

    Args:
        named_parameters: the model's parameters, or what this rank holds of them where an engine has flattened them. A
            parameter that goes by two names (tied) keeps the first.
        optimizer: whose parameters are watched. None: all of `named_parameters`.
        only: which of them, by name. Its patterns must match some of `named_parameters`, not each optimizer's.
        look_again: gives `named_parameters` anew once the optimizer has others; None: new ones go by their place in a group.

    Attributes:
        tensors: the watched parameters, in the order of `layout`.
        layout: their names and sizes.
        is_uniform: whether all share device and dtype; so do their gradients then.
        is_sharded: whether there are DTensors or shards, also among the excluded ones.
        are_plain: whether all are tensors of float32 on the CPU, and none is excluded.
        excluded, excluded_layout: the same of those that the filter leaves out.
        unshaped: those of lazy modules, until a forward pass has given them a shape; they have no gradient before.

    Raises:
        ValueError: if nothing is left to watch, or a pattern matches nothing.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        optimizer: torch.optim.Optimizer | None = None,
        only: NameFilter = NameFilter(),  # noqa: B008
        *,
        look_again: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None,
    ) -> None:
        self._named = [_check(entry) for entry in named_parameters]
        self._look_again = look_again
        self.optimizer = optimizer
        self.only = only
        self._grouped = self._in_groups()
        self._dtypes = [parameter.dtype for parameter in self._grouped]
        self._num_looks = 0
        self.layout: Layout
        self.excluded_layout: Layout
        self._collect()
        if self.everything:
            only.check(self.model_names)
        else:
            raise ValueError(
                "`named_parameters` must hold at least one parameter, got none. "
                "Pass `model.named_parameters()`; an iterator can be used up only once."
            )

    @property
    def everything(self) -> list[Parameter]:
        """All parameters of the optimizer, excluded ones included."""
        return [*self.tensors, *self.excluded, *self.unshaped]

    @property
    def model_names(self) -> list[str]:
        """Names of all parameters of the model, and of those that only the optimizer has."""
        return list(dict.fromkeys([name for name, _ in self._named] + [*self.layout.names, *self.excluded_layout.names]))

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.everything[0].device

    def refresh(self) -> bool:
        """Look whether the optimizer has other parameters by now; True if it has.

        Some 20 ns a parameter. To see whether they are of other dtypes by now, as `module.to` makes them, takes ten times as
        long, so that is looked at every sixteenth time.
        """
        now = self._in_groups()
        is_same = len(now) == len(self._grouped) and all(map(operator.is_, now, self._grouped))
        self._num_looks += 1
        if is_same and self._num_looks % _LOOK_AT_DTYPES_EVERY == 0:
            is_same = [parameter.dtype for parameter in now] == self._dtypes
        has_shapes = self.unshaped and not all(map(_is_unshaped, self.unshaped))
        if is_same and not has_shapes:
            return False
        before = self.layout
        if self._look_again is not None:
            self._named = [_check(entry) for entry in self._look_again()]
        self._grouped, self._dtypes = now, [parameter.dtype for parameter in now]
        self._collect()
        if self.layout.is_like(before):
            self.layout = before  # so that whoever knows it sees that nothing is new
        return True

    def _in_groups(self) -> list[torch.Tensor]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def _collect(self) -> None:
        named = list(_each_once(self._named))
        if self._grouped and self.optimizer is not None:
            inside = {id(parameter): (where, parameter) for where, parameter in _of_optimizer(self.optimizer)}
            model_order = [(name, parameter) for name, parameter in named if id(_trained_in(parameter)) in inside]
            known = {id(_trained_in(parameter)) for _, parameter in model_order}
            # Parameters that the model doesn't list are trained all the same, so they are watched under a made-up name.
            unnamed: list[tuple[str, Parameter]] = [entry for key, entry in inside.items() if key not in known]
            named = model_order + unnamed
        self.unshaped: list[Parameter] = [parameter for _, parameter in named if _is_unshaped(parameter)]
        named = [pair for pair in named if not _is_unshaped(pair[1])] if self.unshaped else named
        kept = [pair for pair in named if self.only.keeps(pair[0])]
        left_out = [] if self.only.keeps_all else [pair for pair in named if not self.only.keeps(pair[0])]
        self.tensors, self.layout = _split(kept)
        self.excluded, self.excluded_layout = _split(left_out)
        # What an engine keeps gradients in need not be what it keeps weights in.
        has_shards = any(isinstance(parameter, FlatShard) for parameter in self.tensors)
        kinds = {(tensor.device, tensor.dtype) for tensor in self.tensors}
        self.is_uniform = not has_shards and len(kinds) <= 1 and all(map(_has_usual_gradient, self.tensors))
        self.is_sharded = is_sharded(self.everything)
        first = self.tensors[0] if self.tensors and self.is_uniform and not (self.is_sharded or self.excluded) else None
        self.are_plain = first is not None and first.dtype is torch.float32 and first.device.type == "cpu"


def _has_usual_gradient(parameter: Parameter) -> bool:
    """Whether its gradient is of its own dtype, as long as nobody has asked torch for another (2.9 and later)."""
    is_leaf = isinstance(parameter, torch.Tensor) and parameter.is_leaf
    return not is_leaf or getattr(parameter, "grad_dtype", parameter.dtype) is parameter.dtype


def _trained_in(parameter: Parameter) -> torch.Tensor | None:
    """The tensor that the optimizer has of it."""
    return parameter.owner if isinstance(parameter, FlatShard) else parameter


def _is_unshaped(parameter: Parameter) -> bool:
    return isinstance(parameter, torch.Tensor) and is_lazy(parameter)


def _split(named: list[tuple[str, Parameter]]) -> tuple[list[Parameter], Layout]:
    tensors = [parameter for _, parameter in named]
    return tensors, Layout.of((name for name, _ in named), map(_shape, tensors))


def _shape(parameter: Parameter) -> tuple[int, ...]:
    if isinstance(parameter, torch.Tensor) and parameter.is_nested:  # of several shapes
        return (parameter.numel(),)
    return tuple(parameter.shape)


def _check(entry: object) -> tuple[str, Parameter]:
    match entry:
        case (str(name), torch.Tensor() as parameter) if is_cut_up(parameter):
            raise ValueError(
                f"`named_parameters` must hold parameters with a gradient of their own shape, got `{clean_name(name)}`, "
                "which FSDP1 or DeepSpeed has cut up. Use `GradGuard` in a Lightning Trainer, or FSDP2 (`fully_shard`)."
            )
        case (str(name), (torch.Tensor() | FlatShard()) as parameter):
            return clean_name(name), parameter
        case _:
            kind = type(entry).__name__
            raise ValueError(
                f"`named_parameters` must hold pairs of a name and a tensor, got a {kind}. Pass `model.named_parameters()`."
            )


def is_cut_up(parameter: torch.Tensor) -> bool:
    """Whether FSDP1 or DeepSpeed has taken a parameter apart, so that it has no gradient of its own shape."""
    # Private to FSDP1 (torch.distributed.fsdp._common_utils) and to DeepSpeed (ZeRO 3, ZeRO 1 and 2), and all that tells.
    marks = ("_fsdp_flattened", "ds_id", "_hp_mapping")
    return any(getattr(parameter, mark, None) is not None for mark in marks)


def _each_once(named: Iterable[tuple[str, Parameter]]) -> Iterator[tuple[str, Parameter]]:
    seen: set[int] = set()
    for name, parameter in named:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield f"param_groups[{group_index}][{index}]", parameter
