"""Asking a worker's main thread to raise `TimerExpired`; its handler is `worker.soft_ending`."""

from __future__ import annotations

from collections.abc import Callable

from hangwatch import linux
from hangwatch.evidence.model import ScopeThread
from hangwatch.evidence.stacks import who_takes
from hangwatch.process import Identity
from hangwatch.watcher.page_reader import Armed, Overdue

ASKED = "asked"


def why_not_raised(
    number: int, found: Overdue, thread: ScopeThread, identity: Identity
) -> str | None:
    """Say why nothing can be raised there; None: it can.

    Args:
        number: the signal that makes the worker raise; 0: none.
        found: what is overdue.
        thread: whose block it is.
        identity: the worker.
    """
    if not isinstance(found, Armed):
        return "not possible: it is in no block"
    if thread.native_id != identity.pid:
        return "not possible: Python raises in the main thread alone"
    if number == 0:
        return "not possible: the worker has no signal for it"
    return None


def ask_to_raise(identity: Identity, number: int, is_overdue: Callable[[], bool]) -> str:
    """Send a worker's main thread the signal at which it raises. May block: see `helper`.

    Args:
        identity: the worker.
        number: the signal.
        is_overdue: a fresh look whether the block has not ended.

    Returns:
        `ASKED`, or why not, in words.
    """
    # A signal that nobody catches kills.
    tid, problem = who_takes(identity.pid, number, [identity.pid])
    if tid is None:
        return f"failed: {problem}"
    if identity.is_dead():
        return "failed: it is dead"
    if not is_overdue():
        return "not asked: the block has ended"
    try:
        linux.signal_thread(identity.pid, tid, number)
    except OSError as error:
        return f"failed: {error.strerror}"
    return ASKED
