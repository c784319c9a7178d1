"""The core in plain Python: blocks, and the slots of a page that they arm.

This is the reference of `_core.c`, which does the same in single calls of C code, and runs
where that can't: without a compiler, without a GIL, in an interpreter with a GIL of its own.

One object is one block. Entering it arms a slot; leaving it disarms the slot, and so does the
object's end, whatever skipped ``__exit__``: an interrupt at its first instruction, a trace
function, a generator that nobody finishes. In plain Python an interrupt between two
instructions of ours can leave a block armed that has not begun, until its object is gone, or
keep a slot from being used again; never does it leave a block unarmed that is open. In a storm
of interrupts one in five costs a slot, so after some 20,000 of them, all within blocks, a page
has none left: blocks run unwatched then, with one warning (tests/property/test_storm.py).

What a block is once a thread has entered it, scope, limit and policy, is its *key*. A thread
keeps the slots of its keys, their details written, so entering again is two stores.

`hooks` decide all that is not plain, see `use`.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial, reduce
from math import inf
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
    from typing import Any, Protocol, TypeVar

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

        def entered(self) -> Exception:
            """Return the error of who enters a block again."""


LAYOUT = layout.VERSION

_MOST_KEYS = 64
_MOST_NOTED = 64
_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
_DISARM = Struct("=d??")
"""The deadline 0.0; then whatever a weak reference's callback is given, where nobody reads."""
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, madvise(2): Python 3.11 has no name for it


class _Home(list["Slot"]):
    """The free slots of a key."""

    __slots__ = ("alive", "keeps", "slots")

    def __init__(self, slots: Slots, keeps: object) -> None:
        self.slots = slots
        self.keeps = keeps  # what the key speaks of by identity
        self.alive = True

    def give_back(self) -> None:
        """Let other keys have the slots."""
        while self:
            try:
                slot = self.pop()
            except IndexError:  # another thread has taken the last one
                return
            self.slots.give_back(slot)


class _Thread:
    """What a thread has: its keys, and its open blocks by their time of entry.

    Attributes:
        homes: by the keys that are entered without asking.
        asked: by the others, and their page.
        ident: whose it is; it gets another one of these when its keys are forgotten.
        open: slots that are armed, or were.
        order: how many blocks it has entered.
    """

    __slots__ = ("__weakref__", "asked", "homes", "ident", "open", "order")

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.homes: dict[Hashable, _Home] = {}
        self.asked: dict[Hashable, _Home] = {}
        self.open: list[Slot] = []
        self.order = 0
        _threads[id(self)] = self

    def forget_keys(self, *, for_good: bool) -> None:
        """Give slots back; `for_good`: those of open blocks, too, when they end."""
        for homes in self.homes, self.asked:
            for key, home in list(homes.items()):
                if for_good:
                    home.alive = False
                    homes.pop(key, None)
                home.give_back()

    def forget_ended(self) -> None:
        """Give back the slots of blocks that ended by their object's end; called by the thread."""
        for slot in self.open:
            if slot.is_lost():
                slot.slots.give_back(slot)
        self.open = [slot for slot in self.open if slot.is_armed()]


class _ThreadEnd:
    """Lives in thread-local storage alone, so that it dies with the thread."""

    def __init__(self, thread: _Thread) -> None:
        self.thread = thread

    def __del__(self) -> None:
        # A forked child ends all threads but one before any hook of ours can run, and the
        # pages are still its parent's then. At the interpreter's end nothing is left of us.
        if _ended is False and _token[0]:
            self.thread.forget_keys(for_good=True)
            self.thread.forget_ended()


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()
        self.end = _ThreadEnd(self.thread)


class Slot:
    """One place of a page, given to a key.

    Attributes:
        home: the free slots of that key.
        disarm: disarms, whatever it is given.
        end: calls that when the object is gone that entered the slot; None: it is not entered.
        given: empty once the slot was given back.
    """

    __slots__ = (
        "at",
        "disarm",
        "end",
        "entry",
        "given",
        "home",
        "index",
        "limit",
        "order",
        "slots",
        "task",
        "thread",
        "words",
    )

    def __init__(self, slots: Slots, index: int, thread: _Thread, home: _Home) -> None:
        self.slots = slots
        self.index = index
        self.thread = thread
        self.home = home
        self.words = slots.words
        self.at = at = slots.first // 8 + index * layout.SLOT_WORDS
        self.disarm: Callable[[object], None] = partial(
            _DISARM.pack_into, slots.memory, at * 8, 0.0
        )
        self.end: ref[Expiration] | None = None
        self.given = [True]
        self.entry = layout.next_generation(self.words[at + layout.ENTRY])
        self.limit = inf
        self.order = 0
        self.task = 0.0

    def is_armed(self) -> bool:
        """Tell whether it is armed, and not another key's place by now."""
        return bool(self.given) and self.words[self.at] != 0.0

    def is_lost(self) -> bool:
        """Tell whether the block that had it ended by its object's end."""
        end = self.end
        return end is not None and end() is None and self.words[self.at] == 0.0


