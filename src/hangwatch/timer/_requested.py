"""Timers that go through the queue or the FIFO: what this process has asked its server for.

A request names a process and a scope, so the server knows one timer for both. Here each thread and
task has its own, and nested blocks of one scope are a stack. The server gets the earliest deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf, nan

from hangwatch.policy import OnExpiry
from hangwatch.timer._acquired import Holder, holder
from hangwatch.worker.blocks import no_end
from hangwatch.worker.warnings import warn

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.arguments import Asked

RELEASE = -1.0
_UNKNOWN = nan
"""What the server was told last, if nobody knows whether that got there: equal to nothing."""
_TRY_AGAIN_AFTER = 0.05


class _Timer:
    """One block's, or one call's, timer: its limit in seconds, and when it expires (epoch).

    Cancelled, it never does. `began` is when its present interval did, which is `limit` long;
    the block's own is `own`.
    """

    __slots__ = ("began", "expiration_time", "holder", "limit", "own", "pauses")

    def __init__(self, expiration_time: float, pauses: bool = False) -> None:
        self.began = time.time()
        self.own = self.limit = expiration_time - self.began
        self.expiration_time = expiration_time
        self.holder = holder()
        self.pauses = pauses

    def restart(self) -> None:
        """Begin an interval as long as the present one."""
        self.began = time.time()
        self.expiration_time = self.began + self.limit

    def renew(self, limit: float | None) -> None:
        """Begin another interval; None: of the block's own length."""
        self.limit = self.own if limit is None else limit
        self.restart()


class Requested:
    """The timers that this process has at its server.

    In another block of the same scope and thread a block replaces that one's timer, and
    gives it its own time anew when it ends; see `RequestedBlock`.

    Args:
        send: sends a request (scope, expiration time in epoch seconds, or `RELEASE`) without
            ever blocking; returns whether there was room for it.
    """

    def __init__(self, send: Callable[[str, float], bool]) -> None:
        self._send = send
        self.forget()

    def forget(self) -> None:
        """In a forked child: forget what the parent asked for."""
        # Reentrant: a signal handler may use timers, too.
        self._lock = threading.RLock()
        self._stacks: dict[str, dict[Holder, list[_Timer]]] = {}
        self._told: dict[str, float] = {}
        self._waiting: dict[str, float] = {}
        self._paused_since = 0.0

    def __contains__(self, scope_id: object) -> bool:
        return scope_id in self._stacks

    def holds(self, scope_id: str) -> bool:
        """Tell whether the caller has a timer of that name."""
        return holder() in self._stacks.get(scope_id, {})

    def begin(self, scope_id: str, timer: _Timer) -> None:
        """Begin a block; if that raises, `end` it."""
        with self._lock:
            if timer.pauses and not self._is_paused():
                self._paused_since = time.time()
            self._stacks.setdefault(scope_id, {}).setdefault(timer.holder, []).append(timer)
            self._tell_all() if timer.pauses else self._tell(scope_id)

    def end(self, scope_id: str, timer: _Timer) -> None:
        """End a block, from whichever thread. Idempotent."""
        with self._lock:
            mine = self._stacks.get(scope_id, {}).get(timer.holder, [])
            if timer in mine:
                if timer is mine[-1] and len(mine) > 1:
                    mine[-2].restart()
                mine.remove(timer)
                if timer.pauses and not self._is_paused():
                    self._shift(time.time())
            self._prune(scope_id)
            self._tell_all() if timer.pauses else self._tell(scope_id)

    def renew(self, scope_id: str, timer: _Timer, limit: float | None) -> bool:
        """Give a block another interval; return False if it has ended."""
        with self._lock:
            if timer not in self._stacks.get(scope_id, {}).get(timer.holder, []):
                return False
            timer.renew(limit)
            self._tell(scope_id)
        return True

    def remaining(self, timer: _Timer) -> float:
        """Return the seconds that a timer has left; they stand still while it is suspended."""
        if timer.pauses or not self._is_paused():
            return timer.expiration_time - time.time()
        return timer.expiration_time - max(self._paused_since, timer.began)

    def replace(self, scope_id: str, expiration_time: float) -> None:
        """Acquire by a call: whatever the caller has of that scope, this takes its place."""
        with self._lock:
            self._stacks.setdefault(scope_id, {})[holder()] = [_Timer(expiration_time)]
            self._told.pop(scope_id, None)
            try:
                self._tell(scope_id)
            except BaseException:
                del self._stacks[scope_id][holder()]
                self._prune(scope_id)
                raise

    def drop(self, scope_id: str) -> None:
        """Release by a call: the caller's timer, or if it has none, anyone's."""
        with self._lock:
            stacks = self._stacks.get(scope_id, {})
            stacks.pop(holder() if holder() in stacks else next(reversed(stacks), holder()), None)
            self._prune(scope_id)
            self._told.pop(scope_id, None)
            self._tell(scope_id, anew=True)

    def _prune(self, scope_id: str) -> None:
        stacks = {who: mine for who, mine in self._stacks.get(scope_id, {}).items() if mine}
        if stacks:
            self._stacks[scope_id] = stacks
        else:
            self._stacks.pop(scope_id, None)

    def _timers(self) -> list[_Timer]:
        return [timer for by in self._stacks.values() for mine in by.values() for timer in mine]

    def _is_paused(self) -> bool:
        return any(timer.pauses for timer in self._timers())

    def _shift(self, now: float) -> None:
        """Give every timer back the time that it was suspended for."""
        for timer in self._timers():
            if timer.expiration_time > self._paused_since:
                timer.expiration_time += max(0.0, now - max(self._paused_since, timer.began))

    def _tell_all(self) -> None:
        for scope_id in {*self._stacks, *self._told}:
            self._tell(scope_id)

    def _tell(self, scope_id: str, anew: bool = False) -> None:
        """Tell the server what holds now, if that is not what it knows."""
        tops = [mine[-1] for mine in self._stacks.get(scope_id, {}).values()]
        if self._is_paused():
            tops = [timer for timer in tops if timer.pauses]
        times = [timer.expiration_time for timer in tops if timer.expiration_time < inf]
        wanted = min(times, default=RELEASE)
        if self._told.get(scope_id, RELEASE) == wanted and not anew:
            return
        before = self._told.get(scope_id, RELEASE)
        self._told[scope_id] = _UNKNOWN
        try:
            sent = not self._waiting and self._send(scope_id, wanted)
        except Exception:
            self._told[scope_id] = before
            raise
        if not sent:
            # A server that is slow must not hold up the worker. But a release has to get
            # there: without it, a healthy worker would be killed.
            if not self._waiting:
                threading.Thread(target=self._send_waiting, name="hangwatch", daemon=True).start()
            self._waiting.pop(scope_id, None)
            self._waiting[scope_id] = wanted
        if wanted == RELEASE:
            self._told.pop(scope_id, None)
        else:
            self._told[scope_id] = wanted

    def _send_waiting(self) -> None:
        while True:
            with self._lock:
                try:
                    while self._waiting:
                        scope_id = next(iter(self._waiting))
                        if not self._send(scope_id, self._waiting[scope_id]):
                            break
                        del self._waiting[scope_id]
                except Exception:  # nobody is there any more who could act on it
                    self._told.update(dict.fromkeys(self._waiting, _UNKNOWN))
                    self._waiting.clear()
                if not self._waiting:
                    return
            time.sleep(_TRY_AGAIN_AFTER)


