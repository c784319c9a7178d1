"""This process's page for one watcher: its memory, its slots, its pauses."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

from hangwatch.page import layout
from hangwatch.page.view import View
from hangwatch.worker.chosen_core import core
from hangwatch.worker.own_descriptor import OwnDescriptor
from hangwatch.worker.pauses import Pauses

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.arguments import Asked


class OwnPage:
    """A page that this process writes.

    Args:
        ring: called, from any thread, when the watcher must be told of a new deadline; returns
            whether it connected first.

    Attributes:
        descriptor: the page's memfd, owned by this object.
        memory: the page.
        view: what it says.
        words: the page as doubles.
        slots: the core's.
        pauses: what suspends its timers.

    Raises:
        OSError: no memory or no descriptor is left for a page.
    """

    def __init__(self, ring: Callable[[], bool]) -> None:
        self.descriptor = OwnDescriptor(layout.create_memfd())
        mapped = mmap.mmap(self.descriptor.number, layout.PAGE_BYTES)
        self.memory = memoryview(mapped)
        self.words: memoryview[float] = self.memory.cast("d")
        self.view = View(self.memory)
        self.ring = ring
        self.slots = core.Slots(mapped, ring, layout.CAPACITY)
        self.pauses = Pauses(self.view, self.words, ring)
        _pages[id(mapped)] = self

    def interval(self, at: int, entry: float) -> float:
        """Return the limit of a block's present interval in seconds."""
        renewed = self.words[at + layout.RENEWED_ENTRY] == entry
        limit: float = self.words[at + (layout.RENEWED_LIMIT if renewed else layout.LIMIT)]
        return limit

    def entered(self, at: int, entry: float) -> float:
        """Return when a block was entered (CLOCK_MONOTONIC)."""
        words = self.words
        if words[at + layout.RENEWED_ENTRY] == entry:
            return words[at + layout.ENTERED]
        return words[at] - words[at + layout.LIMIT]

    def begin_interval(self, at: int, entry: float, deadline: float, limit: float) -> bool:
        """Move a block's deadline, `limit` seconds from now, or never; False: it has ended."""
        words = self.words
        entered = self.entered(at, entry)
        # No calls: by another thread's hand, the block may end, or be renewed, meanwhile.
        if words[at] == 0.0 or words[at + layout.ENTRY] != entry:
            return False
        words[at + layout.ENTERED] = entered
        words[at + layout.RENEWED_ENTRY] = entry
        words[at + layout.RENEWED_LIMIT] = limit
        words[at + layout.RAISED_ENTRY] = 0.0
        words[at + layout.SKIPPED_ENTRY] = 0.0
        words[at] = deadline
        return True

    def close(self) -> None:
        """Give no slot out any more, and let go of the descriptor."""
        self.slots.closed = True
        core.forget_keys()
        self.descriptor.close()


_pages: WeakValueDictionary[int, OwnPage] = WeakValueDictionary()
"""By the identity of their memory."""


def page_of(memory: object) -> OwnPage | None:
    """Return the page that has this memory; None: that is nobody's page."""
    return _pages.get(id(memory))


def details_of(limit: float, name: str, is_place: bool, asked: Asked) -> bytes:
    """Return what a slot of the calling thread says of a block, see `layout.pack_details`.

    Args:
        limit: the block's, in seconds.
        name: its name.
        is_place: whether that is a file and line, whose end tells more than its beginning.
        asked: what else the caller chose.
    """
    ident = threading.get_ident()
    # Not current_thread(), which makes a thread object for whoever has none.
    thread = threading._active.get(ident)  # type: ignore[attr-defined]
    details = layout.SlotDetails(
        limit=limit,
        ident=ident,
        native_id=threading.get_native_id(),
        thread_name="" if thread is None else thread.name,
        scope=name,
        policy=asked.policy,
        pauses=asked.pauses,
    )
    return layout.pack_details(details, keep_end=is_place)
