"""A block is armed while it is open, in a slot of its own, under its own name."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import resource
import sys
import threading
from collections.abc import Generator, Iterator
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hangwatch
from hangwatch.page import layout
from support.pages import QuietClient, quiet_page
from support.sizes import Size, short_and_long

pytestmark = pytest.mark.core


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


@contextlib.contextmanager
def threads_switch_often() -> Iterator[None]:
    """Have threads take turns after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def skipped(client: QuietClient) -> set[str]:
    """Return the scopes of the open blocks that were passed by."""
    reader = client.reader()
    found = {reader.read_details(s.index).scope for s in reader.armed() if reader.was_skipped(s)}
    reader.close()
    return found


def waiting(scope: str) -> Generator[None, None, None]:
    with hangwatch.expires(60, scope):
        yield


# -- one object is one block


def test_blocks_of_all_kinds_are_independent(client: QuietClient) -> None:
    with hangwatch.expires(60, "a"):
        with hangwatch.expires(60, "b"), hangwatch.expires(60, "a"):
            assert client.armed() == {"a": 2, "b": 1}
        assert client.armed() == {"a": 1}
    assert client.armed() == {}


def test_recursion_is_independent_and_not_quadratic(client: QuietClient) -> None:
    def descend(depth: int) -> None:
        if depth:
            with hangwatch.expires(60, "recursive"):
                descend(depth - 1)
        else:
            assert client.armed() == {"recursive": 300}

    for _ in range(3):
        descend(300)
    assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] <= 310


def test_one_object_is_entered_once(client: QuietClient) -> None:
    block = hangwatch.expires(60, "once")
    with block:
        with pytest.raises(hangwatch.HangwatchError, match=r"call expires\(\) again, or decorate"):
            block.__enter__()
        assert client.armed() == {"once": 1}
    with pytest.raises(hangwatch.HangwatchError, match="was entered already"):
        block.__enter__()
    assert client.armed() == {}


def test_what_could_not_be_entered_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block = hangwatch.expires(60, "later")
    with pytest.raises(hangwatch.NotConfiguredError):
        block.__enter__()
    monkeypatch.setenv("HANGWATCH_ADDRESS", "off")
    with block as timer:
        assert timer.remaining() == inf


def test_a_block_is_not_copied_nor_pickled(client: QuietClient) -> None:
    with hangwatch.expires(60, "one") as block:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot pickle"):
                duplicate(block)
        assert client.armed() == {"one": 1}


def test_leaving_what_is_not_entered_or_left_does_nothing(client: QuietClient) -> None:
    block = hangwatch.expires(60, "x")
    block.__exit__(None, None, None)
    with block:
        assert client.armed() == {"x": 1}
    block.__exit__(None, None, None)
    with hangwatch.expires(60, "x"):
        block.__exit__(None, None, None)
        assert client.armed() == {"x": 1}, "the slot is another block's by now"
    with pytest.raises(hangwatch.HangwatchError, match="is not open"):
        block.renew()


def test_exit_stack_and_calls_by_hand(client: QuietClient) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(hangwatch.expires(60, "by hand"))
        stack.enter_context(hangwatch.expires(60, "by hand"))
        stack.enter_context(hangwatch.expires(60, "other"))
        assert client.armed() == {"by hand": 2, "other": 1}
    assert client.armed() == {}
    block = hangwatch.expires(60, "by hand").__enter__()
    assert client.armed() == {"by hand": 1}
    block.__exit__(None, None, None)
    assert client.armed() == {}


def test_a_block_may_be_left_in_another_thread(client: QuietClient) -> None:
    stack = contextlib.ExitStack()
    for _ in range(3):
        stack.enter_context(hangwatch.expires(60, "handed over"))
        thread = threading.Thread(target=stack.close)
        thread.start()
        thread.join()
        assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] <= 2


