"""The core in plain Python: blocks, and the slots of a page that they arm.

This is the reference of `_core.c`, which does the same in single calls of C code. It runs
where that can't: without a compiler, without a GIL, in an interpreter with a GIL of its own.

One object is one block. Entering it arms a slot; leaving it disarms the slot, and so does the
object's end, whatever skipped ``__exit__``: an interrupt at its first instruction, a trace
function, a generator that nobody finishes.

What a block is to its thread (scope, limit and what else its caller chose) is its *key*. A
thread keeps the slots of its keys, their details written, so entering again is two stores.
A slot is in one of three places: free in its page, free in a key, or armed by a block. When a
key is forgotten, its free slots return to their page, and the others when their blocks end.

In plain Python an interrupt between two instructions of ours can leave a block armed that has
not begun, until its object is gone, or keep a slot from being used again; never does it leave
a block unarmed that is open. In a storm of interrupts one in five costs a slot, so after some
20,000 of them, all within blocks, a page has none left: blocks run unwatched then, with one
warning (tests/property/test_storm.py).

`Hooks` decide all that is not plain, see `use`.
"""

from __future__ import annotations

import errno
import mmap
import sys
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial, reduce
from struct import Struct
from time import monotonic
from weakref import WeakValueDictionary, ref

from hangwatch.page import layout

try:
    from hangwatch import linux
except ImportError:  # a Python that was built without ctypes
    linux = None  # type: ignore[assignment]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from types import CodeType, FrameType
    from typing import Any, NoReturn, Protocol, TypeVar

    from hangwatch.worker.tasks import Tasks

    Function = TypeVar("Function", bound=Callable[..., Any])

    class Hooks(Protocol):
        """What Python decides, for either core."""

        def declare(self, *arguments: Any, **named: Any) -> Expiration:
            """Check what is not plain of the arguments of `expires`; return a block."""

        def enter(self, block: Expiration) -> object:
            """Enter a block whose key this thread does not have: arm it, or return an `Other`."""

        def switches_within_a_thread(self) -> bool:
            """Tell whether this thread runs an event loop, or anything like it."""

        def renew(self, block: Expiration, after: float | None) -> None:
            """Renew a block's timer, where that is more than to move a deadline."""

        def refuse_again(self) -> NoReturn:
            """Raise the error of who enters a block again."""


LAYOUT = layout.VERSION

_MOST_KEYS = 64
_LOOK_EVERY = 64
_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
_DISARM = Struct("=d??")
"""The deadline 0.0; then whatever a weak reference's callback is given, where nobody reads."""
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, madvise(2): Python 3.11 has no name for it


class _Key:
    """What a thread enters again and again.

    Attributes:
        slots: of the page where such blocks are armed.
        keeps: what the key tells by its identity; nothing else may get that while it lives.
        quiet: whether its blocks are entered without asking the hooks.
        nests: whether they are, too, within a block of the same scope.
        known: whether its thread still has it.
        free: its slots that no block has.
    """

    __slots__ = ("free", "keeps", "known", "nests", "quiet", "slots")

    def __init__(self, slots: Slots, keeps: object) -> None:
        self.slots = slots
        self.keeps = keeps
        self.quiet = False
        self.nests = True
        self.known = True
        self.free: list[Slot] = []

    def take(self) -> Slot | None:
        """Take one of its free slots; None: it has none."""
        try:
            return self.free.pop()
        except IndexError:
            return None

    def give_back(self) -> None:
        """Let other keys have its free slots."""
        while (slot := self.take()) is not None:
            self.slots.give_back(slot)


class _Keys(dict[Hashable, _Key]):
    """A thread's keys; thread-local storage alone holds them, so they end with the thread."""

    __slots__ = ("__weakref__",)

    def __del__(self) -> None:
        # A forked child ends all threads but one before any hook of ours can run, and the
        # pages are still its parent's then. At the interpreter's end nothing is left of us.
        if _ended is False and _token[0]:
            self.forget()

    def forget(self) -> None:
        """Have the thread ask at its next blocks; called from any thread."""
        for name, key in list(self.items()):
            key.known = False
            self.pop(name, None)
            key.give_back()


