"""What the watcher tells the program that launched it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import deque
from typing import TypedDict

MOST_BYTES = 65536
"""As JSON, labels may take four times what they took in the hello."""
_MOST_WAITING = 10_000


class Event(TypedDict, total=False):
    """One event, a JSON object in a datagram. docs/events.md shows one of each kind.

    Attributes:
        event: its kind: ``joined`` and ``left`` of a worker; ``expired`` at a verdict, then how
            the incident ended, a value of `Outcome`; ``stalled`` and ``restarted`` of the
            watcher; ``alive`` a few times a second, for programs of ours alone.
        at: when, in seconds since the epoch.
        pid: the worker; this and `labels` of a worker's and an incident's events.
        labels: its rank and the like.
        scope: the block's name, perhaps cut; this and the rest down to `headline` of an
            incident's events.
        limit_s: how long it may take, in seconds.
        inside_s: how long it had taken at the verdict.
        late_s: from the deadline to the verdict.
        thread: name of the thread that is inside of it.
        expiration_time: its deadline, in seconds since the epoch.
        signal: what the block asked for, 0: the watcher's choice.
        headline: one line that stands alone.
        for_s: of ``stalled``: for how many seconds the watcher did not run.
        workers: of ``restarted``: how many workers it has taken over.
        joined: of ``alive``: how many workers have connected so far.
    """

    event: str
    at: float
    pid: int
    labels: dict[str, str]
    scope: str
    limit_s: float
    inside_s: float
    late_s: float
    thread: str
    expiration_time: float
    signal: int
    headline: str
    for_s: float
    workers: int
    joined: int


class Events:
    """Sends events, and never waits for who reads them.

    Args:
        descriptor: our end of a SOCK_SEQPACKET pair, still the caller's afterwards; None
            if nobody wants to know.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._socket = None if descriptor is None else socket.socket(fileno=os.dup(descriptor))
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)

    def tell(self, event: Event, droppable: bool = False) -> None:
        """Send an event, or keep it until there is room, unless it is `droppable`."""
        if self._socket is None or (droppable and self._waiting):
            return
        self._waiting.append(json.dumps(event).encode("ascii"))
        self.send_waiting()
        if droppable and self._waiting:
            self._waiting.pop()

    def send_waiting(self) -> None:
        """Send what there is room for."""
        if self._socket is None:
            return
        while self._waiting:
            try:
                self._socket.send(self._waiting[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # the launcher is gone
                with contextlib.suppress(OSError):
                    self._socket.close()
                self._socket = None
                return
            self._waiting.popleft()