def test_a_block_that_two_threads_leave_at_once_gives_its_slot_back_once(
    client: QuietClient,
) -> None:
    block = hangwatch.expires(60, "x")
    turn, turns = threading.Barrier(2), 300

    def leave() -> None:
        for _ in range(turns):
            turn.wait()
            block.__exit__(None, None, None)
            turn.wait()

    other = threading.Thread(target=leave)
    with threads_switch_often():
        other.start()
        for _ in range(turns):
            block = hangwatch.expires(60, "x").__enter__()
            turn.wait()
            block.__exit__(None, None, None)
            turn.wait()
            with hangwatch.expires(60, "x") as one, hangwatch.expires(60, "x") as two:
                assert one.place != two.place
                assert client.armed() == {"x": 2}
        other.join()


def test_a_block_may_be_left_in_another_task(client: QuietClient) -> None:
    stack = contextlib.AsyncExitStack()

    async def enter() -> None:
        await stack.enter_async_context(hangwatch.expires(60, "resource"))

    async def leave() -> None:
        assert client.armed() == {"resource": 1}
        await stack.aclose()
        assert client.armed() == {}

    async def main() -> None:
        await asyncio.create_task(enter())
        await asyncio.create_task(leave())

    asyncio.run(main())


def test_a_cancelled_task_leaves_its_block(client: QuietClient) -> None:
    async def hang() -> None:
        async with hangwatch.expires(60, "cancelled"):
            await asyncio.sleep(1000)

    async def main() -> None:
        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        assert client.armed() == {"cancelled": 1}
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert client.armed() == {}

    asyncio.run(main())


def test_a_block_is_not_awaited_by_mistake(client: QuietClient) -> None:
    async def main() -> None:
        with pytest.raises(TypeError):
            await hangwatch.expires(60, "x")  # type: ignore[misc]
        async with hangwatch.expires(60, "x") as timer:
            assert timer.remaining() > 59

    asyncio.run(main())


# -- its end without __exit__


def test_the_object_s_end_is_the_block_s(client: QuietClient) -> None:
    block = hangwatch.expires(60, "forgotten").__enter__()
    again = block
    assert client.armed() == {"forgotten": 1}
    del block, again
    assert client.armed() == {}
    for _ in range(300):
        hangwatch.expires(60, "forgotten").__enter__()
    assert client.armed() == {}


def test_a_generator_that_waits_is_in_its_block_until_it_is_gone(client: QuietClient) -> None:
    generator = waiting("waiting")
    next(generator)
    assert client.armed() == {"waiting": 1}, "its time runs"
    with pytest.raises(StopIteration):
        next(generator)
    assert client.armed() == {}
    generator = waiting("waiting")
    next(generator)
    del generator
    gc.collect()
    assert client.armed() == {}


def test_a_block_that_an_exception_left_is_disarmed_while_its_traceback_lives(
    client: QuietClient,
) -> None:
    def fail() -> None:
        block = hangwatch.expires(60, "failed")
        with block:
            raise KeyError(block)

    try:
        fail()
    except KeyError as error:
        kept = error
    assert client.armed() == {}
    assert kept.__traceback__ is not None


def test_a_handle_that_a_forked_child_inherits_touches_nobody(client: QuietClient) -> None:
    with hangwatch.expires(60, "parent's") as timer:
        before = bytes(client.page.memory[layout.HEADER_BYTES :][:2000])
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                timer.renew()
                timer.renew(5)
                timer.cancel()
                timer.__exit__(None, None, None)
                del timer
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert bytes(client.page.memory[layout.HEADER_BYTES :][:2000]) == before
        assert client.armed() == {"parent's": 1}


# -- what was skipped