class _Thread(threading.local):
    """What the calling thread has.

    Attributes:
        keys: its keys, by `Expiration._key`.
        open: the slots of its blocks, in order of entry.
    """

    def __init__(self) -> None:
        self.keys = _Keys()
        self.open: dict[Slot, None] = {}
        _all_keys[id(self.keys)] = self.keys


class Slot:
    """One place of a page, given to a key.

    Attributes:
        at: its first word in the page.
        words: the page's words.
        open: its thread's, see `_Thread`.
        disarm: disarms, whatever it is given.
        end: calls that when the block's object is gone; None: no block has the slot.
    """

    __slots__ = ("at", "disarm", "end", "entry", "index", "key", "open", "task", "words")

    def __init__(self, index: int, key: _Key) -> None:
        slots = key.slots
        self.index = index
        self.key = key
        self.open = _thread.open
        self.words = slots.words
        self.at = at = layout.deadline_word(index)
        self.disarm: Callable[[object], None] = partial(
            _DISARM.pack_into, slots.memory, at * 8, 0.0
        )
        self.end: ref[Expiration] | None = None
        self.entry = layout.next_generation(self.words[at + layout.ENTRY])
        self.task = 0.0

    def is_lost(self) -> bool:
        """Tell whether its block ended by its object's end, so that nobody took the slot back."""
        end = self.end
        return end is not None and end() is None and self.words[self.at] == 0.0


class Slots:
    """All slots of one page.

    Args:
        mapped: the page.
        ring: called, from any thread, when the watcher must be told of a new deadline; returns
            whether it connected first, which is not the block's time. None: nobody watches.
        capacity: how many there are.

    Attributes:
        closed: whether no slot is given out any more, and nobody rung for; what is armed stays so.
        given: the slots that keys have.

    Raises:
        OSError: there is no way to keep a forked child from writing this memory.
    """

    def __init__(self, mapped: mmap.mmap, ring: Callable[[], bool] | None, capacity: int) -> None:
        if linux is None:
            raise OSError(errno.ENOSYS, "this Python has neither ctypes nor hangwatch's core in C")
        self.mapped = mapped
        self.memory = memoryview(mapped)
        self.words = self.memory.cast("d")
        self.ring = ring
        self.closed = False
        self.address = linux.address_of(self.memory)
        self._free = list(reversed(range(capacity)))
        self.given: set[Slot] = set()
        if not _HAS_GIL:
            # Counting them takes two steps, between which another thread could count, too.
            self.words[layout.SLOTS_IN_USE] = capacity
        _pages[id(self)] = self

    def arm(
        self,
        block: Expiration,
        details: Callable[[], bytes],
        task: float,
        quiet: bool,
        nests: bool,
    ) -> bool:
        """Arm a slot for a block that is being entered.

        Args:
            block: the block.
            details: returns what a new slot says besides; see `layout.pack_details`.
            task: which task of an event loop enters it; 0.0: none.
            quiet: whether the thread may enter this key again without asking.
            nests: whether it may, too, within a block of the same scope.

        Returns:
            False if no slot is left.
        """
        if not _token[0]:
            forget_parent()
        if self.closed:
            return False
        keys = _thread.keys
        key = keys.get(block._key)
        if key is None or key.slots is not self:
            if key is not None or len(keys) >= _MOST_KEYS:
                keys.forget()
            key = keys[block._key] = _Key(self, (block.scope, block.asked))
        key.quiet = quiet
        key.nests = nests
        slot = key.take() or self._give(key, details())
        if slot is None:
            return False
        block._arm(slot, task)
        return True

    def _give(self, key: _Key, details: bytes) -> Slot | None:
        """Give a key a slot, its details written; None: none is left."""
        if not self._free:
            forget_keys()
        if not self._free or len(self.given) % _LOOK_EVERY == 0:
            for slot in list(self.given):
                if slot.is_lost():
                    self.give_back(slot)
        try:
            slot = Slot(self._free.pop(), key)
        except IndexError:
            return None
        # The new generation goes first: who reads the rest in between sees it change.
        self.words[slot.at + layout.ENTRY] = slot.entry
        begin = (slot.at + layout.LIMIT) * 8
        self.memory[begin : begin + len(details)] = details
        self.given.add(slot)
        # No calls: two threads may come here with neighbouring indices.
        if self.words[layout.SLOTS_IN_USE] <= slot.index:
            self.words[layout.SLOTS_IN_USE] = slot.index + 1.0
        return slot

    def give_back(self, slot: Slot) -> None:
        """Let another key have a slot that is not armed."""
        with suppress(KeyError):  # another thread has given it back
            self.given.remove(slot)
            slot.open.pop(slot, None)
            slot.words[slot.at + layout.IDENT] = 0.0  # the thread's name is nobody's from here on
            self._free.append(slot.index)


