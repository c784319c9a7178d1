"""What a caller gives `expires`, checked; only when a block is entered off the quiet path."""

from __future__ import annotations

from collections.abc import Hashable
from types import CodeType

from hangwatch import policy
from hangwatch.worker.slots import Scope


class Asked:
    """What a caller gave besides the limit and the name, unchecked; None: nothing.

    Attributes:
        key: tells one of these from another.
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
    return policy.checked_limit("after", after, "leave the block out if it may take for ever")


def scope_of(name: Hashable, code: CodeType | None, asked: Asked) -> Scope:
    """Return a block's scope.

    Args:
        name: its name; or, where the caller gave none, the address of its instruction.
        code: the caller's, in that case.
        asked: what else the caller gave.

    Raises:
        ValueError, TypeError: one of these is none: the caller's fault.
    """
    chosen = policy.checked(policy.Policy(asked.on_expiry, asked.grace, asked.signal))
    if asked.pauses and (not isinstance(name, str) or not name):
        raise ValueError(f"reason must be a string that says why, not {name!r:.40}")
    if code is None:
        return Scope(checked_scope(name), False, asked.client, chosen, asked.pauses)
    return Scope(place(code, name), True, (code, asked.client), chosen, asked.pauses)


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
