"""A method of one object replaced for a time, without a trace on copies and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StandIn:
    """Stands in for a method of one object; a function is called instead, with the method as its first argument.

    A deep copy of the object, or one that was pickled, has its own method again. Attributes are those of the method, since
    some callers look for marks on it.

    Args:
        target: whose method.
        name: of the method, or of an attribute that somebody else has put in its place.
        function: what is called instead.
    """

    def __init__(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        self._target = target
        self._name = name
        self._function = function
        self._own = vars(target).get(name)
        self._method = getattr(target, name)
        self._is_removed = False
        setattr(target, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method is called."""
        return self._method(*args, **kwargs) if self._is_removed else self._function(self._method, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        # torch's schedulers wrap the function of `optimizer.step`, and bind that to the optimizer themselves.
        def function(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_method" not in vars(self):
            raise AttributeError(name)
        return getattr(self._method, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._target, self._name)

    def remove(self) -> None:
        """Put back what was there. Where somebody has wrapped this in the meantime the wrapper stays; calls pass through."""
        self._is_removed = True
        if vars(self._target).get(self._name) is not self:
            return
        if self._own is None:
            delattr(self._target, self._name)
        else:
            setattr(self._target, self._name, self._own)
