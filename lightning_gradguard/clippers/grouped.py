"""Different clipping for different parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lightning_gradguard.clippers.base import Clipped, Clipper, clipped_to
from lightning_gradguard.clippers.norm import ClipNorm
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.measure.gradients import Gradients, total
from lightning_gradguard.measure.name_filter import refuse_idle_patterns


class Grouped(Clipper):
    """Clips each group of parameters by its own rule, as if the others were not there.

    A parameter belongs to the first pattern that its name matches; one that matches none is not clipped. What a rule
    takes for the global norm is the norm of its group.

    Args:
        groups: from fnmatch patterns to what clips: a clipper, a number (largest norm of the group), or None for nothing. In
            a guard, `clip={...}` means this.

    Raises:
        ValueError: if it is not such a mapping.

    >>> from lightning_gradguard import AGC
    >>> Grouped({"encoder.*": 1.0, "head.*": AGC()})
    Grouped({'encoder.*': ClipNorm(max_norm=1.0, norm_type=2.0), 'head.*': AGC(clip_factor=0.01, eps=0.001, exclude=())})
    """

    def __init__(self, groups: Mapping[str, float | Clipper | None]) -> None:
        if not isinstance(groups, Mapping) or not groups or not all(isinstance(pattern, str) for pattern in groups):
            raise ValueError(
                f"`groups` must map at least one pattern of names to what clips, got {groups!r}. "
                'For example `{"encoder.*": ClipNorm(1.0), "head.*": AGC()}`.'
            )
        self.groups = {pattern: _to_clipper(pattern, clipper) for pattern, clipper in groups.items()}
        self._pattern_of: dict[str, str | None] = {}

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Clip each group in place; a sync, and those of the clippers on a GPU."""
        norms = gradients.tensor_norms().cpu()
        members: dict[str | None, list[int]] = {}
        for index, name in enumerate(gradients.names):
            members.setdefault(self._find(name), []).append(index)
        # With sharded gradients all ranks have to go through all groups, also one that is empty here.
        done = [
            clipper.clip_(gradients.select(members.get(pattern, [])), total(norms[members.get(pattern, [])], 2.0))
            for pattern, clipper in self.groups.items()
            if clipper is not None
        ]
        gradients.measured = None
        before = float(global_norm)
        if all(clipped.coef == 1.0 for clipped in done):
            return Clipped(coef=1.0, norm=before)
        is_left = {pattern for pattern, clipper in self.groups.items() if clipper is None} | {None}
        left = [float(norms[index]) for pattern in is_left for index in members.get(pattern, [])]
        return clipped_to(before, [*(clipped.norm for clipped in done), *sorted(left)])

    def check(self, names: Sequence[str]) -> None:
        """See that each pattern says something about these names.

        Raises:
            ValueError: if one matches none of them.
        """
        refuse_idle_patterns("clip", self.groups, names)

    def state_dict(self) -> dict[str, Any]:
        """That of each group's clipper, by pattern."""
        return {
            pattern: {"type": type(clipper).__qualname__, "state": clipper.state_dict()}
            for pattern, clipper in self.groups.items()
            if clipper is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; a group that was not there then starts afresh, with a warning."""
        for pattern, clipper in self.groups.items():
            if clipper is None:
                continue
            kind = type(clipper).__qualname__
            saved = state.get(pattern)
            if saved is not None and saved["type"] == kind:
                clipper.load_state_dict(saved["state"])
                continue
            before = "nothing" if saved is None else saved["type"]
            warnings.warn(
                f"The checkpoint holds {before} for the clipper of `{pattern}`, which is {kind} now. "
                "It starts without history.",
                GuardWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"Grouped({self.groups})"

    def _find(self, name: str) -> str | None:
        if name not in self._pattern_of:
            matching = (pattern for pattern in self.groups if fnmatchcase(name, pattern))
            self._pattern_of[name] = next(matching, None)
        return self._pattern_of[name]


def _to_clipper(pattern: str, clipper: float | Clipper | None) -> Clipper | None:
    if clipper is None:
        return None
    if isinstance(clipper, Clipper):
        # A clipper that is named twice would mix two histories.
        return copy.deepcopy(clipper)
    if isinstance(clipper, bool) or not isinstance(clipper, (int, float)):
        raise ValueError(
            f"`clip` for `{pattern}` must be a number (the group's largest norm), a Clipper or None, got {clipper!r}. "
            f'For example `{{"{pattern}": 1.0}}`.'
        )
    try:
        return ClipNorm(clipper)
    except ValueError as error:
        raise ValueError(str(error).replace("`max_norm`", f"`clip` for `{pattern}`", 1)) from None
