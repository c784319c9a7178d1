"""The workers of a kill storm: what victims, survivors and those who hang do.

They know nothing of the implementation but the names that all of them have.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.util
import os
import random
import select
import sys
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from support.history import own_log
from support.processes import fork

HANG, END = b"h", b"e"
HANGS_AFTER = 0.3
KINDS = ("tight", "paced", "nested", "threads", "overruns")
WEIGHTS = (50, 20, 20, 8, 2)
# What a victim leaves behind may expire during the storm, or not.
_LIMITS = (1.0, 30.0, 60.0)
_SCOPES = ("a", "b", "c")
# A survivor says so often that it gets on.
_BEAT = 0.05


class Phase(IntEnum):
    """Where a victim is, and so where it died; in shared memory, since writing takes too long."""

    STARTS = 0
    CONNECTS = 1
    ENTERS = 2
    INSIDE = 3
    LEAVES = 4


@dataclass(frozen=True, slots=True)
class Timers:
    """An implementation, and the queue of the server that workers use.

    Attributes:
        module: the module that has `expires`.
        queue: the server's `multiprocessing` queue.
        logs: the folder for the workers' logs.
    """

    module: Any
    queue: Any
    logs: Path

    def configure(self) -> None:
        """Become a worker of that server."""
        self.module.configure(self.module.LocalTimerClient(self.queue))

    def import_what_workers_do(self) -> None:
        """Import what the first block imports, so that victims need not, each anew."""
        ears, mouth = os.pipe()

        def tell() -> None:
            self.configure()
            with self.module.expires(60, "first"):
                pass
            with os.fdopen(mouth, "w") as out:
                out.write(" ".join(sys.modules))
            _end_the_queue_s_thread()

        pid = fork(tell)
        os.close(mouth)
        with os.fdopen(ears) as names:
            for name in names.read().split():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        os.waitpid(pid, 0)


def _end_the_queue_s_thread() -> None:
    """Wait for it, as a process of multiprocessing does at its end.

    One that ends without may take the queue's lock along, which every sender needs.
    """
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]


def be_a_victim(timers: Timers, phases: memoryview, place: int, kind: str, seed: float) -> None:
    """Enter and leave blocks until somebody comes and kills.

    Args:
        timers: what it uses.
        phases: the shared memory for the victims' phases.
        place: the byte of this victim.
        kind: one of `KINDS`.
        seed: of what it does.
    """
    dice, expires = random.Random(seed), timers.module.expires
    log = own_log(timers.logs)
    log.write("passing", scope="a block", limit=min(_LIMITS))
    timers.configure()
    phases[place] = Phase.CONNECTS

    def one_block(pause: float) -> None:
        with expires(dice.choice(_LIMITS), dice.choice(_SCOPES)):
            phases[place] = Phase.INSIDE
            if pause:
                time.sleep(pause)
            phases[place] = Phase.LEAVES
        phases[place] = Phase.ENTERS

    def loop() -> None:
        while True:
            one_block(dice.random() / 1000 if kind == "paced" else 0.0)

    if kind == "overruns":
        for _ in range(dice.randrange(20)):
            one_block(0.0)
        limit = dice.random() / 100
        log.write("entering", block=1, scope="overrun", limit=limit)
        with expires(limit, "overrun"):
            time.sleep(1000)
    if kind == "threads":
        threading.Thread(target=loop, daemon=True).start()
    if kind == "nested":
        while True:
            with expires(30, "outer"), expires(60, dice.choice(_SCOPES)):
                one_block(0.0)
    loop()


def survive(timers: Timers, path: Path, orders: int, seed: float) -> None:
    """Enter and leave blocks, and log it, until told to hang or to end.

    Args:
        timers: what it uses.
        path: of its log.
        orders: the pipe from which the order comes: `HANG` or `END`.
        seed: of what it does.
    """
    dice, expires, log = random.Random(seed), timers.module.expires, own_log(path)
    timers.configure()
    blocks, beat = 0, time.monotonic()
    while not select.select([orders], [], [], 0.001)[0]:
        with expires(dice.choice((60, 90)), dice.choice(_SCOPES)):
            if dice.random() < 0.3:
                with expires(60, dice.choice(_SCOPES)):
                    blocks += 1
        blocks += 1
        if time.monotonic() > beat + _BEAT:
            log.write("quick", count=blocks)
            blocks, beat = 0, time.monotonic()
    if os.read(orders, 1) == END:
        _end_the_queue_s_thread()
        log.write("end")
        return
    around = expires(60, "around") if dice.random() < 0.5 else contextlib.nullcontext()
    with around:
        log.write("entering", block=1, scope="hangs", limit=HANGS_AFTER)
        with expires(HANGS_AFTER, "hangs"):
            log.write("entered", block=1, watched=True)
            time.sleep(1000)
