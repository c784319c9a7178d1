"""The FIFO: lines of the legacy road, from whoever may write there.

In an input, PARENT stands for our parent's process id.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import tempfile
import time
from contextlib import suppress
from math import isfinite
from signal import SIGRTMAX
from zlib import crc32

from fuzz.bounds import strict
from hangwatch.timer._complaints import Complaints
from hangwatch.timer._fifo import FifoRequestQueue
from hangwatch.timer._table import TimerTable
from hangwatch.timer._targets import RefusedError, hold_descendant
from hangwatch.timer.file_based_local_timer import FileTimerRequest, _request_of

TOKENS = [
    b"\n",
    b'{"version": 1, "pid": 1, "scope_id": "a", "expiration_time": 2e9, "signal": 9}\n',
    b'{"version"',
    b'"pid": -1',
    b'"pid": PARENT',
    b'"scope_id": "',
    b'"expiration_time": ',
    b'"signal": 9',
    b"[" * 4000,
    b"x" * 4095,
    b"x" * 9000,
    b"1" * 4000,
]

_GOOD = FileTimerRequest(2**22 + 7, "good", 2e9, 9)


class _Heard(Complaints):
    """Counts what would be logged."""

    said = 0

    def say(self, text: str) -> None:
        self.said += 1


@functools.cache
def _fifo() -> tuple[FifoRequestQueue, int, _Heard]:
    folder = tempfile.mkdtemp(prefix="hw-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    complaints = _Heard()
    queue = FifoRequestQueue(f"{folder}/fifo", _request_of, complaints)
    queue.open()
    writer = os.open(queue.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return queue, writer, complaints


def check(data: bytes) -> None:
    """Write the bytes in pieces, and see which requests come out, and whom they could end."""
    data = data.replace(b"PARENT", str(os.getppid()).encode())
    queue, writer, complaints = _fifo()
    read_before, said_before = queue.lines_read, complaints.said
    length = 1 + crc32(data) % 5000
    for at in range(0, len(data), length):
        os.write(writer, data[at : at + length])
        queue.size()
        assert len(queue._bytes) <= 1 << 17
    os.write(writer, b"\n" + _GOOD.to_json().encode() + b"\n")
    requests = queue.get(1 << 30, 0)
    assert queue.lines_read - read_before == len(requests)
    assert complaints.said - said_before + len(requests) == data.count(b"\n") + 2
    assert requests.pop() == _GOOD, "a line was lost to what stood before it"
    rest = iter(requests)
    for line in data.split(b"\n"):
        with suppress(ValueError, RecursionError):
            if len(line) < select.PIPE_BUF:
                whole = _request_of(json.loads(line))
                assert any(request == whole for request in rest), "a good line was dropped"
    _check_requests([request for request in requests if isinstance(request, FileTimerRequest)])


def _check_requests(requests: list[FileTimerRequest]) -> None:
    table = TimerTable()
    for request in requests:
        assert type(request.worker_pid) is int
        assert abs(request.worker_pid) < 2**31
        assert isfinite(request.expiration_time)
        assert -(2**31) < request.signal <= SIGRTMAX
        strict(request.to_json())
        table.put(request)
    now = time.time()
    expired = table.expired(now)
    assert all(one.expiration_time <= now + 1 for due in expired.values() for one in due)
    table.next_due()
    for pid in {request.worker_pid for request in requests[:5]}:
        # Nobody here descends from us: there is no one whom a line could end.
        with suppress(RefusedError):
            held = hold_descendant(pid, set())
            os.close(held.pidfd)
            raise AssertionError(f"a line could end process {pid}")
    table.clear(table.pids())
    assert not table.timers
    assert not table.has_overdue()
