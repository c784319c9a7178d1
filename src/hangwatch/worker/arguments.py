"""What a caller gives `expires`, checked."""

from __future__ import annotations

from collections import namedtuple
from functools import lru_cache
from types import CodeType

from hangwatch import policy
from hangwatch.policy import NOTHING_CHOSEN, OnExpiry, Policy

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.blocks import ContractClient
    from hangwatch.worker.core import Expiration


class Asked(
    namedtuple("Asked", ("policy", "client", "pauses", "raises"), defaults=(None, False, None))
):
    """What a caller chose besides the limit and the name.

    Attributes:
        policy: what an overrun leads to.
        client: who acquires the timer; None: whoever is configured.
        pauses: whether the block suspends the process's other timers.
        raises: the exception in the place of `TimerExpired`.
    """

    __slots__ = ()

    policy: Policy
    client: ContractClient | None
    pauses: bool
    raises: type[BaseException] | None


NOTHING_ASKED = Asked(NOTHING_CHOSEN)


def checked_asked(
    client: ContractClient | None, on_expiry: object, grace: object, signal: object, raises: object
) -> Asked | None:
    """Return what a caller chose; None: nothing.

    Raises:
        ValueError, TypeError: one of these is none of what it may be: the caller's fault.
    """
    if client is not None:
        check_client(client)
    chosen = policy.checked(Policy(on_expiry, grace, signal))
    if raises is not None:
        if not (isinstance(raises, type) and issubclass(raises, BaseException)):
            raise TypeError(f"raises must be an exception class, not {raises!r:.40}")
        if chosen.on_expiry not in (None, OnExpiry.RAISE):
            raise ValueError("raises goes with on_expiry='raise' alone: leave one of them out")
        chosen = chosen._replace(on_expiry=OnExpiry.RAISE)
    if client is None and raises is None and chosen == NOTHING_CHOSEN:
        return None
    return Asked(interned(chosen), client, False, raises)


@lru_cache(256)
def interned(chosen: Policy) -> Policy:
    """Return the one object of a policy: a block is looked up by the identity of what is asked."""
    return chosen


def checked_limit(after: object) -> float:
    """Return a block's limit in seconds.

    Raises:
        ValueError, TypeError: `after` is none: the caller's fault.
    """
    return policy.checked_limit("after", after, "leave the block out if it may take for ever")


def checked_scope(scope: object) -> str:
    """Return a block's name as the caller gave it.

    Raises:
        ValueError, TypeError: `scope` is none: the caller's fault.
    """
    if not isinstance(scope, str):
        raise TypeError(f"scope must be a string or None, not {type(scope).__name__}")
    if not scope:
        raise ValueError("scope must not be empty: leave it out for <file>#<line>")
    return str(scope)


def check_client(client: object) -> None:
    """Raise TypeError if `client` can't be a timer client: the caller's fault."""
    for method in ("acquire", "release"):
        if not callable(getattr(client, method, None)):
            raise TypeError(
                f"a timer client needs acquire and release, {type(client).__name__} has no {method}"
            )


def name_of(block: Expiration) -> str:
    """Return a block's name, or where `expires` was called: ``<file>#<line>``."""
    scope = block.scope
    return scope if isinstance(scope, str) else f"{scope.co_filename}#{_line(scope, block.lasti)}"


def _line(code: CodeType, instruction: int) -> int:
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return line
