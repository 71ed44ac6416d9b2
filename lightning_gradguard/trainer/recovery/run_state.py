"""All that a Trainer's run would have to forget to be back at an earlier step."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_gradguard.measure.shards import FlatShard
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.recovery.host import copy_to_host, num_bytes, put_back
from lightning_gradguard.trainer.callback_order import callbacks_of
from lightning_gradguard.trainer.strategies import engine_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RunState:
    """Takes the state of a run down, and puts it back.

    What belongs to the state: parameters and buffers of the module, and of modules that callbacks hold (averaged weights);
    the optimizers' state; the precision plugin's (a GradScaler's scale); what detectors and clippers have learnt; the
    epoch's metrics; and the clock: learning rates and the other settings of parameter groups, schedulers, and random states.

    Args:
        trainer: whose run.
        module: what it trains.
        guards: one for each optimizer.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, guards: Sequence[Pipeline]) -> None:
        self._trainer = trainer
        self._module = module
        self._guards = guards
        self._engine = engine_of(trainer)

    def take(self, reuse: Any = None) -> dict[str, Any]:
        """A copy in CPU memory. Rank-local; waits for the device where a guard has yet to learn of a step.

        Args:
            reuse: an earlier copy, whose memory is used again.
        """
        return {
            "tensors": copy_to_host(self._tensors(), reuse["tensors"] if reuse else None),
            "guards": [guard.state_dict() for guard in self._guards],
            "precision": copy.deepcopy(self._trainer.precision_plugin.state_dict()),
            "engine": {} if (masters := self._engine.master_weights) is None else masters.state(),
            "epoch": self._trainer.current_epoch,
            "metrics": [_state_of(metric) for metric in self._metrics()],
            "groups": [_settings_of(optimizer) for optimizer in self._trainer.optimizers],
            "schedulers": copy.deepcopy([config.scheduler.state_dict() for config in self._trainer.lr_scheduler_configs]),
            "random": random_states(),
        }

    def put_back(self, state: dict[str, Any], *, with_clock: bool = False) -> None:
        """Bring a copy back, in place. Gradients are gone afterwards. Rank-local; waits for the device.

        Args:
            state: from `take`.
            with_clock: whether learning rates, schedulers and random states go back as well, to train on the same batches
                once more. Without it time goes on, as if the steps since had been skipped.
        """
        if torch.cuda.is_available():  # pragma: no cover - needs a GPU
            torch.cuda.synchronize()
        self._put_back_tensors(state["tensors"])
        for guard, saved in zip(self._guards, state["guards"], strict=False):  # an optimizer may have come since
            guard.return_to(saved)
        self._trainer.precision_plugin.load_state_dict(copy.deepcopy(state["precision"]))
        if (masters := self._engine.master_weights) is not None:
            masters.load_state(state["engine"])
        self._put_back_metrics(state)
        if with_clock:
            for optimizer, settings in zip(self._trainer.optimizers, state["groups"], strict=True):
                for group, saved in zip(optimizer.param_groups, settings, strict=True):
                    group.update(copy.deepcopy(saved))
            for config, saved in zip(self._trainer.lr_scheduler_configs, state["schedulers"], strict=True):
                config.scheduler.load_state_dict(copy.deepcopy(saved))
            set_random_states(state["random"])

    def num_bytes(self) -> int:
        """What a copy takes on this rank, at most as a rule: two tensors a weight for an optimizer that has no state yet."""
        tensors = self._tensors()
        guess = 0
        for optimizer, state in zip(self._trainer.optimizers, tensors["optimizers"], strict=True):
            if not num_bytes(state):
                guess += 2 * num_bytes(self._stepped(optimizer))
        return num_bytes(tensors) + guess

    def parameters(self) -> list[tuple[str, Tensor]]:
        """What this rank holds of the module's parameters, by name."""
        found = self._engine.named_parameters(self._module)
        return [(name, it.weight() if isinstance(it, FlatShard) else it) for name, it in found]

    def weights(self) -> Sequence[tuple[str, Tensor]]:
        """Parameters, and the optimizers' state, by name."""
        named = self.parameters()
        for number, optimizer in enumerate(self._trainer.optimizers):
            for index, state in enumerate(self._states_of(optimizer)):
                named.extend((f"optimizer {number}: {key} of parameter {index}", value) for key, value in _tensors_in(state))
        return named

    def _tensors(self) -> dict[str, Any]:
        masters = self._engine.master_weights
        return {
            "modules": [self._tensors_of(module) for module in self._modules()],
            "masters": [] if masters is None else list(masters.tensors),
            "optimizers": [self._states_of(optimizer) for optimizer in self._trainer.optimizers],
        }

    def _tensors_of(self, module: nn.Module) -> dict[str, Tensor]:
        masters = self._engine.master_weights
        parameters = dict(module.named_parameters())
        own = {name: it for name, it in parameters.items() if masters is None or not masters.covers(it)}
        # What a lazy module has not given a shape yet has no values.
        return {name: it for name, it in {**own, **dict(module.named_buffers())}.items() if not is_lazy(it)}

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """What an optimizer steps, by which its state goes."""
        masters = self._engine.master_weights
        if masters is not None:
            return list(masters.tensors)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _states_of(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        # Not `state[parameter]`: the dictionary makes an entry for whatever it is asked for.
        return [optimizer.state.get(parameter) for parameter in self._stepped(optimizer)]

    def _modules(self) -> list[nn.Module]:
        callbacks = (value for callback in callbacks_of(self._trainer) for value in vars(callback).values())
        averages = [value for value in callbacks if isinstance(value, nn.Module) and value is not self._module]
        return [self._module, *averages]

    def _put_back_tensors(self, saved: dict[str, Any]) -> None:
        # A callback may have made its averaged module since; it is left as it is.
        for module, tensors in zip(self._modules(), saved["modules"], strict=False):
            live = self._tensors_of(module)
            for name, tensor in put_back(tensors, live).items():
                if tensor is not live.get(name):  # a buffer that has been assigned since, or can't be written to
                    path, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(path), leaf, tensor)
        for optimizer, states in zip(self._trainer.optimizers, saved["optimizers"], strict=True):
            now = self._states_of(optimizer)
            optimizer.state.clear()
            # A group added since has no saved state, and begins afresh.
            for parameter, before, present in zip(self._stepped(optimizer), states, now, strict=False):
                if before:
                    optimizer.state[parameter] = put_back(before, present)
            optimizer.zero_grad(set_to_none=True)
        if (masters := self._engine.master_weights) is not None:
            put_back(saved["masters"], list(masters.tensors))
            masters.spread()

    def _metrics(self) -> list[Metric]:
        # The epoch's means are private; nothing else than the Trainer can reach them.
        logged = self._trainer.fit_loop.epoch_loop._results.values()
        own = (module for module in self._module.modules() if isinstance(module, Metric))
        return [*logged, *own]

    def _put_back_metrics(self, state: dict[str, Any]) -> None:
        """The epoch's metrics as they were; those of another epoch, or that are new, begin afresh."""
        saved = state["metrics"] if state["epoch"] == self._trainer.current_epoch else []
        known = {id(metric): values for metric, values in saved}
        for metric in self._metrics():
            if id(metric) not in known:
                metric.reset()
            for name, value in known.get(id(metric), {}).items():
                setattr(metric, name, copy.deepcopy(value))

    def reset_metrics(self) -> None:
        """Let the epoch's metrics begin afresh."""
        for metric in self._metrics():
            metric.reset()


def random_states() -> dict[str, Any]:
    """States of all generators that training draws from, on this rank, in plain types and tensors."""
    # The global one is what data sets use.
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],  # plain, so that `torch.load(weights_only=True)` reads it
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Bring them back."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:  # pragma: no cover - needs a GPU
        torch.cuda.set_rng_state(states["cuda"])


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def _tensors_in(state: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in (state or {}).items():
        if isinstance(value, Tensor):
            yield str(key), value


def _state_of(metric: Metric) -> tuple[Metric, dict[str, Any]]:
    values = {name: copy.deepcopy(getattr(metric, name)) for name in (*metric._defaults, "_update_count")}
    return metric, {**values, "_computed": None}
