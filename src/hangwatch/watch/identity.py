"""Who a worker is: what the kernel says, never what a message says."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from dataclasses import dataclass

from hangwatch.errors import ProtocolError

_SO_PEERPIDFD = 77  # linux/socket.h, Linux 6.5


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of /proc/pid/stat that matter here; `start_ticks` since boot."""

    pid: int
    comm: str
    state: str
    ppid: int
    cpu_seconds: float
    start_ticks: int


_TICKS = os.sysconf("SC_CLK_TCK")


def parse_stat(text: str) -> ProcessStat:
    """Parse /proc/pid/stat; the comm may hold spaces and brackets. Source: proc(5)."""
    pid, _, rest = text.partition(" (")
    comm, _, fields = rest.rpartition(") ")
    words = fields.split()
    return ProcessStat(
        pid=int(pid),
        comm=comm,
        state=words[0],
        ppid=int(words[1]),
        cpu_seconds=(int(words[11]) + int(words[12])) / _TICKS,
        start_ticks=int(words[19]),
    )


def read_stat(pid: int) -> ProcessStat | None:
    """Read a process's stat; None if there is no such process (or no /proc)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return parse_stat(stat.read())
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for as long as we hold it.

    Attributes:
        pid: its process id in our pid namespace.
        uid: the effective user id it connected with.
        start_ticks: when it began, in clock ticks since boot; 0 where /proc doesn't tell.
        pidfd: the handle that signals go through; ours to close.
    """

    pid: int
    uid: int
    start_ticks: int
    pidfd: int

    def is_dead(self) -> bool:
        """Tell whether the process has ended; pidfd_open(2): readable means it has."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, number: int) -> str:
        """Send a signal; say in words what came of it."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return "already dead"
        except OSError as error:
            return f"failed: {error.strerror}"
        return "sent"

    def holds(self, descriptor: int, inode: tuple[int, int], native_id: int) -> bool | None:
        """Tell whether the process still has the file `inode` open as `descriptor`.

        A process that exec'd does not: it is another program now, not our worker.

        Returns:
            None if the kernel won't say.
        """
        # A main thread that has exited has no descriptors to show; its others do.
        for task in (self.pid, native_id):
            try:
                status = os.stat(f"/proc/{self.pid}/task/{task}/fd/{descriptor}")
            except FileNotFoundError:
                continue
            except OSError:
                return None
            return (status.st_dev, status.st_ino) == inode
        return False


def identify(connection: socket.socket) -> Identity:
    """Ask the kernel who is at the other end of a connected Unix socket.

    Raises:
        ProtocolError: the peer is outside of our pid namespace, or already gone.

    Source: unix(7) on SO_PEERCRED; SO_PEERPIDFD since Linux 6.5.
    """
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    pid, uid, _ = struct.unpack("3i", credentials)
    if pid <= 0:
        raise ProtocolError(
            "it is outside of the watcher's pid namespace: run the watcher in the same container"
        )
    pidfd = _peer_pidfd(connection, pid)
    stat = read_stat(pid)
    return Identity(pid, uid, 0 if stat is None else stat.start_ticks, pidfd)


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    # Older kernels: by number. The number can't be another's while the peer lives, and
    # it lives if the process we opened existed before and still does: its start time.
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