class Expiration:
    """A block's timer: what `expires` returns; a context manager, and a decorator.

    One object is one block: it is entered once, and may be left in another thread or task.

    Attributes:
        after: its limit in seconds.
        scope: its name; or, where the caller gave none, the caller's code.
        lasti: the instruction of that code; -1 with a name.
        asked: what else the caller chose; None: nothing.
        other: what `Hooks.enter` returned, until the block is left.
    """

    __slots__ = (
        "__weakref__",
        "_entered",
        "_key",
        "_slot",
        "after",
        "asked",
        "lasti",
        "other",
        "scope",
    )

    def __init__(
        self, after: float, scope: str | CodeType, lasti: int, asked: tuple[object, ...] | None
    ) -> None:
        self.after = after
        self.scope = scope
        self.lasti = lasti
        self.asked = asked
        # As in C: no code of theirs runs where a block is looked up.
        what = scope if lasti < 0 else id(scope)
        self._key = what, lasti, after, None if asked is None else tuple(map(id, asked))
        self._entered = False
        self._slot: Slot | None = None
        self.other: Any = None

    def __enter__(self) -> Expiration:
        if self._entered:
            _hooks.refuse_again()
        if _ended is not False:
            return self
        if not _token[0]:
            forget_parent()
        loop = _running_loop()
        task = 0.0 if loop is None else float(id(_task_of(loop)))
        key = _thread.keys.get(self._key)
        # `take` has the except clause: CPython 3.11 keeps an exception, and with it the frame, if
        # a trace function raises where its handling ends (tests/property/test_storm.py).
        slot = None
        if key is not None and key.quiet and (key.nests or not self._is_within_its_scope()):
            slot = key.take()
        if slot is not None:
            self._arm(slot, task)
            return self
        self._entered = True
        try:
            self.other = _hooks.enter(self)
        except BaseException:
            self._disarm()
            self._entered = False
            raise
        return self

    def __exit__(self, kind: object = None, error: object = None, traceback: object = None) -> None:
        other = self.other
        if other is None:
            self._disarm(left=True)
            return
        self.other = None
        try:
            other.exit(kind, error, traceback)
        finally:
            self._disarm(left=True)

    async def __aenter__(self) -> Expiration:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("cannot pickle 'hangwatch.Expiration' object")

    def renew(self, after: float | None = None) -> None:
        """Give the open block another interval from now on: a heartbeat.

        Args:
            after: seconds of this interval; by default the block's own.

        Raises:
            HangwatchError: the block is not open.
            UnsupportedError: the block's client can't do that.
            ValueError, TypeError: `after` is not a positive number.
        """
        if not _token[0]:
            forget_parent()
        slot = self._slot
        if after is not None or slot is None or self.other is not None:
            _hooks.renew(self, after)
            return
        words, at, limit = slot.words, slot.at, self.after
        if words[at + layout.RENEWED_ENTRY] != slot.entry:
            words[at + layout.ENTERED] = words[at] - limit
            words[at + layout.RENEWED_ENTRY] = slot.entry
        words[at + layout.RENEWED_LIMIT] = limit
        words[at + layout.RAISED_ENTRY] = 0.0
        words[at + layout.SKIPPED_ENTRY] = 0.0
        self._set_deadline(slot)

    cancel: Callable[[], None]
    """See `handle.cancel`; it, and what follows, is the same for either core."""
    remaining: Callable[[], float]
    """See `handle.remaining`."""
    if TYPE_CHECKING:

        def __call__(self, function: Function) -> Function: ...  # noqa: D102

    @property
    def place(self) -> tuple[object, int, float] | None:
        """The page's memory, the slot's index and entry; None: none is armed."""
        if not _token[0]:
            forget_parent()
        slot = self._slot
        return None if slot is None else (slot.key.slots.mapped, slot.index, slot.entry)

    def _arm(self, slot: Slot, task: float) -> None:
        """Arm a slot; if that raises, it is not armed."""
        # Disarms once if the token is 1, so never in a forked child, in one call of C code.
        slot.end = ref(self, partial(reduce, slot.disarm, filter(None, _token)))
        slot.open[slot] = None
        self._slot = slot
        self._entered = True
        words, at = slot.words, slot.at
        if slot.task != task:
            slot.task = words[at + layout.TASK] = task
        try:
            # The order of entry, deadline and watch_until is the protocol's.
            slot.entry = words[at + layout.ENTRY] = slot.entry + 1.0
            self._set_deadline(slot)
        except BaseException:
            self._disarm()
            self._entered = False
            raise

    def _is_within_its_scope(self) -> bool:
        """Tell whether the thread may be in a block of the same name already."""
        for slot in list(_thread.open):
            around = slot.end() if slot.end is not None else None
            if around is not None and (around.lasti < 0) == (self.lasti < 0):
                # Of places, the hooks know which line they are.
                if self.lasti >= 0 or around.scope == self.scope:
                    return True
        return False

    def _set_deadline(self, slot: Slot) -> None:
        """Have the block's time begin now, and the watcher know of it."""
        words, at, slots = slot.words, slot.at, slot.key.slots
        now = monotonic()
        deadline = now + self.after
        # No calls: another thread may leave the block meanwhile.
        if self._slot is not slot:
            return
        words[at] = deadline
        if now < words[layout.WATCH_UNTIL] <= deadline or slots.closed:
            return
        if slots.ring is None or not slots.ring():
            return
        # It connected first, which is not the block's time.
        later = monotonic() + self.after
        deadline = words[at]
        if deadline == 0.0 or self._slot is not slot:
            return
        words[at] = later
        if monotonic() >= deadline:
            # The first deadline may have been found overdue, and the other one not yet.
            slots.ring()

    def _disarm(self, left: bool = False) -> None:
        slot = self._slot
        if slot is None:
            return
        if _ended is False and not _token[0]:
            forget_parent()
        # No calls: another thread may leave the block, too.
        slot.words[slot.at] = 0.0
        self._slot = None
        if _ended is not False:
            slot.end = None
            return
        if left and slot.task == 0.0 and [*slot.open][-1:] != [slot]:
            _note_skipped(slot)
        slot.open.pop(slot, None)
        slot.end = None
        slot.key.free.append(slot)
        if not slot.key.known:
            slot.key.give_back()


