"""Blocks on the legacy road: what the server is told, whoever leaves them and in what order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

from hangwatch import LocalTimerClient, expires
from hangwatch.api import TimerRequest


class Transport:
    """A queue whose receiver acts on each request at once."""

    def __init__(self) -> None:
        self.armed: dict[str, float] = {}

    def put(self, request: TimerRequest, block: bool = True) -> None:
        if request.expiration_time < 0:
            self.armed.pop(request.scope_id, None)
        else:
            self.armed[request.scope_id] = request.expiration_time


def _block(client: LocalTimerClient, after: float) -> Iterator[None]:
    with expires(after, "scope", client=client):
        yield


def test_a_block_left_by_another_thread_is_released() -> None:
    transport = Transport()
    block = _block(LocalTimerClient(transport), 60)
    next(block)
    assert transport.armed
    thread = threading.Thread(target=lambda: next(block, None))
    thread.start()
    thread.join()
    assert not transport.armed


def test_a_block_left_by_another_task_is_released() -> None:
    transport = Transport()
    client = LocalTimerClient(transport)

    async def block() -> AsyncIterator[None]:
        with expires(60, "scope", client=client):
            yield

    async def run() -> None:
        blocks = block()
        await asyncio.gather(anext(blocks))
        assert transport.armed
        await asyncio.gather(anext(blocks, None))
        assert not transport.armed

    asyncio.run(run())


def test_of_interleaved_blocks_each_ends_its_own_timer() -> None:
    transport = Transport()
    client = LocalTimerClient(transport)
    short, long = _block(client, 5), _block(client, 600)
    next(short)
    next(long)
    next(short, None)
    assert transport.armed["scope"] > time.time() + 300
    next(long, None)
    assert not transport.armed
