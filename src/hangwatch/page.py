"""The page: the memory that one worker shares with the watcher.

This module alone knows the layout. The worker writes slots, the watcher reads
them and writes one word, ``watch_until``.

Layout (native byte order, one memfd of `PAGE_BYTES`):

    header, 64 bytes
        0   8s  magic, the last byte is the version
        8   u64 capacity: slots that fit
        16  f64 watch_until: the watcher looks at this page again no later than this
        24  f64 slots in use: only the first so many were ever given out
        32  f64 the signal that makes the main thread raise what is overdue there; 0.0: none
        40  f64 1.0 once a Python debugger (bdb, pydevd) was loaded into the process
    slots, 320 bytes each
        0   f64 deadline, 0.0 while not armed
        8   3?  how the block ended; written together with the deadline, read by nobody
        16  f64 entry: generation * 2**32 + times entered; a new scope is a new generation
        24  f64 limit
        32  u64 threading.get_ident(), u64 threading.get_native_id()
        48  u32 flags, i32 signal
        56  u64 the enclosing slot's index + 1 (0: none), f64 its entry
        72  f64 grace
        80  f64 entry of which the next two speak
        88  f64 when the block was entered, f64 limit of its present interval
        104 f64 entry that was ended by an exception of ours, the last one
        112 f64 entry that is in an asyncio task, the last one
        120 24s the thread's name     144 176s the scope      (UTF-8, padded with NUL)

A block that was never renewed was entered at its deadline minus its limit.

Times are seconds of CLOCK_MONOTONIC as a double: after a year of uptime a
double still resolves 4 ns, and Python adds, compares and stores it faster than
an integer of nanoseconds (docs/decisions/0002-doubles.md).

The memory is sparse: the kernel backs only what was touched, so a page has room
for `CAPACITY` slots and costs what is used (docs/decisions/0003-one-sparse-page.md).
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from math import isfinite

VERSION = 2
MAGIC = b"hangwat" + bytes([VERSION])
CAPACITY = 4096
HEADER_BYTES = 64
SLOT_BYTES = 320
PAGE_BYTES = HEADER_BYTES + CAPACITY * SLOT_BYTES
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# Words of the page seen as doubles, counted from the page's start ...
WATCH_UNTIL = 2
SLOTS_IN_USE = 3
RAISE_SIGNAL = 4
DEBUGGER_LOADED = 5
HEADER_WORDS = HEADER_BYTES // 8
SLOT_WORDS = SLOT_BYTES // 8
# ... and from a slot's.
DEADLINE = 0
ENTRY = 2
LIMIT = 3
RENEWED_ENTRY = 10
ENTERED = 11
RENEWED_LIMIT = 12
RAISED_ENTRY = 13
TASK_ENTRY = 14

_HEADER = struct.Struct("=8sQ")
_DETAILS = struct.Struct("=dQQIi")
_DETAILS_AT = LIMIT * 8
_ENCLOSING = struct.Struct("=Qd")
_ENCLOSING_AT = 56
_GRACE = struct.Struct("=d")
_GRACE_AT = 72
_THREAD_AT, _THREAD_BYTES = 120, 24
_SCOPE_AT, _SCOPE_BYTES = 144, 176
_CUT = "…"

NEVER = 2.0**62
"""The deadline of an open block that is never due: cancelled, or replaced by an inner block."""
NEVER_KILL = -1
"""In the place of a slot's signal: an overrun is reported, and the worker left alone."""
NO_GRACE = -1.0
"""In the place of a slot's grace: none, whatever the server's."""

# Flags: two bits of what an overrun leads to, ...
ON_EXPIRY = (None, "report", "raise", "reap")
ON_EXPIRY_BITS = 3
# ... and whether the block suspends the process's other timers.
PAUSES = 4
_FLAGS_LOW_AT = 48 if sys.byteorder == "little" else 51

# One generation is one scope's stay in a slot. The generation wraps long before
# the entry would leave the integers that a double counts exactly (2**53).
GENERATION = 2.0**32
_GENERATIONS = 2.0**20

DISARM = struct.Struct("=d???")
"""What leaving a block writes: the deadline 0.0, then whether it ended by an exception."""


class SlotDetails:
    """What a slot says besides its deadline; constant for one generation.

    Not a dataclass: every worker imports this module, and dataclasses takes as long to
    import as all of hangwatch.

    Attributes:
        limit: seconds that the block may take.
        ident: `threading.get_ident()` of the thread that holds the block.
        native_id: its kernel thread id.
        flags: what an overrun leads to (`on_expiry`), and `PAUSES`.
        signal: what an overrun sends first, `NEVER_KILL`, or 0 for the server's choice.
        grace: seconds that each step before SIGKILL has, `NO_GRACE`, or 0.0 for the server's.
        thread_name: Python's name of the thread, perhaps cut.
        scope: the block's name, perhaps cut.
    """

    __slots__ = ("flags", "grace", "ident", "limit", "native_id", "scope", "signal", "thread_name")

    def __init__(
        self,
        limit: float,
        ident: int,
        native_id: int,
        thread_name: str,
        scope: str,
        flags: int = 0,
        signal: int = 0,
        grace: float = 0.0,
    ) -> None:
        self.limit = limit
        self.ident = ident
        self.native_id = native_id
        self.thread_name = thread_name
        self.scope = scope
        self.flags = flags
        self.signal = signal
        self.grace = grace

    @property
    def on_expiry(self) -> str | None:
        """What an overrun leads to, of `ON_EXPIRY`; None: what the server says."""
        return ON_EXPIRY[self.flags & ON_EXPIRY_BITS]

    @property
    def pauses(self) -> bool:
        """Whether the process's other timers are suspended while the block lasts."""
        return bool(self.flags & PAUSES)