def _note_skipped(slot: Slot) -> None:
    """Note which blocks are open still that the thread entered after the one that it leaves."""
    in_order = list(slot.open)
    newer = [
        (other, other.entry)
        for other in in_order[in_order.index(slot) + 1 :]
        if other.task == 0.0 and other.words[other.at] != 0.0
    ]
    if newer and slot.open is _thread.open and not _hooks.switches_within_a_thread():
        for other, entry in newer:
            other.words[other.at + layout.SKIPPED_ENTRY] = entry


block = Expiration
"""Makes a block of checked arguments."""


def _make_expires(
    new: type[Expiration], frame_of: Callable[[int], FrameType], largest: float
) -> Callable[..., Expiration]:
    """Make `expires`, which has all that it needs: it is called at the interpreter's end, too."""

    def expires(after: float, scope: str | None = None, *more: Any, **named: Any) -> Expiration:
        if (
            more
            or named
            or type(after) not in (float, int)
            or not 0 < after <= largest
            or not (scope is None or (type(scope) is str and scope))
        ):
            return _hooks.declare(after, scope, *more, **named)
        if scope is not None:
            return new(float(after), scope, -1, None)
        frame = frame_of(1)
        return new(float(after), frame.f_code, frame.f_lasti, None)

    return expires


expires = _make_expires(Expiration, sys._getframe, sys.float_info.max)
"""See `hangwatch.worker.expiration.expires`, whose docstring this gets."""


