"""`expires`, `paused`, `watch`, `configure`: what a program calls.

A block that its thread has entered before is entered and left in the core alone; for all
others, the core asks the hooks below. `benchmarks/blocks.py` measures what that costs.
"""

from __future__ import annotations

import atexit
import os
import sys
from types import SimpleNamespace

from hangwatch.errors import HangwatchError
from hangwatch.worker import arguments, client, handle, tasks, transports, wrapped
from hangwatch.worker.arguments import NOTHING_ASKED, Asked
from hangwatch.worker.chosen_core import core, problem
from hangwatch.worker.warnings import warn
from hangwatch.worker.wrapped import Watched

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable
    from typing import Any, NoReturn, TypeVar

    from hangwatch.worker.blocks import ContractClient, Other
    from hangwatch.worker.core import Expiration as Expiration

    Item = TypeVar("Item")
else:
    Expiration = core.Expiration


def expires(
    after: float,
    scope: str | None = None,
    client: ContractClient | None = None,
    on_expiry: str | None = None,
    grace: float | None = None,
    signal: int | None = None,
    raises: type[BaseException] | None = None,
) -> Expiration:
    """Declare that a block, a function or a generator's step takes at most `after` seconds.

    A worker whose block overruns is ended by the watcher, another process, even if the
    block hangs in C with the GIL held. Blocks are independent of each other: nested,
    recursive, in many threads, and in many tasks.

    Args:
        after: seconds from entering the block, more than 0.
        scope: the block's name in reports; ``<file>#<line>`` of the caller by default.
        client: who acquires the timer, if not the one that `configure` set or the
            environment's ``HANGWATCH_ADDRESS`` names.
        on_expiry: what an overrun leads to, if not what the watcher says: ``"report"``, a
            report alone; ``"raise"``, `TimerExpired` within the block, and the worker's end if
            it does not leave the block in time; ``"reap"``, the worker's end.
        grace: seconds that the worker has after each step before SIGKILL, 0 or more.
        signal: number of the signal that is sent first.
        raises: the exception that is raised in the place of `TimerExpired`, which is then its
            ``__cause__``; implies ``on_expiry="raise"``.

    Returns:
        The context manager, and decorator. One object is one block: it is entered once. What
        it decorates gets a new one for each call.

    Raises:
        ValueError: `after` is not positive and finite, `scope` is empty, or one of the rest
            is none of what it may be.
        TypeError: `after` is no number, `scope` no string, `client` no client, `raises` no
            exception class.

    Entering raises `NotConfiguredError` if nobody said who watches, `UnsupportedError` if the
    client can only acquire and release, and `HangwatchError` if the object was entered before.
    """
    limit = arguments.checked_limit(after)
    asked = arguments.checked_asked(client, on_expiry, grace, signal, raises)
    return _block(limit, scope, asked)


def _enter(block: Expiration) -> Other | None:
    global _asks_asyncio
    if core.forks() != _forks:  # a fork that Python did not see
        _after_fork()
    if not _asks_asyncio:
        functions = tasks.asyncio_state()
        if functions is not None:
            core.ask_asyncio(*functions)
            _asks_asyncio = True
    asked: Any = block.asked or NOTHING_ASKED
    return transports.begin(block, asked)


def _refuse_again() -> NoReturn:
    raise HangwatchError(
        "this block was entered already, and one object is one block: call expires() again, "
        "or decorate a function with it"
    )


def _block(limit: float, scope: str | None, asked: Asked | None) -> Expiration:
    """Make a block of who called the function that calls this."""
    if scope is not None:
        made: Expiration = core.block(limit, arguments.checked_scope(scope), -1, asked)
    else:
        frame = sys._getframe(2)
        if frame.f_globals.get("__name__") == core.__name__:  # the core in Python
            frame = frame.f_back or frame
        made = core.block(limit, frame.f_code, frame.f_lasti, asked)
    return made


def timer(limit: float, name: str) -> Expiration:
    """Make a block that nobody enters: a client arms its timer, and `__exit__` disarms it."""
    made: Expiration = core.block(limit, name, -1, None)
    return made


def configure(timer_client: ContractClient | None) -> None:
    """Set the client of every block of this process that names none.

    Args:
        timer_client: the client; None unsets it, and `expires` then raises whatever
            the environment says.

    Raises:
        TypeError: it has no ``acquire`` and ``release``.
    """
    if timer_client is not None:
        arguments.check_client(timer_client)
    transports.configure(timer_client)
    core.forget_keys()


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
        The context manager, and decorator.

    Raises:
        ValueError, TypeError: as `expires`.
    """
    if not isinstance(reason, str) or not reason:
        raise ValueError(f"reason must be a string that says why, not {reason!r:.40}")
    if client is not None:
        arguments.check_client(client)
    asked = NOTHING_ASKED._replace(client=client, pauses=True)
    return _block(arguments.checked_limit(after), reason, asked)


def watch(
    iterable: Iterable[Item] | AsyncIterable[Item],
    after: float,
    scope: str | None = None,
    client: ContractClient | None = None,
    on_expiry: str | None = None,
    grace: float | None = None,
    signal: int | None = None,
    raises: type[BaseException] | None = None,
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
        raises: the exception in the place of `TimerExpired`.

    Returns:
        An iterable, as long as `iterable`.

    Raises:
        TypeError: `iterable` is none; and as `expires`.
    """
    limit = arguments.checked_limit(after)
    asked = arguments.checked_asked(client, on_expiry, grace, signal, raises)
    return Watched(iterable, _block(limit, scope, asked))


def _after_fork() -> None:
    """In a forked child: touch nothing of the parent's, and start anew."""
    global _forks
    _forks = core.forks()
    client.forget_parent()


forget_keys = core.forget_keys
"""Make every thread ask again: another client, or other methods of one."""

_asks_asyncio = False
_forks = 0
hooks = SimpleNamespace(
    declare=expires,
    enter=_enter,
    switches_within_a_thread=lambda: tasks.current_task() != 0.0,
    renew=handle.renew,
    refuse_again=_refuse_again,
)
"""What the core asks; see `core.Hooks`."""
core.use(hooks, expires.__doc__)
# The same for either core: nothing of it needs to be quick.
core.Expiration.cancel = handle.cancel
core.Expiration.remaining = handle.remaining
core.Expiration.__call__ = wrapped.decorate
if not TYPE_CHECKING:  # the same, and quick where nothing but a limit and a name is given
    expires = core.expires
os.register_at_fork(after_in_child=_after_fork)
atexit.register(handle.end)
if problem is not None:
    warn(f"{problem}; blocks cost more until then")
