"""Work that may block, in a process of its own that the loop can kill."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import ClassVar

from hangwatch import linux

_MOST_BYTES = 16 << 20


class Helper:
    """A forked child that does `work` and sends back bytes.

    The watcher is single-threaded, so a fork of it is a whole, usable Python.

    Args:
        work: runs in the child; what it returns comes back as `result`.
        keep: descriptors that the child needs; all others are closed there.
        outlives: whether the child goes on when its parent dies; else it dies with it.
        before_close: called with the pipe before it is closed.

    Attributes:
        pid: the child's, ours until it is waited for.
        pipe: becomes readable when there is more to `read`.
        result: what `work` returned, once `done`; None if it failed or was killed.
        done: whether the child has ended its work or was killed.

    Raises:
        OSError: no process or no descriptor is left.
    """

    def __init__(
        self,
        work: Callable[[], bytes],
        keep: Iterable[int] = (),
        outlives: bool = False,
        before_close: Callable[[int], None] = lambda pipe: None,
    ) -> None:
        self.pipe, write_end = os.pipe()
        self._before_close = before_close
        os.set_blocking(self.pipe, False)
        self._parts: list[bytes] = []
        self.result: bytes | None = None
        self.done = False
        sys.stderr.flush()
        parent = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(write_end)
            raise
        if self.pid == 0:
            _run(work, write_end, keep, None if outlives else parent)
        os.close(write_end)

    def read(self) -> None:
        """Take what the child has sent; never blocks."""
        while not self.done:
            try:
                part = os.read(self.pipe, 1 << 18)
            except BlockingIOError:
                return
            if part and sum(map(len, self._parts)) < _MOST_BYTES:
                self._parts.append(part)
                continue
            whole = b"".join(self._parts)
            # The last byte says that the work came to its end.
            if not part and whole.endswith(b"\n"):
                self.result = whole[:-1]
            self.kill()

    def kill(self) -> None:
        """End the child, whatever it does, and let go of it."""
        if self.done:
            return
        self.done = True
        self._before_close(self.pipe)
        os.close(self.pipe)
        # Not yet waited for, so the number is still its own.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        Helper._unreaped.add(self.pid)
        Helper.reap()

    _unreaped: ClassVar[set[int]] = set()

    @classmethod
    def reap(cls) -> None:
        """Wait for ended children without blocking; one in D state is tried again later."""
        for pid in list(cls._unreaped):
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended = pid
            if ended:
                cls._unreaped.discard(pid)


def _run(
    work: Callable[[], bytes], write_end: int, keep: Iterable[int], lives_with: int | None
) -> None:
    status = 1
    try:
        gc.disable()
        if lives_with is not None:
            linux.die_with(lives_with)
        signal.set_wakeup_fd(-1)
        # Sent to a whole group or cgroup, they end a watcher, which still brings to an end
        # what it has begun. For that it needs us.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        linux.name_process("hw-evidence")
        _close_all_but({0, 1, 2, write_end, *keep})
        data = work() + b"\n"
        # Who outlives its parent has nobody to send a result to.
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(write_end, data) :]
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _close_all_but(keep: set[int]) -> None:
    low = 0
    for descriptor in sorted(keep):
        if low < descriptor:  # an empty range that ends at 0 would mean every descriptor
            os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
