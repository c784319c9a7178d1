"""The contract between workers, clients and servers, for those who write a pair of their own.

A pair is a client and a server that speak the same protocol: subclass `TimerClient` and
`TimerServer`. docs/custom-pairs.md has an example. The names and promises are those of
``torch.distributed.elastic.timer``.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Iterable

from hangwatch.worker.expiration import Expiration, configure, expires, paused, watch

__all__ = [
    "Expiration",
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
    "paused",
    "watch",
]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

STOP_WITHIN = 0.9
"""Seconds that `TimerServer.stop` waits for the round under way."""
_FIRST_BACK_OFF, _LONGEST_BACK_OFF = 0.1, 10.0


class TimerRequest:
    """A worker's request: acquire a timer, or release it. Equal by value.

    Args:
        worker_id: whose timer; of the type on which a client and its server agree.
        scope_id: the timer's name.
        expiration_time: when it expires, in seconds since the epoch; negative: release it.
    """

    __slots__ = ("expiration_time", "scope_id", "worker_id")
    __hash__ = None  # type: ignore[assignment]  # equal by value, and mutable

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimerRequest):
            return NotImplemented
        return (self.worker_id, self.scope_id, self.expiration_time) == (
            other.worker_id,
            other.scope_id,
            other.expiration_time,
        )

    def __repr__(self) -> str:
        wish = "release" if self.expiration_time < 0 else f"until {self.expiration_time:.3f}"
        return f"<{type(self).__name__} of {self.worker_id!r}: {self.scope_id!r}, {wish}>"


class TimerClient(abc.ABC):
    """How a worker acquires and releases timers; subclass it to write your own.

    `expires` calls `acquire` and `release` exactly once a block.
    """

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Acquire a timer for the calling worker.

        What this raises, `expires` raises on entering; the block is not entered then.

        Args:
            scope_id: the block's name.
            expiration_time: when it expires, in seconds since the epoch.
        """

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """Release the calling worker's timer of that name; it has no effect from then on.

        What this raises, `expires` raises on leaving, unless the block itself has raised:
        the block's own exception always wins.
        """


class RequestQueue(abc.ABC):
    """Where a server takes the requests of its clients from."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return how many requests can be taken without waiting.

        Until `get` is called there may come more, and none are lost: right after
        ``n = queue.size()``, ``len(queue.get(n, 0)) == n``.
        """

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take at most `size` requests.

        Args:
            size: how many at most.
            timeout: seconds to wait for them, all in all; with what has come by then, it
                returns.
        """


class TimerServer(abc.ABC):
    """Ends workers whose timers have expired. It watches in a thread of this process.

    One round takes ``max(1, size())`` requests from the queue, registers them, asks which
    timers have expired by now, reaps the workers that hold those, and clears the timers of
    whom it reaped. A worker whose `_reap_worker` returns False is kept, and tried again in
    the next round.

    Args:
        request_queue: where the clients' requests come from.
        max_interval: seconds that a round waits for a request at most.
        daemon: whether the thread lets the process end while it runs.
    """

    def __init__(
        self, request_queue: RequestQueue, max_interval: float, daemon: bool = True
    ) -> None:
        super().__init__()
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._watchdog_thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._round = _Round()
        self._not_reaped: set[Any] = set()

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Take in requests: acquired timers, and released ones (negative `expiration_time`)."""

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Forget all timers of these workers."""

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """Return the timers whose `expiration_time` is `deadline` or earlier, by worker."""

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """End a worker.

        Returns:
            Whether it was reaped. If not, the next round tries again. An exception that
            escapes is logged, and counts as reaped.
        """

    def start(self) -> None:
        """Start watching, and return. While it runs, another start does nothing."""
        if self._watchdog_thread is not None:
            return
        # Each thread has its own: one that a stop could not wait for still ends by itself.
        self._stopping = threading.Event()
        self._watchdog_thread = threading.Thread(
            target=self._watchdog_loop,
            args=(self._stopping,),
            name=f"{type(self).__name__}",
            daemon=self._daemon,
        )
        self._watchdog_thread.start()

    def stop(self) -> None:
        """Stop watching; returns within a second. Without a start it does nothing.

        A round that waits in `RequestQueue.get` for longer ends when that returns: it registers
        what came, and reaps nobody.
        """
        self._stop_watching(STOP_WITHIN)

    def _stop_watching(self, within: float) -> None:
        thread, self._watchdog_thread = self._watchdog_thread, None
        self._stopping.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, within))

    def _watchdog_loop(self, stopping: threading.Event) -> None:
        self._round.stopping = stopping
        back_off = 0.0
        while not stopping.wait(back_off):
            try:
                self._run_watchdog()
            except Exception:
                back_off = min(max(2 * back_off, _FIRST_BACK_OFF), _LONGEST_BACK_OFF)
                if not stopping.is_set():
                    _log().exception("a round of watching failed; the next in %g s", back_off)
            else:
                back_off = 0.0

    def _run_watchdog(self) -> None:
        """Go one round."""
        queue = self._request_queue
        self.register_timers(queue.get(max(1, queue.size()), self._max_interval))
        stopping = self._round.stopping
        if stopping is None or not stopping.is_set():
            self._reap_overdue()

    def _reap_overdue(self) -> None:
        reaped = set()
        all_expired = self.get_expired_timers(time.time())
        self._not_reaped &= all_expired.keys()
        for worker_id, expired in all_expired.items():
            again = worker_id in self._not_reaped
            if not again:
                scopes = self._get_scopes(expired)
                _log().warning("worker %s overran %s: reaping it", worker_id, scopes)
            outcome = self._reap_expired(worker_id, expired)
            if outcome:
                reaped.add(worker_id)
            elif outcome is not None and not again:
                _log().warning("worker %s is not reaped yet: tried again each round", worker_id)
                self._not_reaped.add(worker_id)
        self._not_reaped -= reaped
        self.clear_timers(reaped)

    def _reap_expired(self, worker_id: Any, expired: list[Any]) -> bool | None:
        """Reap a worker; return whether that is done, or None if these timers never kill."""
        return self._reap_worker_no_throw(worker_id)

    def _reap_worker_no_throw(self, worker_id: Any) -> bool:
        """Call `_reap_worker`; an exception that escapes it is logged, and counts as reaped."""
        try:
            return self._reap_worker(worker_id)
        except Exception:
            _log().exception("_reap_worker(%r) must not raise; it counts as reaped", worker_id)
            return True

    def _get_scopes(self, timer_requests: Iterable[TimerRequest]) -> list[str]:
        return [request.scope_id for request in timer_requests]


class _Round(threading.local):
    """The stop of the thread that goes a round; None: `_run_watchdog` was called directly."""

    stopping: threading.Event | None = None


def _log() -> Any:
    import logging  # takes long, and a worker needs none of it

    return logging.getLogger("hangwatch")
