"""What a soak inflicts on the watcher, the workers and the machine, chosen by its seed."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.history import FULL_FOR, STOPPED_FOR, Fault
from support.processes import Watched
from support.raw_worker import connect, hello, memfd
from support.stepped_clock import SteppedClock
from support.watchers import watcher_below

# They run for 2.5 s, and whoever they kept from running has something to catch up on.
WHILE_BUSY = 4.0
BUSY, BELL = "8 busy processes", "rings for ever"

RARELY = (
    # Of a newcomer, or of a worker that is taken over: a crowd waits at times, and whoever
    # comes after a watcher that died among them must have a chance.
    "handshake.*=kill%0.0005,handshake.*=stop%0.0001,"
    "visit.*=kill%0.0001,visit.*=stop%0.00003,"
    "incident.*=kill%0.002,incident.*=stop%0.0005,"
    "ladder.*=kill%0.003,ladder.*=stop%0.001,"
    "raise.asked=kill%0.01,raise.asked=stop%0.003,"
    "error-file.written=kill%0.01,error-file.written=stop%0.003,"
    "sentence.carried-out=kill%0.05,sentence.carried-out=stop%0.01,"
    "report.*=kill%0.003,report.*=stop%0.001,"
    "handover.*=kill%0.0003,handover.*=stop%0.0001,"
    "evidence.asking=sleep:0.1%0.1,kernel.peer-pidfd=fail:ENODATA%0.05,"
    "evidence.gathering=sleep:0.3%0.2,evidence.gathering=sleep:60%0.03,evidence.gathering=kill%0.03"
)
"""The failpoints of a soak: at every step of the watcher, now and then."""

_STRANGER = """
import mmap, os, random, socket, sys, time
from hangwatch.page import layout
from support.raw_worker import connect, hello, memfd
descriptor = memfd()
mapping = mmap.mmap(descriptor, layout.PAGE_BYTES)
with connect(sys.argv[1]) as connection:
    try:
        socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
        connection.recv(4096)
    except OSError:  # the watcher has died meanwhile
        sys.exit()
    connection.setblocking(False)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        {act}
