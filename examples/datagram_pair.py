"""A pair of one's own over a Unix datagram socket, written against the contract alone.

docs/custom-pairs.md walks through it. Run it: one worker leaves its block in time, another one
hangs in C with the GIL held, and the server ends it.

    python examples/datagram_pair.py

The classes run unchanged on the base classes of ``torch.distributed.elastic.timer``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from typing import Any

from hangwatch.timer import (
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    expires,
)

MOST_AT_ONCE = 1000
DEAD_WITHIN = 0.5
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: unix(7)
_log = logging.getLogger("datagram_pair")


def is_ready(descriptor: int, within: float = 0.0) -> bool:
    """Tell whether a descriptor is readable, or becomes so within some seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(within * 1000))


class DatagramTimerClient(TimerClient):
    """A worker's side: an acquired timer is one datagram, a released one is a raised flag.

    Args:
        path: the server's socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._flags: dict[tuple[int, int, str], list[int]] = {}
        self._turned_away = False

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Send the timer together with an eventfd, the flag that `release` will raise."""
        flag = os.eventfd(0)
        self._flags.setdefault(self._mine(scope_id), []).append(flag)
        request = json.dumps({"scope": scope_id[-200:], "until": expiration_time}).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", flag))
        try:
            self._socket.sendmsg([request], [rights], socket.MSG_DONTWAIT, self._path)
            self._turned_away = False
        except BlockingIOError:
            # The server is slow, and its socket is full: better unwatched than held up.
            if not self._turned_away:
                _log.warning("the server has no room: %r is not watched", scope_id)
            self._turned_away = True
        except OSError:  # there is no server
            self.release(scope_id)
            raise

    def release(self, scope_id: str) -> None:
        """Raise the flag: needs no room, can't be lost, and tells a server that is slow, too."""
        flags = self._flags.get(self._mine(scope_id))
        if flags:
            flag = flags.pop()
            os.eventfd_write(flag, 1)
            os.close(flag)

    def close(self) -> None:
        """Close the socket; flags that are down stay so."""
        self._socket.close()

    def _mine(self, scope_id: str) -> tuple[int, int, str]:
        # A timer for each thread, and none of its parent's for a forked child.
        return os.getpid(), threading.get_ident(), scope_id


class DatagramRequest(TimerRequest):
    """A timer of the process `worker_id`; `flag` is readable as soon as it is released."""

    def __init__(self, worker_id: int, scope_id: str, expiration_time: float, flag: int) -> None:
        super().__init__(worker_id, scope_id, expiration_time)
        self.flag = flag


class DatagramRequestQueue(RequestQueue):
    """The requests that come in through the socket.

    Args:
        path: where to make the socket; in a folder that is yours alone.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(path)
        self._taken: list[TimerRequest] = []

    def size(self) -> int:
        """Take what has come out of the socket: what is counted can't get lost any more."""
        self._take()
        return len(self._taken)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Return at most `size` requests, waiting `timeout` seconds for them all in all."""
        until = time.monotonic() + timeout
        while self.size() < size:
            if not is_ready(self._socket.fileno(), max(0.0, until - time.monotonic())):
                break
        requests, self._taken = self._taken[:size], self._taken[size:]
        return requests

    def close(self) -> None:
        """Close the socket: from now on, workers that acquire find no server."""
        self._socket.close()

    def _take(self) -> None:
        room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        with contextlib.suppress(BlockingIOError):  # the socket is empty
            for _ in range(MOST_AT_ONCE):
                request = self._parse(*self._socket.recvmsg(4096, room, flags)[:2])
                if request is not None:
                    self._taken.append(request)

    def _parse(self, data: bytes, ancillary: list[Any]) -> TimerRequest | None:
        pid, descriptors = 0, []
        for _level, kind, value in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(value)[0]  # the kernel's word, not the sender's
            elif kind == socket.SCM_RIGHTS:
                descriptors += [fd for (fd,) in struct.iter_unpack("i", value)]
        try:
            fields = json.loads(data)
            (flag,) = descriptors
            return DatagramRequest(pid, str(fields["scope"]), float(fields["until"]), flag)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            _log.warning("dropped a bad request of process %d: %r", pid, error)
            return None


class DatagramTimerServer(TimerServer):
    """Ends processes whose timers have expired; a worker's id is its process id."""

    def __init__(
        self, request_queue: RequestQueue, max_interval: float, daemon: bool = True
    ) -> None:
        super().__init__(request_queue, max_interval, daemon)
        self._timers: dict[int, list[DatagramRequest]] = {}
        self._pidfds: dict[int, int] = {}

    def register_timers(self, timer_requests: list[Any]) -> None:
        """Hold each worker by a pidfd from its first timer on; forget what has ended."""
        self._forget_what_ended()
        for request in timer_requests:
            pid = request.worker_id
            try:
                if pid == os.getpid():
                    raise PermissionError("a server must not end itself")
                if pid not in self._pidfds:
                    self._pidfds[pid] = os.pidfd_open(pid)
            except OSError as error:
                _log.warning("dropped %r of process %d: %s", request.scope_id, pid, error)
                os.close(request.flag)
                continue
            self._timers.setdefault(pid, []).append(request)

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Forget all timers of these workers, and let go of them."""
        for pid in worker_ids:
            for timer in self._timers.pop(pid, []):
                os.close(timer.flag)
            if pid in self._pidfds:
                os.close(self._pidfds.pop(pid))

    def get_expired_timers(self, deadline: float) -> dict[int, list[TimerRequest]]:
        """Return what is due by `deadline`, and whose flag is down even now."""
        expired: dict[int, list[TimerRequest]] = {}
        for pid, timers in self._timers.items():
            for timer in timers:
                if timer.expiration_time <= deadline and not is_ready(timer.flag):
                    expired.setdefault(pid, []).append(timer)
        return expired

    def _reap_worker(self, worker_id: int) -> bool:
        """Kill it. Only its confirmed death is a success; all else is tried again."""
        pidfd = self._pidfds[worker_id]
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return is_ready(pidfd, DEAD_WITHIN)

    def _forget_what_ended(self) -> None:
        # The dead first: a new process may have got the number of one of them.
        self.clear_timers({pid for pid, pidfd in self._pidfds.items() if is_ready(pidfd)})
        for pid, timers in self._timers.items():
            self._timers[pid] = []
            for timer in timers:
                if is_ready(timer.flag):
                    os.close(timer.flag)
                else:
                    self._timers[pid].append(timer)


def finish(path: str) -> None:
    configure(DatagramTimerClient(path))
    with expires(after=60, scope="work"):
        time.sleep(0.1)


def hang(path: str) -> None:
    configure(DatagramTimerClient(path))
    with expires(after=1, scope="work"):
        ctypes.PyDLL(None).pause()  # in C, with the GIL held


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "timers")
        queue = DatagramRequestQueue(path)
        server = DatagramTimerServer(queue, max_interval=0.1)
        server.start()
        start = multiprocessing.get_context("spawn").Process
        workers = [start(target=finish, args=(path,)), start(target=hang, args=(path,))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        server.stop()
        queue.close()
    ends = [worker.exitcode for worker in workers]
    print(f"the worker that left its block in time ended with status {ends[0]}")
    print(f"the worker that hung was ended by signal {-(ends[1] or 0)}")
    return 0 if ends == [0, -signal.SIGKILL] else 1


if __name__ == "__main__":
    sys.exit(main())
