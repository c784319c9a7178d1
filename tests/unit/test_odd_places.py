"""What a block does in odd places: rows of the table in docs/timers.md.

`tests/property/test_slots.py` has the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import pytest

import hangwatch
from support.pages import QuietClient, quiet_page

pytestmark = pytest.mark.core


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


def skipped(client: QuietClient) -> set[str]:
    """Return the scopes of the open blocks that were passed by."""
    reader = client.reader()
    found = {reader.read_details(s.index).scope for s in reader.armed() if reader.was_skipped(s)}
    reader.close()
    return found


@contextlib.contextmanager
def interrupt_at(code: CodeType) -> Iterator[None]:
    """Raise KeyboardInterrupt as soon as a function begins, as a signal's handler may do."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "call" and frame.f_code is code:
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def limited(scope: str) -> Iterator[None]:
    with hangwatch.expires(60, scope):
        yield


def in_a_stack() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(hangwatch.expires(60, "inner"))


def in_a_context_manager() -> None:
    with limited("inner"):
        pass


@pytest.mark.parametrize(
    ("work", "exits"),
    [
        (in_a_stack, contextlib.ExitStack.__exit__),
        (in_a_context_manager, contextlib._GeneratorContextManager.__exit__),
    ],
)
def test_what_an_interrupt_kept_from_being_left_ends_with_its_exception(
    client: QuietClient, work: Any, exits: Any
) -> None:
    with hangwatch.expires(60, "outer"):
        try:
            with hangwatch.expires(60, "middle"), interrupt_at(exits.__code__):
                work()
        except KeyboardInterrupt:
            assert client.armed() == {"outer": 1, "inner": 1}, "the traceback has it"
            assert skipped(client) == {"inner"}, "it can't lead to an end of the worker"
        assert client.armed() == {"outer": 1}


def test_in_an_event_loop_nobody_knows_what_was_skipped(client: QuietClient) -> None:
    async def main() -> None:
        earlier = hangwatch.expires(60, "earlier").__enter__()
        with hangwatch.expires(60, "still open"):
            earlier.__exit__(None, None, None)
            assert client.armed() == {"still open": 1}
            assert skipped(client) == set()

    asyncio.run(main())


def test_a_block_that_failed_is_over_although_its_error_is_kept(client: QuietClient) -> None:
    async def fail() -> None:
        block = hangwatch.expires(60, "failed")
        async with block:
            raise KeyError(block)

    async def main() -> None:
        failed = asyncio.ensure_future(fail())
        await asyncio.wait([failed])
        sys.last_value = failed.exception()
        assert client.armed() == {}

    asyncio.run(main())
    assert client.armed() == {}
    del sys.last_value


AT_THE_END = """
import atexit, sys, threading, time
sys.path[:0] = {path!r}
atexit.register(lambda: check())  # the last one to be called
import hangwatch
from support.pages import quiet_page

def in_a_thread():
    with hangwatch.expires(60, "in a thread"):
        entered.set()
        time.sleep(1000)

def check():
    with hangwatch.expires(60, "new") as timer:
        timer.renew()
        timer.renew(5)
        timer.cancel()
        print(client.armed(), timer.remaining())

entered = threading.Event()
with quiet_page() as client:
    threading.Thread(target=in_a_thread, daemon=True).start()
    entered.wait()
    block = hangwatch.expires(60, "the main thread's").__enter__()
    assert client.armed() == {{"in a thread": 1, "the main thread's": 1}}
"""


def test_at_the_interpreter_s_end_blocks_of_other_threads_are_disarmed() -> None:
    """Those threads are stopped where they are, and can't leave them."""
    path = [entry for entry in sys.path if entry.endswith("tests")]
    result = subprocess.run(
        [sys.executable, "-c", AT_THE_END.format(path=path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == """{"the main thread's": 1} inf\n"""