"""
"""A worker that disturbs the watcher for a while."""
_GARBAGE = _STRANGER.format(
    act="""
        at = random.randrange(layout.HEADER_BYTES, layout.slot_byte(20))
        # Of the header what is not the directory, by which a successor finds the slots.
        at, size = random.choice([(at, 64)] * 99 + [(16, 32)])
        mapping[at:at + size] = random.choice([os.urandom(size), bytes(size), bytes([255]) * size])
        try: connection.send(b"!")
        except OSError: pass"""
)
_BELL = _STRANGER.format(
    act="""
        try: connection.send(b"!")
        except OSError: time.sleep(0.0005)"""
)
_BUSY = (
    "import time\nuntil = time.monotonic() + 2.5\nwhile time.monotonic() < until: sum(range(999))"
)


class Injector:
    """Inflicts one fault after the other.

    Args:
        rng: chooses them.
        keeper: the keeper's process id.
        address: where the watcher listens.
        reports: a file system of its own, small, or None: it can't be filled then.
        clock: the wall clock of watcher and workers, or None: it can't be stepped then.
        living: returns the workers that the driver started and that live.
    """

    def __init__(
        self,
        rng: random.Random,
        keeper: int,
        address: str,
        reports: Path | None,
        clock: SteppedClock | None,
        living: Callable[[], list[Watched]],
    ) -> None:
        self.faults: list[Fault] = []
        self.killed: set[int] = set()
        self.hostile: dict[int, str] = {}
        self.left_out: list[str] = []
        self._rng = rng
        self._keeper = keeper
        self._address = address
        self._reports = reports
        self._clock = clock
        self._living = living
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._held: list[socket.socket] = []
        self._kinds: dict[Callable[[], None], float] = {
            self._kill_watcher: 3,
            self._stop_watcher: 1,
            self._kill_worker: 3,
            self._stop_worker: 3,
            self._crowd: 1,
            self._silent: 1,
            self._garbage: 1,
            self._bell: 1,
            self._busy: 0.5,
            self._few_descriptors: 0.5,
        }
        if reports is not None:
            self._kinds[self._full_disk] = 0.5
        else:
            self.left_out.append("full disk: that takes a user namespace or root")
        if clock is not None:
            self._kinds[self._step_clock] = 2
        else:
            self.left_out.append("wall clock stepped: that takes libfaketime")

    def inflict(self) -> None:
        """Inflict one fault."""
        self._rng.choices(list(self._kinds), list(self._kinds.values()))[0]()

    def look_after(self) -> None:
        """Take back what has lasted long enough."""
        now = time.monotonic()
        due = [entry for entry in self._later if entry[0] <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for _, undo in due:
            undo()

    def end(self) -> None:
        """Take everything back."""
        for _, undo in self._later:
            undo()
        self._later = []

    def note(self, kind: str, costs: float = 0.0, pid: int = 0) -> None:
        """Note a fault."""
        self.faults.append(Fault(time.monotonic(), kind, costs, pid))

    def _signal_watcher(self, number: int, kind: str) -> None:
        pid = watcher_below(self._keeper)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.note(kind, pid=pid)

    def _kill_watcher(self) -> None:
        self._signal_watcher(signal.SIGKILL, "watcher killed")

    def _stop_watcher(self) -> None:
        self._signal_watcher(signal.SIGSTOP, "watcher stopped")

    def _kill_worker(self) -> None:
        if living := self._living():
            worker = self._rng.choice(living)
            self.killed.add(worker.pid)
            worker.signal(signal.SIGKILL)
            self.note("worker killed", pid=worker.pid)

    def _stop_worker(self) -> None:
        if living := self._living():
            worker = self._rng.choice(living)
            worker.signal(signal.SIGSTOP)
            seconds = self._rng.uniform(0.05, STOPPED_FOR)
            self.note("worker stopped", seconds, worker.pid)

            def go_on() -> None:
                if worker in self._living():
                    worker.signal(signal.SIGCONT)

            self._after(seconds, go_on)

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    def _crowd(self) -> None:
        page = memfd()
        for _ in range(50):
            with contextlib.suppress(OSError):
                connection = connect(self._address)
                connection.setblocking(False)
                self._held.append(connection)
                socket.send_fds(connection, [hello(page_fd=page)], [page])
        os.close(page)
        self.note("crowd of 50")
        self._after(1.0, self._hang_up)

    def _silent(self) -> None:
        with contextlib.suppress(OSError):
            self._held.append(connect(self._address))
            self._held.append(connect(self._address))
            self._held[-1].send(b"{")
        self.note("says nothing, or a byte")
        self._after(2.5, self._hang_up)

    def _hang_up(self) -> None:
        for connection in self._held:
            connection.close()
        self._held = []

    def _spawn(self, kind: str, script: str) -> int:
        program = [sys.executable, "-c", script, self._address]
        pid = os.posix_spawn(sys.executable, program, os.environ)
        self.hostile[pid] = kind
        return pid

    def _garbage(self) -> None:
        self.note("garbage in a page", pid=self._spawn("garbage in a page", _GARBAGE))

    def _bell(self) -> None:
        self.note(BELL, pid=self._spawn(BELL, _BELL))

    def _busy(self) -> None:
        for _ in range(8):
            self._spawn(BUSY, _BUSY)
        self.note(BUSY, WHILE_BUSY)

    def _few_descriptors(self) -> None:
        """Leave no room for newcomers, and those inside what they have."""
        used = 0
        for pid in self._both():
            with contextlib.suppress(OSError):
                used = max(used, *map(int, os.listdir(f"/proc/{pid}/fd")))
        self._limit_descriptors(used + 40)
        self.note("few descriptors")
        self._after(1.0, lambda: self._limit_descriptors(None))

    def _limit_descriptors(self, most: int | None) -> None:
        for pid in self._both():
            with contextlib.suppress(OSError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (most or hard, hard))

    def _both(self) -> list[int]:
        """Return keeper and watcher."""
        return [self._keeper, *filter(None, [watcher_below(self._keeper)])]

    def _full_disk(self) -> None:
        assert self._reports is not None
        filler = self._reports / ".filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self.note("full disk")
        self._after(FULL_FOR, lambda: filler.unlink(missing_ok=True))

    def _step_clock(self) -> None:
        assert self._clock is not None
        self._clock.step(self._rng.choice([3600, -3600, 0]))
        self.note("wall clock stepped")