def test_what_is_open_still_when_an_earlier_block_is_left_was_skipped(client: QuietClient) -> None:
    earlier = hangwatch.expires(60, "earlier").__enter__()
    left_over = hangwatch.expires(60, "left over").__enter__()
    with hangwatch.expires(60, "in order"):
        assert skipped(client) == set()
    earlier.__exit__(None, None, None)
    assert skipped(client) == {"left over"}
    left_over.renew()
    assert skipped(client) == set(), "it is alive"
    left_over.__exit__(None, None, None)
    with hangwatch.expires(60, "left over"):
        assert skipped(client) == set()


def test_a_block_left_in_another_thread_skips_none(client: QuietClient) -> None:
    earlier = hangwatch.expires(60, "earlier").__enter__()
    with hangwatch.expires(60, "later"):
        thread = threading.Thread(target=earlier.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert client.armed() == {"later": 1}
        assert skipped(client) == set()


def test_tasks_that_take_turns_skip_none(client: QuietClient) -> None:
    async def one(begun: asyncio.Event, go_on: asyncio.Event, scope: str) -> None:
        with hangwatch.expires(60, scope):
            begun.set()
            await go_on.wait()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(one(events[0], events[1], "first"))
        await events[0].wait()
        second = asyncio.create_task(one(events[2], events[3], "second"))
        await events[2].wait()
        events[1].set()
        await first
        assert (client.armed(), skipped(client)) == ({"second": 1}, set())
        events[3].set()
        await second

    asyncio.run(main())


# -- slots


def test_a_thread_that_ends_gives_its_slots_back(client: QuietClient) -> None:
    def run() -> None:
        with hangwatch.expires(60, "a"), hangwatch.expires(60, "b"):
            pass
        hangwatch.expires(60, "never left").__enter__()

    for _ in range(50):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] <= 60


def test_a_block_that_outlives_its_thread_returns_its_slot(client: QuietClient) -> None:
    for _ in range(100):
        entered: list[hangwatch.Expiration] = []
        thread = threading.Thread(
            target=lambda: entered.append(hangwatch.expires(60, "kept").__enter__())  # noqa: B023
        )
        thread.start()
        thread.join()
        assert client.armed() == {"kept": 1}
        entered.pop().__exit__(None, None, None)
        assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] <= 4