class Slots:
    """All slots of one page.

    Args:
        memory: the page.
        ring: called, from any thread, when the watcher must be told of a new deadline; returns
            whether it connected first, which is not the block's time.
        first: the byte at which the slots begin.
        capacity: how many there are.

    Attributes:
        closed: whether no slot is given out any more, and nobody rung for; what is armed stays so.

    Raises:
        OSError: there is no way to keep a forked child from writing this memory.
    """

    def __init__(
        self, memory: mmap.mmap, ring: Callable[[], bool], first: int, capacity: int
    ) -> None:
        if linux is None:
            raise OSError(errno.ENOSYS, "this Python has neither ctypes nor hangwatch's core in C")
        self.memory = memoryview(memory)
        self.words = self.memory.cast("d")
        self._address = linux.address_of(self.memory)
        self.first = first
        self._ring = ring
        self._capacity = capacity
        self._next_index = itertools.count()
        self._free: deque[int] = deque()
        self._given: dict[int, Slot] = {}
        self._mapped = memory
        self.closed = False
        if not _HAS_GIL:
            # Counting them takes two steps, between which another thread could count, too.
            self.words[layout.SLOTS_IN_USE] = capacity
        _pages[id(self)] = self

    def arm(
        self,
        block: Expiration,
        limit: float,
        details: Callable[[], bytes],
        task: float,
        quiet: bool,
    ) -> bool:
        """Arm a slot for a block that is being entered.

        Args:
            block: the block.
            limit: seconds that it may take.
            details: returns what a new slot says besides; see `layout.pack_details`.
            task: which task of an event loop enters it; 0.0: none.
            quiet: whether the thread may enter this key again without asking.

        Returns:
            False if no slot is left.
        """
        if not _token[0]:
            forget_parent()
        if self.closed:
            return False
        thread = _local.thread
        homes: dict[Hashable, _Home] = thread.homes if quiet else thread.asked
        key: Hashable = block._key if quiet else (block._key, id(self))
        home = homes.get(key)
        if home is None or home.slots is not self:
            if home is not None or len(homes) >= _MOST_KEYS:
                thread.forget_keys(for_good=True)
            homes[key] = home = _Home(self, (block.scope, block.asked))
        try:
            slot = home.pop()
        except IndexError:
            written = details()
            index = self._free_index()
            if index is None:
                return False
            slot = Slot(self, index, thread, home)
            at = slot.at
            # The new generation goes first: who reads the rest in between sees it change.
            self.words[at + layout.ENTRY] = slot.entry
            begin = (at + layout.LIMIT) * 8
            self.memory[begin : begin + len(written)] = written
            self._given[index] = slot
            # No calls: two threads may come here with neighbouring indices.
            if self.words[layout.SLOTS_IN_USE] <= index:
                self.words[layout.SLOTS_IN_USE] = index + 1.0
        slot.limit = limit
        _arm(block, slot, task)
        return True

    def ring(self, slot: Slot, entry: float) -> None:
        """Ask the watcher for a look."""
        if self.closed or not self._ring():
            return
        # It connected first, which is not the block's time.
        later = monotonic() + slot.limit
        deadline = slot.words[slot.at]
        if deadline == 0.0 or slot.entry != entry:
            return
        slot.words[slot.at] = later
        if monotonic() >= deadline:
            # The first deadline may have been found overdue, and the other one not yet.
            self._ring()

    def ring_again(self) -> None:
        """Ask the watcher for a look, for a block that has had its first one."""
        if not self.closed:
            self._ring()

    def forget_parent(self) -> None:
        """In a forked child: put private memory under every handle to the parent's page."""
        self.closed = True
        linux.make_private(self._address, len(self.memory))

    def give_back(self, slot: Slot) -> None:
        """Let another key have a slot that is not armed."""
        with suppress(IndexError):  # another thread has given it back
            slot.given.pop()
            slot.words[slot.at + layout.IDENT] = 0.0  # the thread's name is nobody's from here on
            self._free.append(slot.index)

    def _free_index(self) -> int | None:
        for _ in range(2):
            try:
                return self._free.pop()
            except IndexError:
                pass
            index = next(self._next_index)
            if index < self._capacity:
                return index
            for thread in _alive(_threads):
                thread.forget_keys(for_good=False)
            for slot in list(self._given.values()):
                if slot.is_lost():
                    self.give_back(slot)
        return None


