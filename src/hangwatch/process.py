"""Another process: held by a pidfd, described by /proc."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass


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


def wait_readable(descriptor: int, within: float) -> bool:
    """Wait some seconds for a descriptor, a process's pidfd for example, to become readable.

    Source: poll(2), which unlike select(2) takes descriptors of any number; pidfd_open(2):
    readable means that the process has ended.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(within * 1000))


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

    def is_dead(self, within: float = 0.0) -> bool:
        """Tell whether the process has ended, or does so within some seconds."""
        return wait_readable(self.pidfd, within)

    def send(self, number: int) -> str:
        """Send a signal; say in words what came of it."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return "already dead"
        except OSError as error:
            return f"failed: {error.strerror}"
        return "sent"

    def is_theirs(self) -> bool | None:
        """Tell whether the process still is of the user that it connected as.

        One that has run a program with the set-user-ID bit may be another's by now, and its
        user must not have us signal it. None if the kernel won't say.
        """
        return may_signal(self.uid, self.pid)

    def holds(self, descriptor: int, inode: tuple[int, int], native_id: int) -> bool | None:
        """Tell whether the process still has the file `inode` open as `descriptor`.

        A process that exec'd does not: it is another program now, not our worker. Nor is one
        that is another user's by now, whatever it has open.

        Returns:
            None if the kernel won't say.
        """
        theirs = self.is_theirs()
        if not theirs:
            return theirs
        # A main thread that has exited has no descriptors to show; its others do.
        for task in (self.pid, native_id):
            try:
                status = os.stat(f"/proc/{self.pid}/task/{task}/fd/{descriptor}")
            except FileNotFoundError:
                continue
            except OSError:
                return None
            return (status.st_dev, status.st_ino) == inode
        # No /proc, or one that hides this process from us, shows nothing of it at all.
        return False if self.is_dead() or os.path.exists(f"/proc/{self.pid}") else None


def may_signal(uid: int, pid: int) -> bool | None:
    """Tell whether user `uid` may signal process `pid`; of our own user the kernel decides later.

    Returns:
        None if the kernel won't say; then it is not to be signalled, but may be the same.

    Source: kill(2), for a sender without capabilities.
    """
    if uid in (0, os.geteuid()):
        return True
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            words = next(line.split() for line in status if line.startswith("Uid:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return False
    except OSError:
        return None
    real, saved = int(words[1]), int(words[3])
    return uid in (real, saved)
