"""This process's page for one watcher: its memory, its slots, its pauses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

from hangwatch.page import layout
from hangwatch.page.view import View
from hangwatch.worker.arguments import name_of
from hangwatch.worker.blocks import SlotTimer
from hangwatch.worker.chosen_core import core
from hangwatch.worker.own_descriptor import OwnDescriptor, OwnMemory
from hangwatch.worker.pauses import Pauses

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.arguments import Asked
    from hangwatch.worker.core import Expiration


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
        mapped = OwnMemory(self.descriptor.number, layout.PAGE_BYTES)
        self.memory = memoryview(mapped)
        self.words: memoryview[float] = self.memory.cast("d")
        self.view = View(self.memory)
        self.ring = ring
        self.slots = core.Slots(mapped, ring, layout.CAPACITY)
        self.pauses = Pauses(self.view, self.words, ring)
        _pages[id(mapped)] = self

    def close(self) -> None:
        """Give no slot out any more, and let go of the descriptor."""
        self.slots.closed = True
        core.forget_keys()
        self.descriptor.close()


_pages: WeakValueDictionary[int, OwnPage] = WeakValueDictionary()
"""By the identity of their memory."""


def timer_at(place: tuple[object, int, float]) -> SlotTimer | None:
    """Return the timer of a block that is open at a place; None: that is in nobody's page."""
    memory, index, entry = place
    page = _pages.get(id(memory))
    return None if page is None else SlotTimer(page, index, entry)


def details_of(block: Expiration, asked: Asked) -> bytes:
    """Return what a slot of the calling thread says of a block, see `layout.pack_details`.

    Args:
        block: the block.
        asked: what its caller chose.
    """
    ident = threading.get_ident()
    # Not current_thread(), which makes a thread object for whoever has none.
    thread = threading._active.get(ident)  # type: ignore[attr-defined]
    details = layout.SlotDetails(
        limit=block.after,
        ident=ident,
        native_id=threading.get_native_id(),
        thread_name="" if thread is None else thread.name,
        scope=name_of(block),
        policy=asked.policy,
        pauses=asked.pauses,
    )
    # Of a file and line, the end tells more than the beginning.
    return layout.pack_details(details, keep_end=block.lasti >= 0)