class Expiration:
    """A block's timer: what `expires` returns; a context manager, and a decorator.

    One object is one block: it is entered once, and may be left in another thread or task.
    """

    __slots__ = ("__weakref__", "_key", "_slot", "asked", "other", "scope")

    # Set by `expires`; an __init__ would cost as much as all the rest of it.
    _key: tuple[Any, int, float, Hashable]
    """The scope, or the id of its code; see `block`."""
    _slot: Slot | None
    asked: tuple[object, ...] | None
    other: Any
    """What `Hooks.enter` returned."""
    scope: str | CodeType

    def __enter__(self) -> Expiration:
        if self._slot is not None:
            raise _hooks.entered()
        if _ended is not False:
            return self
        if not _token[0]:
            forget_parent()
        slot: Slot | None
        task = _Asyncio.task()
        try:
            slot = _local.thread.homes[self._key].pop()
        except (KeyError, IndexError):
            slot = None
        if slot is not None:
            _arm(self, slot, task)
            return self
        # After the except clause: CPython 3.11 keeps an exception, and with it our frame, if a
        # trace function raises where its handling ends (tests/property/test_storm.py).
        self._slot = _NONE
        try:
            self.other = _hooks.enter(self)
        except BaseException:
            self._disarm()
            self._slot = None
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
        slot = self._slot
        if not _token[0]:
            forget_parent()
        if after is not None or slot is None or slot is _NONE or self.other is not None:
            _hooks.renew(self, after)
            return
        words, at = slot.words, slot.at
        now = monotonic()
        deadline = now + slot.limit
        if words[at + layout.RENEWED_ENTRY] != slot.entry:
            words[at + layout.ENTERED] = words[at] - slot.limit
            words[at + layout.RENEWED_ENTRY] = slot.entry
        words[at + layout.RENEWED_LIMIT] = slot.limit
        words[at + layout.RAISED_ENTRY] = 0.0
        words[at + layout.SKIPPED_ENTRY] = 0.0
        words[at] = deadline
        if not now < words[layout.WATCH_UNTIL] <= deadline:
            slot.slots.ring_again()

    cancel: Callable[[], None]
    """See `handle.cancel`; it, and what follows, is the same for either core."""
    remaining: Callable[[], float]
    """See `handle.remaining`."""
    if TYPE_CHECKING:

        def __call__(self, function: Function) -> Function: ...  # noqa: D102

    def again(self) -> Expiration:
        """Return another object for the same block, which nobody has entered yet."""
        return block(self.after, self.scope, self.lasti, self.asked)

    @property
    def after(self) -> float:
        """See `block`."""
        return self._key[2]

    @property
    def lasti(self) -> int:
        """See `block`."""
        return self._key[1]

    @property
    def place(self) -> tuple[object, int, float] | None:
        """The page's memory, the slot's index and entry; None: none is armed."""
        if not _token[0]:
            forget_parent()
        slot = self._slot
        if slot is None or slot is _NONE:
            return None
        return slot.slots._mapped, slot.index, slot.entry

    def _disarm(self, left: bool = False) -> None:
        slot = self._slot
        if slot is None or slot is _NONE:
            return
        if _ended is False and not _token[0]:
            forget_parent()
        slot.words[slot.at] = 0.0
        self._slot = _NONE
        slot.end = None
        if _ended is not False:
            return
        thread, home = slot.thread, slot.home
        if thread.open and thread.open[-1] is slot:
            thread.open.pop()
        else:
            _left_out_of_order(thread, slot, left)
        home.append(slot)
        if not home.alive:
            home.give_back()


def _arm(block: Expiration, slot: Slot, task: float) -> None:
    """Arm a slot, the same way as `_core.c`."""
    words, at, thread = slot.words, slot.at, slot.thread
    block._slot = slot
    # Disarms once if the token is 1, so never in a forked child, in one call of C code.
    slot.end = ref(block, partial(reduce, slot.disarm, filter(None, _token)))
    thread.order = slot.order = thread.order + 1
    if len(thread.open) >= _MOST_NOTED:
        thread.forget_ended()
    thread.open.append(slot)
    if slot.task != task:
        slot.task = words[at + layout.TASK] = task
    try:
        # The order of entry, deadline and watch_until is the protocol's.
        slot.entry = words[at + layout.ENTRY] = entry = slot.entry + 1.0
        now = monotonic()
        words[at] = deadline = now + slot.limit
        if not now < words[layout.WATCH_UNTIL] <= deadline:
            slot.slots.ring(slot, entry)
    except BaseException:
        block._disarm()
        block._slot = None
        raise


