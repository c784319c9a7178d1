"""What a caller gives `expires`, checked; only when a block is entered off the quiet path."""

from __future__ import annotations

from collections.abc import Hashable
from math import inf
from types import CodeType

from hangwatch.page import layout as page
from hangwatch.worker.slots import Scope

LAST_SIGNAL = 64
"""The kernel's, on every machine but MIPS; signal(7)."""


class Asked:
    """What a caller chose besides the limit and the name, unchecked; None: nothing.

    Attributes:
        key: tells one choice from another.
    """

    __slots__ = ("client", "grace", "key", "on_expiry", "pauses", "signal")

    def __init__(
        self,
        client: object = None,
        on_expiry: object = None,
        grace: object = None,
        signal: object = None,
        pauses: bool = False,
    ) -> None:
        self.client = client
        self.on_expiry = on_expiry
        self.grace = grace
        self.signal = signal
        self.pauses = pauses
        self.key: tuple[Hashable, ...] = id(client), on_expiry, grace, signal, pauses

    @property
    def is_more_than_a_client(self) -> bool:
        """Whether anything is chosen that a client who acquires and releases can't do."""
        return self.key[1:] != NOTHING_ASKED.key[1:]


NOTHING_ASKED = Asked()


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


def checked_choices(on_expiry: object, grace: object, signal: object) -> tuple[int, int, float]:
    """Return what a caller chose about an overrun, as `page` has it: flags, signal, grace.

    Raises:
        ValueError, TypeError: one of these is none: the caller's fault.
    """
    if on_expiry not in page.ON_EXPIRY:
        raise ValueError(f"on_expiry must be 'report', 'raise' or 'reap', not {on_expiry!r:.40}")
    number = 0 if signal is None else checked_signal(signal)
    if grace is None:
        return page.ON_EXPIRY.index(on_expiry), number, 0.0
    return page.ON_EXPIRY.index(on_expiry), number, checked_grace(grace) or page.NO_GRACE


def checked_grace(grace: object) -> float:
    """Return a grace in seconds.

    Raises:
        ValueError, TypeError: `grace` is none: the caller's fault.
    """
    if not isinstance(grace, int | float) or isinstance(grace, bool):
        raise TypeError(f"grace must be a number of seconds, not {type(grace).__name__}")
    if not 0 <= grace < inf:
        raise ValueError(f"grace must be a number of seconds, 0 or more, not {grace!r:.40}")
    return float(grace)


def checked_signal(number: object) -> int:
    """Return the number of a signal.

    Raises:
        ValueError, TypeError: there is no such signal: the caller's fault.
    """
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(
            f"signal must be a signal's number, such as signal.SIGTERM, not {number!r:.40}"
        )
    if not 0 < number <= LAST_SIGNAL:
        raise ValueError(
            f"signal must be a signal's number, 1 to {LAST_SIGNAL}, not {number!r:.40}: "
            "for no signal at all, on_expiry='report'"
        )
    return int(number)


def scope_of(name: Hashable, code: CodeType | None, asked: Asked) -> Scope:
    """Return a block's scope.

    Args:
        name: its name; or, where the caller gave none, the address of its instruction.
        code: the caller's, in that case.
        asked: what else the caller chose.

    Raises:
        ValueError, TypeError: one of these is none: the caller's fault.
    """
    flags, signal, grace = checked_choices(asked.on_expiry, asked.grace, asked.signal)
    if asked.pauses:
        flags |= page.PAUSES
        if not isinstance(name, str) or not name:
            raise ValueError(f"reason must be a string that says why, not {name!r:.40}")
    if code is None:
        return Scope(checked_scope(name), False, asked.client, flags, signal, grace)
    return Scope(place(code, name), True, (code, asked.client), flags, signal, grace)


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
