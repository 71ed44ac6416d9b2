"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    Args:
        number: how many.
        noun: what, in the singular.
        plural: the same in the plural; "": with an s.

    >>> counted(1, "alert"), counted(1200, "batch", "batches")
    ('1 alert', '1,200 batches')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