def deadline_word(index: int) -> int:
    """Return the word of slot `index`'s deadline."""
    return HEADER_WORDS + index * SLOT_WORDS + DEADLINE


def slot_byte(index: int) -> int:
    """Return the byte at which slot `index` begins."""
    return HEADER_BYTES + index * SLOT_BYTES


def create_memfd() -> int:
    """Create a page's memory: sized, sealed, its header written.

    Returns:
        The descriptor, close-on-exec; the caller owns it.

    Raises:
        OSError: the kernel has no memory or no descriptor left.

    Source: memfd_create(2), fcntl(2) on file seals.
    """
    descriptor = os.memfd_create("hangwatch-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, PAGE_BYTES)
        os.pwrite(descriptor, _HEADER.pack(MAGIC, CAPACITY), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def header_problem(memory: memoryview) -> str | None:
    """Say what is wrong with a page's header, or None."""
    magic, capacity = _HEADER.unpack_from(memory, 0)
    if magic[:-1] != MAGIC[:-1]:
        return "the page does not begin with hangwatch's magic"
    if magic[-1] != VERSION:
        return f"the page has layout {magic[-1]}, this watcher reads {VERSION}"
    if capacity != CAPACITY:
        return f"the page says it has {capacity} slots, not {CAPACITY}"
    return None


def next_generation(entry: float) -> float:
    """Return the entry that begins the slot's next generation, never entered yet."""
    return ((entry // GENERATION + 1.0) % _GENERATIONS) * GENERATION


def times_entered(entry: float) -> int:
    """Return how often this scope was entered in this slot; 0 for what is no number."""
    return int(entry % GENERATION) if isfinite(entry) else 0


def cut(text: str, room: int, *, keep_end: bool = False) -> bytes:
    """Encode `text` as UTF-8 in at most `room` bytes; what is lost leaves a mark."""
    if len(text) <= room:
        encoded = text.encode("utf-8", "backslashreplace")
        if len(encoded) <= room:
            return encoded
    mark = _CUT.encode()
    part = text[-room:] if keep_end else text[:room]
    encoded = part.encode("utf-8", "backslashreplace")
    room -= len(mark)
    if keep_end:
        return mark + encoded[-room:].decode("utf-8", "ignore").encode()
    return encoded[:room].decode("utf-8", "ignore").encode() + mark


def pauses(memory: memoryview, index: int) -> bool:
    """Tell whether the block in slot `index` suspends the others, without reading the rest."""
    return bool(memory[slot_byte(index) + _FLAGS_LOW_AT] & PAUSES)


def write_details(memory: memoryview, index: int, details: SlotDetails, keep_end: bool) -> None:
    """Write a slot's details, and that no block is around it.

    The slot must not be armed, and its generation must be new.

    Args:
        memory: the page as bytes.
        index: the slot.
        details: what to write.
        keep_end: cut a long scope at its beginning (a path's end tells more).
    """
    at = slot_byte(index)
    _DETAILS.pack_into(
        memory,
        at + _DETAILS_AT,
        details.limit,
        details.ident,
        details.native_id,
        details.flags,
        details.signal,
    )
    _GRACE.pack_into(memory, at + _GRACE_AT, details.grace)
    write_enclosing(memory, index, None, 0.0)
    name = cut(details.thread_name, _THREAD_BYTES).ljust(_THREAD_BYTES, b"\0")
    scope = cut(details.scope, _SCOPE_BYTES, keep_end=keep_end).ljust(_SCOPE_BYTES, b"\0")
    memory[at + _THREAD_AT : at + _SCOPE_AT + _SCOPE_BYTES] = name + scope


def write_enclosing(memory: memoryview, index: int, enclosing: int | None, entry: float) -> None:
    """Say which block is around the one in slot `index`; before arming it."""
    word = 0 if enclosing is None else enclosing + 1
    _ENCLOSING.pack_into(memory, slot_byte(index) + _ENCLOSING_AT, word, entry)


def read_enclosing(memory: memoryview, index: int) -> tuple[int | None, float]:
    """Return the slot of the block around the one in slot `index`, or None, and its entry."""
    word, entry = _ENCLOSING.unpack_from(memory, slot_byte(index) + _ENCLOSING_AT)
    return (word - 1 if 0 < word <= CAPACITY else None), entry


def read_details(memory: memoryview, index: int) -> SlotDetails:
    """Read a slot's details, whatever the bytes are: a page may hold nonsense."""
    at = slot_byte(index)
    limit, ident, native_id, flags, signal = _DETAILS.unpack_from(memory, at + _DETAILS_AT)
    (grace,) = _GRACE.unpack_from(memory, at + _GRACE_AT)
    return SlotDetails(
        limit=limit if isfinite(limit) else 0.0,
        ident=ident,
        native_id=native_id,
        thread_name=_text(memory, at + _THREAD_AT, _THREAD_BYTES),
        scope=_text(memory, at + _SCOPE_AT, _SCOPE_BYTES),
        flags=flags,
        signal=signal,
        grace=grace if isfinite(grace) else 0.0,
    )


def _text(memory: memoryview, at: int, room: int) -> str:
    return bytes(memory[at : at + room]).split(b"\0", 1)[0].decode("utf-8", "replace")
