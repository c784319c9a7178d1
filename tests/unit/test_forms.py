"""Every form of a timer: decorator, async, iteration, handle. Seen in the page, unwatched."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from math import inf

import pytest

import hangwatch
from support.nursery import LIMIT
from support.pages import QuietClient, quiet_page

pytestmark = pytest.mark.core


def remains(timer: hangwatch.Expiration, of: float) -> bool:
    """Tell whether all of an interval remains, but for what a machine may stand still."""
    return of - LIMIT < timer.remaining() <= of


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


class TestDecorator:
    def test_of_a_function(self, client: QuietClient) -> None:
        @hangwatch.expires(60, "work")
        def work(depth: int, *, more: int = 0) -> dict[str, int]:
            """Work."""
            return work(depth - 1) if depth else client.armed()

        assert work(2, more=1) == {"work": 3}, "each call is a block"
        assert client.armed() == {}
        assert (work.__name__, work.__doc__) == ("work", "Work.")
        with pytest.raises(TypeError, match="missing"):
            work()  # type: ignore[call-arg]
        assert client.armed() == {}

    def test_of_methods(self, client: QuietClient) -> None:
        class Trainer:
            @hangwatch.expires(60, "step")
            def step(self) -> dict[str, int]:
                return client.armed()

            @classmethod
            @hangwatch.expires(60, "load")
            def load(cls) -> dict[str, int]:
                return client.armed()

        assert (Trainer().step(), Trainer.load()) == ({"step": 1}, {"load": 1})

    def test_one_object_decorates_many_and_is_entered_once_besides(
        self, client: QuietClient
    ) -> None:
        step = hangwatch.expires(60, "step")

        @step
        def work() -> dict[str, int]:
            return client.armed()

        decorated = step(client.armed)
        with step:
            assert (work(), decorated()) == ({"step": 2}, {"step": 2})
            with pytest.raises(hangwatch.HangwatchError, match="entered already"), step:
                pass
        assert work() == {"step": 1}

    def test_its_scope_is_its_place_by_default(self, client: QuietClient) -> None:
        @hangwatch.expires(60)
        def work() -> dict[str, int]:
            return client.armed()

        line = inspect.getsourcelines(work)[1]
        assert work() == {f"{__file__}#{line}": 1}

    def test_of_a_coroutine_function(self, client: QuietClient) -> None:
        @hangwatch.expires(60, "fetch")
        async def fetch(at_once: asyncio.Barrier) -> dict[str, int]:
            await at_once.wait()
            found = client.armed()
            await at_once.wait()
            return found

        async def main() -> list[dict[str, int]]:
            barrier = asyncio.Barrier(3)
            return await asyncio.gather(*(fetch(barrier) for _ in range(3)))

        assert inspect.iscoroutinefunction(fetch)
        assert asyncio.run(main()) == [{"fetch": 3}] * 3
        assert client.armed() == {}

    def test_of_a_generator_only_while_it_is_at_work(self, client: QuietClient) -> None:
        seen = []

        @hangwatch.expires(60, "generate")
        def generate() -> Generator[int, str, str]:
            seen.append(client.armed())
            try:
                got = yield 1
                seen.append(client.armed())
                assert got == "sent"
                yield 2
            except KeyError:
                seen.append(client.armed())
                yield 3
            finally:
                seen.append(client.armed())
            return "returned"

        assert inspect.isgeneratorfunction(generate)
        generator = generate()
        assert next(generator) == 1
        assert client.armed() == {}
        assert generator.send("sent") == 2
        assert client.armed() == {}
        assert generator.throw(KeyError()) == 3
        assert client.armed() == {}
        with pytest.raises(StopIteration) as stop:
            next(generator)
        assert stop.value.value == "returned"
        assert seen == [{"generate": 1}] * 4
        assert client.armed() == {}

    def test_of_a_generator_that_is_closed_or_fails(self, client: QuietClient) -> None:
        ended = []

        @hangwatch.expires(60, "generate")
        def generate() -> Iterator[int]:
            try:
                yield 1
                raise ValueError("mine")
            finally:
                ended.append(client.armed())

        generator = generate()
        next(generator)
        with pytest.raises(ValueError, match="mine"):
            next(generator)
        generator = generate()
        next(generator)
        generator.close()  # type: ignore[attr-defined]
        assert ended == [{"generate": 1}] * 2
        assert client.armed() == {}

    def test_of_an_async_generator(self, client: QuietClient) -> None:
        @hangwatch.expires(60, "stream")
        async def stream() -> AsyncGenerator[dict[str, int], str]:
            try:
                got = yield client.armed()
                assert got == "sent"
                await asyncio.sleep(0)
                yield client.armed()
            except KeyError:
                yield {"thrown": 1}

        async def main() -> None:
            assert inspect.isasyncgenfunction(stream)
            async for found in stream():
                assert found == {"stream": 1}
                assert client.armed() == {}
                break
            generator = stream()
            assert await anext(generator) == {"stream": 1}
            assert await generator.asend("sent") == {"stream": 1}
            assert await generator.athrow(KeyError()) == {"thrown": 1}
            with pytest.raises(StopAsyncIteration):
                await anext(generator)
            generator = stream()
            await anext(generator)
            await generator.aclose()

        asyncio.run(main())
        assert client.armed() == {}

    @pytest.mark.parametrize("what", [int, classmethod(print), 3])
    def test_of_nothing_else(self, what: object) -> None:
        with pytest.raises(TypeError, match="decorates functions"):
            hangwatch.expires(60)(what)  # type: ignore[type-var]


class TestAsync:
    def test_many_tasks_on_one_line_have_a_timer_each(self, client: QuietClient) -> None:
        async def work(after: float, barrier: asyncio.Barrier) -> None:
            async with hangwatch.expires(after) as timer:
                await barrier.wait()
                assert remains(timer, after)
                timer.renew(after + 500)
                await barrier.wait()
                assert remains(timer, after + 500), "it was this task's that was renewed"
                (count,) = client.armed().values()
                assert count == 5
                await barrier.wait()

        async def main() -> None:
            barrier = asyncio.Barrier(5)
            await asyncio.gather(*(work(1000.0 * n, barrier) for n in range(1, 6)))

        asyncio.run(main())
        assert client.armed() == {}

    def test_it_ends_when_the_body_fails_and_in_an_exit_stack(self, client: QuietClient) -> None:
        async def main() -> None:
            with pytest.raises(ZeroDivisionError):
                async with hangwatch.expires(60, "fails"):
                    raise ZeroDivisionError
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(hangwatch.expires(60, "in a stack"))
                assert client.armed() == {"in a stack": 1}
            assert client.armed() == {}
            timer = hangwatch.expires(60, "without with")
            assert await timer.__aenter__() is timer
            assert client.armed() == {"without with": 1}
            await timer.__aexit__(None, None, None)

        asyncio.run(main())
        assert client.armed() == {}

    def test_another_task_may_leave_it(self, client: QuietClient) -> None:
        """An async generator that is closed late is finalised by a task of the loop's."""

        async def items() -> AsyncIterator[int]:
            async with hangwatch.expires(60, "left open"):
                yield 1
                yield 2

        async def main() -> None:
            generator = items()
            await anext(generator)
            assert client.armed() == {"left open": 1}
            await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]
            assert client.armed() == {}

        asyncio.run(main())


