"""This process's own page, seen as its watcher would see it, with no watcher around."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hangwatch.page import layout
from hangwatch.watcher.page_reader import PageReader
from hangwatch.worker import expiration, transports
from hangwatch.worker.client import ADDRESS_VARIABLE, WorkerClient


class QuietClient(WorkerClient):
    """A client that never connects; its page promises a look in the far future."""

    def ring(self) -> bool:
        return False

    def reader(self) -> PageReader:
        """Return this process's page as the watcher reads it."""
        return PageReader(self.page.descriptor.number)

    def armed(self) -> dict[str, int]:
        """Return how many watched blocks each scope has open."""
        with_reader = self.reader()
        scopes: dict[str, int] = {}
        for slot in with_reader.armed():
            details = with_reader.details(slot)
            assert details is not None
            scopes[details.scope] = scopes.get(details.scope, 0) + 1
        with_reader.close()
        return scopes


def write_details(memory: memoryview, index: int, details: layout.SlotDetails) -> None:
    """Write what a slot says besides its deadline and its entry."""
    at = layout.slot_byte(index) + layout.LIMIT * 8
    packed = layout.pack_details(details, keep_end=False)
    memory[at : at + len(packed)] = packed


@contextmanager
def quiet_page(page_made: bool = True, capacity: int = layout.CAPACITY) -> Iterator[QuietClient]:
    """Make the environment name a client whose page nobody watches, and yield it.

    Args:
        page_made: whether there is a page already.
        capacity: how many slots it has.
    """
    address = f"/nowhere/{os.getpid()}/{time.monotonic_ns()}"
    client = QuietClient(address)
    if page_made:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "CAPACITY", capacity)
            client.page.words[layout.WATCH_UNTIL] = time.monotonic() + 1e6
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(transports, "client_at", lambda wanted: client)
    expiration.forget_keys()
    try:
        yield client
    finally:
        monkeypatch.undo()
        expiration.forget_keys()
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before
