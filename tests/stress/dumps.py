"""`make stress-dumps DUMPS=10000`: stacks are asked of workers that recover at that moment.

Dumping the threads of a healthy, running process can crash it (CPython issues 116008 and
131580), so the watcher looks before it asks. Here workers with several busy threads overrun
their blocks by next to nothing, all the time, while they are asked as the watcher asks. None
may crash.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from hangwatch.evidence.stacks import Asked, collect
from hangwatch.process import Identity
from hangwatch.watcher.page_reader import PageReader
from hangwatch.wire import StackChannel

WORKERS = 4

# It arms its blocks in a page that nobody watches, and says where that and its channel are.
RECOVERS = """
import os, random, sys, threading, time
import hangwatch
from hangwatch.worker import stack_channel
from support.pages import quiet_page

def deep(n):
    return n and deep(n - 1)

def busy():
    while True:
        deep(random.randrange(60))
        [object() for _ in range(50)]

with quiet_page() as client:
    channel = stack_channel.open_channel()
    page = client.page.descriptor.number
    print(page, channel.fd, channel.own, channel.all, threading.get_ident(), flush=True)
    for _ in range(2):
        threading.Thread(target=busy, daemon=True).start()
    while True:
        with hangwatch.expires(after=0.001, scope="recovers"):
            end = time.monotonic() + random.uniform(0.0005, 0.006)
            while time.monotonic() < end:
                deep(random.randrange(60))
"""


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        asked: how many blocks were overdue, and asked for stacks.
        answered: how many of them gave one.
        recovered: how many ended before, or while, they were asked.
        crashed: how the workers ended that should have lived.
    """

    asked: int = 0
    answered: int = 0
    recovered: int = 0
    crashed: list[int] = field(default_factory=list)


class Recovering:
    """A worker that overruns and recovers all the time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RECOVERS],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self.process.stdout is not None
        page, *channel, self._ident = map(int, self.process.stdout.readline().split())
        self._channel = StackChannel(*channel)
        folder = f"/proc/{self.process.pid}/fd"
        descriptor = os.open(f"{folder}/{page}", os.O_RDWR | os.O_CLOEXEC)
        self._reader = PageReader(descriptor)
        os.close(descriptor)
        status = os.stat(f"{folder}/{self._channel.fd}")
        self._inode = (status.st_dev, status.st_ino)
        pid = self.process.pid
        self._identity = Identity(pid, os.geteuid(), 0, os.pidfd_open(pid))

    def ask(self, tally: Tally) -> None:
        """Wait until its block is overdue, and ask it for its stacks as the watcher would."""
        while self.process.poll() is None:
            overdue = [slot for slot in self._reader.armed() if slot.deadline <= time.monotonic()]
            if overdue:
                break
        else:
            return
        found = overdue[0]
        tally.asked += 1
        threads, missing = collect(
            Asked(
                identity=self._identity,
                channel=self._channel,
                inode=self._inode,
                ident=self._ident,
                native_id=self.process.pid,
                names={},
                is_overdue=lambda: self._reader.is_still(found),
                doomed=False,
            )
        )
        tally.answered += bool(threads)
        tally.recovered += any("ended meanwhile" in reason for reason in missing)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._reader.close()
        os.close(self._identity.pidfd)


def stress(dumps: int, progress: Progress) -> Tally:
    """Ask so often, each worker by a thread of ours."""
    tally = Tally()
    task = progress.add_task("dumps", total=dumps)

    def ask_one() -> None:
        worker = Recovering()
        while tally.asked < dumps:
            worker.ask(tally)
            status = worker.process.poll()
            if status is not None:
                tally.crashed.append(status)
                worker.end()
                worker = Recovering()
            progress.update(task, completed=tally.asked)
        worker.end()

    with ThreadPoolExecutor(WORKERS) as pool:
        for asking in [pool.submit(ask_one) for _ in range(WORKERS)]:
            asking.result()
    return tally


def main(dumps: int) -> int:
    """Run the stress and print what happened; the exit status says whether it was well."""
    began = time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        tally = stress(dumps, progress)
    names = [signal.Signals(-status).name for status in tally.crashed if status < 0]
    print(
        f"{tally.asked} blocks asked for their stacks while they recovered, in "
        f"{time.monotonic() - began:.0f} s: {tally.answered} answered, {tally.recovered} had "
        f"ended by then; workers that crashed: {len(tally.crashed)} {' '.join(names)}"
    )
    # Who is not asked in time proves nothing.
    return int(bool(tally.crashed) or tally.answered < tally.asked / 2)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
