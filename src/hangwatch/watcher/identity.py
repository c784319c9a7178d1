"""Who a worker is: what the kernel says, never what a message says."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import struct

from hangwatch.errors import ProtocolError
from hangwatch.failpoints import failpoint
from hangwatch.process import Identity, read_stat

_SO_PEERPIDFD = 77  # linux/socket.h, Linux 6.5
_SO_PASSRIGHTS = 83  # Linux 6.16
_MOST_UNREAD = 4096
_ENDED = "it ended while it connected"


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


def has_hung_up(connection: socket.socket) -> bool:
    """Tell whether nobody has the other end any more, whatever it has left to be read.

    Source: unix_poll() in linux/net/unix/af_unix.c.
    """
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def refuse_descriptors(connection: socket.socket) -> None:
    """Have the kernel take no more descriptors for us from a peer, if it can.

    What closing one does, and how long that takes, is up to who made it.

    Source: unix(7) on SCM_RIGHTS; unix_may_passrights() in linux/net/unix/af_unix.c.
    """
    with contextlib.suppress(OSError):
        failpoint("kernel.pass-rights")
        connection.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def read_out(connection: socket.socket) -> None:
    """Read what a peer that has left had still sent.

    Whoever closes a socket last closes the descriptors of what is unread there. That shall be
    us, whom the keeper replaces should it take for ever, not the keeper.
    """
    with contextlib.suppress(OSError):
        for _ in range(_MOST_UNREAD):
            if not connection.recv(1, socket.MSG_DONTWAIT):
                break


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
        pidfd = pidfd_by_number(pid)
        if has_hung_up(connection):
            os.close(pidfd)
            raise ProtocolError(_ENDED) from None
        return pidfd


def pidfd_by_number(pid: int) -> int:
    """Hold a peer by its number, for kernels before 6.5.

    The number can't be another's while the peer lives; whoever calls has to see that it still
    does. (Not so if the peer left its connection to a child, and ended.)

    Raises:
        ProtocolError: it ended meanwhile, or can't be held.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise ProtocolError(f"it can't be held by a pidfd ({error.strerror})") from None
