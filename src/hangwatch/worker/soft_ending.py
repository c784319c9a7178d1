"""`TimerExpired`, raised in the main thread by a signal of the watcher's.

Python runs a signal's handler in the main thread, between two bytecodes of whatever runs
there, and what it raises is raised at that place. The handler looks which block has overrun,
and raises only where the frame that entered the block is among those that run: never in a
neighbour, and never once the block has ended. Source: Python's signal module, "Signals and
threads".
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from types import CodeType, FrameType

from hangwatch.errors import TimerExpired
from hangwatch.page import layout
from hangwatch.worker.free_signals import free_signals

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    from hangwatch.worker.own_page import OwnPage

# They call what is timed from within a ``with`` of their own, as anybody does.
_CALLERS = ("hangwatch.worker.decorated", "hangwatch.worker.iteration")
# Python code that ours calls while it begins or ends a block.
_CALLED = ("asyncio.tasks", "asyncio.events", "threading")


class _Raisable:
    """An open block of the main thread whose overrun raises."""

    def __init__(
        self, page: OwnPage, place: tuple[object, int, float], name: str, raises: Any
    ) -> None:
        self._page = page
        _, self._index, self._entry = place
        self._at = layout.deadline_word(self._index)
        self._name = name
        self._raises = raises
        frame = _who_enters()
        # Not the frame itself, which would be kept alive, with all that it refers to.
        self.frame = id(frame), id(frame.f_code)

    def deadline(self) -> float:
        """Return the deadline; 0.0: the block has ended."""
        words = self._page.words
        return words[self._at] if words[self._at + layout.ENTRY] == self._entry else 0.0

    def is_overdue(self, now: float) -> bool:
        """Tell whether the block has overrun, and was not raised in for it."""
        page = self._page
        if page.words[self._at + layout.RAISED_ENTRY] == self._entry:
            return False
        runs = now < page.pauses.since() or page.view.is_pause(self._index)
        return runs and 0.0 < self.deadline() <= now

    def entered(self) -> float:
        """Return when the block was entered (CLOCK_MONOTONIC)."""
        return self._page.entered(self._at, self._entry)

    def note_raised(self) -> None:
        """Say in the page that it was raised in this block."""
        self._page.words[self._at + layout.RAISED_ENTRY] = self._entry

    def raise_now(self, now: float) -> None:
        """Raise what the block asked for."""
        limit = self._page.interval(self._at, self._entry)
        expired = TimerExpired(self._name, limit, now - self.entered())
        if self._raises is None or self._raises is TimerExpired:
            raise expired
        try:
            own = self._raises(str(expired))
        except Exception:  # it wants other arguments
            raise expired from None
        raise own from expired


class _Handler:
    """The handler of this process; there is one, however many pages it has."""

    number = 0
    blocks: list[_Raisable] = []  # noqa: RUF012  # replaced as a whole


def install() -> int | None:
    """Catch a signal, the first time; return its number, 0 if none is free, None in a thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    # A program that took the signal since then has it.
    if not _Handler.number or signal.getsignal(_Handler.number) is not _raise:
        _Handler.number = next(iter(free_signals()), 0)
        try:
            if _Handler.number:
                signal.signal(_Handler.number, _raise)
        except ValueError:  # a subinterpreter, where no handler can be set
            _Handler.number = 0
    return _Handler.number


def note(page: OwnPage, place: tuple[object, int, float], name: str, raises: object) -> None:
    """Let an overrun of a block that the main thread has just entered raise."""
    if threading.get_ident() == threading.main_thread().ident:
        open_ones = [block for block in _Handler.blocks if block.deadline()]
        _Handler.blocks = [*open_ones, _Raisable(page, place, name, raises)]


def _raise(number: int, frame: FrameType | None) -> None:
    now = monotonic()
    overdue = [block for block in _Handler.blocks if block.is_overdue(now)]
    # If nothing has ended, the watcher asks again.
    if not overdue or _is_between(frame) or _is_unguarded(frame):
        return
    inside: list[_Raisable] = []
    outermost: _Raisable | None = None
    # What a trace function raises unsets it, and comes to who is traced at any place.
    while frame is not None and not _is_tracing(frame):
        here = [block for block in overdue if block.frame == (id(frame), id(frame.f_code))]
        if here:
            inside += here
            outermost = min(here, key=_Raisable.entered)
        frame = frame.f_back
    if outermost is not None:
        # All of them end by it; it is the outermost that catches it.
        for block in inside:
            block.note_raised()
        outermost.raise_now(now)


def _who_enters() -> FrameType:
    """Return the frame whose block is being entered."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (_is_ours(frame) or _is_contextlib(frame.f_back)):
        # A generator of `@contextmanager` waits while the block lasts: it is its user's.
        frame = frame.f_back
    return frame


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


def _is_ours(frame: FrameType) -> bool:
    """Tell whether a frame is of our code, and not one that calls a user's.

    So is what `ExitStack` and `@contextmanager` do; and weakref's, where an exception is ignored.
    """
    module = str(frame.f_globals.get("__name__", ""))
    if module in _CALLERS:
        return False
    return module in ("contextlib", "weakref") or module.startswith("hangwatch.")


def _is_between(frame: FrameType | None) -> bool:
    """Tell whether a block is just being entered or left."""
    while frame is not None and frame.f_globals.get("__name__") in _CALLED:
        frame = frame.f_back
    return frame is not None and _is_ours(frame)


def _is_unguarded(frame: FrameType | None) -> bool:
    """Tell whether a ``with`` or ``try`` around an instruction would miss what is raised there.

    CPython 3.13 leaves the jump back of a loop out of what surrounds it (cpython#130279), 3.14
    the step between ``__enter__`` and the block (#148874).
    """
    if frame is None:
        return False
    code, at = frame.f_code, frame.f_lasti
    handler = _handler_at(code, at)
    enters = any(b.frame == (id(frame), id(code)) for b in _Handler.blocks if b.deadline())
    return handler is None if enters else handler != _handler_at(code, at - 2)


def _handler_at(code: CodeType, at: int) -> int | None:
    """Return where a function catches what an instruction raises; None: it does not.

    Source: CPython, InternalDocs/exception_handling.md, "Format of the exception table".
    """
    numbers = _numbers_in(code.co_exceptiontable)
    for start, length, handler, _ in zip(numbers, numbers, numbers, numbers, strict=True):
        if start <= at // 2 < start + length:
            return handler
    return None


def _numbers_in(table: bytes) -> Iterator[int]:
    number = 0
    for byte in table:
        number = number << 6 | byte & 63
        if not byte & 64:
            yield number
            number = 0


def _is_tracing(frame: FrameType) -> bool:
    """Tell whether a frame is a call of a trace or profile function."""
    around = None if frame.f_back is None else frame.f_back.f_trace
    functions = sys.gettrace(), sys.getprofile(), around
    return any(frame.f_code is _code_of(function) for function in functions)


def _code_of(function: Any) -> object:
    if function is None:
        return None
    function = getattr(function, "__func__", function)  # of a method
    code = getattr(function, "__code__", None)
    return getattr(type(function).__call__, "__code__", None) if code is None else code
