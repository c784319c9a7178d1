"""systemd's protocol at the edge: sockets that we are given, news that we give.

Source: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from math import inf
from time import monotonic

from hangwatch.errors import AddressError

_FIRST_DESCRIPTOR = 3


def take_listener(environment: MutableMapping[str, str]) -> socket.socket | None:
    """Take the listening socket that the launcher passed, if it passed one to us.

    The variables are removed, so that no child takes them for its own.

    Raises:
        AddressError: what was passed is not one listening SOCK_SEQPACKET socket.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or count == "0":
        return None
    if count != "1":
        raise AddressError(f"{count} sockets were passed: a watcher listens on one")
    try:
        listener = socket.socket(fileno=_FIRST_DESCRIPTOR)
        listener.set_inheritable(False)
        right = (
            listener.family == socket.AF_UNIX
            and listener.type == socket.SOCK_SEQPACKET
            and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
    except OSError as error:
        raise AddressError(f"descriptor 3 is no socket ({error.strerror})") from None
    if not right:
        raise AddressError(
            "the socket that was passed is not a listening Unix SOCK_SEQPACKET socket: "
            "use ListenSequentialPacket= in the socket unit"
        )
    return listener


class Notifier:
    """Tells the launcher how we are, if it wants to know."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        for_us = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = environment.pop("WATCHDOG_USEC", "")
        self._ping_every = int(period) / 1e6 / 4 if for_us and period.isdigit() else inf
        self._next_ping = monotonic() if for_us and period.isdigit() else inf
        self._said = ""

    def watching(self, workers: int) -> None:
        """Say, as often as is wanted, that a watcher watches so many workers."""
        news = [] if self._said else ["READY=1"]
        status = f"STATUS=watching {workers} workers"
        if status != self._said:
            news.append(status)
        if monotonic() >= self._next_ping:
            self._next_ping = monotonic() + self._ping_every
            news.append("WATCHDOG=1")
        # What did not get through, as others had filled its queue, is said again next time.
        if news and self.tell(*news):
            self._said = status

    def tell(self, *news: str) -> bool:
        """Send lines such as ``READY=1``, if anybody wants to know; never blocks, never fails.

        Returns:
            Whether that was said to whoever wants to know.
        """
        if self._socket is not None:
            # A launcher that has gone is no reason to stop watching.
            try:
                self._socket.sendto("\n".join(news).encode(), self._address)
            except OSError:
                return False
        return True
