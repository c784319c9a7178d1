"""The pair over a `multiprocessing` queue: drop-ins for PyTorch's classes of these names."""

from __future__ import annotations

import errno
import os
import queue
import select
import signal
import struct
import sys
from time import monotonic, sleep

from hangwatch.folder import REPORT_DIR
from hangwatch.timer import _place
from hangwatch.timer._client import DropInClient
from hangwatch.timer._complaints import Complaints
from hangwatch.timer._overrides import remember
from hangwatch.timer._server import DropInServer
from hangwatch.timer.api import RequestQueue, TimerRequest

__all__ = ["LocalTimerClient", "LocalTimerServer", "MultiprocessingRequestQueue"]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

# A message that its sender has counted, and its feeder thread has not written yet.
_IN_FLIGHT_FOR = 0.005
_MOST_AT_ONCE = 100_000
# So many in a row are the queue's fault, not that of who put them there.
_MOST_UNREADABLE = 100


class LocalTimerClient(DropInClient):
    """A worker's client of the `LocalTimerServer` on the same queue.

    If that server has a companion watcher, arming goes through shared memory. Otherwise, as with
    another library's server or a manager's queue, requests go through the queue; one that is
    full holds up nobody.

    Args:
        mp_queue: the queue that the server was given.

    Raises:
        TypeError: it is no queue.
    """

    def __init__(self, mp_queue: Any) -> None:
        super().__init__()
        _check_queue(mp_queue, "put")
        self._mp_queue = mp_queue

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {self._state()}>"

    def _forget_parent(self) -> None:
        super()._forget_parent()
        # What multiprocessing does in children of its own: without that, a lock that the
        # parent's feeder thread held would be held for ever.
        reset = getattr(self._mp_queue, "_after_fork", None)
        if reset is not None:
            reset()

    def _link(self) -> str | None:
        return _link_of_queue(self._mp_queue)

    def _send(self, scope_id: str, expiration_time: float) -> bool:
        request = TimerRequest(os.getpid(), scope_id, expiration_time)
        sent = _send_past_the_lock(self._mp_queue, request)
        if sent is not None:
            return sent
        try:
            self._mp_queue.put(request, False)
        except queue.Full:
            return False
        return True


