"""The pair over a FIFO: drop-ins for PyTorch's classes of these names."""

from __future__ import annotations

import json
import os
import signal as signals
import time
import zlib
from collections.abc import Callable
from math import isfinite
from time import monotonic, sleep

from hangwatch.folder import REPORT_DIR
from hangwatch.policy import NO_SIGNAL, Policy
from hangwatch.timer import _fifo, _place
from hangwatch.timer._client import DropInClient
from hangwatch.timer._complaints import Complaints
from hangwatch.timer._overrides import is_overridden, remember
from hangwatch.timer._server import DropInServer
from hangwatch.timer.api import STOP_WITHIN, TimerRequest
from hangwatch.timer.debug_info_logging import log_debug_info_for_expired_timers

__all__ = ["FileTimerClient", "FileTimerRequest", "FileTimerServer"]

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.watcher.events import Event

    LogEvent = Callable[[str, "FileTimerRequest | None"], None]

_NO_SERVER_FOR = 1.0
_TRY_AGAIN_AFTER = 0.02
# As JSON a character may take 12 bytes; a whole line has PIPE_BUF.
_LONGEST_SCOPE = 300


class FileTimerRequest(TimerRequest):
    """A request as it goes through the FIFO.

    Args:
        worker_pid: whose timer.
        scope_id: the timer's name.
        expiration_time: when it expires, in seconds since the epoch; negative: release it.
        signal: what to send to a worker that overran; 0 or less: nothing.
    """

    __slots__ = ("signal", "version")
    __hash__ = None  # equal by value, and mutable

    def __init__(
        self, worker_pid: int, scope_id: str, expiration_time: float, signal: int = 0
    ) -> None:
        super().__init__(worker_pid, scope_id, expiration_time)
        self.version = 1
        self.signal = signal

    @property
    def worker_pid(self) -> int:
        """The worker's process id."""
        pid: int = self.worker_id
        return pid

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileTimerRequest):
            return False
        same = (self.version, self.signal) == (other.version, other.signal)
        return same and super().__eq__(other) is True

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        return json.dumps(
            {
                "version": self.version,
                "pid": self.worker_pid,
                "scope_id": self.scope_id,
                "expiration_time": self.expiration_time,
                "signal": self.signal,
            }
        )


@remember("_send_request")
class FileTimerClient(DropInClient):
    """A worker's client of the `FileTimerServer` on the same FIFO.

    If that server has a companion watcher, arming goes through shared memory. Otherwise, as with
    PyTorch's server, requests go through the FIFO; a slow server holds up nobody.

    Args:
        file_path: the FIFO that the server made.
        signal: what is sent first to a worker that overran; 0 or less: it is never killed.

    Raises:
        ValueError: there is no such signal.
    """

    def __init__(self, file_path: str, signal: int = signals.SIGKILL) -> None:
        super().__init__()
        if int(signal) > signals.SIGRTMAX:
            raise ValueError(
                f"signal must be 1 to {int(signals.SIGRTMAX)}, or 0 or less for a timer that "
                f"never kills, not {signal!r}"
            )
        self._file_path = os.fspath(file_path)
        self.signal = signal

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._file_path!r}, {self._state()}>"

    def _may_connect(self) -> bool:
        return not is_overridden(self, "_send_request")

    def _link(self) -> str | None:
        try:
            return _place.link_of(os.stat(self._file_path))
        except OSError:
            return None

    def _policy(self) -> Policy:
        return Policy(signal=int(self.signal) if self.signal > 0 else NO_SIGNAL)

    def _send(self, scope_id: str, expiration_time: float) -> bool:
        acquires = expiration_time >= 0
        request = FileTimerRequest(
            worker_pid=os.getpid(),
            scope_id=_short(scope_id),
            expiration_time=expiration_time if acquires else -1,
            signal=int(self.signal) if acquires else 0,
        )
        try:
            self._send_request(request)
        except BlockingIOError:
            return False
        return True

    def _send_request(self, request: FileTimerRequest) -> None:
        """Write a request into the FIFO.

        Raises:
            BrokenPipeError: no server reads it, for a second.
            BlockingIOError: the FIFO is full.
            RuntimeError: the request is too long.
        """
        line = request.to_json()
        until = monotonic() + _NO_SERVER_FOR
        while True:
            try:
                _fifo.write(self._file_path, line)
            except BlockingIOError:
                raise
            except ValueError as error:
                raise RuntimeError(f"the request can't be sent: {error}") from None
            except OSError as error:
                # It may just be starting.
                if monotonic() < until:
                    sleep(_TRY_AGAIN_AFTER)
                    continue
                raise BrokenPipeError(
                    error.errno,
                    f"no FileTimerServer reads this FIFO ({error.strerror}): start one first",
                    self._file_path,
                ) from None
            return


