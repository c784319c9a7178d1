"""A server that ends while its workers live, and the next one on the same queue."""

from __future__ import annotations

import multiprocessing as mp
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from hangwatch import LocalTimerClient, LocalTimerServer, expires
from support.nursery import LIMIT

_CONTEXT = mp.get_context("spawn")


def _hang_after_the_restart(queue: mp.Queue[object], inside: Event, restarted: Event) -> None:
    client = LocalTimerClient(queue)
    with expires(600, "before", client=client):
        inside.set()
    restarted.wait()
    with expires(0.2, "after", client=client):
        time.sleep(1000)


def test_the_first_block_after_a_restart_is_watched(tmp_path: Path) -> None:
    queue: mp.Queue[object] = _CONTEXT.Queue()
    inside, restarted = _CONTEXT.Event(), _CONTEXT.Event()
    worker = _CONTEXT.Process(target=_hang_after_the_restart, args=(queue, inside, restarted))
    server = LocalTimerServer(queue, report_dir=tmp_path)
    server.start()
    worker.start()
    try:
        assert inside.wait(LIMIT)
        server.stop()
        server = LocalTimerServer(queue, report_dir=tmp_path)
        server.start()
        restarted.set()
        worker.join(LIMIT)
        assert worker.exitcode == -signal.SIGKILL
    finally:
        worker.kill()
        server.stop()
