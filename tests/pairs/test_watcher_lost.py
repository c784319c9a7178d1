"""A server's watcher that is killed with its keeper, and a link that somebody removed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from hangwatch import expires
from support.nursery import LIMIT
from support.pairs import CONTEXT, Pair, running
from support.watchers import wait_until


def _kill_with_its_watcher(keeper: int) -> None:
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    for pid in (keeper, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


def _hang_after(inside: Event, go: Event) -> None:
    with expires(60, "before"):
        inside.set()
    go.wait()
    with expires(0.5, "after"):
        time.sleep(1000)


def test_a_watcher_that_was_killed_with_its_keeper_is_replaced(pair: Pair) -> None:
    with running(pair):
        inside, go = CONTEXT.Event(), CONTEXT.Event()
        worker = pair.worker(_hang_after, inside, go)
        assert inside.wait(LIMIT)
        keeper = pair.server._beside.pid  # type: ignore[union-attr]
        _kill_with_its_watcher(keeper)
        wait_until(
            lambda: pair.server._beside.pid != keeper,  # type: ignore[union-attr]
            "another watcher",
        )
        go.set()
        worker.join(LIMIT)
        assert worker.exitcode == -signal.SIGKILL


def test_a_link_that_was_removed_comes_back_and_goes_with_the_server(pair: Pair) -> None:
    with running(pair):
        link = pair.server._link()
        assert link is not None
        os.unlink(link)
        wait_until(lambda: os.path.lexists(link), "the link")
        pair.server.stop()
        assert not os.path.lexists(link)
