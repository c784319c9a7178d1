"""What the holder of an open block can do about its timer, beyond moving a deadline."""

from __future__ import annotations

from hangwatch.errors import HangwatchError
from hangwatch.worker.arguments import checked_limit
from hangwatch.worker.blocks import UNWATCHED
from hangwatch.worker.chosen_core import core
from hangwatch.worker.own_page import timer_at

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.blocks import Timer
    from hangwatch.worker.core import Expiration


def renew(block: Expiration, after: float | None = None) -> None:
    """Give an open block another interval; see `Expiration.renew`."""
    limit = None if after is None else checked_limit(after)
    _timer_of(block).renew(limit)


def cancel(block: Expiration) -> None:
    """Let the open block go on without a deadline; `renew` gives it one again.

    Raises:
        HangwatchError: the block is not open.
        UnsupportedError: the block's client can't do that.
    """
    _timer_of(block).cancel()


def remaining(block: Expiration) -> float:
    """Return the seconds that the open block has left.

    Negative once it has overrun, infinite without a deadline; it stands still while the
    process is paused.

    Raises:
        HangwatchError: the block is not open.
    """
    return _timer_of(block).remaining()


def _timer_of(block: Expiration) -> Timer:
    core.forks()  # after a fork that Python did not see, the page is the parent's until then
    place = block.place
    if block.other is not None:
        timer: Timer = block.other
        return timer
    if place is None and not _ended:  # else it is unwatched, as all that begin then
        raise HangwatchError(
            "this timer's block is not open: renew, cancel and ask for what remains within it"
        )
    return UNWATCHED if place is None else timer_at(place) or UNWATCHED


_ended = False


def end() -> None:
    """The interpreter ends: see `core.end`."""
    global _ended
    _ended = True
    core.end()