def use(hooks: Hooks, description: str | None) -> None:
    """Say who decides what is not plain, and what `help` says of `expires`. Called once."""
    global _hooks
    _hooks = hooks
    expires.__doc__ = description
    expires.__wrapped__ = hooks.declare  # type: ignore[attr-defined]  # it has the signature


def ask_asyncio(running_loop: Callable[[], object], tasks: Tasks) -> None:
    """Say how to find out which task of asyncio's runs; see `asyncio_state`. Called once."""
    global _running_loop, _task_of
    _task_of = tasks.get if isinstance(tasks, dict) else tasks
    _running_loop = running_loop


def forget_keys() -> None:
    """Make every thread ask again at its next blocks."""
    for keys in _alive(_all_keys):
        keys.forget()


def forks() -> int:
    """Return how many forks lie between the first process that loaded this and the caller."""
    if not _token[0]:
        forget_parent()
    return _forks


def register_fence() -> bool:
    """Let the watcher's memory fence reach this process; see `linux.register_fence`."""
    return linux is not None and linux.register_fence()


def end() -> None:
    """The interpreter ends: disarm what other threads have armed, and let new blocks be.

    It is about to stop those threads where they are, and to take away what ours needs.
    """
    global _ended
    if not _token[0]:
        forget_parent()
    _ended = True
    for slots in _alive(_pages):
        for slot in list(slots.given):
            if slot.open is not _thread.open:
                slot.words[slot.at] = 0.0


def _alive(all_of_them: WeakValueDictionary[int, Any]) -> list[Any]:
    """Return what is there; in one call of C code, for other threads add to it meanwhile."""
    return [one for alive in all_of_them.valuerefs() if (one := alive()) is not None]


def forget_parent() -> None:
    """In a forked child, whoever forked it: the pages are its own from here on."""
    global _forks
    for slots in _alive(_pages):
        slots.closed = True
        linux.make_private(slots.address, len(slots.memory))  # under every handle to it
    _token[0] = 1
    _forks += 1
    forget_keys()


def _running_loop() -> object:
    """Return asyncio's loop that runs in this thread; nobody has said yet how to find it."""


_task_of: Callable[[object], object]
_ended: bool | None = False
"""True once the interpreter ends; None once it has taken our names away, too."""
_hooks: Hooks
_forks = 0
_pages: WeakValueDictionary[int, Slots] = WeakValueDictionary()
_all_keys: WeakValueDictionary[int, _Keys] = WeakValueDictionary()
_memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with suppress(OSError):  # before Linux 4.14: forks that Python does not see go unnoticed
    _memory.madvise(_WIPE_ON_FORK)
_token = memoryview(_memory)[:1]
"""A byte that is 1; the kernel makes it 0 in every forked child."""
_token[0] = 1
_thread = _Thread()