class TestWatch:
    def test_each_step_and_never_the_body(self, client: QuietClient) -> None:
        def load() -> Iterator[dict[str, int]]:
            for _ in range(3):
                yield client.armed()

        steps = 0
        for found in hangwatch.watch(load(), after=60, scope="load"):
            assert found == {"load": 1}
            assert client.armed() == {}
            steps += 1
        assert steps == 3

    def test_it_is_as_long_as_what_it_iterates_over(self) -> None:
        watched = hangwatch.watch([1, 2, 3], after=60)
        assert len(watched) == 3
        with quiet_page():
            assert [list(watched), list(watched)] == [[1, 2, 3]] * 2, "it may be iterated again"
        with pytest.raises(TypeError):
            len(hangwatch.watch(iter([1]), after=60))
        assert hangwatch.watch(iter([]), after=60)
        assert not hangwatch.watch([], after=60)

    def test_its_scope_is_its_place_by_default(self, client: QuietClient) -> None:
        def load() -> Iterator[dict[str, int]]:
            yield client.armed()

        here = inspect.currentframe()
        assert here is not None
        (found,) = list(hangwatch.watch(load(), after=60))
        assert found == {f"{__file__}#{here.f_lineno - 1}": 1}

    def test_what_fails_to_give_the_next_item(self, client: QuietClient) -> None:
        def load() -> Iterator[int]:
            yield 1
            raise OSError("the mount is dead")

        with pytest.raises(OSError, match="dead"):
            list(hangwatch.watch(load(), after=60))
        assert client.armed() == {}

    def test_async(self, client: QuietClient) -> None:
        async def load() -> AsyncIterator[dict[str, int]]:
            for _ in range(3):
                await asyncio.sleep(0)
                yield client.armed()

        async def main() -> None:
            found = []
            async for item in hangwatch.watch(load(), after=60, scope="load"):
                assert client.armed() == {}
                found.append(item)
            assert found == [{"load": 1}] * 3

        asyncio.run(main())

    def test_bad_arguments(self, client: QuietClient) -> None:
        with pytest.raises(TypeError, match="not iterable"):
            hangwatch.watch(3, after=60)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="after must be positive"):
            hangwatch.watch([1], after=0)