@remember("register_timers", "clear_timers", "get_expired_timers", "_reap_worker")
class FileTimerServer(DropInServer):
    """Watches the workers that have a `FileTimerClient` of the same FIFO.

    It never signals its own process.

    Args:
        file_path: where it makes its FIFO.
        run_id: what `log_debug_info_for_expired_timers` is told.
        max_interval: seconds that a round of the server's thread waits for a request at most;
            what is due does not wait for it.
        daemon: whether the thread lets the process end while it runs.
        log_event: called with ``watchdog started``, ``watchdog stopped``, and, from a thread
            of this process, with ``timer expired`` and ``kill worker process`` and the
            request that it is about.
        report_dir: folder of the newest 100 reports; None keeps none.

    Raises:
        FileExistsError: something that is not ours is there; it is left alone.
        OSError: no FIFO can be made there.
    """

    def __init__(
        self,
        file_path: str,
        run_id: str = "",
        max_interval: float = 10,
        daemon: bool = True,
        log_event: LogEvent | None = None,
        *,
        report_dir: str | os.PathLike[str] | None = REPORT_DIR,
    ) -> None:
        self._file_path = os.fspath(file_path)
        self._run_id = run_id
        self._log_event = log_event
        complaints = Complaints()
        self._fifo = _fifo.FifoRequestQueue(self._file_path, _request_of, complaints)
        super().__init__(self._fifo, max_interval, daemon, report_dir, complaints)
        self._fifo.make()

    @property
    def _request_count(self) -> int:
        """How many requests came through the FIFO."""
        return self._fifo.lines_read

    def start(self) -> None:
        """Start watching; returns when workers can connect. A second start does nothing.

        Raises:
            OSError: the FIFO can't be made.
        """
        if self._watchdog_thread is not None:
            return
        self._fifo.open()
        super().start()
        self._emit("watchdog started", None)

    def stop(self) -> None:
        """Stop watching and remove the FIFO, within a second.

        The watcher finishes by itself what it has begun by then, a report for example. Without
        a start it only removes the FIFO; in a forked child it does nothing.
        """
        if self._end():
            self._emit("watchdog stopped", None)

    def run_once(self) -> None:
        """Take what is in the FIFO, go one last round, and stop."""
        thread, self._watchdog_thread = self._watchdog_thread, None
        if thread is not None:
            self._stopping.set()
            thread.join(STOP_WITHIN)
            self._go_round(0.0)
        self._end()

    def clear_timers(self, worker_pids: set[int]) -> None:
        """Forget all timers of these workers, and of those that have ended."""
        super().clear_timers(worker_pids)

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Tell whether there is such a process."""
        if pid <= 0:  # kill(2) would take it for a group
            return False
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except (OSError, OverflowError):
            return False
        return True

    def get_last_progress_time(self) -> int:
        """Return when the watcher was last known to run, in epoch seconds.

        Until the first client has connected, that is now.
        """
        return int(self._last_progress if self._joined else time.time())

    def _end(self) -> bool:
        if self._owner != os.getpid():
            return False
        super().stop()
        self._fifo.close()
        return True

    def _link(self) -> str | None:
        return _place.link_of(self._fifo.status())

    def _is_gone(self, pid: int) -> bool:
        return super()._is_gone(pid) or not self.is_process_running(pid)

    def _reap_worker(self, worker_pid: int, signal: int = signals.SIGKILL) -> bool:
        return self._targets.reap(worker_pid, signal)

    def _reap_expired(self, worker_id: int, expired: list[FileTimerRequest]) -> bool | None:
        expired.sort(key=lambda request: request.expiration_time)
        self._expired(worker_id, expired)
        for request in expired:
            if request.signal > 0:
                try:
                    reaped = self._reap_worker(worker_id, request.signal)
                except Exception as error:
                    self._complaints.say(
                        f"_reap_worker must not raise, it counts as reaped: {error!r}"
                    )
                    return True
                if reaped:
                    self._emit("kill worker process", request)
                return reaped
        # The worker's other timers are still to be watched.
        for request in expired:
            self._table.drop(request)
        return None

    def _expired(self, pid: int, expired: list[FileTimerRequest]) -> None:
        # Looked up when it is called, so that it can be replaced.
        log_debug_info_for_expired_timers(
            self._run_id, {pid: [request.to_json() for request in expired]}
        )
        for request in expired:
            self._emit("timer expired", request)
            if request.signal > 0:
                break

    def _on_event(self, event: Event) -> None:
        super()._on_event(event)
        if event["event"] not in ("expired", "reaped"):
            return
        request = FileTimerRequest(
            event["pid"],
            event["scope"],
            event["expiration_time"],
            event["signal"] or int(signals.SIGKILL),
        )
        if event["event"] == "expired":
            self._expired(event["pid"], [request])
        else:
            self._emit("kill worker process", request)

    def _emit(self, name: str, request: FileTimerRequest | None) -> None:
        if self._log_event is None:
            return
        try:
            self._log_event(name, request)
        except Exception as error:
            self._complaints.say(f"log_event({name!r}) raised {error!r}")


def _request_of(fields: object) -> FileTimerRequest:
    """Make a request of a line's JSON.

    Raises:
        ValueError: it is none: whoever wrote it is at fault.
    """
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    missing = {"pid", "scope_id", "expiration_time", "signal"} - fields.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    pid, scope_id = fields["pid"], fields["scope_id"]
    expiration_time, signal = fields["expiration_time"], fields["signal"]
    for name, value in ("pid", pid), ("signal", signal):
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
            raise ValueError(f"its {name} is no number of one: {value!r:.40}")
    if signal > signals.SIGRTMAX:
        raise ValueError(f"there is no signal {signal}")
    if not isinstance(scope_id, str):
        raise ValueError(f"its scope_id is no string: {scope_id!r:.40}")
    if not isinstance(expiration_time, int | float) or isinstance(expiration_time, bool):
        raise ValueError(f"its expiration_time is no number: {expiration_time!r:.40}")
    try:
        finite = isfinite(expiration_time)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"its expiration_time is not finite: {str(expiration_time)[:40]}")
    return FileTimerRequest(pid, scope_id, expiration_time, signal)


def _short(scope_id: str) -> str:
    """Shorten a scope so that its line fits; scopes that differ still do."""
    if len(scope_id) <= _LONGEST_SCOPE:
        return scope_id
    kept = _LONGEST_SCOPE - 10
    return f"{scope_id[:kept]}…{zlib.crc32(scope_id.encode('utf-8', 'backslashreplace')):08x}"
