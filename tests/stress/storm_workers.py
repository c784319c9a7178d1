"""The workers of a kill storm: what victims, survivors and those who hang do.

They know nothing of the implementation but the names that all of them have.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.util
import os
import random
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from stress.storm_board import Forker, Order, Phase, Survivor, fork

HANGS_AFTER = 0.3
KINDS = ("tight", "paced", "nested", "threads", "overruns")
WEIGHTS = (50, 20, 20, 8, 2)
_SCOPES = ("a", "b", "c")
# What a victim leaves behind may expire during the storm, or not.
_LIMITS = (1.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Timers:
    """An implementation, and the queue of the server that workers use.

    Attributes:
        module: the module that has `expires`.
        queue: the server's `multiprocessing` queue.
    """

    module: Any
    queue: Any

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

        pid = fork(tell)
        os.close(mouth)
        with os.fdopen(ears) as names:
            for name in names.read().split():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        os.waitpid(pid, 0)


def be_a_victim(timers: Timers, forker: Forker, place: int, kind: str, seed: float) -> None:
    """Enter and leave blocks until somebody comes and kills."""
    dice = random.Random(seed)
    phases, expires = forker.phases, timers.module.expires
    timers.configure()
    phases[place] = Phase.FIRST

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
        with expires(dice.random() / 100, "overrun"):
            time.sleep(600)
    if kind == "threads":
        threading.Thread(target=loop, daemon=True).start()
    if kind == "nested":
        while True:
            with expires(30, "outer"), expires(60, dice.choice(_SCOPES)):
                one_block(0.0)
    loop()


def survive(timers: Timers, me: Survivor, seed: float) -> None:
    """Enter and leave blocks, and show it, until told to hang, or to end."""
    dice = random.Random(seed)
    expires = timers.module.expires
    timers.configure()
    while me.order == Order.GO_ON:
        with expires(dice.choice((30, 60)), dice.choice(_SCOPES)):
            me.gets_on()
            if dice.random() < 0.3:
                with expires(60, dice.choice(_SCOPES)):
                    me.gets_on()
        me.blocks += 1
        me.gets_on()
        time.sleep(0.001)
    if me.order == Order.END:
        # As a process of multiprocessing ends: a queue's thread is waited for.
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        return
    around = expires(60, "around") if dice.random() < 0.5 else contextlib.nullcontext()
    with around:
        me.deadline = time.monotonic() + HANGS_AFTER
        with expires(HANGS_AFTER, "hangs"):
            time.sleep(600)
