"""The drop-in pairs, each with one way to start a worker."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hangwatch
from support.nursery import LIMIT

KILLED = -signal.SIGKILL
CONTEXT = multiprocessing.get_context("forkserver")
"""How workers are started: from a warm process, with nothing of the server's in them."""
CONTEXT.set_forkserver_preload(["hangwatch.wire", "support.pair_workers"])
Server = hangwatch.LocalTimerServer | hangwatch.FileTimerServer


class Pair:
    """A drop-in pair: its server, not started, and what its clients are made of.

    Attributes:
        name: ``local`` or ``file``.
        place: the queue, or the FIFO's path.
        server: the server.
    """

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        self.name = name
        options.setdefault("report_dir", folder / "reports")
        self.place: Any = CONTEXT.Queue() if name == "local" else str(folder / "fifo")
        self.options = options
        self.server = self.make_server()

    def make_server(self) -> Server:
        """Make another server at the same place."""
        if self.name == "local":
            return hangwatch.LocalTimerServer(self.place, **self.options)
        return hangwatch.FileTimerServer(self.place, **self.options)

    def client(self) -> hangwatch.LocalTimerClient | hangwatch.FileTimerClient:
        """Make a client."""
        return client_at(self.place)

    def worker(self, body: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        """Start a worker that is configured with a client and calls ``body(*arguments)``."""
        process = CONTEXT.Process(target=_work, args=(self.place, body, arguments), daemon=True)
        process.start()
        return process

    def gated(
        self, body: Callable[..., None], *arguments: Any
    ) -> tuple[ForkServerProcess, Connection]:
        """Start a worker that calls ``body(gate, *arguments)``; return it, and our end of the gate.

        Each `wait_at(gate)` of the worker is one `recv` here, and then one `send` lets it go on. It
        is no event of multiprocessing: that would block us if a waiting worker were killed.
        """
        ours, its = CONTEXT.Pipe()
        with its:
            return self.worker(body, its, *arguments), ours


def wait_at(gate: Connection) -> None:
    """Say that we are here, and wait until we are told to go on."""
    gate.send("here")
    gate.recv()


@contextmanager
def running(pair: Pair) -> Iterator[Pair]:
    """Start a pair's server, and stop it in the end."""
    pair.server.start()
    try:
        yield pair
    finally:
        pair.server.stop()


def client_at(place: Any) -> hangwatch.LocalTimerClient | hangwatch.FileTimerClient:
    """Make the client of a queue, or of a FIFO's path."""
    if isinstance(place, str):
        return hangwatch.FileTimerClient(place)
    return hangwatch.LocalTimerClient(place)


def _work(place: Any, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    hangwatch.configure(client_at(place))
    body(*arguments)


def hang(after: float = 0.2, scope: str = "hang") -> None:
    """Overrun a block, for good."""
    with hangwatch.expires(after=after, scope=scope):
        time.sleep(1000)


def stay(gate: Connection) -> None:
    """Wait within a block that does not overrun."""
    with hangwatch.expires(after=600, scope="well"):
        wait_at(gate)


def ignore_sigterm(path: str) -> None:
    """Overrun a block whose signal is SIGTERM, which does nothing here."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hangwatch.configure(hangwatch.FileTimerClient(path, signal=signal.SIGTERM))
    hang()


def exit_status(process: BaseProcess) -> int | None:
    """Wait for a worker's end; return None, and kill it, if it does not end."""
    process.join(LIMIT)
    status = process.exitcode
    process.kill()
    return status


def take_the_legacy_road(pair: Pair) -> None:
    """Start the server without a watcher beside it."""
    pair.server._keeps_its_own_way = lambda: True  # type: ignore[method-assign]
    pair.server.start()
    assert pair.server._companion is None
