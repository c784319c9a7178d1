"""The stack dump: the bytes of a memfd that the worker itself may write to."""

from __future__ import annotations

import time

from fuzz.bounds import check_report
from hangwatch.evidence import faulthandler_text, stacks
from hangwatch.evidence.model import Case, Evidence, Scope, ScopeThread, Worker
from hangwatch.process import Identity

IDENT = 0x7F02
TOKENS = [
    b"Thread 0x",
    b"Current thread 0x",
    b" [name]",
    b" (most recent call first):\n",
    b"Thread 0x00007f02 [main] (most recent call first):\n",
    b"Stack (most recent call first):\n",
    b'  File "',
    b'", line ',
    b" in ",
    b'  File "a.py", line 1 in f\n',
    b"  File ???, line ??? in ???\n",
    b"  ...\n",
    b"...\n",
    b"\\xe4",
    b"\\ud800",
    b"\\U0010ffff",
    b"\\U00110000",
    b"\x1b[2J",
    "\u2028\x85\u0664".encode(),
    b"9" * 4400,
    b"f" * 4400,
]

_ASKED = stacks.Asked(
    identity=Identity(4242, 0, 0, -1),
    channel=None,
    inode=(0, 0),
    ident=IDENT,
    native_id=4242,
    names={IDENT: "MainThread"},
    is_overdue=lambda: True,
)
_CASE = Case(
    time.time(),
    Worker(4242, 0, None, {}, ["x"], "3.11"),
    Scope("forward", 1.0, 2.0, 1.0, 1, ScopeThread(IDENT, 4242, "MainThread"), []),
)


def check(data: bytes) -> None:
    """Read a dump as evidence, and write the report that it becomes part of."""
    threads, _ = faulthandler_text.parse(data.decode("utf-8", "replace"))
    assert len(threads) <= 100, "faulthandler stops there"
    for thread in threads:
        assert thread.ident is None or 0 <= thread.ident < 2**64
        assert len(thread.frames) <= 100, "faulthandler stops there"
        for frame in thread.frames:
            assert 0 <= frame.line < 2**31
            (frame.file + frame.function).encode()  # no half of a surrogate pair
    for own in (threads[:1], []):
        merged = stacks._merge(_ASKED, own, threads)
        written = check_report(_CASE, Evidence(threads=merged))
        assert len(written["threads"]) == len(merged) <= len(threads) + 1
