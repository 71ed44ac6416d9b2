"""What the figures of a record are called in a logger, and what they mean."""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

import numpy as np

from lightning_gradguard.layout import Floats
from lightning_gradguard.record import Measurement, Position, Record

DESCRIPTIONS = {
    "global_norm": "2-norm over all gradients of the optimizer, before clipping.",
    "clipped_norm": "The same norm after clipping.",
    "clip_coef": "Norm after clipping over norm before, in (0, 1]; 1 means that nothing was clipped.",
    "global_norm_1": "Sum of the magnitudes of all gradient elements of the optimizer (1-norm), before clipping.",
    "global_norm_inf": "Largest magnitude of a gradient element of the optimizer (infinity norm), before clipping.",
    "explosion_limit": "Global norm above which a step counts as an explosion.",
    "limit_ratio": "That limit over the global norm; a step at 1 or below counts as an explosion.",
    "num_skipped": "Optimizer steps passed over so far.",
    "num_clipped": "Steps so far whose gradients were made smaller.",
    "num_alerts": "Findings reported so far.",
    "learning_rate": "Learning rate, the largest of the optimizer's groups.",
    "weight_norm": "2-norm of all weights of the optimizer, before the step.",
    "update_ratio": "2-norm of what the step before has changed of the weights, over their 2-norm; estimated from a sample.",
    "num_zero": "Gradient elements that are exactly zero, over all parameters.",
    "num_nan": "Gradient elements that are NaN, over all parameters.",
    "num_inf": "Gradient elements that are infinite, over all parameters.",
    "log10_norms": "log10 of the gradient norms of all parameters, one sample each.",
    "alerts": "What was found, what was done, and what to try.",
}


_NORMS = {None: "2-norm", "1": "Sum of the magnitudes (1-norm)", "inf": "Largest magnitude (infinity norm)"}

LoggedNorms = Literal["totals", "groups", "all"]
"""Of what norms are logged: the whole model only, groups of modules, too, or each parameter as well."""
LOGGED_NORMS: tuple[str, ...] = get_args(LoggedNorms)


def description(tag: str) -> str:
    """What a tag shows, for TensorBoard's information icon.

    >>> description("gradguard/norm/encoder.0")
    '2-norm of the gradients of encoder.0, before clipping.'
    """
    of_group = re.search(r"/norm(?:_(1|inf))?/(.+)", tag)
    if of_group:
        norm_type, group = of_group.groups()
        return f"{_NORMS[norm_type]} of the gradients of {group}, before clipping."
    return DESCRIPTIONS.get(tag.rpartition("/")[2], "")


def tag_prefix(position: Position) -> str:
    """`gradguard`, or `gradguard/<n>` where there are several optimizers."""
    return "gradguard" if position.num_optimizers == 1 else f"gradguard/{position.optimizer}"


def scalars(record: Record, norms: LoggedNorms = "groups") -> dict[str, float]:
    """The scalars of a record by tag without prefix. What isn't there, a limit or what others clip, is left out."""
    measurement, totals = record.measurement, record.totals
    values: dict[str, float] = {
        "global_norm": measurement.global_norm,
        "num_skipped": totals.num_skipped,
        "num_alerts": totals.num_alerts,
    }
    if record.clip_coef is not None and record.clipped_norm is not None:
        values |= {
            "clipped_norm": record.clipped_norm,
            "clip_coef": record.clip_coef,
            "num_clipped": totals.num_clipped,
        }
    of_weights = {
        "learning_rate": measurement.learning_rate,
        "weight_norm": measurement.weight_norm,
        "update_ratio": measurement.update_ratio,
    }
    values |= {name: figure for name, figure in of_weights.items() if figure is not None}
    if math.isfinite(record.explosion_limit):
        values["explosion_limit"] = record.explosion_limit
    if math.isfinite(record.limit_ratio):
        values["limit_ratio"] = record.limit_ratio
    values |= _of_parts("norm", measurement, measurement.norms, 2.0, norms)
    for norm_type, found in measurement.other_norms.items():
        suffix = f"_{norm_type:g}"
        values[f"global_norm{suffix}"] = float(np.linalg.norm(found, norm_type)) if len(found) else 0.0
        values |= _of_parts(f"norm{suffix}", measurement, found, norm_type, norms)
    if record.histograms is not None:
        values["num_zero"] = float(record.histograms.num_zero.sum())
        values["num_nan"] = float(record.histograms.num_nan.sum())
        values["num_inf"] = float(record.histograms.num_inf.sum())
    return values


def _of_parts(tag: str, measurement: Measurement, found: Floats, norm_type: float, norms: LoggedNorms) -> dict[str, float]:
    """Norms of groups and parameters from those of all parameters."""
    layout = measurement.layout
    values: dict[str, float] = {}
    if norms != "totals":
        for partition in (layout.groups, layout.subgroups):
            of_groups = partition.norms(found, norm_type).tolist()
            values |= {f"{tag}/{name}": norm for name, norm in zip(partition.names, of_groups, strict=True)}
    if norms == "all":
        values |= {f"{tag}/{layout.names[index]}": float(found[index]) for index in np.flatnonzero(measurement.has_grad)}
    return values
