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
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from conformance.row import LOCAL, OURS, Outcome, death
from support.history import Log, Record
from support.nursery import LIMIT
from support.processes import Gate, Watched
from support.processes import fork as fork_and_end

PATIENCE = 25.0
"""How long a scenario waits for what must come before it gives up, with another implementation."""
SOON = 0.1
"""A max_interval like that of torchrun: short, so that nothing else is measured."""
BEFORE_A_ROUND = 45.0
"""Seconds that are too short for the default `max_interval` of 60 s, whatever the machine does."""

Body = Callable[[], None]
_fork = multiprocessing.get_context("fork")


class Server(Protocol):
    """What both implementations' servers have."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def register_timers(self, timer_requests: list[Any]) -> None: ...
    def get_expired_timers(self, deadline: float) -> dict[Any, list[Any]]: ...
    def clear_timers(self, worker_ids: set[Any], /) -> None: ...


class Stage:
    """One server with its workers, to be played.

    Args:
        implementation: the module under test.
        pair: `LOCAL` or `FILE`.
        name: tells several stages of a scenario apart.

    Attributes:
        window: how long a worker whose limit is 1 s may live on. Whoever waits longer has missed
            it; of ours, that it never dies is only said after what no machine takes.
    """

    def __init__(self, implementation: str, pair: str, name: str = "timer") -> None:
        self.implementation = implementation
        self.pair = pair
        self.timer = importlib.import_module(implementation)
        self.window = LIMIT if implementation == OURS else 5.0
        # Of both implementations, who puts into the queue must be a fork of who made it.
        self.queue = _fork.Queue()
        self.path = os.path.abspath(name)
        self._ears, mouth = os.pipe()
        self._log = Log(mouth)
        self._heard: list[Record] = []
        self._later = Gate()

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
        path = Path(f"{self.path}.stderr")
        return path.read_text(errors="replace") if path.exists() else ""

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

        return fork(work)

    def play_here(
        self,
        *workers: Body,
        before: Body | None = None,
        then: Callable[[Server], None] | None = None,
        later: Body | None = None,
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
        while True:
            self._later.wait()
            self.start_worker(later or self.hang_after(0.1, word="later"))

    # -- in a worker --

    def client(self, **options: object) -> object:
        """Make the pair's client."""
        if self.pair == LOCAL:
            made: object = self.timer.LocalTimerClient(self.queue)
        else:
            made = self.timer.FileTimerClient(self.path, **options)
        return made

    def hang_after(self, seconds: float, scope: str = "step", word: str = "hangs") -> Body:
        """Return a worker that hangs in a block that may take so many seconds."""

        def body() -> None:
            # Said before it arms: from then on it may be killed at any time.
            self.say(word)
            with self.timer.expires(seconds, scope):
                hang()

        return body

    # -- anywhere --

    def say(self, word: str, value: float = 0.0, note: str = "") -> None:
        """Tell the observer something."""
        self._log.write(word, pid=os.getpid(), value=value, scope=note)

    # -- the observer --

    def play(self, *workers: Body, **how: Any) -> Watched:
        """Start a server's process with its workers; return when the server has started.

        Args:
            workers: what each worker does, with the client configured.
            how: `before` is what the server's process does first, `then` what it does after it
                has started the workers, `later` what each worker does that is started after
                that; `signal_of_client` is for the workers' `FileTimerClient`; the rest are
                options of the server.
        """
        process = Watched(fork(lambda: self.play_here(*workers, **how)))
        self.hear("started")
        return process

    def hear(self, word: str, count: int = 1) -> list[Record]:
        """Wait until `word` was said so often; return who said it."""
        found = self.overhear(word, count, max(PATIENCE, self.window))
        if len(found) < count:
            raise AssertionError(
                f"heard {word!r} {len(found)} times, not {count}, and {self._heard}; "
                f"standard error: {self.stderr[-3000:]}"
            )
        return found

    def overhear(self, word: str, count: int, within: float) -> list[Record]:
        """Return who says `word`, at most `count` of them, within so many seconds."""
        found: list[Record] = []
        until = time.monotonic() + within
        while True:
            for said in [said for said in self._heard if said.do == word][: count - len(found)]:
                self._heard.remove(said)
                found.append(said)
            left = until - time.monotonic()
            if len(found) == count or left <= 0:
                return found
            if select.select([self._ears], [], [], left)[0]:
                # What one process wrote at once is read at once: nothing is cut in two.
                lines = os.read(self._ears, 1 << 16).splitlines()
                self._heard += [Record(**json.loads(line)) for line in lines]

    def must_be_killed(self, count: int = 1, within: float | None = None) -> Outcome:
        """Hear of workers that hang: the promise holds if each is killed within the window."""
        within = within or self.window
        hung = [Watched(said.pid, said.at) for said in self.hear("hangs", count)]
        deaths = [process.death_within(within) for process in hung]
        killed = [after for after in deaths if after is not None]
        if count == 1:
            return Outcome(len(killed) == 1, death(deaths[0], within))
        if len(killed) == count:
            return Outcome(True, f"{count} of {count} killed, the last after {max(killed):.1f} s")
        return Outcome(False, f"{count - len(killed)} of {count} still alive after {within:g} s")

    def start_later(self, word: str = "later") -> Watched | None:
        """Have the server's process start one more worker; None if it does not."""
        self._later.open()
        found = self.overhear(word, 1, self.window)
        return Watched(found[0].pid, found[0].at) if found else None

    def goes_on(self) -> bool:
        """Have one more worker hang; tell whether it is killed, and so all before it has been."""
        later = self.start_later()
        return later is not None and later.death_within(self.window) is not None

    def takes_requests(self, worker: Watched | None) -> bool:
        """Ask by hand for a worker's end; tell whether all requests have been taken by now.

        Other implementations only get the time for it: theirs may end the server's process, too.
        """
        if self.implementation != OURS:
            time.sleep(1.5)
            return True
        if worker is None:
            return False
        self.request(worker.pid, "step", -1)
        return worker.death_within(self.window) is not None

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so; return False if it isn't within the window."""
        until = time.monotonic() + self.window
        while not condition():
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def request(self, pid: int, scope: str, expires_in: float) -> None:
        """Send the server a request that no client of this stage has made."""
        expiration = time.time() + expires_in
        if self.pair == LOCAL:
            request = self.timer.TimerRequest(pid, scope, expiration)
            # When this process has ended, the request is in the queue's pipe.
            putter = _fork.Process(target=self.queue.put, args=(request,))
            putter.start()
            putter.join()
        else:
            self.write(request_line(pid, scope, expiration, signal.SIGKILL))

    def write(self, lines: str) -> None:
        """Write lines into the FIFO at once."""
        descriptor = self.open_fifo()
        os.write(descriptor, lines.encode())
        os.close(descriptor)

    def open_fifo(self) -> int:
        """Open the FIFO's writing end as soon as there is a reader."""
        until = time.monotonic() + PATIENCE + self.window
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


def fork(body: Body) -> int:
    """Fork a process of a scenario: it outlives its parent, but not the scenario."""

    def act() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the observer's handler is not for it
        body()

    return fork_and_end(act, outlives_us=True)


def hang() -> None:
    """Do nothing for longer than any scenario takes; whoever is left is killed in the end."""
    time.sleep(1000)


def hold_the_gil_until(gate: Gate) -> None:
    """Wait at a gate, in C, with the GIL."""
    ctypes.PyDLL(None).read(gate.reading, ctypes.create_string_buffer(1), 1)


def killed(processes: Iterable[Watched]) -> int:
    """Count how many are dead, or as good as dead."""
    return sum(process.is_killed() for process in processes)
