"""The two packages that Lightning comes in: `lightning` and `pytorch-lightning`. This module alone imports them.

They hold the same code under two names, and the classes of one are strangers to the other: an `isinstance` that knows only
one is wrong in the other's Trainer. So an object is compared with the classes of every package that is loaded, and what is
called comes from the package of the Trainer that it is called for. For annotations either will do: under `TYPE_CHECKING`
other modules import from `lightning`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from lightning_gradguard.sinks.bars import bars_aside

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.loggers import Logger

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""Where `Trainer` is imported from; the first is taken if both are installed and neither is loaded."""

_CALLER = 5
"""Frames from Lightning's own call of `logging` up to the caller of `rank_zero_info` here."""


def is_of_lightning(cls: type) -> bool:
    """Whether a class is defined by Lightning itself."""
    return cls.__module__.startswith(("lightning.", "pytorch_lightning."))


def is_lightning_module(value: object) -> TypeGuard[pl.LightningModule]:
    """Whether it is a `LightningModule`."""
    return isinstance(value, classes("LightningModule"))


def is_checkpoint(callback: object) -> TypeGuard[Checkpoint]:
    """Whether a callback saves checkpoints."""
    return isinstance(callback, classes("callbacks.Checkpoint"))


def is_no_optimizer(optimizer: object) -> bool:
    """Whether it only stands in for one, because `configure_optimizers` has returned None."""
    return isinstance(optimizer, classes("core.optimizer._MockOptimizer"))


def is_left_to_the_module(fetcher: object) -> bool:
    """Whether batches are fetched by `training_step(dataloader_iter)`, and not by the Trainer."""
    return isinstance(fetcher, classes("loops.fetchers._DataLoaderIterDataFetcher"))


def takes_argument(hook: Callable[..., Any], name: str, *, explicit: bool = False, min_args: int | None = None) -> bool:
    """Whether the Trainer passes an argument to a hook.

    Args:
        hook: a method.
        name: of the argument.
        explicit: whether `*args` does not count.
        min_args: number of arguments from which on it is passed whatever its name.
    """
    # The same function in all of them: it looks at the signature alone.
    is_in_signature = _find(_loaded()[0], "utilities.signature_utils.is_param_in_hook_signature")
    return bool(is_in_signature(hook, name, explicit=explicit, min_args=min_args))


def dummy_logger(trainer: pl.Trainer) -> Logger:
    """A logger of the Trainer's package that writes nothing."""
    logger: Logger = of_trainer(trainer, "loggers.logger.DummyLogger")()
    return logger


def tell_of_checkpoint(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Call `on_load_checkpoint` of all callbacks, and let them load their states, as the Trainer does."""
    of_trainer(trainer, "trainer.call._call_callbacks_on_load_checkpoint")(trainer, checkpoint)


def rank_zero_info(message: str) -> None:
    """Write to Lightning's log, on the first rank."""
    # The two share this function, and the rank that it knows; which of their logs it writes to, the one loaded last decides.
    with bars_aside():
        _find(_loaded()[0], "utilities.rank_zero_info")(message, stacklevel=_CALLER)


def silences_loggers() -> bool:
    """Whether Lightning's loggers stand for nothing in this process, since its rank is not the first's.

    Not what the Trainer says of itself: each process that DDP starts runs the whole script again, and in it a fit on one
    device, too, whose Trainer believes to be the first.
    """
    return bool(_find(_loaded()[0], "utilities.rank_zero_only").rank)


def classes(path: str) -> tuple[type, ...]:
    """A class of every loaded package, for `isinstance`.

    Args:
        path: where it is below the package, as "callbacks.Checkpoint".
    """
    return _classes_of(path, tuple(_loaded()))


@cache
def _classes_of(path: str, packages: tuple[str, ...]) -> tuple[type, ...]:
    # Asked for at each step, and the other package may be loaded later.
    return tuple(_find(package, path) for package in packages)


def of_trainer(trainer: pl.Trainer, path: str) -> Any:
    """A class or function of the Trainer's own package.

    Args:
        trainer: whose package.
        path: where it is below the package, as "callbacks.Checkpoint".
    """
    package = next(package for package in _loaded() if isinstance(trainer, _find(package, "Trainer")))
    return _find(package, path)


def _find(package: str, path: str) -> Any:
    module, _, name = f"{package}.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def _loaded() -> list[str]:
    """The packages that are loaded, at least one. One that nobody uses costs seconds to import, so the other stays out."""
    return [package for package in PACKAGES if sys.modules.get(package) is not None] or [_import_first()]


def _import_first() -> str:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:  # noqa: PERF203 - two packages
            if not f"{package}.".startswith(f"{error.name}."):  # it is installed, and something that it needs is not
                raise
        else:
            return package
    raise ModuleNotFoundError(
        "GradGuard needs `lightning` or `pytorch-lightning`, got neither; extras of these names bring one: "
        'pip install "lightning-gradguard[lightning]". `Guard`, for a loop of your own, needs neither.',
        name=PACKAGES[0],
    )


if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback  # noqa: PLC0414 - exported from here
    from lightning.pytorch.utilities.exceptions import (  # type: ignore[attr-defined]  # where both packages have it
        MisconfigurationException as MisconfigurationException,  # noqa: PLC0414 - exported from here
    )
else:

    class _OfAllPackages:
        """Makes its subclass a subclass of every loaded package's own class, of one that is loaded later included.

        With both installed nobody knows at import which one a user will take: `from lightning_gradguard import GradGuard`
        mostly comes first. By the time an instance is made, the package of its Trainer is loaded.
        """

        def __new__(cls, *_args: Any, **_settings: Any) -> Any:
            base = next(each for each in cls.__mro__ if "_PATH" in vars(each))
            missing = tuple(other for other in classes(base._PATH) if not issubclass(base, other))
            if missing:
                # A user's subclass may have its bases in an order that leaves no room for another.
                with suppress(TypeError):
                    base.__bases__ += missing
            return super().__new__(cls)

    class Callback(_OfAllPackages, *classes("Callback")):
        """Base of a callback for a Trainer of either package."""

        _PATH = "Callback"

    class MisconfigurationException(_OfAllPackages, *classes("utilities.exceptions.MisconfigurationException")):
        """Base of an error that is Lightning's own in either package."""

        _PATH = "utilities.exceptions.MisconfigurationException"
