"""Replays a bundle on a module, without a Trainer, and says again who is to blame."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.forensics.flow.evidence import Evidence
from lightning_gradguard.forensics.flow.explosion_causes import explosion_causes, top_row, with_row_replaced
from lightning_gradguard.forensics.flow.flow import Flow, FlowMeter
from lightning_gradguard.forensics.flow.norm_history import usual_of
from lightning_gradguard.forensics.flow.report import culprit_of as culprit_of_cause
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_causes
from lightning_gradguard.forensics.nonfinite.layout import layout_of
from lightning_gradguard.forensics.nonfinite.report import culprit_of
from lightning_gradguard.forensics.nonfinite.samples import Batch, exchanged
from lightning_gradguard.forensics.nonfinite.search import Search
from lightning_gradguard.forensics.nonfinite.suspects import suspects_of
from lightning_gradguard.forensics.state import unchanged


class Trainable(Protocol):
    """What a replay needs of a module; a LightningModule with automatic optimization has it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss, or a dictionary with it."""


@dataclass(frozen=True)
class Rerun:
    """What a replay gave.

    Attributes:
        losses: of each micro-batch.
        norm: of all gradients.
        culprit: who is to blame; None if nothing was found.
    """

    losses: tuple[float, ...]
    norm: float
    culprit: Culprit | None


def rerun(module: nn.Module, bundle: Bundle) -> Rerun:
    """Replay; the module's weights become those of the bundle, if it has them. It runs on the CPU.

    Raises:
        ValueError: if module and bundle don't fit together.
    """
    _check(module, bundle)
    if bundle.model is not None:
        module.load_state_dict(bundle.model)
    module.train()
    for part in module.modules():
        for name in ("log", "log_dict", "print"):
            vars(part)[name] = _nothing
    kind = bundle.alert["kind"]
    if kind == "nonfinite" or any(parameter["num_nan"] or parameter["num_inf"] for parameter in bundle.alert["parameters"]):
        return _follow(module, bundle)
    return _measure(module, bundle, kind)


def _check(module: nn.Module, bundle: Bundle) -> None:
    if not callable(getattr(module, "training_step", None)):
        raise ValueError(
            f"The module must have a `training_step(batch, batch_idx)` that returns the loss, got {type(module).__name__}. "
            "Have the function after `--module` return your LightningModule."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "A module with manual optimization can only be replayed by its Trainer. The alert is in the bundle."
        )
    if not bundle.batches:
        raise ValueError(f"The bundle holds no batches, so there is nothing to replay: {'; '.join(bundle.left_out)}.")


def _follow(module: nn.Module, bundle: Bundle) -> Rerun:
    """Who made the damage."""
    search = Search(module, follow_rows=True)
    losses, norm = _run(module, bundle.batches, lambda entry: search.watch(entry["batch"]), is_raised=True)
    blame = search.blame
    culprit = None if blame is None else culprit_of(blame, suspects_of(blame, search.layout, search.rows, None))
    return Rerun(losses, norm, culprit)


def _measure(module: nn.Module, bundle: Bundle, kind: str) -> Rerun:
    """Why gradients vanish or explode."""
    meters: list[FlowMeter] = []

    @contextmanager
    def watch(entry: dict[str, Any]) -> Iterator[None]:
        meters.append(FlowMeter(module, Batch.of(entry["batch"]).size))
        with meters[-1].watch():
            yield

    losses, norm = _run(module, bundle.batches, watch)
    flow = meters[-1].flow
    healthy_flow: Flow | None = None
    healthy_norm = None
    if bundle.healthy is not None:
        _, healthy_norm = _run(module, [{**bundle.batches[-1], "batch": bundle.healthy}], watch)
        healthy_flow = meters[-1].flow
    evidence = Evidence(
        bundle.alert["step"],
        flow,
        norm,
        healthy_flow,
        healthy_norm,
        *_without_row(module, bundle, flow),
        usual=usual_of(bundle.healthy_norms),
        weight_growths=bundle.weights_have_moved(),
        is_from_start=bundle.is_from_start,
        silent=tuple(parameter["name"] for parameter in bundle.alert["parameters"] if parameter["norm"] == 0.0),
    )
    causes = vanishing_causes(evidence) if kind == "vanishing" else explosion_causes(evidence)
    return Rerun(losses, norm, culprit_of_cause(causes, flow, rank=0, error=None, tolerance=0.0))


def _without_row(module: nn.Module, bundle: Bundle, flow: Flow) -> tuple[float | None, bool | None]:
    """The gradient's norm with the row that counts most replaced by another, and whether that one counts most then."""
    found = top_row(flow)
    if found is None or len(bundle.batches) != 1:
        return None, None
    (entry,) = bundle.batches
    row, _, size = found
    try:
        layout = layout_of(entry["batch"])
        if layout.size != size:
            return None, None
        rest = exchanged(entry["batch"], layout, with_row_replaced(row, size))
        meter = FlowMeter(module, size)
        _, norm = _run(module, [{**entry, "batch": rest}], lambda _: meter.watch())
    except Exception:  # noqa: BLE001 - a batch whose rows can't be exchanged names no single one
        return None, None
    again = top_row(meter.flow)
    return norm, again is not None and again[0] == row


def _run(
    module: nn.Module, batches: list[dict[str, Any]], watch: Any, *, is_raised: bool = False
) -> tuple[tuple[float, ...], float]:
    losses = []
    with unchanged(module), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        for entry in batches:
            try:
                with watch(entry):
                    torch.set_rng_state(entry["rng"])
                    output = cast("Trainable", module).training_step(entry["batch"], entry["batch_idx"])
                    loss: Tensor = output["loss"] if isinstance(output, dict) else output
                    (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            except Exception:  # noqa: PERF203 - one for each micro-batch of a single step
                if not is_raised:
                    raise
                losses.append(math.nan)  # as the guard has counted it
            else:
                losses.append(float(loss.detach()))
        norms = [float(it.grad.double().norm()) for it in module.parameters() if it.grad is not None]
    return tuple(losses), math.hypot(*norms) if norms else 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    """There is nothing to log to."""
