"""The stage of a scenario: a server's process, its workers, and the observer who started them.

Whoever calls `Stage.play` is the observer. It forks the server's process, which makes the server
and forks the workers, as a launcher does. So the observer survives what happens to the others,
and sees through pidfds when they die.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import multiprocessing
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from conformance.row import LOCAL, Outcome, death

PATIENCE = 25.0
"""How long a scenario waits for what must come before it gives up."""
WINDOW = 5.0
"""How long a worker whose limit is 1 s may live on; whoever waits longer has missed it."""
SOON = 0.1
"""A max_interval like that of torchrun: short, so that nothing else is measured."""

Body = Callable[[], None]
_fork = multiprocessing.get_context("fork")


class Server(Protocol):
    """What both implementations' servers have."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def register_timers(self, timer_requests: list[Any]) -> None: ...
    def get_expired_timers(self, deadline: float) -> dict[Any, list[Any]]: ...
    def clear_timers(self, worker_ids: set[Any], /) -> None: ...


@dataclass(frozen=True, slots=True)
class Said:
    """What a process told the observer: `at` is its monotonic clock, which all share."""

    word: str
    pid: int
    at: float
    value: float
    note: str


class Gate:
    """A gate that one process opens for so many others; made before any of them is forked."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def open(self, count: int = 1) -> None:
        """Let `count` processes through."""
        os.write(self._write, b"." * count)

    def wait(self) -> None:
        """Wait to be let through."""
        os.read(self._read, 1)


class Watched:
    """A process that the observer watches; it need not be its child."""

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


class Stage:
    """One server with its workers, to be played.

    Args:
        implementation: the module under test.
        pair: `LOCAL` or `FILE`.
        name: tells several stages of a scenario apart.
    """

    def __init__(self, implementation: str, pair: str, name: str = "timer") -> None:
        self.implementation = implementation
        self.pair = pair
        self.timer = importlib.import_module(implementation)
        # Of both implementations, who puts into the queue must be a fork of who made it.
        self.queue = _fork.Queue()
        self.path = os.path.abspath(name)
        self._ears, self._mouth = os.pipe()
        self._heard: list[Said] = []

    def warm_up_logging(self) -> None:
        """Have an exception logged, in the observer, before anybody is forked.

        The first one that PyTorch logs imports its compiler, which takes seconds. It is not these
        that a scenario means to measure.
        """
        try:
            raise RuntimeError("an exception, to be logged")
        except RuntimeError:
            logging.getLogger(f"{self.implementation}.conformance").exception("warm up")

    def another(self, name: str) -> Stage:
        """Set up one more stage, which nothing of this one touches."""
        return Stage(self.implementation, self.pair, name)

    @property
    def stderr(self) -> str:
        """What the server's process and its workers wrote to their standard error."""
        try:
            return Path(f"{self.path}.stderr").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # -- in the server's process --

    def server(self, **options: object) -> Server:
        """Make the pair's server."""
        if self.pair == LOCAL:
            made: Server = self.timer.LocalTimerServer(self.queue, **options)
        else:
            made = self.timer.FileTimerServer(self.path, "conformance", **options)
        return made

    def start_worker(self, body: Body, **client_options: object) -> int:
        """Start a worker whose timers go to this stage's server; return its pid."""

        def work() -> None:
            self.timer.configure(self.client(**client_options))
            body()

        return start_process(work)

    def play_here(
        self,
        *workers: Body,
        before: Body | None = None,
        then: Callable[[Server], None] | None = None,
        signal_of_client: int | None = None,
        **options: object,
    ) -> None:
        """Be the server's process: see `play`."""
        log = os.open(f"{self.path}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        if before is not None:
            before()
        server = self.server(**options)
        server.start()
        client_options = {} if signal_of_client is None else {"signal": signal_of_client}
        for worker in workers:
            self.start_worker(worker, **client_options)
        self.say("started")
        if then is not None:
            then(server)
        hang()

    # -- in a worker --

    def client(self, **options: object) -> object:
        """Make the pair's client."""
        if self.pair == LOCAL:
            made: object = self.timer.LocalTimerClient(self.queue)
        else:
            made = self.timer.FileTimerClient(self.path, **options)
        return made

    def hang_after(self, seconds: float, scope: str = "step") -> Body:
        """Return a worker that hangs in a block that may take so many seconds."""

        def body() -> None:
            with self.timer.expires(seconds, scope):
                self.say("hangs")
                hang()

        return body

    # -- anywhere --

    def say(self, word: str, value: float = 0.0, note: str = "") -> None:
        """Tell the observer something."""
        said = Said(word, os.getpid(), time.monotonic(), value, note)
        # One write of less than PIPE_BUF bytes: no lock, nothing that a kill could break.
        os.write(self._mouth, json.dumps(asdict(said)).encode() + b"\n")

    # -- the observer --

    def play(
        self,
        *workers: Body,
        before: Body | None = None,
        then: Callable[[Server], None] | None = None,
        signal_of_client: int | None = None,
        **options: object,
    ) -> Watched:
        """Start a server's process with its workers; return when the server has started.

        Args:
            workers: what each worker does, with the client configured.
            before: what the server's process does first.
            then: what it does after it has started the workers.
            signal_of_client: the signal that the workers' `FileTimerClient` gets.
            options: of the server.
        """
        pid = start_process(
            lambda: self.play_here(
                *workers,
                before=before,
                then=then,
                signal_of_client=signal_of_client,
                **options,
            )
        )
        process = Watched(pid)
        self.hear("started")
        return process

    def hear(self, word: str, count: int = 1) -> list[Said]:
        """Wait until `word` was said so often; return who said it."""
        found = self.overhear(word, count, PATIENCE)
        if len(found) < count:
            raise AssertionError(
                f"heard {word!r} {len(found)} times, not {count}, and {self._heard}; "
                f"standard error: {self.stderr[-3000:]}"
            )
        return found

    def overhear(self, word: str, count: int, within: float) -> list[Said]:
        """Return who says `word`, at most `count` of them, within so many seconds."""
        found: list[Said] = []
        until = time.monotonic() + within
        while True:
            for said in [said for said in self._heard if said.word == word][: count - len(found)]:
                self._heard.remove(said)
                found.append(said)
            left = until - time.monotonic()
            if len(found) == count or left <= 0:
                return found
            if select.select([self._ears], [], [], left)[0]:
                # What one process wrote at once is read at once: nothing is cut in two.
                lines = os.read(self._ears, 1 << 16).splitlines()
                self._heard += [Said(**json.loads(line)) for line in lines]

    def must_be_killed(self, word: str = "hangs", count: int = 1) -> Outcome:
        """Hear of workers that hang: the promise holds if each is killed within the window."""
        hung = [Watched(said.pid, said.at) for said in self.hear(word, count)]
        deaths = [process.death_within(WINDOW) for process in hung]
        killed = [after for after in deaths if after is not None]
        if count == 1:
            return Outcome(len(killed) == 1, death(deaths[0], WINDOW))
        if len(killed) == count:
            return Outcome(True, f"{count} of {count} killed, the last after {max(killed):.1f} s")
        return Outcome(False, f"{count - len(killed)} of {count} still alive after {WINDOW:g} s")

    def request(self, pid: int, scope: str, expires_in: float, signal_number: int = 9) -> None:
        """Send a server a request that no client of this stage has made."""
        expiration = time.time() + expires_in
        if self.pair == LOCAL:
            self.queue.put(self.timer.TimerRequest(pid, scope, expiration))
        else:
            self.write(request_line(pid, scope, expiration, signal_number))

    def write(self, lines: str) -> None:
        """Write lines into the FIFO at once."""
        descriptor = self.open_fifo()
        os.write(descriptor, lines.encode())
        os.close(descriptor)

    def open_fifo(self) -> int:
        """Open the FIFO's writing end as soon as there is a reader."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)


def request_line(pid: int, scope: str, expiration_time: float, signal_number: int) -> str:
    """Return a request as it stands in a FIFO, its newline included."""
    request = {"version": 1, "pid": pid, "scope_id": scope, "expiration_time": expiration_time}
    return json.dumps({**request, "signal": signal_number}) + "\n"


def start_process(body: Body) -> int:
    """Fork a process that does something and ends; return its pid."""

    def act() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            body()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            raise

    process = _fork.Process(target=act)
    process.start()
    assert process.pid is not None
    return process.pid


def hang(seconds: float = 30.0) -> None:
    """Do nothing for longer than any scenario takes, but not forever: nobody is left behind."""
    time.sleep(seconds)


def hold_the_gil(seconds: float) -> None:
    """Hold the GIL in C."""
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))


def deaths(processes: Iterable[Watched], within: float) -> int:
    """Count how many are dead so many seconds after each was first seen."""
    return sum(process.death_within(within) is not None for process in processes)
