"""Runs a step's `training_step` again, and leaves no trace."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.forensics.comparison import compare_gradients
from lightning_gradguard.forensics.state import State, unchanged
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.trainer.packages import dummy_logger, is_lightning_module, takes_argument
from lightning_gradguard.trainer.precision import scaler_of
from lightning_gradguard.trainer.progress import fetches_batches
from lightning_gradguard.trainer.replay.window import MicroBatch, Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Observer = Callable[[MicroBatch, State], AbstractContextManager[object]]
"""Called for each micro-batch; the context is entered before its forward and left after its backward pass."""


class _StepReached(BaseException):
    """The step that is replayed has been reached; no user's `except Exception` may catch it."""


@dataclass
class Replayed:
    """What a replay gave.

    Attributes:
        losses: of each micro-batch, unscaled; of a manual optimization none.
        gradients: of each parameter that has one, by its id; true size.
        error: what ended it, where that was asked for.
    """

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    error: Exception | None = None

    def is_finite(self, of: Iterable[Tensor] | None = None) -> bool:
        """Whether it ran to its end, and no loss and no gradient holds NaN or infinity.

        Args:
            of: the parameters whose gradients count; None: all.
        """
        if self.error is not None:
            return False
        wanted = self.gradients.keys() if of is None else {id(it) for it in of}
        values = [*self.losses, *(gradient for key, gradient in self.gradients.items() if key in wanted)]
        return all(bool(getattr(value, "_local_tensor", value).isfinite().all()) for value in values)


def can_replay(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a step can be run again without a trace.

    Not where a `training_step` fetches its own batches, which uses them up. Nor under DDP with `find_unused_parameters`: its
    reducer notes each parameter that a backward pass reaches, in the replay too, and would wait for it in the next step.
    """
    if fetches_batches(module):
        return False
    return not getattr(trainer.strategy.model, "find_unused_parameters", False)


class Replay:
    """Runs the forward and backward passes of one optimizer's step again, on the same batches from the same random state.

    Weights, buffers, gradients, flags, plain attributes of every submodule and the random state are put back afterwards.
    Nothing is logged; optimizers and schedulers don't step. It runs on the unwrapped module: without DDP's collectives, and
    without compiled code. What a module does outside (files, prints) happens again.

    Args:
        trainer: as it is in `on_before_optimizer_step`.
        module: the one that is trained.
        window: which micro-batches have been.
        buffers: their values from before the step.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, window: Window, buffers: Buffers) -> None:
        self._trainer = trainer
        self._module = module
        self._window = window
        self._buffers = buffers

    def run(
        self,
        optimizer: Optimizer,
        *,
        step: int | None = None,
        batches: Sequence[MicroBatch] | None = None,
        observe: Observer | None = None,
        change: Callable[[Any], Any] = lambda batch: batch,
        prepare: Callable[[State], None] = lambda state: None,  # noqa: ARG005
        passed: Callable[[], None] = lambda: None,
        may_raise: bool = False,
        is_apart: bool = False,
    ) -> Replayed:
        """Replay.

        Args:
            optimizer: whose step it is.
            step: number of the decision; None: the running one.
            batches: what to run; None: the micro-batches of the step.
            observe: what watches each micro-batch.
            change: what to put in the place of a batch.
            prepare: called before the first micro-batch; what it changes is put back as well.
            passed: called at each step before the one that is replayed; gradients until then were not its.
            may_raise: whether an exception is an answer; then steps of optimizers don't end the replay.
            is_apart: whether it runs on other parameters that share the memory of the module's, which no hook watches.
        """
        replayed = Replayed()
        batches = self._window.of(optimizer, step) if batches is None else batches
        reached = _Steps(optimizer, self._window.num_steps(optimizer), passed)
        with ExitStack() as stack:
            state = stack.enter_context(unchanged(self._module))
            stack.enter_context(self._silence(reached))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            self._rewind()
            if is_apart:
                _exchange_parameters_(self._module)
            prepare(state)
            for index, micro_batch in enumerate(batches):
                reached.is_last = index == len(batches) - 1 and not may_raise
                watch = contextlib.nullcontext() if observe is None else observe(micro_batch, state)
                try:
                    with watch:
                        micro_batch.restore_rng()
                        loss = self._run(micro_batch, change)
                        if loss is not None:
                            replayed.losses.append(loss)
                except Exception as error:
                    if not may_raise:
                        raise
                    replayed.error = error
                    break
            replayed.gradients = self._gradients()
        return replayed

    def _run(self, micro_batch: MicroBatch, change: Callable[[Any], Any]) -> Tensor | None:
        """One micro-batch; its loss where the optimization is automatic."""
        module, trainer = self._module, self._trainer
        args = [change(micro_batch.batch)]
        # As the Trainer does: the second argument may have any name, and may be missing.
        if takes_argument(module.training_step, "batch_idx", min_args=2):
            args.append(micro_batch.batch_idx)
        try:
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(*args)
        except _StepReached:
            return None
        if not module.automatic_optimization:
            return None
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            return None
        self._backward(loss / trainer.accumulate_grad_batches)
        return loss.detach()

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        scaler = scaler_of(self._trainer)
        self._module.backward(loss if scaler is None else scaler.scale(loss), *args, **kwargs)

    def _gradients(self) -> dict[int, Tensor]:
        scaler = scaler_of(self._trainer)
        scale = None if scaler is None else scaler._get_scale_async()
        grads = {id(it): it.grad for it in self._module.parameters() if it.grad is not None}
        return grads if scale is None else {key: grad / scale for key, grad in grads.items()}

    def _rewind(self) -> None:
        """Give buffers the values that they had before the step, and take back a toggled optimizer's flags."""
        # Private, and all that tells which flags are not the user's; annotated for names, but keyed by parameters.
        flags: dict[Any, bool] = {**self._module._param_requires_grad_state}
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        self._module._param_requires_grad_state = {}
        if len(self._trainer.optimizers) == 1:
            self._buffers.restore_()
        else:  # an earlier optimizer of the same batch has taken them down halfway
            self._buffers.repair_()

    @contextlib.contextmanager
    def _silence(self, reached: _Steps) -> Iterator[None]:
        """Keep the replay from logging, stepping, and telling callbacks."""
        trainer, module = self._trainer, self._module
        for part in module.modules():
            if is_lightning_module(part):  # put back with the other attributes
                for name in ("log", "log_dict", "print"):
                    vars(part)[name] = _nothing
        vars(module)["manual_backward"] = self._backward
        with ExitStack() as stack:
            loggers = trainer.loggers
            trainer.loggers = [dummy_logger(trainer) for _ in loggers]
            stack.callback(setattr, trainer, "loggers", loggers)
            wrapped = getattr(trainer.strategy, "_lightning_optimizers", [])  # what `self.optimizers()` gives
            for raw, outer in zip(trainer.optimizers, wrapped, strict=True):
                for each in (raw, outer):
                    stack.enter_context(_attribute(each, "step", reached.stand_in(raw)))
            for config in trainer.lr_scheduler_configs:
                stack.enter_context(_attribute(config.scheduler, "step", _nothing))
            yield


