"""Interrupts in the middle of blocks; what stays armed after each is counted.

Run as a program, ``python -m support.storm KIND HITS``, it strikes blocks of many patterns until
that many exceptions were caught, and prints a `Count` as JSON. The kinds:

    signal  KeyboardInterrupt, raised by a handler of SIGALRM, up to three in a row
    async   PyThreadState_SetAsyncExc, called by another thread
    trace   a trace function that raises at the n-th event, for every n or for some of them;
            opcodes are events, too
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import hangwatch
from hangwatch.page import layout
from hangwatch.worker import expiration
from support.pages import QuietClient, quiet_page

KINDS = ("signal", "async", "trace")
MOST_IN_A_ROW = 3


class Struck(BaseException):
    """What strikes, if it is no KeyboardInterrupt."""


_CAUGHT = (KeyboardInterrupt, Struck)

# -- patterns


def work() -> None:
    """Do nothing, in a frame of its own."""


def nested() -> None:
    with hangwatch.expires(60, "a"), hangwatch.expires(60):
        work()
        with hangwatch.expires(60, "a"):
            work()


def renewed() -> None:
    with hangwatch.expires(60, "a") as outer:
        with hangwatch.expires(60) as inner:
            work()
            inner.renew()
            inner.cancel()
        outer.renew(30)
        outer.remaining()


def exit_stack() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(hangwatch.expires(60, "a"))
        stack.enter_context(hangwatch.expires(60))
        work()


@contextlib.contextmanager
def managed() -> Iterator[None]:
    with hangwatch.expires(60, "managed"):
        yield


def managers() -> None:
    with managed(), managed():
        work()


def generated() -> Iterator[int]:
    with hangwatch.expires(60, "generated"):
        yield from range(3)


def left_half_way() -> None:
    for _ in generated():
        for _ in generated():
            break
        break


def loops() -> None:
    for turn in range(4):
        with hangwatch.expires(60, "turn"):
            if turn == 1:
                continue
            if turn == 3:
                break


def returns() -> None:
    while True:
        with hangwatch.expires(60, "returns"):
            return work()


async def _coroutine() -> None:
    async with hangwatch.expires(60, "async"), hangwatch.expires(60) as inner:
        work()
        inner.renew()


def async_with() -> None:
    with contextlib.suppress(StopIteration):
        _coroutine().send(None)


@hangwatch.expires(60, "decorated")
def recursive(depth: int = 2) -> None:
    if depth:
        recursive(depth - 1)


def paused() -> None:
    with hangwatch.expires(60, "a"), hangwatch.paused("pause", 60):
        work()


def watched() -> None:
    for _ in hangwatch.watch((1, 2), 60):
        work()


def raising() -> None:
    with hangwatch.expires(60, "raising", on_expiry="raise"):
        work()


PATTERNS: tuple[Callable[[], None], ...] = (
    nested,
    renewed,
    exit_stack,
    managers,
    left_half_way,
    loops,
    returns,
    async_with,
    recursive,
    paused,
    watched,
    raising,
)


class Count:
    """What came of a storm, in exceptions and in blocks.

    Attributes:
        hits: exceptions that were caught.
        swallowed: those that came to nobody, in a callback or a finalizer.
        held: hits after which something was armed while the exception was being handled.
        collected: hits after which something was armed until the cycles were collected.
        stuck: blocks that stayed armed, by pattern.
        in_use: slots that were ever given out.
        watched: whether a block still is, after all of it.
    """

    def __init__(self) -> None:
        self.hits = self.swallowed = self.held = self.collected = self.in_use = 0
        self.stuck: dict[str, int] = {}
        self.watched = False

    def to_json(self) -> str:
        return json.dumps(vars(self))


class Storm:
    """Strikes, and looks at the page after each strike."""

    def __init__(self, client: QuietClient, hits: int) -> None:
        self.count = Count()
        self.wanted = hits
        self.left = 0
        self.random = random.Random(11)
        self.striking = threading.Lock()
        self._client = client
        self._swallowed = itertools.count()
        # C code: no interruption can get lost in it.
        sys.unraisablehook = partial(next, self._swallowed)

    def armed(self) -> int:
        return len(self._client.page.view.armed())

    def prepare(self) -> None:
        """Have blocks ring, or not; or ask, as those do that a thread enters for the first time."""
        is_quiet = self.random.random() < 0.8
        self._client.page.words[layout.WATCH_UNTIL] = time.monotonic() + 29 if is_quiet else 0.0
        if self.random.random() < 0.1:
            expiration.forget_keys()

    def survive(self, action: Callable[[], None], levels: int = MOST_IN_A_ROW) -> None:
        """Do something, catching as many strikes as there may be, each in a frame of its own."""
        try:
            if levels:
                self.survive(action, levels - 1)
            else:
                action()
        except _CAUGHT:
            self.count.hits += 1
            if self.left == 0 and self.armed():
                self.count.held += 1
        self.calm_down()

    def look(self, pattern: Callable[[], None]) -> None:
        """Once an exception is handled and gone: nothing may be armed."""
        if not self.armed():
            return
        gc.collect()
        stuck = self._client.page.view.armed()
        if not stuck:
            self.count.collected += 1
            return
        name = pattern.__name__
        self.count.stuck[name] = self.count.stuck.get(name, 0) + len(stuck)
        for slot in stuck:
            self._client.page.words[layout.deadline_word(slot.index)] = 0.0

    def finish(self) -> Count:
        self.count.in_use = int(self._client.page.words[layout.SLOTS_IN_USE])
        self.count.swallowed = next(self._swallowed)
        with hangwatch.expires(60, "after all"):
            self.count.watched = self._client.armed() == {"after all": 1}
        return self.count

    # -- at any time

    def rage(self, pattern: Callable[[], None], begin: Callable[[], object]) -> None:
        # A function, since CPython 3.13 leaves a loop's jump back out of the try around it.
        self.left = self.random.randrange(1, MOST_IN_A_ROW + 1)
        begin()
        while self.left:
            pattern()

    def calm_down(self) -> None:
        self.left = 0
        with self.striking:
            pass
        for _ in range(100):
            pass

    def at_any_time(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        for pattern in itertools.cycle(PATTERNS):
            self.prepare()
            self.survive(partial(self.rage, pattern, begin))
            end()
            self.look(pattern)
            if self.count.hits >= self.wanted:
                return

    def strike_by_signal(self, number: int, frame: FrameType | None) -> None:
        if self.left:
            self.left -= 1
            raise KeyboardInterrupt

    def by_signal(self) -> None:
        signal.signal(signal.SIGALRM, self.strike_by_signal)
        uniform = self.random.uniform

        def begin() -> None:
            signal.setitimer(signal.ITIMER_REAL, uniform(5e-6, 1e-4), uniform(1e-5, 6e-5))

        self.at_any_time(begin, partial(signal.setitimer, signal.ITIMER_REAL, 0))

    def strike_from_thread(self, ident: int) -> None:
        dice, struck = random.Random(13), ctypes.py_object(Struck)
        while True:
            time.sleep(dice.uniform(1e-5, 2e-4))
            with self.striking:
                if self.left:
                    self.left -= 1
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), struck)

    def by_thread(self) -> None:
        sys.setswitchinterval(1e-5)
        threading.Thread(
            target=self.strike_from_thread, args=(threading.get_ident(),), daemon=True
        ).start()
        self.at_any_time(int, int)

    # -- at every event

    def at_every_event(self) -> None:
        """Or, if fewer hits are wanted than there are events, at some of each pattern's."""
        ways = [
            Way(within(pattern) if around else pattern, asks, rings)
            for pattern in PATTERNS
            for asks, rings, around in itertools.product((False, True), repeat=3)
        ]
        events = sum(self.traced(way, 0).seen for way in ways)
        stride = max(1, events // self.wanted)
        while self.count.hits < self.wanted:
            for way in ways:
                first = self.random.randrange(stride) + 1
                for number in itertools.count(first, stride):
                    if not self.traced(way, number).has_raised:
                        break
                    self.look(way.pattern)

    def traced(self, way: Way, number: int) -> Tracer:
        until = 0.0 if way.rings else time.monotonic() + 29
        self._client.page.words[layout.WATCH_UNTIL] = until
        if way.asks:
            expiration.forget_keys()
        else:
            way.pattern()
        tracer = Tracer(number)
        # CPython unsets a trace function that raises.
        self.survive(partial(tracer.trace, way.pattern))
        sys.settrace(None)
        return tracer


class Way(NamedTuple):
    """How a pattern is run: whether its blocks ask, and ring."""

    pattern: Callable[[], None]
    asks: bool
    rings: bool


class Tracer:
    """Raises at the n-th event; at none for 0."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.seen = 0

    @property
    def has_raised(self) -> bool:
        return self.seen == self._number

    def trace(self, pattern: Callable[[], None]) -> None:
        sys.settrace(self.see)
        pattern()
        sys.settrace(None)

    def see(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        self.seen += 1
        if self.seen == self._number:
            raise Struck
        return self.see


def within(pattern: Callable[[], None]) -> Callable[[], None]:
    """Return what follows a pattern within a block."""

    def around() -> None:
        with hangwatch.expires(60, "around"):
            pattern()

    around.__name__ = pattern.__name__
    return around


def main() -> None:
    """Strike."""
    assert asyncio  # a block asks which task runs
    kind, hits = sys.argv[1], int(sys.argv[2])
    with quiet_page() as client:
        for pattern in PATTERNS:  # what is imported at a first use is so now
            pattern()
        storm = Storm(client, hits)
        {"signal": storm.by_signal, "async": storm.by_thread, "trace": storm.at_every_event}[kind]()
        print(storm.finish().to_json())


if __name__ == "__main__":
    main()
