"""Whether the machine ran: a process on each CPU that notes when that CPU stood still.

On a shared machine a CPU can stand still for seconds while another goes on, so a clock in one
process does not notice.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from functools import partial
from pathlib import Path

from support.history import Fault, life_of, own_log
from support.processes import fork
from support.watchers import wait_until

_NAP = 0.02
STOOD_STILL = 0.1
"""Seconds: who sleeps for so much longer than it meant to was kept from running."""


class Clocks:
    """A process on each CPU, until `close`.

    Args:
        folder: where their logs go; see `stalls_in`.

    Attributes:
        pids: the processes, one a CPU.
    """

    def __init__(self, folder: Path) -> None:
        self._seconds = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self._looks = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.pids = []
        for place, cpu in enumerate(sorted(os.sched_getaffinity(0))):
            log = folder / f"clock-{cpu}.log"
            self.pids.append(fork(partial(self._run, place, cpu, log)))

    def stood_still(self) -> float:
        """Return for how many seconds any CPU stood still, at most: of all of them together."""
        return sum(self._seconds[: len(self.pids)])

    def close(self) -> None:
        """End the processes, once each has noted what it may just have overslept."""
        now = time.monotonic()
        wait_until(lambda: min(self._looks[: len(self.pids)]) > now, "each clock has looked")
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # our child, not waited for
            os.waitpid(pid, 0)

    def _run(self, place: int, cpu: int, path: Path) -> None:
        os.sched_setaffinity(0, {cpu})
        log = own_log(path)
        while True:
            before = time.monotonic()
            time.sleep(_NAP)
            overslept = time.monotonic() - before - _NAP
            if overslept > STOOD_STILL:
                self._seconds[place] += overslept
                log.write("stood still", value=overslept)
            self._looks[place] = before


def stalls_in(folder: Path) -> list[Fault]:
    """Return when a CPU stood still, from the logs of the clocks of that folder."""
    logs = folder.glob("clock-*.log")
    lives = [life_of(log.read_text().splitlines(True)) for log in logs]
    return [fault for life in lives if life is not None for fault in life.faults]
