"""What a caller gives `expires`, checked; only when a block is entered off the quiet path."""

from __future__ import annotations

from collections.abc import Hashable
from math import inf
from types import CodeType


def checked_limit(after: object) -> float:
    """Return a block's limit in seconds.

    Raises:
        ValueError, TypeError: `after` is none: the caller's fault.
    """
    try:
        if isinstance(after, str | bytes):
            raise TypeError
        limit = float(after)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"after must be a number of seconds, not {type(after).__name__}: "
            "for a timedelta, give its total_seconds()"
        ) from None
    except OverflowError:
        limit = inf
    if not 0 < limit < inf:
        raise ValueError(
            f"after must be positive and finite, not {after!r:.40}: "
            "leave the block out if it may take for ever"
        )
    return limit


def checked_scope(scope: Hashable) -> str:
    """Return a block's name as the caller gave it.

    Raises:
        ValueError, TypeError: `scope` is none: the caller's fault.
    """
    if not isinstance(scope, str):
        raise TypeError(f"scope must be a string or None, not {type(scope).__name__}")
    if not scope:
        raise ValueError("scope must not be empty: leave it out for <file>#<line>")
    return scope


def place(code: CodeType, address: object) -> str:
    """Return ``<file>#<line>`` of the instruction at `address`, which is in `code`."""
    assert isinstance(address, int)
    return f"{code.co_filename}#{_line(code, address - id(code))}"


def _line(code: CodeType, instruction: int) -> int:
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return line


def check_client(client: object) -> None:
    """Raise TypeError if `client` can't be a timer client: the caller's fault."""
    for method in ("acquire", "release"):
        if not callable(getattr(client, method, None)):
            raise TypeError(
                f"a timer client needs acquire and release, {type(client).__name__} has no {method}"
            )
