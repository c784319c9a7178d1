"""What the holder of an open block can do about its timer, beyond moving a deadline."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic

from hangwatch.errors import HangwatchError
from hangwatch.page import layout
from hangwatch.worker.arguments import checked_limit
from hangwatch.worker.chosen_core import core
from hangwatch.worker.own_page import OwnPage, page_of

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.core import Expiration


def renew(block: Expiration, after: float | None = None) -> None:
    """Give an open block another interval; see `Expiration.renew`."""
    limit = None if after is None else checked_limit(after)
    own = _own_way(block, "renew")
    if own is not None:
        own(limit)
        return
    page, at, entry = _place(block)
    if page is not None:
        limit = page.words[at + layout.LIMIT] if limit is None else limit
        page.begin_interval(at, entry, monotonic() + limit, limit)
        page.ring()


def cancel(block: Expiration) -> None:
    """Let the open block go on without a deadline; `renew` gives it one again.

    Raises:
        HangwatchError: the block is not open.
        UnsupportedError: the block's client can't do that.
    """
    own = _own_way(block, "cancel")
    if own is not None:
        own()
        return
    page, at, entry = _place(block)
    if page is not None:
        page.begin_interval(at, entry, layout.NEVER, page.words[at + layout.LIMIT])


def remaining(block: Expiration) -> float:
    """Return the seconds that the open block has left.

    Negative once it has overrun, infinite without a deadline; it stands still while the
    process is paused.

    Raises:
        HangwatchError: the block is not open.
    """
    own = _own_way(block, "remaining")
    if own is not None:
        left: float = own()
        return left
    page, at, entry = _place(block)
    if page is None:
        return inf
    deadline = page.words[at]
    if deadline == 0.0 or deadline >= layout.NEVER:  # 0.0: an inherited one, or the process ends
        return inf
    now, since = monotonic(), page.pauses.since()
    if since < now and not page.view.is_pause((at - layout.HEADER_WORDS) // layout.SLOT_WORDS):
        now = max(since, deadline - page.interval(at, entry))
    return deadline - now


def _own_way(block: Expiration, method: str) -> Callable[..., float] | None:
    """Return how that is done where it is not the slot's; see `blocks.Other`."""
    way: Callable[..., float] | None = getattr(block.other, method, None)
    return way


def _place(block: Expiration) -> tuple[OwnPage | None, int, float]:
    """Return the block's page, its slot's first word, and its entry; no page: unwatched."""
    core.forks()  # after a fork that Python did not see, the page is the parent's until then
    place = block.place
    if place is None and _ended:  # it is unwatched, as all that begin then
        return None, 0, 0.0
    if place is None:
        raise HangwatchError(
            "this timer's block is not open: renew, cancel and ask for what remains within it"
        )
    memory, index, entry = place
    return page_of(memory), layout.deadline_word(index), entry


_ended = False


def end() -> None:
    """The interpreter ends: see `core.end`."""
    global _ended
    _ended = True
    core.end()