class _Steps:
    """Stand-ins for the `step` of optimizers; the one that is replayed ends the replay.

    Args:
        optimizer: whose step is replayed.
        num_before: how often it stepped in the last micro-batch before.
        passed: called at each step but that one.
    """

    def __init__(self, optimizer: Optimizer, num_before: int, passed: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._passed = passed
        self._num_left = num_before
        self.is_last = False

    def stand_in(self, optimizer: Optimizer) -> Callable[..., Any]:
        """What to call instead of an optimizer's `step`."""

        def step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if optimizer is self._optimizer and self.is_last:
                if not self._num_left:
                    raise _StepReached
                self._num_left -= 1
            self._passed()
            return loss

        return step


def _exchange_parameters_(module: nn.Module) -> None:
    """Give a module new parameters in the memory of its own, until its attributes are put back.

    Hooks of whoever reduces gradients between ranks hang on the own ones.
    """
    others: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, own in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            other = others.setdefault(id(own), nn.Parameter(own.detach(), own.requires_grad))
            setattr(owner, name, other)  # as users do: recurrent layers keep a list of theirs beside


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for what must not happen twice."""


@contextlib.contextmanager
def _attribute(target: object, name: str, value: object) -> Iterator[None]:
    """An attribute of one object that hides its method for a time."""
    own = vars(target)
    before = own.get(name, _nothing)
    own[name] = value
    try:
        yield
    finally:
        if before is _nothing:
            del own[name]
        else:
            own[name] = before


def compare(replayed: Replayed, parameters: Sequence[Tensor]) -> tuple[bool, float | None]:
    """Whether a replay gave the gradients that parameters have, and the relative error of the finite elements."""
    return compare_gradients(replayed.gradients, parameters)


def average_over_ranks_(replayed: Replayed, parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Do what DDP does to gradients, to those of a replay. A collective for each parameter that has one on all ranks."""
    for parameter in parameters:
        if parameter.grad is not None:
            own = replayed.gradients.get(id(parameter))
            whole = torch.zeros_like(parameter) if own is None else own.clone()
            replayed.gradients[id(parameter)] = ranks.sum_(whole) / ranks.size
