"""What people are told: an alert, the parameters that stand out, and who is to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from lightning_gradguard.policy import Action

KINDS = ("nonfinite", "explosion", "vanishing", "overflow", "update_ratio", "rollback", "snapshot", "checkpoint")
"""Kinds of alerts that are not a user's own detector's."""

KEPT = " It is kept for `gradguard replay "
"""Begins the last sentence of a message about a step that is written to a file."""


@dataclass(frozen=True)
class ParameterReport:
    """One parameter that stands out. Reads like its line of JSON too: `report["name"]`.

    Attributes:
        name: its name in the model.
        norm: 2-norm of its gradient.
        num_nan: NaN elements in its gradient; 1 for at least one where a GPU has decided by itself.
        num_inf: infinite elements in its gradient; 0 where they could not be counted.
    """

    name: str
    norm: float
    num_nan: int = 0
    num_inf: int = 0

    def keys(self) -> tuple[str, ...]:
        """Field names, so that `dict(report)` works."""
        return tuple(entry.name for entry in fields(self))

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass(frozen=True)
class Frame:
    """A call in the user's code, or in a library that it uses.

    Attributes:
        file, line, source: where it is.
        function: its name, with the class of its `self`, as `Model.loss`.
    """

    file: str
    line: int
    function: str
    source: str = ""


@dataclass(frozen=True)
class Culprit:
    """Who made the damage, as far as it could be found.

    Attributes:
        phase: "data", "weights", "forward" or "backward".
        module: path in the LightningModule, "" for code in `training_step` itself; the batch leaf, as
            `batch['x']`, for data; the parameter's or buffer's name for weights.
        op: aten operator or autograd node.
        file, line, source: the line of code.
        samples: bad rows of the batch, where they are certain; None: it is not single ones, or it can't be told.
        rank: the process.
        reproduced: whether a replay gave the same gradients.
        error: relative error of the replayed gradients.
        message: one sentence.
        remedy: what to try.
        inputs: what went into the operator, in words: type, shape and range of each tensor.
        before: the operators before it and what came out of them, in words, oldest first.
        cause: why gradients vanish or explode, in a word ("saturation", "rate", "sample", ...); "" for NaN and Inf.
        factors: lines of a Markdown table: what each layer multiplies the gradient by.
        probable_samples: rows of the batch that are bad as far as can be guessed; None where they are certain, or not known.
        frames: the calls that led to the line, innermost first, up to five: your own code, then one for each library.
    """

    phase: str
    module: str = ""
    op: str = ""
    file: str | None = None
    line: int | None = None
    source: str | None = None
    samples: tuple[int, ...] | None = None
    rank: int = 0
    reproduced: bool = False
    error: float | None = None
    message: str = ""
    remedy: str = ""
    inputs: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    cause: str = ""
    factors: tuple[str, ...] = ()
    probable_samples: tuple[int, ...] | None = None
    frames: tuple[Frame, ...] = ()

    @property
    def in_words(self) -> str:
        """As messages say it."""
        if self.cause:
            return f"cause: {self.cause}; {self.message}"
        source = f" (`{self.source}`)" if self.source else ""
        return f"culprit: {self.message}{source}"


@dataclass(frozen=True)
class Alert:
    """One finding, as it is reported.

    Attributes:
        time: seconds since the epoch (Unix time).
        step: number of the decision, from 0.
        epoch, batch_idx: where in the Trainer's loop; None in a raw loop. Where several batches make a step, it is the
            batch of `micro_batch`.
        micro_batch: the backward pass inside the step, from 0.
        optimizer: index of the optimizer.
        rank: the process that saw it first.
        kind: "nonfinite", "explosion", "vanishing", "overflow" or your detector's name.
        action: what was done.
        value, limit: what was found and what would have been in order.
        parameters: worst offenders first.
        culprit: who made it; None until forensics found one.
        message: one sentence a person can act on.
        remedy: what to try.
    """

    time: float
    step: int
    epoch: int | None
    batch_idx: int | None
    micro_batch: int
    optimizer: int
    rank: int
    kind: str
    action: Action
    value: float
    limit: float
    parameters: tuple[ParameterReport, ...]
    culprit: Culprit | None
    message: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON allows it: NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".

        `float()` reads them back.
        """
        return {key: jsonable(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Alert:
        """The other way round, of a dictionary that may come from another version or from a stranger.

        Fields that are not known are passed over, and those that are missing have no value, except the four that make an
        alert: `step`, `kind`, `action` and `message`.

        Raises:
            ValueError: if one of these is missing, or a field is of a wrong type; it names the field.

        >>> Alert.from_dict({"step": 3, "kind": "nonfinite", "action": "skip", "message": "NaN.", "value": "NaN"}).value
        nan
        """
        return cls(**{**_NOT_KNOWN, **_fields_of(cls, content, required=("step", "kind", "action", "message"))})


_NOT_KNOWN: Mapping[str, Any] = {
    "time": math.nan,
    "epoch": None,
    "batch_idx": None,
    "micro_batch": 0,
    "optimizer": 0,
    "rank": 0,
    "value": math.nan,
    "limit": math.nan,
    "parameters": (),
    "culprit": None,
    "remedy": "",
}


def _fields_of(cls: type, content: Any, *, required: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The values of those fields of a dataclass that a dictionary has; required are those without a default, or these."""
    if not isinstance(content, Mapping):
        raise ValueError("it has no fields")
    values = {}
    for entry in fields(cls):
        if entry.name not in content:
            if entry.default is MISSING if required is None else entry.name in required:
                raise ValueError(f"`{entry.name}` is missing")
            continue
        try:
            values[entry.name] = _CONVERTERS[str(entry.type)](content[entry.name])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"`{entry.name}` is not valid") from None
    return values


def _number(value: Any) -> float:
    if type(value) not in (int, float) and value not in ("NaN", "Infinity", "-Infinity"):
        raise ValueError
    return float(value)


def _exactly(of_type: type) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        if type(value) is not of_type:
            raise ValueError
        return value

    return checked


def _or_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _all(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def converted(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(convert(entry) for entry in value)

    return converted


def _made(cls: type) -> Callable[[Any], Any]:
    return lambda value: cls(**_fields_of(cls, value))


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "Action": Action,
    "Culprit | None": _or_none(_made(Culprit)),
    "bool": _exactly(bool),
    "float": _number,
    "float | None": _or_none(_number),
    "int": _exactly(int),
    "int | None": _or_none(_exactly(int)),
    "str": _exactly(str),
    "str | None": _or_none(_exactly(str)),
    "tuple[Frame, ...]": _all(_made(Frame)),
    "tuple[ParameterReport, ...]": _all(_made(ParameterReport)),
    "tuple[int, ...] | None": _or_none(_all(_exactly(int))),
    "tuple[str, ...]": _all(_exactly(str)),
}
"""What is made of a value, by the annotation of its field."""


def jsonable(value: Any) -> Any:
    """A tree as strict JSON allows it; see `Alert.to_dict`."""
    if isinstance(value, Action):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return value
