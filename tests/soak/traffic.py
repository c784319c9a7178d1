"""A worker of the soak: `python -m soak.traffic FOLDER SEED ACTS` plays acts and logs them."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hangwatch
from hangwatch.worker.client import client_at
from support.history import own_log

LONG = 60.0


class Traffic:
    """What one worker does.

    Args:
        folder: where its log goes.
        seed: chooses the acts.
        child: whether another worker forked it.
    """

    def __init__(self, folder: str, seed: int, child: bool = False) -> None:
        self.folder = folder
        self.log = own_log(folder, child)
        self.rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._client = client_at(os.environ["HANGWATCH_ADDRESS"])

    def play(self, acts: int) -> None:
        """Play so many acts, and end; some of them end it."""
        self.quick()
        connected, before = self._client.is_connected, self._open_now()
        for _ in range(acts):
            self.rng.choices(list(_ACTS), list(_ACTS.values()))[0](self)
        until = time.monotonic() + 5
        # The kernel lets go of a thread a moment after Python has.
        while len(after := self._open_now()) > len(before) and time.monotonic() < until:
            time.sleep(0.01)
        if connected and len(after) > len(before):
            self.log.write("problem", scope=f"open before: {before}, then: {after}")
        self.log.write("end")

    def _open_now(self) -> list[str]:
        """Return the descriptors and the threads of this process."""
        return [*os.listdir("/proc/self/fd"), *os.listdir("/proc/self/task")]

    @contextmanager
    def logged(
        self,
        scope: str,
        limit: float,
        pauses: bool = False,
        on_expiry: str | None = None,
        grace: float | None = None,
    ) -> Iterator[hangwatch.Expiration]:
        """Enter a block, and log every step of it; note its number, and whether it is watched."""
        number = next(self._numbers)
        if pauses:
            block = hangwatch.paused(scope, limit)
        else:
            block = hangwatch.expires(limit, scope, on_expiry=on_expiry, grace=grace)
        # The grace comes after what is raised, and after the first signal.
        choices = {"on_expiry": on_expiry, "grace": grace or 0.0, "patience": 2 * (grace or 0.0)}
        about = {"scope": scope, "limit": limit, "pauses": pauses, **choices}
        self.log.write("entering", block=number, **about)
        try:
            with block as timer:
                watched = self._client.is_connected
                self.log.write("entered", block=number, watched=watched)
                self.number, self.watched = number, watched
                yield timer
                self.log.write("leaving", block=number)
        except hangwatch.TimerExpired:
            # It came inside: only the end of the block has let it through.
            self.log.write("raised", block=number)
        self.log.write("left", block=number)

    def unique(self, name: str) -> str:
        """Return a scope that no other block of this process has."""
        return f"{name}-{next(self._numbers)}"

    # -- acts of those who are well

    def quick(self) -> None:
        """Many blocks, quickly."""
        count = self.rng.randrange(100, 2000)
        for _ in range(count):
            with hangwatch.expires(LONG, "quick"):
                pass
        self.log.write("quick", count=count, watched=self._client.is_connected)

    def nest(self) -> None:
        """Blocks within blocks, of long and of short limits."""
        self._nest(self.rng.randrange(1, 5))

    def _nest(self, depth: int) -> None:
        with self.logged(self.rng.choice("abc"), self.rng.choice([3.0, LONG])):
            time.sleep(self.rng.uniform(0, 0.05))
            if depth > 1:
                self._nest(depth - 1)

    def heartbeat(self) -> None:
        """A block that is renewed in time, for longer than its limit."""
        with self.logged(self.unique("heartbeat"), 2.0) as timer:
            number = self.number
            for _ in range(10):
                time.sleep(0.25)
                self.log.write("renewing", block=number)
                timer.renew()
                self.log.write("renewed", block=number, limit=2.0)

    def cancel(self) -> None:
        """A block that is cancelled before its limit, and stays."""
        with self.logged(self.unique("cancel"), 1.0) as timer:
            timer.cancel()
            self.log.write("cancelled", block=self.number)
            time.sleep(1.3)

    def pause(self) -> None:
        """A pause that takes longer than what it suspends may."""
        with self.logged(self.unique("suspended"), 1.0):
            with self.logged(self.unique("pause"), 20, pauses=True):
                if self.rng.random() < 0.5:
                    with self.logged(self.unique("inner pause"), 20, pauses=True):
                        time.sleep(0.5)
                with self.logged(self.unique("in a pause"), 0.5):
                    time.sleep(1.0)
            time.sleep(0.02)

    def threads(self) -> None:
        """Blocks in three threads."""
        threads = [threading.Thread(target=self._nest, args=(3,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def tasks(self) -> None:
        """Five asyncio tasks in the same line."""

        async def task() -> None:
            async with hangwatch.expires(LONG, "task"):
                await asyncio.sleep(self.rng.uniform(0, 0.05))

        async def main() -> None:
            await asyncio.gather(*(task() for _ in range(5)))

        asyncio.run(main())
        self.log.write("quick", count=5)

    def late(self) -> None:
        """A block that ends about when its deadline passes."""
        with self.logged(self.unique("late"), 0.3):
            time.sleep(0.3 + self.rng.uniform(-0.02, 0.02))

    def report(self) -> None:
        """A block that overruns and is only reported."""
        scope, limit = self.unique("report"), self.rng.uniform(0.1, 0.5)
        with self.logged(scope, limit, on_expiry="report"):
            time.sleep(self.rng.choice([0.5, 2.0, 10.0]))

    # -- acts that start or become another process

    def fork(self) -> None:
        """A child that is a worker itself."""
        with self.logged("waits for a child", LONG):
            self._wait_for(self._fork())

    def leave_behind(self) -> None:
        """A hang, while a child, a worker as well, goes on."""
        child = self._fork()
        with self.logged(self.unique("hang"), 0.3):
            watched = self.watched
            self._wait_for(child)
            if watched:
                _asleep()

    def _fork(self) -> int:
        """Fork a child that plays two acts."""
        seed = self.rng.randrange(2**32)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self.log.close()
                Traffic(self.folder, seed, child=True).play(2)
                status = 0
            except SystemExit:
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.log.write("forked", pid=child)
        return child

    def _wait_for(self, child: int) -> None:
        # Logged first: who is killed after it has reaped could tell nobody any more.
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert end is not None
        by_signal = end.si_code != os.CLD_EXITED
        status = -end.si_status if by_signal else end.si_status
        self.log.write("waited", pid=child, status=status)
        os.waitpid(child, 0)

    def execute(self) -> None:
        """Another program in this process; what the old one armed must not end it."""
        seed = str(self.rng.randrange(2**32))
        with self.logged(self.unique("exec"), 0.5):
            self.log.write("executing")
            os.execv(sys.executable, [sys.executable, "-m", "soak.traffic", self.folder, seed, "2"])

    def exit(self) -> None:
        """An end inside of a block."""
        with self.logged("exit", 0.5):
            self.log.write("end")
            if self.rng.random() < 0.5:
                sys.exit(0)
            os._exit(0)

    # -- acts that end badly

    def hang(self) -> None:
        """A hang, in one of several ways, with or without a grace or children."""
        how = self.rng.choice([_in_c, _in_a_lock, _in_a_loop, _asleep])
        if self.rng.random() < 0.3:
            how = self._with_a_child(how)
        choice, limit = self.rng.random(), self.rng.uniform(0.1, 1.5)
        if choice < 0.3:
            signal.signal(signal.SIGTERM, self.rng.choice([signal.SIG_IGN, signal.SIG_DFL]))
            self._hang(how, limit, "reap", grace=0.5)
        elif choice < 0.5:
            self._hang(lambda: _in_two_threads(how), limit)
        else:
            self._hang(how, limit)

    def _with_a_child(self, how: Callable[[], None]) -> Callable[[], None]:
        def hang() -> None:
            # By the child itself: we may be killed at any moment.
            subprocess.Popen(["sleep", "1000"], preexec_fn=self._note_that_we_are_spawned)
            how()

        return hang

    def _note_that_we_are_spawned(self) -> None:
        self.log.write("spawned", pid=os.getpid())

    def raised(self) -> None:
        """A block that is ended from inside, unless it is stuck in C."""
        how = _in_c if self.rng.random() < 0.3 else _in_short_sleeps
        self._hang(how, self.rng.uniform(0.1, 0.6), "raise", grace=1.0)

    def _hang(
        self,
        how: Callable[[], object],
        limit: float,
        on_expiry: str | None = None,
        grace: float = 0,
    ) -> None:
        """Hang in a block of its own, unless nobody watches: then nobody would end it."""
        scope = self.unique(on_expiry or "hang")
        with self.logged(scope, limit, on_expiry=on_expiry, grace=grace or None):
            if self.watched:
                how()


_never, _unwritten = os.pipe()


def _in_c() -> None:
    ctypes.PyDLL(None).read(_never, ctypes.create_string_buffer(1), 1)


def _in_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _in_a_loop() -> None:
    until = time.monotonic() + 1000
    while time.monotonic() < until:
        sum(range(100))


def _asleep() -> None:
    time.sleep(1000)


def _in_two_threads(how: Callable[[], None]) -> None:
    threading.Thread(target=how, daemon=True).start()
    _asleep()


def _in_short_sleeps() -> None:
    for _ in range(100_000):
        time.sleep(0.01)


_ACTS: dict[Callable[[Traffic], None], float] = {
    Traffic.quick: 4,
    Traffic.nest: 4,
    Traffic.heartbeat: 1,
    Traffic.cancel: 1,
    Traffic.pause: 2,
    Traffic.threads: 2,
    Traffic.tasks: 2,
    Traffic.late: 2,
    Traffic.report: 0.5,
    Traffic.fork: 1,
    Traffic.leave_behind: 0.5,
    Traffic.execute: 1,
    Traffic.exit: 0.7,
    Traffic.hang: 1.5,
    Traffic.raised: 1,
}


def main() -> None:
    """Be a worker: the arguments are the folder, the seed, and how many acts."""
    Traffic(sys.argv[1], int(sys.argv[2])).play(int(sys.argv[3]))


if __name__ == "__main__":
    main()
