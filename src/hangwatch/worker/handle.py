"""The open block that an `Expiration` is the handle of, and how ``async with`` leaves it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from threading import get_ident

from hangwatch.errors import HangwatchError
from hangwatch.worker.acquired import Holder, holder
from hangwatch.worker.arguments import checked_limit
from hangwatch.worker.blocks import SlotTimer
from hangwatch.worker.client import all_slots
from hangwatch.worker.slots import Slot
from hangwatch.worker.tasks import current_task

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.blocks import Timer


class Handle:
    """What the holder of an open block can do about its timer."""

    __slots__ = ()

    if TYPE_CHECKING:

        def _timer(self) -> Timer: ...
        def _leave(self, *exc_info: object) -> None: ...

    def renew(self, after: float | None = None) -> None:
        """Give the open block another interval from now on: a heartbeat.

        Args:
            after: seconds of this interval; by default the block's own `after`.

        Raises:
            HangwatchError: the block is not open, or this thread is in none of several.
            UnsupportedError: the block's client can't do that.
            ValueError, TypeError: `after` is not a positive number.
        """
        limit = None if after is None else checked_limit(after)
        if not self._timer().renew(limit):
            raise not_open()

    def cancel(self) -> None:
        """Let the open block go on without a deadline; `renew` gives it one again.

        Raises:
            HangwatchError: the block is not open, or this thread is in none of several.
            UnsupportedError: the block's client can't do that.
        """
        if not self._timer().cancel():
            raise not_open()

    def remaining(self) -> float:
        """Return the seconds that the open block has left.

        Negative once it has overrun, infinite without a deadline; it stands still while the
        process is paused.

        Raises:
            HangwatchError: the block is not open, or this thread is in none of several.
        """
        left = self._timer().remaining()
        if left is None:
            raise not_open()
        return left


class ExitLookup(property):
    """``__exit__``: what ends a block, chosen when it is looked up.

    ``with`` looks it up on the instance before it calls ``__enter__`` (PEP 343), and gets one C
    call that disarms the slot chosen at that moment. contextlib.ExitStack takes it from the
    class and calls it with the instance.
    """

    def __call__(self, block: Handle, *exc_info: object) -> None:
        """Leave a block that was entered by a call."""
        block._leave(*exc_info)


class AsyncExitLookup(property):
    """``__aexit__``, which ``async with`` (PEP 492) and AsyncExitStack treat alike."""

    def __call__(self, block: Handle, *exc_info: object) -> Done:
        """Leave a block that was entered by a call."""
        block._leave(*exc_info)
        return Done(None)


class Done:
    """What can be awaited, and has happened already."""

    def __init__(self, result: object) -> None:
        self._result = result

    def __await__(self) -> Generator[None, None, object]:
        return self._result
        yield


class AsyncExit:
    """Ends a block when it is called, not when what it returns is awaited."""

    def __init__(self, end: Callable[..., None]) -> None:
        self._end = end

    def __call__(self, *exc_info: object) -> Done:
        """End the block."""
        self._end(*exc_info)
        return Done(None)


def open_timer(
    block: object, slots: list[Slot], opened: Iterable[tuple[Holder, Timer]]
) -> Timer | None:
    """Find the timer of the block that `block` is in.

    Args:
        block: an `Expiration`.
        slots: those of the calling thread.
        opened: timers of it that no slot leads to, the innermost last.

    Returns:
        That of its innermost block in this thread and task; else of its only one in the
        process; None if there is none.

    Raises:
        HangwatchError: it is in several, none of them in this thread and task.
    """
    alive = [(who, timer) for who, timer in opened if timer.remaining() is not None]
    here = [timer for _, timer in alive if isinstance(timer, SlotTimer)]
    for thread in {
        id(slot.thread): slot.thread for slot in (*slots, *(t.slot for t in here))
    }.values():
        if thread.ident != get_ident():
            continue
        for slot, entry in reversed(thread.stack_of(current_task())):
            for its in here:
                if its.slot is slot and its.entry == entry:
                    return its
            if slot.block is block and slot.is_open(entry):
                return SlotTimer(slot, entry)
    for who, timer in reversed(alive):
        if who == holder():
            return timer
    timers = [timer for _, timer in alive]
    for slot in all_slots():
        entry = slot.words[slot.entry_at]
        if slot.block is block and slot.is_open(entry):
            timers.append(SlotTimer(slot, entry))
    if len(timers) > 1:
        raise HangwatchError(
            "several threads or tasks are in blocks of this timer, and this is none of them: "
            "give each block a timer of its own"
        )
    return timers[0] if timers else None


def not_open() -> HangwatchError:
    """Return the error of who handles the timer of a block that is not open."""
    return HangwatchError(
        "this timer's block is not open: renew, cancel and ask for what remains within it"
    )
