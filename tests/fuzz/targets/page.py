"""The page: memory that a hostile worker writes, at any moment, whatever it likes.

An input is text, one assignment a line: slots, field, value:

    header in_use 31
    0 deadline 1.0
    0-30 task @1
    --
    0 entry nan

The page has room for 64 slots, so that many can be tried, or for all that there are if the
first line is `large`. Its directory has the slots, and room for a second area (`areas 2`, then
`name2` and the rest). `@1` is the slot after the one in question. A line `--` ends what stands
in the page at first; what follows is written while the watcher reads. `bytes` as the first
line makes all that follows it the slots' memory, again and again. What is none of this is
passed over.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf, isfinite, isnan
from signal import SIGRTMAX
from typing import Any

from fuzz.bounds import check_report, strict
from hangwatch.errors import PageError
from hangwatch.evidence.model import Case, Evidence
from hangwatch.evidence.report import overrun
from hangwatch.page import layout
from hangwatch.page.view import Armed
from hangwatch.policy import DEFAULT, LONGEST_GRACE, OnExpiry, Policy, decide
from hangwatch.process import Identity
from hangwatch.watcher import case, news, takeover
from hangwatch.watcher.page_reader import PageReader, Standstill
from hangwatch.watcher.verdict import Verdict
from hangwatch.watcher.visit import visit
from hangwatch.watcher.watched import Watched
from hangwatch.wire import Hello

NOW = 1000.0
_MOST_LINES = 64
_HEADER = {
    "magic": (0, "8s"),
    "size": (8, "Q"),
    "in_use": (24, "d"),
    "raise": (32, "d"),
    "areas": (48, "Q"),
    **{
        f"{field}{number or ''}": (at + (88 - 56) * (number == 2), kind)
        for number in (0, 2)
        for field, at, kind in (
            *(("name", 56, "8s"), ("offset", 64, "Q")),
            *(("row_bytes", 72, "Q"), ("rows", 80, "Q")),
        )
    },
}
_SLOT = {
    "deadline": (8 * layout.DEADLINE, "d"),
    "entry": (8 * layout.ENTRY, "d"),
    "limit": (8 * layout.LIMIT, "d"),
    "ident": (32, "Q"),
    "native_id": (40, "Q"),
    "flags": (48, "I"),
    "signal": (52, "i"),
    "task": (8 * layout.TASK, "d"),
    "skipped_entry": (8 * layout.SKIPPED_ENTRY, "d"),
    "grace": (72, "d"),
    "renewed_entry": (8 * layout.RENEWED_ENTRY, "d"),
    "entered": (8 * layout.ENTERED, "d"),
    "renewed_limit": (8 * layout.RENEWED_LIMIT, "d"),
    "raised_entry": (8 * layout.RAISED_ENTRY, "d"),
    "name": (120, "24s"),
    "scope": (144, "176s"),
}
TOKENS = [
    b"\n--\n",
    b"\n0-30 ",
    b"\n30 ",
    b"\n0 ",
    b"\n1 ",
    b"\nheader ",
    *(f"{field} ".encode() for field in (*_HEADER, *_SLOT)),
    *(b"nan", b"inf", b"-inf", b"-0.0", b"1e308", b"-1e308", b"5e-324", b"4.6e18"),
    *(b"999.5", b"1000.0", b"1000.5", b"4294967296.0", b"2e12"),
    *(b"0xffffffffffffffff", b"31", b"-1", b"@0", b"@1", b"@-1", b"64", b"65"),
]


def check(data: bytes) -> None:
    """Visit a page, judge what is due there, and write the reports."""
    first, *later = _steps(data)
    slots = layout.CAPACITY if data.startswith(b"large\n") else 64
    area = layout.Area("slots", layout.HEADER_BYTES, layout.SLOT_BYTES, slots)
    descriptor = layout.create_memfd(area)
    try:
        memory = mmap.mmap(descriptor, area.end)
        _write(memory, first)
        try:
            reader = PageReader(descriptor)
        except PageError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            hello = Hello(3, NOW, True, {"rank": "0"}, ["x"], "3.11", None, pid=7, main_ident=1)
            worker = Watched(connection, Identity(4242, 0, 0, -1), hello, reader, (0, 0))
            changes = iter(later)

            def change() -> bool:
                for lines in changes:
                    _write(memory, lines)
                    return True
                return False

            _check_worker(worker, change)
        reader.close()
        memory.close()
    finally:
        os.close(descriptor)


def _check_worker(worker: Watched, change: Callable[[], bool]) -> None:
    reader = worker.reader
    found = visit(reader, change, lambda: NOW, [0.0, 1.0], {})
    assert not isnan(found.again)
    assert found.again >= NOW
    assert len(found.entries) <= layout.CAPACITY
    assert all(0 < slot.deadline <= NOW for slot in found.due)
    deadlines = [slot.deadline for slot in found.due]
    assert deadlines == sorted(deadlines)
    worker.entries = found.entries
    for slot in [*found.due[:2], *found.due[2:][-1:]]:
        _check_verdict(worker, slot)
        change()
    still = worker.stands_still(NOW, False, found.inside, 0.0)
    for standstill in (still, Standstill(1.0, 2.0, tuple(reader.entries()))):
        if standstill is not None:
            known = case.case_of(worker, standstill, NOW)
            assert known is None or _written(known)["scope"]["name"] == "<gap>"
    doing = case.doing_of(worker)
    assert all(isfinite(one.limit_s) and 0 <= one.inside_s < inf for one in doing.scopes)
    names = reader.thread_names()
    assert all(0 <= ident < 2**64 and len(name) <= 24 for ident, name in names.items())
    assert 0 <= reader.raise_signal() <= SIGRTMAX
    reader.is_paused()
    worker.judged = dict.fromkeys(found.due, inf)
    assert len(takeover.state_of(worker)) < 65_000
    worker.forget_ended()


def _check_verdict(worker: Watched, slot: Armed) -> None:
    reader = worker.reader
    chosen = reader.policy(slot)
    _check_chosen(chosen)
    reader.details(slot)
    reader.lasts(slot)
    reader.task(slot)
    reader.was_skipped(slot)
    reader.was_raised(slot)
    change = reader.change_of(slot)
    assert change is None or isinstance(change, str)
    known = case.case_of(worker, slot, NOW)
    if known is None:
        return
    scope = _written(known)["scope"]
    numbers = [scope["limit_s"], scope["inside_s"], scope["late_s"], scope["since_renewal_s"] or 0]
    assert all(isfinite(number) for number in numbers)
    assert len(scope["name"]) <= 176
    assert len(scope["thread"]["name"]) <= 24
    assert len(scope["within"]) <= 32
    assert len(scope["enclosing"]) < layout.CAPACITY
    assert 0 <= scope["entry"] <= 2**32
    verdict = Verdict(worker, slot, NOW, known, {}, decide(chosen, DEFAULT), chosen)
    event = json.dumps(news.of_incident("expired", verdict, overrun(known)))
    assert len(event) <= 8192
    strict(event)


def _written(known: Case) -> dict[str, dict[str, Any]]:
    assert known.worker.pid == 4242, "the peer, whoever the page names"
    written: dict[str, dict[str, Any]] = check_report(known, Evidence())
    return written


def _check_chosen(chosen: Policy) -> None:
    assert chosen[3:] == (None,) * len(chosen[3:]), "the rest is the server's"
    for server in (
        DEFAULT,
        DEFAULT._replace(grace=1.0),
        DEFAULT._replace(on_expiry=OnExpiry.RAISE),
    ):
        policy = decide(chosen, server)
        assert policy.on_expiry is OnExpiry.REPORT or 0 < policy.first_signal <= SIGRTMAX
        assert 0 <= policy.signal_grace <= LONGEST_GRACE
        assert 0 < policy.raise_grace <= LONGEST_GRACE
    forced = DEFAULT._replace(on_expiry=OnExpiry.REPORT, force=True)
    assert decide(chosen, forced).on_expiry is OnExpiry.REPORT


def _steps(data: bytes) -> list[bytes]:
    return [data] if data.startswith(b"bytes\n") else data.split(b"\n--\n")


def _write(memory: mmap.mmap, step: bytes) -> None:
    if step.startswith(b"bytes\n"):
        content = step[6:] or b"\0"
        room = 64 * layout.SLOT_BYTES
        memory[24:32] = struct.pack("=d", 64.0)
        tiled = (content * (room // len(content) + 1))[:room]
        memory[layout.HEADER_BYTES : layout.HEADER_BYTES + room] = tiled
        return
    for line in step.split(b"\n")[:_MOST_LINES]:
        with suppress(ValueError, KeyError, struct.error, OverflowError):
            where, field, value = line.split(b" ", 2)
            if where == b"header":
                at, kind = _HEADER[field.decode()]
                memory[at : at + struct.calcsize(kind)] = _packed(kind, value, 0)
                continue
            at, kind = _SLOT[field.decode()]
            size = struct.calcsize(kind)
            for index in _slots(where, (len(memory) - layout.HEADER_BYTES) // layout.SLOT_BYTES):
                start = layout.slot_byte(index) + at
                memory[start : start + size] = _packed(kind, value, index)


def _slots(where: bytes, count: int) -> Iterator[int]:
    first, _, last = where.partition(b"-")
    return iter(range(max(0, int(first)), min(int(last or first), count - 1) + 1))


def _packed(kind: str, value: bytes, index: int) -> bytes:
    if kind.endswith("s"):
        return struct.pack(f"={kind}", value)
    if kind == "d":
        return struct.pack("=d", float(value))
    number = index + 1 + int(value[1:]) if value.startswith(b"@") else int(value, 0)
    bits = 8 * struct.calcsize(kind)
    packed: int = number & (2**bits - 1)
    return packed.to_bytes(bits // 8, sys.byteorder)
