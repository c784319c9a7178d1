"""The layout of a page: the memory that one worker shares with the watcher.

This module alone knows an offset. The worker writes slots, the watcher reads them and
writes one word, ``watch_until``. What the words mean together is in `view`.

Layout (native byte order, one memfd):

    header, 512 bytes
        0   8s  magic, the last byte is the layout's number
        8   u64 size of the whole page in bytes
        16  f64 watch_until: the watcher looks at this page again no later than this
        24  f64 slots in use: only the first so many were ever given out
        32  f64 the signal that makes the main thread raise what is overdue there; 0.0: none
        40  f64 1.0 once a Python debugger (bdb, pydevd) was loaded into the process
        48  u64 number of areas
        56  the directory: for each area 8s name (ASCII, padded with NUL), u64 offset from the
            page's beginning, u64 size of a row, u64 number of rows
    the area "slots", rows of 320 bytes
        0   f64 deadline, 0.0 while not armed
        8   f64 nothing: who disarms in plain Python writes there, too
        16  f64 entry: generation * 2**32 + times entered; a new scope is a new generation
        24  f64 limit
        32  u64 threading.get_ident(), u64 threading.get_native_id()
        48  u32 flags, i32 signal (`policy.to_words`; of the flags, `PAUSES` is not the policy's)
        56  f64 the task of an event loop that entered the block; 0.0: none; a timer that was
            acquired by a call has a number of its own here
        64  f64 entry that was skipped: a block that its thread entered earlier was left before
        72  f64 grace (`policy.to_words`)
        80  f64 entry of which the next two speak
        88  f64 when the block was entered, f64 limit of its present interval
        104 f64 entry that was ended by an exception of ours, the last one
        112 f64 nothing yet
        120 24s the thread's name     144 176s the scope      (UTF-8, padded with NUL)

A block that was never renewed was entered at its deadline minus its limit.

A reader finds its areas by the directory and ignores areas that it does not know, so a
later version may add some without a new number. What is already here gets a new number
whenever it changes; a reader of another number refuses the page.

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
from collections.abc import Iterable, Iterator
from math import isfinite

from hangwatch.errors import PageError
from hangwatch.policy import NOTHING_CHOSEN, Policy, from_words, to_words

VERSION = 3
MAGIC = b"hangwat" + bytes([VERSION])
CAPACITY = 4096
HEADER_BYTES = 512
SLOT_BYTES = 320
PAGE_BYTES = HEADER_BYTES + CAPACITY * SLOT_BYTES
MOST_BYTES = 16 << 20
"""No reader maps a page that is larger, whatever areas a later version adds."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
WHAT_TO_DO = "install the same hangwatch in both environments"
"""What to do about a worker and a watcher of different versions."""

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
IDENT = 4
TASK = 7
SKIPPED_ENTRY = 8
RENEWED_ENTRY = 10
ENTERED = 11
RENEWED_LIMIT = 12
RAISED_ENTRY = 13

_HEADER = struct.Struct("=8sQ")
_AREAS_AT = 48
_AREA = struct.Struct("=8sQQQ")
_MOST_AREAS = (HEADER_BYTES - _AREAS_AT - 8) // _AREA.size
_DETAILS = struct.Struct("=dQQIi")
_DETAILS_AT = LIMIT * 8
_GRACE = struct.Struct("=d")
_GRACE_AT = 72
_THREAD_AT, _THREAD_BYTES = 120, 24
_SCOPE_AT, _SCOPE_BYTES = 144, 176
_CUT = "…"

NEVER = 2.0**62
"""The deadline of an open block that is never due: cancelled, or replaced by an inner block."""

PAUSES = 4
"""A flag: whether the block suspends the process's other timers."""
_FLAGS_LOW_AT = 48 if sys.byteorder == "little" else 51

# One generation is one scope's stay in a slot. The generation wraps long before
# the entry would leave the integers that a double counts exactly (2**53).
GENERATION = 2.0**32
_GENERATIONS = 2.0**20


class SlotDetails:
    """What a slot says besides its deadline; constant for one generation.

    Not a dataclass: every worker imports this module, and dataclasses takes as long to
    import as all of hangwatch.

    Attributes:
        limit: seconds that the block may take.
        ident: `threading.get_ident()` of the thread that holds the block.
        native_id: its kernel thread id.
        thread_name: Python's name of the thread, perhaps cut.
        scope: the block's name, perhaps cut.
        policy: what the block chose about an overrun.
        pauses: whether the process's other timers are suspended while the block lasts.
    """

    __slots__ = ("ident", "limit", "native_id", "pauses", "policy", "scope", "thread_name")

    def __init__(
        self,
        limit: float,
        ident: int,
        native_id: int,
        thread_name: str,
        scope: str,
        policy: Policy = NOTHING_CHOSEN,
        pauses: bool = False,
    ) -> None:
        self.limit = limit
        self.ident = ident
        self.native_id = native_id
        self.thread_name = thread_name
        self.scope = scope
        self.policy = policy
        self.pauses = pauses


