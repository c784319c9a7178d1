"""A block that is open is armed, in a slot of its own, under its own name."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
import threading
from collections.abc import Generator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hangwatch
from hangwatch.page import layout
from hangwatch.worker import expiration, page_writer
from hangwatch.worker.slots import Slot
from support.pages import QuietClient, quiet_page
from support.sizes import Size, short_and_long


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


def test_one_object_may_be_entered_again_and_again(client: QuietClient) -> None:
    limit = hangwatch.expires(60, "limit")
    for _ in range(3):
        with limit:
            with limit, limit:
                assert client.armed() == {"limit": 3}
            assert client.armed() == {"limit": 1}
        assert client.armed() == {}


def test_one_object_may_be_entered_by_many_threads(client: QuietClient) -> None:
    limit = hangwatch.expires(60, "limit")
    inside, leave = threading.Barrier(5), threading.Barrier(5)

    def run() -> None:
        with limit:
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert client.armed() == {"limit": 4}
    leave.wait()
    for thread in threads:
        thread.join()
    assert client.armed() == {}


def test_exit_stack_and_calls_by_hand(client: QuietClient) -> None:
    limit = hangwatch.expires(60, "by hand")
    with contextlib.ExitStack() as stack:
        stack.enter_context(limit)
        stack.enter_context(limit)
        stack.enter_context(hangwatch.expires(60, "other"))
        assert client.armed() == {"by hand": 2, "other": 1}
    assert client.armed() == {}
    limit.__enter__()
    with limit:
        assert client.armed() == {"by hand": 2}
    assert client.armed() == {"by hand": 1}
    limit.__exit__(None, None, None)
    assert client.armed() == {}
    with pytest.raises(hangwatch.HangwatchError, match="not entered"):
        type(limit).__exit__(limit, None, None, None)


def test_what_is_left_inside_of_an_ended_block_is_not_watched(client: QuietClient) -> None:
    def abandoned() -> Generator[None, None, None]:
        with hangwatch.expires(60, "abandoned"):
            yield

    for _ in range(200):
        with hangwatch.expires(60, "outer"):
            generator = abandoned()
            next(generator)
            hangwatch.expires(60, "never left").__enter__()
            assert client.armed() == {"outer": 1, "abandoned": 1, "never left": 1}
        assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] < 150, "what is left behind is used again"


def test_a_slot_is_not_used_again_while_somebody_may_leave_its_block(client: QuietClient) -> None:
    """Generators that wait inside of blocks, outer ones that have ended, threads that have."""

    def waiting(scope: str) -> Generator[None, None, None]:
        with hangwatch.expires(60, scope):
            yield

    generators = []

    def begin() -> None:
        for _ in range(70):
            generators.append(waiting("waiting"))
            next(generators[-1])

    with hangwatch.expires(60, "outer"):
        begin()
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert client.armed() == {"waiting": 70}, "those of the thread have nothing around them"
    with contextlib.ExitStack() as stack:
        for number in range(150):
            stack.enter_context(hangwatch.expires(60, f"open {number}"))
        generators.clear()
        assert sum(client.armed().values()) == 150
    assert client.armed() == {}


def test_a_thread_that_ends_gives_its_slots_back(client: QuietClient) -> None:
    def run() -> None:
        hangwatch.expires(60, "never left").__enter__()

    for _ in range(50):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert client.armed() == {}
    assert client.page.words[layout.SLOTS_IN_USE] <= 8


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
    assert client.page.words[layout.SLOTS_IN_USE] <= 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8192
    with hangwatch.expires(60, "after all"):
        assert client.armed() == {"after all": 1}


@short_and_long
def test_at_the_cap_a_block_runs_unwatched_with_one_warning(
    client: QuietClient, caplog: pytest.LogCaptureFixture, size: Size
) -> None:
    capacity = size.of(300, layout.CAPACITY, layout.CAPACITY)
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "CAPACITY", capacity)
            for number in range(capacity + 50):
                stack.enter_context(hangwatch.expires(60, f"block {number % 50}"))
        assert sum(client.armed().values()) == capacity
    assert client.armed() == {}
    assert len([record for record in caplog.records if "unwatched" in record.message]) == 1


def test_slots_change_hands_at_the_cap_and_none_is_lost(
    client: QuietClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than slots, each with scopes of its own, few of them open at once."""
    monkeypatch.setattr(layout, "CAPACITY", 12)
    problems: list[str] = []
    unwatched = 0
    start = threading.Barrier(8)

    def run(number: int) -> None:
        nonlocal unwatched
        start.wait()
        for turn in range(1500):
            scope = f"{number}.{turn % 5}"
            block = hangwatch.expires(60, scope)
            exit_block = block.__exit__
            slot = block._slot
            if not isinstance(slot, Slot):
                slot = expiration._local.road[1]
            block.__enter__()
            words = slot.words
            for _ in range(3):
                if slot.limit != 60:
                    unwatched += 1
                elif (
                    words[slot.deadline_at] == 0.0
                    or layout.read_details(client.page.memory, slot.index).scope != scope
                ):
                    problems.append(scope)
            exit_block(None, None, None)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    with threads_switch_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert client.page.words[layout.SLOTS_IN_USE] == 12
    assert unwatched < 8 * 1500