class TestHandle:
    def test_renew_cancel_remaining(self, client: QuietClient) -> None:
        with hangwatch.expires(1000, "work") as timer:
            assert remains(timer, 1000)
            timer.renew(2000)
            assert remains(timer, 2000)
            timer.renew()
            assert remains(timer, 1000), "by default, the block's own"
            timer.cancel()
            assert timer.remaining() == inf
            assert client.armed() == {"work": 1}, "still open"
            timer.renew()
            assert remains(timer, 1000)

    def test_a_block_in_a_cancelled_one_is_watched(self, client: QuietClient) -> None:
        with hangwatch.expires(1000, "outer") as timer:
            timer.cancel()
            with hangwatch.expires(1000, "inner"):
                assert client.armed() == {"outer": 1, "inner": 1}

    def test_of_its_own_block_in_recursion(self, client: QuietClient) -> None:
        def descend(depth: int) -> None:
            with hangwatch.expires(1000 * (depth + 1), "recursive") as timer:
                if depth:
                    descend(depth - 1)
                assert remains(timer, 1000 * (depth + 1))
                timer.renew(10_000)
                assert remains(timer, 10_000)

        descend(5)

    def test_from_another_thread(self, client: QuietClient) -> None:
        with hangwatch.expires(1000, "work") as timer:
            heart = threading.Thread(target=timer.renew, args=[2000])
            heart.start()
            heart.join()
            assert remains(timer, 2000)

    def test_without_with(self, client: QuietClient) -> None:
        timer = hangwatch.expires(1000, "without with")
        timer.__enter__()
        timer.renew(2000)
        assert remains(timer, 2000)
        timer.__exit__(None, None, None)
        with pytest.raises(hangwatch.HangwatchError, match="not open"):
            timer.renew()

    def test_of_a_block_that_another_thread_has_left(self, client: QuietClient) -> None:
        timer = hangwatch.expires(1000, "handed over")
        with contextlib.ExitStack() as stack:
            stack.enter_context(timer)
            closer = threading.Thread(target=stack.pop_all().close)
            closer.start()
            closer.join()
            with hangwatch.expires(60, "handed over"):
                for act in (timer.renew, timer.cancel, timer.remaining):
                    with pytest.raises(hangwatch.HangwatchError, match="not open"):
                        act()

    def test_outside_of_its_block(self, client: QuietClient) -> None:
        timer = hangwatch.expires(1000, "work")
        for act in (timer.renew, timer.cancel, timer.remaining):
            with pytest.raises(hangwatch.HangwatchError, match="not open"):
                act()
        with timer:
            pass
        with pytest.raises(hangwatch.HangwatchError, match="not open"):
            timer.renew()
        assert client.armed() == {}

    @pytest.mark.parametrize("after", [0, -1, inf, float("nan")])
    def test_a_bad_interval(self, client: QuietClient, after: float) -> None:
        with hangwatch.expires(1000, "work") as timer:
            with pytest.raises(ValueError, match="after must be positive"):
                timer.renew(after)
            assert remains(timer, 1000)

    def test_where_nobody_watches_it_does_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HANGWATCH_ADDRESS", "off")

        def descend(depth: int) -> None:
            with hangwatch.expires(1000, "off") as timer:
                if depth:
                    descend(depth - 1)
                timer.renew()
                timer.cancel()
                assert timer.remaining() == inf
                beat = threading.Thread(target=timer.renew)
                beat.start()
                beat.join()

        descend(3)
        with hangwatch.paused("off", 60) as pause:
            pause.renew()

    def test_of_a_user_written_client(self) -> None:
        calls: list[str] = []

        class Own(hangwatch.TimerClient):
            def acquire(self, scope_id: str, expiration_time: float) -> None:
                calls.append("acquire")

            def release(self, scope_id: str) -> None:
                calls.append("release")

        with hangwatch.expires(1000, "own", client=Own()) as timer:
            assert remains(timer, 1000)
            for act in (timer.renew, timer.cancel):
                with pytest.raises(hangwatch.UnsupportedError, match="Own can't"):
                    act()
        assert calls == ["acquire", "release"], "once a block"
        with pytest.raises(hangwatch.UnsupportedError, match="pause"):
            hangwatch.paused("own", 60, client=Own()).__enter__()


def test_a_pause_needs_a_limit(client: QuietClient) -> None:
    with pytest.raises(TypeError, match="after"):
        hangwatch.paused("no limit")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="finite"):
        hangwatch.paused("for ever", after=inf)
