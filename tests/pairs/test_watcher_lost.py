"""A server's watcher that is killed with its keeper, and a link that somebody removed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from hangwatch import expires
from support.pairs import KILLED, Pair, exit_status, running, wait_at
from support.watchers import wait_until


def _kill_with_its_watcher(keeper: int) -> None:
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    for pid in (keeper, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


def _hang_after(gate: Connection) -> None:
    with expires(600, "before"):
        wait_at(gate)
    with expires(0.2, "after"):
        time.sleep(1000)


def test_a_watcher_that_was_killed_with_its_keeper_is_replaced(tmp_path: Path) -> None:
    with running(Pair("local", tmp_path)) as pair:
        worker, gate = pair.gated(_hang_after)
        gate.recv()
        keeper = pair.server._companion.pid  # type: ignore[union-attr]
        _kill_with_its_watcher(keeper)
        wait_until(
            lambda: pair.server._companion.pid != keeper,  # type: ignore[union-attr]
            "another watcher",
        )
        gate.send("go on")
        assert exit_status(worker) == KILLED


def test_a_link_that_was_removed_comes_back_and_goes_with_the_server(tmp_path: Path) -> None:
    with running(Pair("file", tmp_path)) as pair:
        link = pair.server._link()
        assert link is not None
        os.unlink(link)
        wait_until(lambda: os.path.lexists(link), "the link")
        pair.server.stop()
        assert not os.path.lexists(link)