def deadline_word(index: int) -> int:
    """Return the word of slot `index`'s deadline."""
    return HEADER_WORDS + index * SLOT_WORDS + DEADLINE


def slot_byte(index: int) -> int:
    """Return the byte at which slot `index` begins."""
    return HEADER_BYTES + index * SLOT_BYTES


class Area:
    """A part of a page: rows of one size.

    Attributes:
        name: what the rows are.
        offset: where the first row begins, in bytes from the page's beginning.
        row_bytes: size of a row.
        rows: number of rows.
    """

    __slots__ = ("name", "offset", "row_bytes", "rows")

    def __init__(self, name: str, offset: int, row_bytes: int, rows: int) -> None:
        self.name = name
        self.offset = offset
        self.row_bytes = row_bytes
        self.rows = rows

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.rows * self.row_bytes


SLOTS = Area("slots", HEADER_BYTES, SLOT_BYTES, CAPACITY)


def header(areas: Iterable[Area], size: int) -> bytes:
    """Return a page's header.

    Args:
        areas: the page's areas.
        size: of the whole page in bytes.
    """
    areas = list(areas)
    directory = [
        _AREA.pack(area.name.encode("ascii"), area.offset, area.row_bytes, area.rows)
        for area in areas
    ]
    head = _HEADER.pack(MAGIC, size).ljust(_AREAS_AT, b"\0")
    return b"".join([head, struct.pack("=Q", len(areas)), *directory]).ljust(HEADER_BYTES, b"\0")