def test_a_place_never_has_two_owners_while_threads_end(
    client: QuietClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that end give their places back while others, at the cap, take them."""
    monkeypatch.setattr(layout, "CAPACITY", 12)
    problems: list[str] = []

    def run(name: str) -> None:
        for turn in range(20):
            scope = f"{name}.{turn % 3}"
            with hangwatch.expires(60, scope):
                for slot in expiration._local.all_slots():
                    if slot.key == scope and slot.words[slot.deadline_at]:
                        details = layout.read_details(client.page.memory, slot.index)
                        if details.scope != scope or not slot.words[slot.deadline_at]:
                            problems.append(scope)

    with threads_switch_often():
        for round_ in range(100):
            threads = [threading.Thread(target=run, args=(f"{round_}-{n}",)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert problems == []


def test_without_a_gil_every_slot_counts_as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """See the model's `in-use-raced`: two threads that count could lose one of the slots."""
    monkeypatch.setattr(page_writer, "_GIL", False)
    with quiet_page() as client, hangwatch.expires(60, "one"):
        assert client.armed() == {"one": 1}
        assert client.page.words[layout.SLOTS_IN_USE] == layout.CAPACITY


def test_tasks_on_one_line_are_independent(client: QuietClient) -> None:
    seen = []

    async def work(number: int) -> None:
        for _ in range(5):
            with hangwatch.expires(60, "task"):
                await asyncio.sleep(0.001 * (number % 7))
                if number == 7:
                    seen.append(client.armed()["task"])
                with hangwatch.expires(60, "inner"):
                    await asyncio.sleep(0)

    async def main() -> None:
        with hangwatch.expires(60, "before"):
            tasks = [asyncio.create_task(work(number)) for number in range(60)]
            await asyncio.sleep(0.0001)
        for _ in range(20):
            await asyncio.sleep(0.001)
            reader = client.reader()
            words = client.page.words
            stored = sum(
                words[layout.deadline_word(index)] > 0
                for index in range(int(words[layout.SLOTS_IN_USE]))
            )
            assert len(reader.armed()) == stored, "a task's end orphaned another task's block"
            reader.close()
        await asyncio.gather(*tasks)

    with hangwatch.expires(60, "sync"):
        asyncio.run(main())
    assert max(seen) > 1
    assert client.armed() == {}


@given(st.text(min_size=1, max_size=400))
def test_any_scope_can_be_written_and_read(scope: str) -> None:
    with quiet_page() as client, hangwatch.expires(60, scope):
        (name,) = client.armed()
        cut = name.endswith("…") and len(scope.encode("utf-8", "backslashreplace")) > 160
        whole = scope.encode("utf-8", "backslashreplace").split(b"\0")[0].decode()
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


def test_one_object_entered_by_contending_threads(client: QuietClient) -> None:
    limit = hangwatch.expires(60, "limit")
    problems: list[object] = []

    def run() -> None:
        try:
            for _ in range(3000):
                with limit:
                    thread = client.page._per_thread.thread
                    assert thread is not None
                    mine = [*thread.slots.values(), *thread.others]
                    if not any(slot.words[slot.deadline_at] for slot in mine):
                        problems.append("not armed")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    with threads_switch_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert client.armed() == {}


def test_a_look_at_exit_by_a_stranger_confuses_nothing(client: QuietClient) -> None:
    for enter_twice in (False, True):
        block = hangwatch.expires(60, "looked at")
        assert hasattr(block, "__exit__")
        block.__enter__()
        assert client.armed() == {"looked at": 1}
        if enter_twice:
            with hangwatch.expires(60, "looked at"):
                assert client.armed() == {"looked at": 2}
        block.__exit__(None, None, None)
        assert client.armed() == {}
        block = hangwatch.expires(60, "looked at")
        assert hasattr(block, "__exit__")
        with contextlib.ExitStack() as stack:
            stack.enter_context(block)
            assert client.armed() == {"looked at": 1}
        assert client.armed() == {}


def test_tasks_leave_their_own_blocks_by_hand(client: QuietClient) -> None:
    with hangwatch.expires(60, "warm-up"):
        pass
    block = hangwatch.expires(60, "by hand")

    async def work(first: asyncio.Event, second: asyncio.Event) -> None:
        async def other() -> None:
            block.__enter__()
            first.set()
            await second.wait()
            block.__exit__(None, None, None)

        task = asyncio.create_task(other())
        await first.wait()
        block.__enter__()
        with hangwatch.expires(60, "warm-up"):
            left = hangwatch.expires(60, "left")
            left.__enter__()
            assert client.armed() == {"by hand": 2, "warm-up": 1, "left": 1}
        assert client.armed() == {"by hand": 2}, "what a task leaves behind goes with its block"
        block.__exit__(None, None, None)
        assert client.armed() == {"by hand": 1}
        second.set()
        await task
        assert client.armed() == {}

    async def main() -> None:
        await work(asyncio.Event(), asyncio.Event())

    asyncio.run(main())


def test_many_threads_enter_one_object_by_a_stack(client: QuietClient) -> None:
    """Each one's exit is its own, however their calls interleave."""
    errors: list[BaseException] = []

    def enter(limit: hangwatch.Expiration, together: threading.Barrier) -> None:
        try:
            together.wait()
            for _ in range(20):
                with contextlib.ExitStack() as stack:
                    timer = stack.enter_context(limit)
                    assert timer.remaining() > 500
        except BaseException as error:
            errors.append(error)

    with threads_switch_often():
        for _ in range(30):
            limit, together = hangwatch.expires(1000, "shared"), threading.Barrier(4)
            threads = [threading.Thread(target=enter, args=(limit, together)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (errors, client.armed()) == ([], {})
