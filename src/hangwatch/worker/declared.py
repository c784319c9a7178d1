"""`paused` and `watch`: blocks that are declared in another way than by `expires`."""

from __future__ import annotations

import sys

from hangwatch.worker.arguments import Asked
from hangwatch.worker.expiration import Expiration, expires

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable
    from typing import TypeVar

    from hangwatch.worker.blocks import ContractClient
    from hangwatch.worker.iteration import Watched

    Item = TypeVar("Item")


def paused(reason: str, after: float, client: ContractClient | None = None) -> Expiration:
    """Declare a block that suspends this process's other timers, and their clocks.

    When it ends, every open block goes on with the time that was left to it. Pauses may be
    nested, and overlap in several threads: the timers go on when the last one ends.

    Args:
        reason: the pause's name in reports.
        after: seconds that the pause may take: nothing is switched off for ever. A pause that
            overruns is judged as any block.
        client: whose timers, if not those of the one that `configure` set or the environment's
            ``HANGWATCH_ADDRESS`` names.

    Returns:
        The context manager, and decorator. What is wrong with the arguments it says on entering:

    Raises:
        ValueError, TypeError, NotConfiguredError: as `expires`.
        UnsupportedError: the client knows no more than to acquire and release.
    """
    block = expires(after, reason)
    block._asked = asked = Asked(client, pauses=True)
    block._key = *asked.key, reason
    return block


def watch(
    iterable: Iterable[Item] | AsyncIterable[Item],
    after: float,
    scope: str | None = None,
    client: ContractClient | None = None,
    on_expiry: str | None = None,
    grace: float | None = None,
    signal: int | None = None,
) -> Watched[Item]:
    """Iterate over what may hang while it gets the next item, a data loader for example.

    The timer runs while the iterator is at work on its next item, never in the loop's body.

    Args:
        iterable: what to iterate over, with ``for`` or ``async for``.
        after: seconds that each next item may take.
        scope: the name in reports; ``<file>#<line>`` of the caller by default.
        client: see `expires`, as for the rest.
        on_expiry: what an overrun leads to.
        grace: seconds that the worker has after each step before SIGKILL.
        signal: number of the signal that is sent first.

    Returns:
        An iterable, as long as `iterable`.

    Raises:
        TypeError: `iterable` is none.
    """
    from hangwatch.worker.iteration import Watched

    block = expires(after, scope, client, on_expiry, grace, signal)
    if scope is None:
        frame = sys._getframe(1)
        block._code = frame.f_code
        where = id(frame.f_code) + frame.f_lasti
        key = block._key
        block._key = (*key[:-1], where) if isinstance(key, tuple) else where
    return Watched(iterable, block._again)
