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
from time import monotonic
from types import FrameType

from hangwatch.errors import TimerExpired
from hangwatch.page import layout
from hangwatch.worker.blocks import SlotTimer
from hangwatch.worker.exception_table import handler_at
from hangwatch.worker.free_signals import free_signals

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    from hangwatch.page.view import Armed
    from hangwatch.worker.own_page import OwnPage

# It calls what is timed from within a ``with`` of its own, as anybody does.
_CALLER = "hangwatch.worker.wrapped"
# Python code that ours calls while it begins or ends a block.
_CALLED = ("asyncio.tasks", "asyncio.events", "threading")


class _Raisable(SlotTimer):
    """A block of the main thread whose overrun raises; made as it is entered.

    Args:
        page, index, entry: see `SlotTimer`.
        name: its name.
        raises: the exception in the place of `TimerExpired`, or None.
    """

    def __init__(self, page: OwnPage, index: int, entry: float, name: str, raises: Any) -> None:
        super().__init__(page, index, entry)
        self.frame = _identity(_who_enters())
        self._name = name
        self._raises = raises

    def is_overdue(self, now: float) -> bool:
        """Tell whether it has overrun, and was not raised in for it."""
        armed, view = self.armed(), self.page.view
        return armed is not None and armed in view.overdue(now) and not view.was_raised(armed)

    def note_raised(self) -> None:
        """Say in the page that it was raised in this block."""
        at = layout.deadline_word(self.index)
        self.page.words[at + layout.RAISED_ENTRY] = self.entry

    def raise_now(self, armed: Armed, now: float) -> None:
        """Raise what the block asked for."""
        view = self.page.view
        expired = TimerExpired(self._name, view.interval(armed), now - view.entered(armed))
        if self._raises is None or self._raises is TimerExpired:
            raise expired
        try:
            own = self._raises(str(expired))
        except Exception:  # it wants other arguments
            raise expired from None
        raise own from expired


# There is one handler in a process, however many pages it has.
_number = 0
_blocks: list[_Raisable] = []
"""In their order of entry; replaced as a whole."""


def install(page: OwnPage) -> bool:
    """Let the watcher of a page interrupt the main thread, if a signal is free; False: in others.

    A signal is caught the first time.
    """
    global _number
    if threading.get_ident() != threading.main_thread().ident:
        return False
    # A program that took the signal since then has it.
    if not _number or signal.getsignal(_number) is not _raise:
        _number = next(iter(free_signals()), 0)
        try:
            if _number:
                signal.signal(_number, _raise)
        except ValueError:  # a subinterpreter, where no handler can be set
            _number = 0
    page.words[layout.RAISE_SIGNAL] = _number
    return True


def note(page: OwnPage, place: tuple[object, int, float], name: str, raises: object) -> None:
    """Let an overrun of a block that the main thread has just entered raise."""
    global _blocks
    new = _Raisable(page, *place[1:], name, raises)
    _blocks = [*(block for block in _blocks if block.armed()), new]


def _raise(number: int, frame: FrameType | None) -> None:
    now = monotonic()
    overdue = [block for block in _blocks if block.is_overdue(now)]
    # If nothing has ended, the watcher asks again.
    if not overdue or _is_between(frame) or _is_unguarded(frame):
        return
    running = []
    # What a trace function raises unsets it, and comes to who is traced at any place.
    while frame is not None and not _is_tracing(frame):
        running.append(_identity(frame))
        frame = frame.f_back
    inside = [block for block in overdue if block.frame in running]
    if not inside:
        return
    # All of them end by it; it is the outermost that catches it: a frame's first one.
    outermost = max(inside, key=lambda block: running.index(block.frame))
    armed = outermost.armed()
    if armed is not None:  # nor has another thread ended it
        for block in inside:
            block.note_raised()
        outermost.raise_now(armed, now)


def _identity(frame: FrameType) -> tuple[int, int]:
    """Return what tells a frame; itself, it would be kept alive, with all that it refers to."""
    return id(frame), id(frame.f_code)


def _who_enters() -> FrameType:
    """Return the frame whose block is being entered."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        _is_ours(frame) or _module_of(frame.f_back) == "contextlib"
    ):
        # A generator of `@contextmanager` waits while the block lasts: it is its user's.
        frame = frame.f_back
    return frame


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_ours(frame: FrameType) -> bool:
    """Tell whether a frame is of our code, and not one that calls a user's.

    So is what `ExitStack` and `@contextmanager` do; and weakref's, where an exception is ignored.
    """
    module = _module_of(frame)
    if module in ("contextlib", "weakref"):
        return True
    return module.startswith("hangwatch.") and module != _CALLER


def _is_between(frame: FrameType | None) -> bool:
    """Tell whether a block is just being entered or left."""
    while frame is not None and _module_of(frame) in _CALLED:
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
    handler = handler_at(code, at)
    enters = any(block.frame == _identity(frame) for block in _blocks if block.armed())
    return handler is None if enters else handler != handler_at(code, at - 2)


def _is_tracing(frame: FrameType) -> bool:
    """Tell whether a frame is a call of a trace or profile function."""
    around = None if frame.f_back is None else frame.f_back.f_trace
    functions = sys.gettrace(), sys.getprofile(), around
    return any(frame.f_code is _code_of(function) for function in functions)


def _code_of(function: object) -> object:
    """Return the code of a function, a method or an object that can be called, if it has any."""
    code = getattr(function, "__code__", None)
    return getattr(type(function).__call__, "__code__", None) if code is None else code
