"""Processes: to look at, to start, to wait for, and to end."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hangwatch import linux


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def comm(pid: int) -> str:
    """Return the name that ps shows."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def open_files(pid: int) -> int:
    """Count a process's descriptors."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def held_by(*pids: int) -> list[tuple[int, int, int]]:
    """Return the descriptors, the memfds among them, and the threads of each that lives."""
    counts = []
    for pid in pids:
        with contextlib.suppress(OSError):
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            memfds = sum(link.startswith("/memfd:") for link in links)
            counts.append((len(links), memfds, len(os.listdir(f"/proc/{pid}/task"))))
    return counts


def left_below_us() -> dict[int, str]:
    """Return the processes that are our children, and their names; of a subreaper, orphans, too."""
    found = {}
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            found[int(pid)] = comm(int(pid))
    return found


def errors_in(text: str) -> list[str]:
    """Return what a log says of exceptions that nobody caught, and of crashes."""
    return re.findall(r"^(?:Traceback|Fatal Python error)(?:.*\n)+?(?=\S)(.*)", text, re.M)


class Gate:
    """A gate that one process opens for so many others; made before any of them is forked."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()

    def open(self, count: int = 1) -> None:
        """Let `count` processes through."""
        os.write(self._writing, b"." * count)

    def wait(self) -> None:
        """Wait to be let through."""
        os.read(self.reading, 1)


class Watched:
    """A process that another one watches; it need not be its child.

    Args:
        pid: its process id.
        since: the moment from which on its death is measured; now if it is None.
    """

    def __init__(self, pid: int, since: float | None = None) -> None:
        self.pid = pid
        self._since = time.monotonic() if since is None else since
        self._pidfd = os.pidfd_open(pid)

    def death_within(self, seconds: float) -> float | None:
        """Wait for its death; return after how many seconds it came, None if it didn't."""
        left = max(0.0, self._since + seconds - time.monotonic())
        if not select.select([self._pidfd], [], [], left)[0]:
            return None
        return time.monotonic() - self._since

    def is_dead(self) -> bool:
        """Tell whether it is dead."""
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def is_killed(self) -> bool:
        """Tell whether it is dead, or has a SIGKILL that it only has to die of; proc(5)."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.M)
            if any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending):
                return True
        return self.is_dead()

    def signal(self, number: int) -> None:
        """Send it a signal, unless it is dead and waited for."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Watch it no longer."""
        os.close(self._pidfd)


def fork(body: Callable[[], None], outlives_us: bool = False) -> int:
    """Fork a process that does something and ends, at the latest with its parent.

    Args:
        body: what it does.
        outlives_us: whether it may go on without its parent.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if not outlives_us:
            linux.die_with(parent)
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_everybody() -> None:
    """Kill every process below this one, a subreaper, to which the orphans come."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in left_below_us():
                os.kill(pid, signal.SIGKILL)  # our child, not waited for
            os.wait()
