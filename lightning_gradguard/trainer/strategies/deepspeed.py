"""DeepSpeed. With ZeRO 1, 2 and 3 gradients and the step are its own, each rank's part of them in a partition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.layout import clean_name
from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import Scaling
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.record import Record
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.strategies.base import MasterWeights
from lightning_gradguard.trainer.strategies.zero import Stage3Masters, Stage12Masters, ZeroScaling, ZeroStep

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


_ZERO_12, _ZERO_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"


class DeepSpeed:
    """Gradients are pieces of DeepSpeed's partitions, there to be read from the end of a window until the step.

    DeepSpeed calls no hook around its step, but passes over a step by itself when gradients are not finite. So a skip
    writes NaN into the partitions, and DeepSpeed counts it among its `skipped_steps`. In stage 0, without ZeRO, gradients
    and optimizer are torch's own, and the Trainer's hook at each micro-batch is the only difference.

    Args:
        trainer: the Trainer.
    """

    no_replay: str | None = "a backward pass outside of DeepSpeed's engine would mix with the gradients that it has gathered"
    saves_folders = True

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._step: ZeroStep | None = None

    @property
    def _engine(self) -> Any:
        return self._trainer.strategy.model

    @property
    def _uses_zero(self) -> bool:
        return bool(_kinds_of(self._engine.optimizer) & {_ZERO_12, _ZERO_3})

    @property
    def has_whole_weights(self) -> bool:
        """Up to stage 2."""
        return _ZERO_3 not in _kinds_of(self._engine.optimizer)

    @property
    def scaling(self) -> Scaling | None:
        """In fp16 DeepSpeed keeps the loss scale, and takes it out of gradients inside its step."""
        return ZeroScaling(self._engine.optimizer) if self._engine.fp16_enabled() else None

    @property
    def master_weights(self) -> MasterWeights | None:
        """The partitions in fp32; none in stage 0."""
        if not self._uses_zero:
            return None
        zero = self._engine.optimizer
        masters: MasterWeights = Stage3Masters(zero) if _ZERO_3 in _kinds_of(zero) else Stage12Masters(zero)
        return masters

    def refuse_settings(self, settings: Settings) -> None:
        """By DeepSpeed's config, before a large model is loaded for nothing."""
        config: Any = self._trainer.strategy.config  # type: ignore[attr-defined]
        offload = _section(_section(config, "zero_optimization"), "offload_optimizer")
        clipping = config.get("gradient_clipping") if isinstance(config, dict) else None
        _refuse(
            settings,
            gradient_clipping=clipping if isinstance(clipping, (int, float)) else 0.0,
            is_fp16=self._trainer.precision in ("16-mixed", "16-true") or bool(_section(config, "fp16").get("enabled")),
            is_on_disk=offload.get("device") == "nvme",
        )

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings) -> None:
        """By what DeepSpeed has made of its config."""
        (optimizer,) = optimizers
        engine = self._engine
        if not (self._uses_zero or optimizer is engine.basic_optimizer):
            raise ConflictError(
                "DeepSpeed's `zero_optimization` must be of stage 1, 2 or 3 for GradGuard in bf16 and fp16, got an "
                f"optimizer of type {type(optimizer).__name__}, whose gradients it can't find. Stage 1 trains alike."
            )
        _refuse(
            settings,
            gradient_clipping=engine.gradient_clipping(),
            is_fp16=engine.fp16_enabled(),
            is_on_disk=getattr(optimizer, "swap_optimizer", False),
        )

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """A piece of each parameter that DeepSpeed trains; in stage 0 the parameters themselves."""
        uses_zero = self._uses_zero
        step = self._step = self._step or ZeroStep(self._engine)
        for name, parameter in module.named_parameters():
            if not uses_zero:
                yield name, parameter
            elif parameter.requires_grad:
                yield clean_name(name), step.piece_of(parameter)

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:
        """All: there is one optimizer, and what it holds are flat partitions."""
        return WatchedParameters(self.named_parameters(module), None if self._uses_zero else optimizer, only)

    def note(self, record: Record) -> None:
        """A skip that no overflow is the reason of tells DeepSpeed nothing about its loss scale."""
        if self._step is not None and record.decision.skip and not record.measurement.is_scaler_overflow:
            self._step.keep_scale()

    def is_step(self) -> bool:
        """The Trainer calls for each micro-batch; at the end of a window DeepSpeed steps."""
        return self._step is not None and self._step.open()


def _kinds_of(optimizer: Any) -> set[str]:
    return {cls.__name__ for cls in type(optimizer).__mro__}


def _section(config: Any, name: str) -> dict[str, Any]:
    """A part of DeepSpeed's config; empty where there is none, or none that DeepSpeed would take."""
    found = config.get(name) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _refuse(settings: Settings, *, gradient_clipping: float, is_fp16: bool, is_on_disk: bool) -> None:
    """What DeepSpeed does in a place that can't be reached, or does itself already."""
    if is_on_disk:
        raise ConflictError(
            "DeepSpeed's `offload_optimizer.device` must be 'cpu' or 'none' for GradGuard, got 'nvme': each look at a "
            "gradient would read it from the disk."
        )
    if settings.histograms_of == "clipped" and gradient_clipping > 0.0:
        raise ConflictError(
            "`histograms_of` must be 'raw' where DeepSpeed clips, got 'clipped': what comes of that is not seen. Let "
            "GradGuard clip, by `clip`, instead of DeepSpeed's `gradient_clipping`."
        )
    if settings.clipper is None:
        return
    if gradient_clipping > 0.0:
        raise ConflictError(
            f"DeepSpeed's `gradient_clipping` must be unset where GradGuard clips, got {gradient_clipping!r}: gradients "
            "would be clipped twice. Remove it from DeepSpeed's config, or `clip` from GradGuard."
        )
    if is_fp16:
        raise ConflictError(
            "`clip` must be None under DeepSpeed in fp16: gradients are still multiplied by the loss scale, in 16 bits, "
            "until DeepSpeed's own step. Set DeepSpeed's `gradient_clipping` instead, or use bf16."
        )