@short_and_long
def test_a_million_scopes_take_few_slots_and_little_memory(client: QuietClient, size: Size) -> None:
    """Or less than a million: what does not grow with the first of them does not grow."""

    def run(first: int, last: int) -> None:
        for number in range(first, last):
            with hangwatch.expires(60, f"batch {number}"):
                pass

    run(0, 2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The entries' generations wrap at 2**20 in each slot: begin shortly before.
    for index in range(int(client.page.words[layout.SLOTS_IN_USE])):
        client.page.words[layout.deadline_word(index) + layout.ENTRY] = (2.0**20 - 100) * 2.0**32
    run(2000, 2000 + size.of(10_000, 30_000, 100_000))
    assert client.page.words[layout.SLOTS_IN_USE] <= 70
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8192
    with hangwatch.expires(60, "after all"):
        assert client.armed() == {"after all": 1}


def test_at_the_cap_a_block_runs_unwatched_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with quiet_page(capacity=300) as client:
        with contextlib.ExitStack() as stack:
            for number in range(350):
                stack.enter_context(hangwatch.expires(60, f"block {number % 50}"))
            assert sum(client.armed().values()) == 300
        assert client.armed() == {}
        assert len([record for record in caplog.records if "unwatched" in record.message]) == 1
        with hangwatch.expires(60, "room again"):
            assert client.armed() == {"room again": 1}


def test_slots_change_hands_at_the_cap_and_none_has_two_owners() -> None:
    """More threads than slots, each with scopes of its own; some threads end meanwhile."""
    with quiet_page(capacity=12) as client:
        problems: list[str] = []
        watched = 0

        # Each has five scopes by then: more than there are slots.
        lasting_ones_met = threading.Barrier(6)

        def run(name: str, turns: int) -> None:
            nonlocal watched
            for turn in range(turns):
                if turn == 5 and turns == 1000:
                    lasting_ones_met.wait()
                scope = f"{name}.{turn % 5}"
                with hangwatch.expires(60, scope) as block:
                    for _ in range(3):
                        place = block.place
                        if place is None or block.remaining() == inf:
                            continue
                        watched += 1
                        if client.page.view.read_details(place[1]).scope != scope:
                            problems.append(scope)

        with threads_switch_often():
            lasting = [threading.Thread(target=run, args=(str(n), 1000)) for n in range(6)]
            for thread in lasting:
                thread.start()
            for round_ in range(50):
                short = [threading.Thread(target=run, args=(f"{round_}-{n}", 20)) for n in range(3)]
                for thread in short:
                    thread.start()
                for thread in short:
                    thread.join()
            for thread in lasting:
                thread.join()
        assert problems == []
        assert watched > 0
        assert client.armed() == {}
        assert client.page.words[layout.SLOTS_IN_USE] == 12


def test_tasks_on_one_line_are_independent_and_in_their_own_blocks(client: QuietClient) -> None:
    seen: list[int] = []
    chains: list[list[str]] = []

    async def work(number: int) -> None:
        for _ in range(5):
            with hangwatch.expires(60, "task"):
                await asyncio.sleep(0.001 * (number % 7))
                if number == 7:
                    seen.append(client.armed()["task"])
                with hangwatch.expires(60, "inner") as timer:
                    await asyncio.sleep(0)
                    if number == 7:
                        reader = client.reader()
                        assert timer.place is not None
                        (slot,) = (s for s in reader.armed() if s.index == timer.place[1])
                        chains.append([details.scope for details in reader.chain(slot)])
                        reader.close()

    async def main() -> None:
        with hangwatch.expires(60, "before"):
            tasks = [asyncio.create_task(work(number)) for number in range(60)]
            await asyncio.sleep(0.0001)
        await asyncio.gather(*tasks)

    with hangwatch.expires(60, "sync"):
        asyncio.run(main())
    assert max(seen) > 1
    assert chains == [["inner", "task"]] * 5, "of its own task, not of its neighbours"
    assert client.armed() == {}


@given(st.text(min_size=1, max_size=400))
def test_any_scope_can_be_written_and_read(scope: str) -> None:
    with quiet_page() as client, hangwatch.expires(60, scope):
        (name,) = client.armed()
        whole = scope.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
        cut = name.endswith("…") and len(whole.encode()) > 160
        assert (cut and whole.startswith(name[:-1])) or name == whole


def test_threads_that_arm_first_at_the_same_time_share_one_page() -> None:
    for _ in range(30):
        with quiet_page(page_made=False) as client:
            start, inside, leave = threading.Barrier(8), threading.Barrier(9), threading.Barrier(9)

            def run(
                start: threading.Barrier, inside: threading.Barrier, leave: threading.Barrier
            ) -> None:
                start.wait()
                with hangwatch.expires(60, "first"):
                    inside.wait()
                    leave.wait()

            threads = [threading.Thread(target=run, args=(start, inside, leave)) for _ in range(8)]
            for thread in threads:
                thread.start()
            inside.wait()
            try:
                assert client.armed() == {"first": 8}
            finally:
                leave.wait()
                for thread in threads:
                    thread.join()


def test_who_could_not_have_a_page_is_watched_as_soon_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with quiet_page(page_made=False) as client:
        fails = True

        def create() -> int:
            if fails:
                raise OSError(24, "too many open files")
            return real()

        real = layout.create_memfd
        monkeypatch.setattr(layout, "create_memfd", create)
        monkeypatch.setattr("hangwatch.worker.client._TRY_AGAIN_AFTER", 0.0)
        for _ in range(3):
            with hangwatch.expires(60, "x") as timer:
                assert timer.remaining() == inf
        fails = False
        with hangwatch.expires(60, "x"):
            assert client.armed() == {"x": 1}
