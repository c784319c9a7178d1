"""What /proc says of a process. Any of it may block on one in D state: see helper."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from hangwatch.evidence.model import Child, Task
from hangwatch.process import parse_stat, read_stat

BETWEEN_READINGS_S = 0.02


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU time and context switches of one kernel thread at one moment."""

    state: str
    comm: str
    cpu_s: float
    switches: int


@dataclass(frozen=True, slots=True)
class SignalMasks:
    """Bit masks of one kernel thread; bit n - 1 is signal n. Source: proc(5)."""

    pending: int
    shared_pending: int
    blocked: int
    caught: int


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def task_ids(pid: int) -> list[int]:
    """Return the kernel thread ids of a process."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return []


def readings(pid: int) -> dict[int, Reading]:
    """Read every thread's CPU time and context switches."""
    found = {}
    for tid in task_ids(pid):
        stat = _read(f"/proc/{pid}/task/{tid}/stat")
        status = _read(f"/proc/{pid}/task/{tid}/status")
        if stat is None or status is None:
            continue
        parsed = parse_stat(stat)
        switches = sum(
            int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line
        )
        found[tid] = Reading(parsed.state, parsed.comm, parsed.cpu_seconds, switches)
    return found


def signal_masks(pid: int, tid: int) -> SignalMasks | None:
    """Read the signal masks of one thread; None if there is no such thread."""
    text = _read(f"/proc/{pid}/task/{tid}/status")
    if text is None:
        return None
    masks = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("SigPnd", "ShdPnd", "SigBlk", "SigCgt"):
            masks[name] = int(value, 16)
    if len(masks) < 4:
        return None
    return SignalMasks(masks["SigPnd"], masks["ShdPnd"], masks["SigBlk"], masks["SigCgt"])


def tracer(pid: int) -> int:
    """Return the process that traces a process, a debugger or strace; 0: none. ptrace(2)."""
    for tid in task_ids(pid):
        for line in (_read(f"/proc/{pid}/task/{tid}/status") or "").splitlines():
            if line.startswith("TracerPid:") and (found := int(line.split()[1])):
                return found
    return 0


def credentials(pid: int) -> tuple[int, int, list[int]]:
    """Return a process's effective user and group and its other groups.

    Raises:
        OSError: /proc doesn't tell, or there is no such process.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
        lines = dict(line.split(":", 1) for line in status)
    # Real, effective, saved, file system's.
    uid, gid = (int(lines[name].split()[1]) for name in ("Uid", "Gid"))
    return uid, gid, [int(group) for group in lines["Groups"].split()]


def sees_our_files(pid: int) -> bool:
    """Tell whether a process has our mount namespace and our root: a path is the same file.

    Raises:
        OSError: /proc doesn't tell, or there is no such process.
    """
    for tid in task_ids(pid):
        # A main thread that has exited has neither any more; the others do.
        with contextlib.suppress(FileNotFoundError):
            return all(
                os.path.samestat(os.stat(f"/proc/{pid}/task/{tid}/{name}"), os.stat(ours))
                for name, ours in (("ns/mnt", "/proc/self/ns/mnt"), ("root", "/proc/self/root"))
            )
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def has(mask: int, signal: int) -> bool:
    """Tell whether `signal` is in `mask`."""
    return bool(mask >> (signal - 1) & 1)


def wchan(pid: int, tid: int) -> str | None:
    """Return the kernel function that a thread sleeps in, where the kernel tells."""
    text = _read(f"/proc/{pid}/task/{tid}/wchan")
    return text if text and text != "0" else None


def tasks(pid: int, before: dict[int, Reading], after: dict[int, Reading]) -> list[Task]:
    """Describe every thread, with the CPU time that it gained between two readings."""
    described = []
    for tid, reading in after.items():
        syscall = _read(f"/proc/{pid}/task/{tid}/syscall")
        earlier = before.get(tid, reading)
        described.append(
            Task(
                tid=tid,
                comm=reading.comm,
                state=reading.state,
                wchan=wchan(pid, tid),
                syscall=syscall.strip() if syscall else None,
                cpu_s=reading.cpu_s,
                cpu_gained_s=round(reading.cpu_s - earlier.cpu_s, 3),
            )
        )
    return described


def children(pid: int) -> tuple[list[Child], str | None]:
    """Describe every descendant of a process.

    Returns:
        The descendants, and why there may be more.
    """
    import psutil

    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            stat = read_stat(child.pid)
            if stat is not None:
                words = [word[:256] for word in _command_of(child.pid)[:32]]
                found.append(Child(child.pid, stat.ppid, stat.comm, stat.state, words))
    except psutil.Error as error:
        return found, str(error)
    return found, None


def _command_of(pid: int) -> list[str]:
    return (_read(f"/proc/{pid}/cmdline") or "").rstrip("\0").split("\0")


def start_time(start_ticks: int) -> float | None:
    """Turn a start in clock ticks since boot into seconds since the epoch."""
    for line in (_read("/proc/stat") or "").splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) + start_ticks / os.sysconf("SC_CLK_TCK")
    return None


def rss_bytes(pid: int) -> int | None:
    """Return a process's resident memory."""
    text = _read(f"/proc/{pid}/statm")
    return None if text is None else int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state(pid: int, tid: int) -> str | None:
    """Return the state letter of one thread."""
    text = _read(f"/proc/{pid}/task/{tid}/stat")
    return None if text is None else parse_stat(text).state