def create_memfd(slots: Area = SLOTS) -> int:
    """Create a page's memory: sized, sealed, its header written.

    Args:
        slots: where its slots are, and how many.

    Returns:
        The descriptor, close-on-exec; the caller owns it.

    Raises:
        OSError: the kernel has no memory or no descriptor left.

    Source: memfd_create(2), fcntl(2) on file seals.
    """
    descriptor = os.memfd_create("hangwatch-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, slots.end)
        os.pwrite(descriptor, header([slots], slots.end), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_areas(memory: memoryview) -> dict[str, Area]:
    """Read a page's header and its directory, whatever the bytes are.

    Returns:
        The areas by their names, those included that this version does not know. None begins
        before the header's end, ends behind the page's, or overlaps another.

    Raises:
        PageError: the page is of another layout, or its directory is wrong: the worker's fault.
    """
    if len(memory) < HEADER_BYTES:
        raise PageError(f"the page has {len(memory)} bytes instead of {HEADER_BYTES} or more")
    magic, size = _HEADER.unpack_from(memory, 0)
    if magic[:-1] != MAGIC[:-1]:
        raise PageError("the page does not begin with hangwatch's magic")
    if magic[-1] != VERSION:
        raise PageError(
            f"the page has layout {magic[-1]}, this watcher reads {VERSION}: {WHAT_TO_DO}"
        )
    if size != len(memory):
        raise PageError(f"the page has {len(memory)} bytes instead of {size}, as its header says")
    (count,) = struct.unpack_from("=Q", memory, _AREAS_AT)
    if count > _MOST_AREAS:
        raise PageError(f"the page says it has {count} areas, at most {_MOST_AREAS} fit")
    areas: dict[str, Area] = {}
    end = HEADER_BYTES
    for area in sorted(_areas(memory, count), key=lambda area: area.offset):
        problem = _problem_of(area, end, len(memory))
        if area.name in areas:
            problem = "is there twice"
        if problem is not None:
            raise PageError(f"the page's area {area.name!a} {problem}")
        areas[area.name] = area
        end = area.end
    return areas


def _areas(memory: memoryview, count: int) -> Iterator[Area]:
    for number in range(count):
        name, *numbers = _AREA.unpack_from(memory, _AREAS_AT + 8 + number * _AREA.size)
        yield Area(name.rstrip(b"\0").decode("latin-1"), *numbers)


def _problem_of(area: Area, least: int, size: int) -> str | None:
    """Say why an area can't stand where it does, in a page of `size` bytes used up to `least`."""
    if area.offset % 8 or area.row_bytes % 8 or not area.row_bytes:
        return (
            f"is misaligned: offset {area.offset} and row size {area.row_bytes} "
            "must be multiples of 8"
        )
    if area.offset < HEADER_BYTES or area.end > size:
        return (
            f"is out of range: it lies from {area.offset} to {area.end}, "
            f"the page's areas from {HEADER_BYTES} to {size}"
        )
    if area.offset < least:
        return f"overlaps another: it begins at {area.offset}, the one before ends at {least}"
    return None


def read_slots(memory: memoryview) -> Area:
    """Find a page's slots.

    Raises:
        PageError: see `read_areas`; or it has no slots, or not such that this version reads.
    """
    slots = read_areas(memory).get(SLOTS.name)
    if slots is None or slots.rows == 0:
        raise PageError("the page has no slots")
    if slots.row_bytes != SLOTS.row_bytes:
        raise PageError(
            f"the page's slots have {slots.row_bytes} bytes each, "
            f"this watcher reads {SLOTS.row_bytes}: {WHAT_TO_DO}"
        )
    if slots.rows > SLOTS.rows:
        raise PageError(f"the page has {slots.rows} slots, this watcher reads {SLOTS.rows} at most")
    return slots


def next_generation(entry: float) -> float:
    """Return the entry that begins the slot's next generation, never entered yet."""
    return ((entry // GENERATION + 1.0) % _GENERATIONS) * GENERATION


def times_entered(entry: float) -> int:
    """Return how often this scope was entered in this slot; 0 for what is no number."""
    return int(entry % GENERATION) if isfinite(entry) else 0


def cut(text: str, room: int, *, keep_end: bool = False) -> bytes:
    """Encode `text` as UTF-8 in at most `room` bytes; what is lost leaves a mark.

    A NUL, with which a reader would end, is written as an escape.
    """
    text = text.replace("\0", "\\0")
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


def pauses(memory: memoryview, index: int, offset: int = HEADER_BYTES) -> bool:
    """Tell whether the block in slot `index` suspends the others, without reading the rest."""
    return bool(memory[offset + index * SLOT_BYTES + _FLAGS_LOW_AT] & PAUSES)


def pack_details(details: SlotDetails, keep_end: bool) -> bytes:
    """Return a slot's bytes from `LIMIT` on: its details, and nothing of an earlier block's.

    The slot must not be armed, and its generation must be new, when they are written.

    Args:
        details: what to write.
        keep_end: cut a long scope at its beginning (a path's end tells more).
    """
    row = bytearray(SLOT_BYTES)
    flags, signal, grace = to_words(details.policy)
    _DETAILS.pack_into(
        row,
        _DETAILS_AT,
        details.limit,
        details.ident,
        details.native_id,
        flags | PAUSES * details.pauses,
        signal,
    )
    _GRACE.pack_into(row, _GRACE_AT, grace)
    name = cut(details.thread_name, _THREAD_BYTES).ljust(_THREAD_BYTES, b"\0")
    scope = cut(details.scope, _SCOPE_BYTES, keep_end=keep_end).ljust(_SCOPE_BYTES, b"\0")
    row[_THREAD_AT : _SCOPE_AT + _SCOPE_BYTES] = name + scope
    return bytes(row[_DETAILS_AT:])


def no_details() -> bytes:
    """Return what a slot says that nobody reads."""
    return bytes(SLOT_BYTES - _DETAILS_AT)


def read_details(memory: memoryview, index: int, offset: int = HEADER_BYTES) -> SlotDetails:
    """Read a slot's details, whatever the bytes are.

    Args:
        memory: the page as bytes.
        index: the slot.
        offset: where the page's slots begin.
    """
    at = offset + index * SLOT_BYTES
    limit, ident, native_id, flags, signal = _DETAILS.unpack_from(memory, at + _DETAILS_AT)
    (grace,) = _GRACE.unpack_from(memory, at + _GRACE_AT)
    return SlotDetails(
        limit=limit if isfinite(limit) else 0.0,
        ident=ident,
        native_id=native_id,
        thread_name=_text(memory, at + _THREAD_AT, _THREAD_BYTES),
        scope=_text(memory, at + _SCOPE_AT, _SCOPE_BYTES),
        policy=from_words(flags, signal, grace),
        pauses=bool(flags & PAUSES),
    )


def _text(memory: memoryview, at: int, room: int) -> str:
    return bytes(memory[at : at + room]).split(b"\0", 1)[0].decode("utf-8", "replace")
