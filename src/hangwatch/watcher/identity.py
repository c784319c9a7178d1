"""Who a worker is: what the kernel says, never what a message says."""

from __future__ import annotations

import functools
import os
import socket
import struct

from hangwatch.errors import ProtocolError
from hangwatch.failpoints import failpoint
from hangwatch.process import Identity, read_stat

_SO_PEERPIDFD = 77  # linux/socket.h, Linux 6.5


def identify(connection: socket.socket) -> Identity:
    """Ask the kernel who is at the other end of a connected Unix socket.

    Raises:
        ProtocolError: the peer is outside of our pid namespace, or already gone.

    Source: unix(7) on SO_PEERCRED; SO_PEERPIDFD since Linux 6.5.
    """
    pid, uid = credentials_of(connection)
    if pid <= 0:
        raise ProtocolError(
            "it is outside of the watcher's pid namespace: run the watcher in the same container"
        )
    pidfd = _peer_pidfd(connection, pid)
    stat = read_stat(pid)
    return Identity(pid, uid, 0 if stat is None else stat.start_ticks, pidfd)


def credentials_of(connection: socket.socket) -> tuple[int, int]:
    """Return the pid and the effective user id of who connected, as of then; unix(7)."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


@functools.cache
def kernel_gives_pidfds() -> bool:
    """Tell whether a connected socket can be asked for its peer's pidfd at any time."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        try:
            failpoint("kernel.peer-pidfd")
            os.close(one.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError:
            return False
    return True


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    try:
        failpoint("kernel.peer-pidfd")
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return pidfd_by_number(pid)


def pidfd_by_number(pid: int) -> int:
    """Hold a peer by its number, for kernels before 6.5.

    The number can't be another's while the peer lives, and it lives if the process that
    we hold existed before and still does: its start time.

    Raises:
        ProtocolError: it ended meanwhile, or can't be held.
    """
    before = read_stat(pid)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise ProtocolError(f"it can't be held by a pidfd ({error.strerror})") from None
    after = read_stat(pid)
    if before is None or after is None or before.start_ticks != after.start_ticks:
        os.close(pidfd)
        raise ProtocolError("it ended while it connected")
    return pidfd
