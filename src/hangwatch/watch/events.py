"""What the watcher tells the program that launched it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import deque
from typing import TypedDict

MOST_BYTES = 16384
_MOST_WAITING = 10_000


class Event(TypedDict, total=False):
    """One event, a JSON object in a datagram.

    Attributes:
        event: ``alive`` a few times a second, ``expired`` at a verdict, or how an incident
            ended: a value of `Outcome`.
        at: when, in seconds since the epoch.
        joined: of ``alive``: how many workers have connected so far.
        pid: the worker; this and the rest not of ``alive``.
        scope: the block's name, perhaps cut.
        expiration_time: its deadline, in seconds since the epoch.
        signal: what the block asked for, 0: the watcher's choice.
    """

    event: str
    at: float
    joined: int
    pid: int
    scope: str
    expiration_time: float
    signal: int


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
