"""Blocks on the legacy road: what the server is told, whoever leaves them and in what order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from math import inf

import pytest

from hangwatch import HangwatchError, LocalTimerClient, UnsupportedError, expires, paused
from hangwatch.timer.api import TimerRequest


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


def test_only_leaving_a_block_releases_it() -> None:
    transport = Transport()
    block = expires(60, "forgotten", client=LocalTimerClient(transport)).__enter__()
    assert list(transport.armed) == ["forgotten"]
    del block
    assert list(transport.armed) == ["forgotten"]


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


def due_in(transport: Transport, scope: str) -> float:
    return transport.armed[scope] - time.time()


def test_handles_of_blocks_on_this_road() -> None:
    transport = Transport()
    client = LocalTimerClient(transport)
    with expires(60, "scope", client=client) as timer:
        timer.renew(200)
        assert 199 < due_in(transport, "scope") <= 200
        assert 199 < timer.remaining() <= 200
        with expires(30, "scope", client=client):
            assert due_in(transport, "scope") <= 30
        assert 199 < due_in(transport, "scope") <= 200, "its present interval, anew"
        timer.cancel()
        assert (transport.armed, timer.remaining()) == ({}, inf)
        with expires(30, "scope", client=client):
            assert due_in(transport, "scope") <= 30
        assert (transport.armed, timer.remaining()) == ({}, inf), "it stays cancelled"
        timer.renew()
        assert 59 < due_in(transport, "scope") <= 60, "by default, the block's own"
    assert transport.armed == {}
    with pytest.raises(HangwatchError, match="not open"):
        timer.renew()


def test_a_pause_on_this_road() -> None:
    transport = Transport()
    client = LocalTimerClient(transport)
    with expires(60, "work", client=client) as work, expires(50, "x", client=client):
        with paused("x", 600, client=client) as pause:
            assert list(transport.armed) == ["x (paused)"], "the others are told to wait"
            before = work.remaining()
            time.sleep(0.3)
            assert work.remaining() == before
            with expires(40, "x", client=client), paused("x", 500, client=client):
                pass
            assert list(transport.armed) == ["x (paused)"], "an inner pause ends nothing"
            with pytest.raises(UnsupportedError, match="must have an end"):
                pause.cancel()
        assert sorted(transport.armed) == ["work", "x"]
        assert before - 0.25 < due_in(transport, "work") <= before
    assert transport.armed == {}


def test_what_this_road_does_not_carry_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    transport = Transport()
    client = LocalTimerClient(transport)
    for _ in range(2):
        with expires(60, "scope", client=client, on_expiry="report"):
            assert transport.armed == {}, "who would only report it would kill here"
    with expires(60, "scope", client=client, grace=3):
        assert list(transport.armed) == ["scope"]
    assert caplog.text.count("knows neither on_expiry nor grace nor signal") == 1