class MultiprocessingRequestQueue(RequestQueue):
    """The requests that come through a `multiprocessing` queue.

    Args:
        mp_queue: the queue; only one process may take from it.

    Raises:
        TypeError: it is no queue.
    """

    def __init__(self, mp_queue: Any) -> None:
        super().__init__()
        _check_queue(mp_queue, "get", "qsize")
        self._mp_queue = mp_queue
        self._taken: list[Any] = []
        self._unreadable = 0
        self._complaints = Complaints()

    def size(self) -> int:
        """Return how many requests there are; so many `get` returns without waiting.

        What senders have counted, but not written yet, is waited for a few milliseconds.
        """
        until = monotonic() + _IN_FLIGHT_FOR
        while len(self._taken) < _MOST_AT_ONCE:
            try:
                self._take_one(self._taken, 0.0)
            except queue.Empty:
                if monotonic() >= until or self._mp_queue.qsize() <= 0:
                    break
                sleep(0.0005)
        return len(self._taken)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take at most `size` requests, waiting `timeout` seconds for them all in all."""
        until = monotonic() + timeout
        requests, self._taken = self._taken[:size], self._taken[size:]
        try:
            while len(requests) < size:
                self._take_one(requests, until - monotonic())
        except queue.Empty:
            pass
        except BaseException:
            self._taken[:0] = requests
            raise
        return requests

    def _take_one(self, into: list[Any], wait: float) -> None:
        """Take one request; what can't be unpickled is dropped alone.

        Raises:
            queue.Empty: there is none within `wait` seconds.
        """
        try:
            into.append(self._mp_queue.get(wait > 0, max(0.0, wait)))
        except (queue.Empty, OSError, EOFError):
            raise
        except Exception as error:
            self._unreadable += 1
            if getattr(self._mp_queue, "_closed", False) or self._unreadable > _MOST_UNREADABLE:
                raise
            self._complaints.say(f"dropped what can't be unpickled: {error!r:.200}")
        else:
            self._unreadable = 0


@remember("register_timers", "clear_timers", "get_expired_timers", "_reap_worker")
class LocalTimerServer(DropInServer):
    """Watches the workers that have a `LocalTimerClient` on the same queue.

    Args:
        mp_queue: a `multiprocessing` queue.
        max_interval: seconds that a round of the server's thread waits for a request at most;
            what is due does not wait for it.
        daemon: whether the thread lets the process end while it runs.
        report_dir: folder of the newest 100 reports; None keeps none.

    Raises:
        TypeError: it is no queue.
    """

    def __init__(
        self,
        mp_queue: Any,
        max_interval: float = 60,
        daemon: bool = True,
        *,
        report_dir: str | os.PathLike[str] | None = REPORT_DIR,
    ) -> None:
        requests = MultiprocessingRequestQueue(mp_queue)
        super().__init__(requests, max_interval, daemon, report_dir, Complaints())
        self._mp_queue = mp_queue

    def start(self) -> None:
        """Start watching; returns when workers can connect. A second start does nothing.

        Raises:
            ValueError: the queue is closed.
        """
        if getattr(self._mp_queue, "_closed", False):
            raise ValueError("the queue is closed: make a new one, and a server for it")
        super().start()

    def _link(self) -> str | None:
        return _link_of_queue(self._mp_queue)

    def _reap_worker(self, worker_id: int) -> bool:
        return self._targets.reap(worker_id, signal.SIGKILL)


def _send_past_the_lock(mp_queue: Any, request: TimerRequest) -> bool | None:
    """Send a request as `put` would, but without the lock that all senders of a queue share.

    Who is killed while it has that lock keeps it for ever, and all others wait. A write of at
    most PIPE_BUF bytes needs none: it is never mixed with another one. Source: pipe(7).

    Returns:
        Whether there was room for it; None: it has to be `put`. That must not differ from one
        request of a scope to the next: what is `put` may be overtaken by what isn't, and a
        release by the request that it takes back.
    """
    # Loaded if it is one of theirs; a block imports nothing.
    queues: Any = sys.modules.get("multiprocessing.queues")
    reduction: Any = sys.modules.get("multiprocessing.reduction")
    if None in (queues, reduction) or type(mp_queue) is not queues.Queue or mp_queue._closed:
        return None
    pickled = bytes(reduction.ForkingPickler.dumps(request))
    # As `multiprocessing.connection.Connection` frames it.
    message = struct.pack("!i", len(pickled)) + pickled
    if len(message) > select.PIPE_BUF:
        return None
    try:
        # One of our own, since the queue's is not ours to make non-blocking.
        number = mp_queue._writer.fileno()
        writer = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return False
        return None  # no /proc, or a closed end
    sent = False
    try:
        # What the queue counts, and what bounds it.
        if mp_queue._sem.acquire(False):
            try:
                sent = os.write(writer, message) > 0
            except BlockingIOError:
                pass
            except OSError:  # nobody reads: as `put` has it
                return None
            finally:
                if not sent:
                    mp_queue._sem.release()
    finally:
        os.close(writer)
    return sent


def _check_queue(mp_queue: object, *methods: str) -> None:
    for method in methods:
        if not callable(getattr(mp_queue, method, None)):
            raise TypeError(
                f"mp_queue must be a multiprocessing queue, not {type(mp_queue).__name__}: "
                "make one by multiprocessing.get_context(...).Queue()"
            )


def _link_of_queue(mp_queue: Any) -> str | None:
    """Return the address file of a queue's companion watcher; None: the queue has no pipe."""
    # Both ends of a pipe have one inode; a process may have closed either.
    for end in ("_reader", "_writer"):
        try:
            return _place.link_of(os.fstat(getattr(mp_queue, end).fileno()))
        except (AttributeError, OSError, TypeError, ValueError):
            continue
    return None