class RequestedBlock:
    """A block whose timer goes through the queue or the FIFO; see `worker.blocks.Other`."""

    def __init__(self, requested: Requested, name: str, asked: Asked, limit: float) -> None:
        self._requested = requested
        # Apart from blocks of that name: it replaces none, and none replaces it.
        self._name = f"{name} (paused)" if asked.pauses else name
        self._pauses = asked.pauses
        # Such a server can only kill.
        self._limit = inf if asked.policy.on_expiry is OnExpiry.REPORT else limit
        self._timer: _Timer | None = _Timer(time.time() + self._limit, asked.pauses)
        try:
            requested.begin(self._name, self._timer)
        except BaseException:
            with suppress(Exception):
                self._end()
            raise

    def exit(self, kind: object, error: object, traceback: object) -> None:
        """Give it back. A server that is gone by now has nothing to be given back."""
        try:
            self._end()
        except Exception as problem:
            warn(f"the end of block {self._name!r} could not be told: {problem}")
        except BaseException:
            # An interruption: the server would end a healthy worker for it.
            with suppress(Exception):
                self._end()
            raise

    def renew(self, limit: float | None) -> None:
        """Ask for another interval."""
        if self._timer is not None:
            limit = inf if self._limit == inf else limit
            self._requested.renew(self._name, self._timer, limit)

    def cancel(self) -> None:
        """Give the timer back; the block goes on."""
        if self._pauses:
            raise no_end()
        self.renew(inf)

    def remaining(self) -> float:
        """Return the seconds that are left."""
        return inf if self._timer is None else self._requested.remaining(self._timer)

    def _end(self) -> None:
        timer = self._timer
        if timer is not None:
            self._requested.end(self._name, timer)
            self._timer = None