def _left_out_of_order(thread: _Thread, slot: Slot, left: bool) -> None:
    """Note that blocks were skipped which the thread entered later and that are open still."""
    thread.open = [other for other in thread.open if other is not slot and other.is_armed()]
    newer = [
        (other, other.entry)
        for other in thread.open
        if other.order > slot.order and other.task == 0.0
    ]
    if left and newer and slot.task == 0.0 and thread is _local.thread:
        if not _hooks.switches_within_a_thread():
            for other, entry in newer:
                if other.entry == entry and other.is_armed():
                    other.words[other.at + layout.SKIPPED_ENTRY] = entry


class _Asyncio:
    """What asyncio says of this thread, as soon as we have seen it imported."""

    running_loop: Callable[[], object] | None = None
    task_of: Callable[[object], object]

    @classmethod
    def task(cls) -> float:
        """Return the identity of the task that runs in this thread; 0.0: no loop runs."""
        if cls.running_loop is None:
            return 0.0
        loop = cls.running_loop()
        return 0.0 if loop is None else float(id(cls.task_of(loop)))


def block(
    after: float, scope: str | CodeType, lasti: int, asked: tuple[object, ...] | None
) -> Expiration:
    """Make a block of checked arguments.

    Args:
        after: its limit in seconds.
        scope: its name; or, where the caller gave none, the caller's code.
        lasti: the instruction of that code; -1 with a name.
        asked: what else the caller chose; None: nothing.
    """
    what = scope if lasti < 0 else id(scope)
    # As in C: no code of theirs runs where a block is looked up.
    choice = None if asked is None else tuple(map(id, asked))
    made = Expiration()
    made._key = what, lasti, after, choice
    made.scope = scope
    made.asked = asked
    made._slot = made.other = None
    return made


def expires(
    after: float,
    scope: str | None = None,
    *more: Any,
    _new: type[Expiration] = Expiration,
    _frame: Callable[[int], FrameType] = sys._getframe,
    _largest: float = sys.float_info.max,
    **named: Any,
) -> Expiration:
    """See `hangwatch.worker.expiration.expires`, whose docstring this gets."""
    # What it needs is at hand: it is called at the interpreter's end, too.
    if (
        more
        or named
        or type(after) not in (float, int)
        or not 0 < after <= _largest
        or not (scope is None or (type(scope) is str and scope))
    ):
        return _hooks.declare(after, scope, *more, **named)
    made = _new()
    if scope is None:
        frame = _frame(1)
        made.scope = code = frame.f_code
        made._key = id(code), frame.f_lasti, float(after), None
    else:
        made.scope = scope
        made._key = scope, -1, float(after), None
    made._slot = made.other = made.asked = None
    return made


def use(hooks: Hooks, description: str | None) -> None:
    """Say who decides what is not plain, and what `help` says of `expires`. Called once."""
    global _hooks
    _hooks = hooks
    expires.__doc__ = description
    expires.__wrapped__ = hooks.declare  # type: ignore[attr-defined]  # it has the signature


def ask_asyncio(running_loop: Callable[[], object], tasks: Tasks) -> None:
    """Say how to find out which task of asyncio's runs; see `asyncio_state`. Called once."""
    _Asyncio.task_of = staticmethod(tasks.get if isinstance(tasks, dict) else tasks)
    _Asyncio.running_loop = staticmethod(running_loop)


def forget_keys() -> None:
    """Make every thread ask again at its next blocks."""
    for thread in _alive(_threads):
        thread.forget_keys(for_good=True)


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
    _ended = True
    own = threading.get_ident()
    for thread in _alive(_threads):
        for slot in () if thread.ident == own else list(thread.open):
            if slot.is_armed():
                slot.words[slot.at] = 0.0


def _alive(all_of_them: WeakValueDictionary[int, Any]) -> list[Any]:
    """Return what is there; in one call of C code, for other threads add to it meanwhile."""
    return [
        one for one in (reference() for reference in all_of_them.valuerefs()) if one is not None
    ]


def forget_parent() -> None:
    """In a forked child, whoever forked it: the pages are its own from here on."""
    global _forks
    for slots in _alive(_pages):
        slots.forget_parent()
    _token[0] = 1
    _forks += 1
    forget_keys()


_ended: bool | None = False
"""True once the interpreter ends; None once it has taken our names away, too."""
_NONE: Any = object()
"""In the place of the slot of a block that was entered, and has none, or none any more."""
_hooks: Hooks
_forks = 0
_pages: WeakValueDictionary[int, Slots] = WeakValueDictionary()
_threads: WeakValueDictionary[int, _Thread] = WeakValueDictionary()
_memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with suppress(OSError):  # before Linux 4.14: forks that Python does not see go unnoticed
    _memory.madvise(_WIPE_ON_FORK)
_token = memoryview(_memory)[:1]
"""A byte that is 1; the kernel makes it 0 in every forked child."""
_token[0] = 1
_local = _PerThread()
