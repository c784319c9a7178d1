"""The timers of requests. A round costs what is due, not what is armed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from time import monotonic

from hangwatch.agenda import Agenda
from hangwatch.timer.api import TimerRequest

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

Key = tuple[int, str]


class TimerTable:
    """Timers by process and scope.

    A request speaks of the wall clock. It is read once, when the request comes, and from
    then on the monotonic clock counts: a step of the wall clock moves no deadline.

    Attributes:
        timers: every timer that is armed, by process id and scope.
    """

    def __init__(self) -> None:
        self.timers: dict[Key, Any] = {}
        self._scopes: dict[int, set[str]] = {}
        self._agenda = Agenda()
        self._overdue: dict[Key, float] = {}

    def put(self, request: Any) -> None:
        """Arm a timer, in the place of an older one of its name, or disarm it."""
        pid, scope_id, expiration_time = (
            request.worker_id,
            request.scope_id,
            request.expiration_time,
        )
        key = pid, scope_id
        self._remove(key)
        if expiration_time < 0:
            return
        self.timers[key] = request
        self._scopes.setdefault(pid, set()).add(scope_id)
        # In this order: if we are held up in between, the deadline moves later, not earlier.
        left = expiration_time - time.time()
        self._agenda.put(key, monotonic() + left)

    def drop(self, request: TimerRequest) -> None:
        """Forget this one timer, if it is still armed."""
        key = request.worker_id, request.scope_id
        if self.timers.get(key) is request:
            self._remove(key)

    def clear(self, pids: Iterable[int]) -> None:
        """Forget all timers of these processes."""
        for pid in list(pids):
            for scope_id in self._scopes.get(pid, set()).copy():
                self._remove((pid, scope_id))

    def expired(self, deadline: float) -> dict[int, list[Any]]:
        """Return the timers due by `deadline` (epoch seconds), the earliest first, by process."""
        by = monotonic() + deadline - time.time()
        self._overdue.update(self._agenda.take(by))
        found: dict[int, list[Any]] = {}
        for key, due in self._overdue.items():
            if due <= by:
                found.setdefault(key[0], []).append(self.timers[key])
        return found

    def next_due(self) -> float:
        """Return when the next timer that is not overdue yet is due (CLOCK_MONOTONIC)."""
        return self._agenda.next()

    def has_overdue(self) -> bool:
        """Tell whether a timer is overdue whose worker was not reaped."""
        return bool(self._overdue)

    def pids(self) -> list[int]:
        """Return the processes that have timers."""
        return list(self._scopes)

    def _remove(self, key: Key) -> None:
        if self.timers.pop(key, None) is None:
            return
        self._agenda.drop(key)
        self._overdue.pop(key, None)
        pid, scope_id = key
        self._scopes[pid].discard(scope_id)
        if not self._scopes[pid]:
            del self._scopes[pid]
