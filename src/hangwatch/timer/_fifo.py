"""The FIFO of the File pair: one JSON object a line.

Layout: {"version": 1, "pid": int, "scope_id": str, "expiration_time": float or -1,
"signal": int}, with its newline at most `PIPE_BUF` bytes, written at once, so that lines of
several writers don't mix (pipe(7)). Unknown keys are ignored.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import stat
import weakref
from collections.abc import Callable
from time import monotonic

from hangwatch.timer._complaints import Complaints
from hangwatch.timer.api import RequestQueue, TimerRequest

_MOST_BYTES = 1 << 16
_BEGINNING = b'{"version"'


class FifoRequestQueue(RequestQueue):
    """The requests that come through a FIFO; no writer can make their reader wait.

    Args:
        path: where the FIFO is, or will be.
        parse: makes a request of a line's JSON; raises `ValueError` for what is none.
        complaints: where to say which lines were dropped.

    Attributes:
        path: the same.
        lines_read: how many requests were read.
    """

    def __init__(
        self, path: str, parse: Callable[[object], TimerRequest], complaints: Complaints
    ) -> None:
        self.path = path
        self.lines_read = 0
        self._parse = parse
        self._complaints = complaints
        self._descriptor = -1
        self._ours: tuple[int, int] | None = None
        self._bytes = bytearray()
        self._requests: list[TimerRequest] = []
        _all.add(self)

    def make(self) -> None:
        """Make the FIFO, if it is not there.

        Raises:
            FileExistsError: what is there is no FIFO, or another server's. It is left alone.
            OSError: it can't be made there.
        """
        try:
            os.mkfifo(self.path, 0o600)
        except FileExistsError:
            self._check_existing()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"can't make a FIFO here ({error.strerror}): give a path in a folder that exists "
                "and is yours to write to",
                self.path,
            ) from None
        else:
            status = os.lstat(self.path)
            self._ours = status.st_dev, status.st_ino

    def open(self) -> None:
        """Open it, if it is not open; from then on requests can be written."""
        if self._descriptor >= 0:
            return
        self.make()
        # With a writing end of our own there is no end of file when the last writer leaves.
        descriptor = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileExistsError(errno.EEXIST, "this is no FIFO any more", self.path)
        self._descriptor = descriptor
        self._bytes.clear()
        self._requests.clear()

    def forget(self) -> None:
        """In a forked child: the FIFO is its parent's, and must not look as if it were read."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._ours = -1, None

    def status(self) -> os.stat_result:
        """Return what the kernel says of it."""
        return os.fstat(self._descriptor) if self._descriptor >= 0 else os.stat(self.path)

    def close(self) -> None:
        """Close it, and remove it if we made it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._ours:
                os.unlink(self.path)
        except OSError:
            pass
        self._ours = None

    def size(self) -> int:
        """Return how many requests have come by now."""
        self._read()
        return len(self._requests)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take at most `size` requests, waiting `timeout` seconds for the first."""
        until = monotonic() + timeout
        poll = select.poll()
        if self._descriptor >= 0:  # else it was closed meanwhile
            poll.register(self._descriptor, select.POLLIN)
        while True:
            self._read()
            wait = until - monotonic()
            if self._requests or wait <= 0:
                break
            poll.poll(wait * 1000)
        requests, self._requests = self._requests[:size], self._requests[size:]
        return requests

    def _check_existing(self) -> None:
        status = os.lstat(self.path)
        if not stat.S_ISFIFO(status.st_mode):
            raise FileExistsError(
                errno.EEXIST, "this is no FIFO and is left alone: give another path", self.path
            )
        if status.st_uid != os.geteuid():
            raise FileExistsError(
                errno.EEXIST,
                f"this FIFO belongs to user {status.st_uid}: give another path",
                self.path,
            )
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:  # nobody reads it: left behind, or made for us
            return
        raise FileExistsError(
            errno.EEXIST, "another server reads this FIFO: stop it, or give another path", self.path
        )

    def _read(self) -> None:
        if self._descriptor < 0:
            return
        # All that is there now, and no more: a writer that never stops holds up nobody.
        left = fcntl.fcntl(self._descriptor, fcntl.F_GETPIPE_SZ)
        while self._descriptor >= 0 and left > 0:
            try:
                part = os.read(self._descriptor, _MOST_BYTES)
            except BlockingIOError:
                return
            left -= len(part)
            *lines, rest = part.split(b"\n")
            for line in lines:
                self._bytes += line
                self._take(bytes(self._bytes))
                self._bytes.clear()
            self._bytes += rest
            if len(self._bytes) > _MOST_BYTES:
                del self._bytes[: -select.PIPE_BUF]

    def _take(self, line: bytes) -> None:
        # Before a whole line may stand what another writer did not finish.
        for beginning in dict.fromkeys((0, max(line.rfind(_BEGINNING), 0))):
            try:
                if len(line) - beginning >= select.PIPE_BUF:
                    raise ValueError(f"it is longer than {select.PIPE_BUF} bytes")
                request = self._parse(json.loads(line[beginning:]))
            except (ValueError, RecursionError) as error:
                problem = error
            else:
                self.lines_read += 1
                self._requests.append(request)
                return
        self._complaints.say(f"dropped a line of the FIFO {self.path}: {problem}")


def write(path: str, line: str) -> None:
    """Write one line into a FIFO that somebody reads; never waits.

    Raises:
        BlockingIOError: it is full.
        OSError: nobody reads it, or it is no FIFO.
        ValueError: the line is too long to be written at once.
    """
    data = line.encode("ascii") + b"\n"
    if len(data) > select.PIPE_BUF:
        raise ValueError(f"a line of {len(data)} bytes is longer than {select.PIPE_BUF}")
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "this is no FIFO", path)
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


_all: weakref.WeakSet[FifoRequestQueue] = weakref.WeakSet()


def _after_fork() -> None:
    for fifo in list(_all):
        fifo.forget()


os.register_at_fork(after_in_child=_after_fork)
