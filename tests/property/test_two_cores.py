"""The core in C and the one in Python do the same, whatever is done, and in whatever order.

Both are loaded once more, beside the one that hangwatch runs, each with a page and hooks of its
own. Every step is taken with both: what they answer is compared, and then their pages, byte by
byte. Times are compared with a tolerance. Which of several free slots is given out is nobody's
promise: once that may differ, only what belongs to open blocks is compared.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import hangwatch.worker
from hangwatch.page import layout
from support.sizes import Size, short_and_long

FOLDER = Path(hangwatch.worker.__file__).parent
BUILT = next(FOLDER.glob("_core*.so"), None)
CAPACITY = 6
TOLERANCE = 10.0
"""Seconds; less than the limits below differ by."""
THREADS = ("main", "one", "two")
SCOPES = ("a", "b", "c", 0, 1)
"""Names; or which of the places below calls without one."""
LIMITS = (60, 90.5, 1000)
CHOICES: tuple[tuple[str] | None, ...] = (None, None, None, ("asks",), ("other",), ("fails",))
"""What the caller chose; here it says what the hooks do."""
WRONG: tuple[tuple[Any, ...], ...] = (
    (0,),
    (-1, "x"),
    (float("nan"),),
    (float("inf"), "x"),
    (10**400,),
    ("5",),
    (True,),
    (5, ""),
    (5, 7),
    (5, b"x"),
    (5, "x", None),
)
TIMES = (layout.DEADLINE, layout.ENTERED)

pytestmark = [
    pytest.mark.skipif(BUILT is None, reason="the core in C was not built"),
    pytest.mark.timeout(900),
]


def fresh(path: Path | None) -> ModuleType:
    """Load another instance of a core."""
    assert path is not None
    name = f"hangwatch.worker.{path.name.partition('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def here(core: Core, limit: float) -> Any:
    return core.module.expires(limit)


def there(core: Core, limit: float) -> Any:
    return core.module.expires(after=limit)


PLACES = (here, there)


class Other:
    """What ends with a block; see `hangwatch.worker.blocks.Other`."""

    def __init__(self, said: list[tuple[object, ...]], *, fails: bool) -> None:
        self._said = said
        self._fails = fails

    def exit(self, kind: object, error: object, traceback: object) -> None:
        self._said.append(("exit", kind))
        if self._fails:
            raise RuntimeError("the end fails")


class Core:
    """One core, its page, the blocks that were made with it, and what it asked of its hooks."""

    def __init__(self, path: Path | None) -> None:
        self.module = fresh(path)
        self.blocks: dict[int, Any] = {}
        self.said: list[tuple[object, ...]] = []
        self.rings = "no"
        self.loop_tasks: dict[object, object] = {}
        self.module.use(self, None)
        self.module.ask_asyncio(asyncio._get_running_loop, self.loop_tasks)
        self.new_page()

    def new_page(self, watched: bool = True) -> None:
        size = layout.HEADER_BYTES + CAPACITY * layout.SLOT_BYTES
        self.page = mmap.mmap(-1, size)
        self.words = memoryview(self.page).cast("d")
        self.slots = self.module.Slots(self.page, self.ring if watched else None, CAPACITY)

    def ring(self) -> bool:
        self.said.append(("ring",))
        if self.rings == "fails":
            raise RuntimeError("the ring fails")
        return self.rings == "connects"

    # -- hooks

    def declare(self, *arguments: object, **named: object) -> object:
        raise ValueError("what is not plain")

    def enter(self, block: Any) -> Other | None:
        choice = None if block.asked is None else block.asked[0]
        self.said.append(("enter", block.after, block.lasti >= 0, choice))
        if choice == "fails":
            raise RuntimeError("entering fails")

        scope = block.scope if isinstance(block.scope, str) else block.scope.co_name

        def details() -> bytes:
            thread = threading.current_thread()
            said = layout.SlotDetails(
                block.after, threading.get_ident(), thread.native_id or 0, thread.name, scope
            )
            return layout.pack_details(said, keep_end=False)

        nests = scope not in ("b", there.__name__)
        is_armed = self.slots.arm(block, details, self.task(), choice is None, nests)
        self.said.append(("armed", is_armed))
        return Other(self.said, fails=block.after == 1000) if choice == "other" else None

    def task(self) -> float:
        loop = asyncio._get_running_loop()
        return 0.0 if loop is None else float(id(self.loop_tasks.get(loop)))

    def switches_within_a_thread(self) -> bool:
        return self.task() != 0.0

    def renew(self, block: Any, after: float | None) -> None:
        self.said.append(("renew", after))
        if block.place is None:
            raise RuntimeError("the block is not open")

    def refuse_again(self) -> None:
        raise RuntimeError("entered already")

    # -- what is done with it

    def make(self, number: int, scope: str | int, limit: float, choice: Any) -> None:
        if isinstance(scope, int) and choice is None:
            self.blocks[number] = PLACES[scope](self, limit)
        elif isinstance(scope, int):
            self.blocks[number] = self.module.block(limit, PLACES[scope].__code__, 2, choice)
        elif choice is None:
            self.blocks[number] = self.module.expires(limit, scope)
        else:
            self.blocks[number] = self.module.block(limit, scope, -1, choice)

    def place(self, number: int) -> tuple[int, float] | None:
        place = self.blocks[number].place
        return None if place is None else (place[1], place[2])

    def row(self, index: int, page: mmap.mmap) -> list[object]:
        """Return a slot's words, without its times, and then the rest of its bytes."""
        at = layout.slot_byte(index)
        words: list[object] = list(struct.unpack_from("=14d", page, at))
        for word in TIMES:
            words[word] = words[word] != 0.0
        words[layout.DEADLINE + 1] = None
        words[layout.IDENT : layout.TASK] = []  # no doubles
        return [
            *words,
            page[at + layout.IDENT * 8 : at + layout.TASK * 8],
            page[at + 120 : at + layout.SLOT_BYTES],
        ]

    def row_of(self, number: int) -> list[object]:
        """Return the slot of an open block, whichever it is."""
        memory, index, entry = self.blocks[number].place
        words = self.words_of(memory, index)
        row = self.row(index, memory)
        for word in (layout.SKIPPED_ENTRY, layout.RENEWED_ENTRY, layout.RAISED_ENTRY):
            row.append(words[word] == entry)
        assert words[layout.ENTRY] == entry
        return [entry % layout.GENERATION, row[layout.DEADLINE], row[layout.LIMIT], *row[-5:]]

    def words_of(self, memory: mmap.mmap, index: int) -> tuple[float, ...]:
        return struct.unpack_from("=14d", memory, layout.slot_byte(index))


class Worker:
    """A thread that does what it is given."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (action := self._inbox.get()) is not None:
            self._answers.put(action())
            del action

    def do(self, action: Callable[[], object]) -> object:
        self._inbox.put(action)
        return self._answers.get()

    def end(self) -> None:
        self._inbox.put(None)
        self._thread.join()


def answer_of(action: Callable[[], object]) -> object:
    """Return what an action returns, or raises; the exception itself is gone by then."""
    try:
        return action()
    except Exception as error:
        return type(error), str(error)


def _pick(what: str) -> st.SearchStrategy[int]:
    """Draw one of the machine's blocks."""
    return st.runner().flatmap(lambda machine: st.sampled_from(getattr(machine, what)() or [-1]))


WHO = st.sampled_from(THREADS)
ANY = _pick("any_blocks")
OPEN = _pick("open_blocks")


class TwoCores(RuleBasedStateMachine):
    """Steps that are taken with both cores."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.cores = [Core(FOLDER / "core.py"), Core(BUILT)]
        self.workers = {who: Worker(who) for who in THREADS if who != "main"}
        self.made = 0
        self.keys: dict[str, set[object]] = {who: set() for who in THREADS}
        self.last: dict[str, tuple[str | int, float, Any]] = {}
        self.same_slots = True
        self.same_keys = True
        self.loop = object()
        self.promise(1e6)

    def teardown(self) -> None:
        self.both("main", lambda core: core.module.end())
        self.pages_say_the_same()
        self.both("one", lambda core: core.make(-2, "after the end", 60, None))
        self.both("one", lambda core: core.blocks[-2].__enter__() and core.place(-2))
        asyncio._set_running_loop(None)
        for core in self.cores:
            core.blocks.clear()
        for worker in self.workers.values():
            worker.end()

    def any_blocks(self) -> list[int]:
        return sorted(self.cores[0].blocks)

    def open_blocks(self) -> list[int]:
        blocks = self.cores[0].blocks
        return sorted(number for number in blocks if blocks[number].place is not None)

    def both(self, who: str, action: Callable[[Core], object]) -> object:
        """Have a thread do something with either core; return what both answer."""
        TwoCores.steps += 1
        answers = []
        for core in self.cores:
            core.said.clear()
            asked = partial(answer_of, partial(action, core))
            answer = asked() if who == "main" else self.workers[who].do(asked)
            said = [one for one in core.said if self.same_keys or one[0] not in ("enter", "armed")]
            answers.append((answer, said))
        assert answers[0] == answers[1]
        return answers[0][0]

    def place(self, number: int) -> Callable[[Core], object]:
        def ask(core: Core) -> object:
            place = core.place(number)
            if place is None or self.same_slots:
                return place
            return place[1] % layout.GENERATION if self.same_keys else "some place"

        return ask

    def differ(self, who: str = "") -> None:
        """From now on, the cores may give out other slots: several were given back at once."""
        if not who or len(self.keys[who]) > 1:
            self.same_slots = False

    @initialize(until=st.sampled_from((0.0, 75.0, 1e6)))
    def begin(self, until: float) -> None:
        self.promise(until)

    @rule(until=st.sampled_from((0.0, 75.0, 1e6)))
    def promise(self, until: float) -> None:
        now = time.monotonic()
        for core in self.cores:
            core.words[layout.WATCH_UNTIL] = now + until if until else 0.0

    @rule(rings=st.sampled_from(("no", "no", "connects", "fails")))
    def ring_so(self, rings: str) -> None:
        for core in self.cores:
            core.rings = rings

    @rule(
        who=WHO,
        scope=st.sampled_from(SCOPES),
        limit=st.sampled_from(LIMITS),
        choice=st.sampled_from(CHOICES),
    )
    def enter(self, who: str, scope: str | int, limit: float, choice: Any) -> None:
        number, self.made = self.made, self.made + 1
        self.both(who, lambda core: core.make(number, scope, limit, choice))
        self.enter_again(who, number)
        self.keys[who].add((scope, limit, choice))
        self.last[who] = scope, limit, choice

    @rule(who=WHO)
    def enter_what_it_entered_last(self, who: str) -> None:
        if who in self.last:
            self.enter(who, *self.last[who])

    @rule(who=WHO, number=ANY)
    def enter_again(self, who: str, number: int) -> None:
        if number >= 0:
            if len(self.open_blocks()) + sum(map(len, self.keys.values())) >= CAPACITY:
                self.differ()  # slots change hands

            def enter(core: Core) -> bool:
                return core.blocks[number].__enter__() is core.blocks[number]

            self.both(who, enter)
            self.both("main", self.place(number))

    @rule(who=WHO, number=OPEN)
    def leave(self, who: str, number: int) -> None:
        self.leave_any(who, number, by_exception=False)

    @rule(who=WHO, number=ANY, by_exception=st.booleans())
    def leave_any(self, who: str, number: int, by_exception: bool) -> None:
        if number >= 0:
            what = (KeyError, KeyError(), None) if by_exception else (None, None, None)
            self.both(who, lambda core: core.blocks[number].__exit__(*what))
            self.both("main", self.place(number))

    @rule(who=WHO, number=ANY)
    def forget(self, who: str, number: int) -> None:
        if number in self.open_blocks():
            # In Python, its slot waits until somebody looks for any: another one is asked for.
            self.differ()
            self.same_keys = False
        if number >= 0:
            self.both(who, lambda core: core.blocks.pop(number) and None)

    @rule(who=WHO, number=st.one_of(ANY, OPEN), after=st.sampled_from((None, None, 5, 70)))
    def renew(self, who: str, number: int, after: float | None) -> None:
        arguments = () if after is None else (after,)
        if number >= 0:
            self.both(who, lambda core: core.blocks[number].renew(*arguments))

    @rule(number=ANY)
    def make_again(self, number: int) -> None:
        if number >= 0:
            new, self.made = self.made, self.made + 1

            def again(core: Core) -> None:
                old = core.blocks[number]
                core.blocks[new] = core.module.block(old.after, old.scope, old.lasti, old.asked)

            self.both("main", again)

    @rule(number=ANY)
    def ask(self, number: int) -> None:
        def facts(core: Core) -> object:
            block = core.blocks[number]
            others = block.other is None, block.asked
            # Within the instruction of a call, CPython 3.11 says another place to C.
            return block.after, block.scope, block.lasti >= 0, others

        if number >= 0:
            self.both("main", facts)

    @rule(
        arguments=st.sampled_from(WRONG),
        named=st.sampled_from(({}, {"after": 5}, {"scope": "x"}, {"grace": 1}, {"bad": 1})),
    )
    def call_wrongly(self, arguments: Any, named: dict[str, Any]) -> None:
        def call(core: Core) -> str:
            try:
                return type(core.module.expires(*arguments, **named)).__name__
            except (ValueError, TypeError):
                return "refused"

        self.both("main", call)

    @rule(who=WHO)
    def begin_or_end_a_loop(self, who: str) -> None:
        def turn() -> None:
            loop: Any = None if asyncio._get_running_loop() else self.loop
            asyncio._set_running_loop(loop)

        turn() if who == "main" else self.workers[who].do(turn)

    @rule(task=st.sampled_from(("task", "another", None)))
    def switch_to_a_task(self, task: str | None) -> None:
        for core in self.cores:
            core.loop_tasks[self.loop] = task

    @rule(who=st.sampled_from(THREADS[1:]))
    def end_a_thread(self, who: str) -> None:
        self.differ(who)
        self.keys[who].clear()
        self.workers[who].end()
        self.workers[who] = Worker(who)

    @rule(who=WHO)
    def pass_through_many_scopes(self, who: str) -> None:
        self.differ()

        def run(core: Core) -> None:
            for number in range(70):
                with core.module.expires(60, f"passing {number}"):
                    pass

        if all(core.rings != "fails" for core in self.cores):
            self.both(who, run)

    @rule()
    def forget_all_keys(self) -> None:
        self.differ()
        self.both("main", lambda core: core.module.forget_keys())

    @rule(watched=st.sampled_from((True, True, False)))
    def close_the_page(self, watched: bool) -> None:
        self.differ()

        def close(core: Core) -> None:
            core.slots.closed = True
            core.module.forget_keys()
            core.new_page(watched)

        self.both("main", close)

    @rule(by_c=st.booleans(), number=ANY)
    def fork(self, by_c: bool, number: int) -> None:
        """A child touches no page of its parent's, and has both cores do the same as well."""
        before = [bytes(core.page) for core in self.cores]
        readable, writable = os.pipe()
        pid = ctypes.PyDLL(None).fork() if by_c else os.fork()
        if pid == 0:
            said = b"?"
            try:
                said = repr(answer_of(lambda: self.in_the_child(number))).encode()
            finally:
                os.write(writable, said)
                os._exit(0)
        os.close(writable)
        with open(readable, "rb") as pipe:
            assert pipe.read() == b"None"
        os.waitpid(pid, 0)
        assert [bytes(core.page) for core in self.cores] == before

    def in_the_child(self, number: int) -> None:
        if number >= 0:
            self.both("main", lambda core: core.blocks[number].renew())
            self.both("main", lambda core: core.blocks[number].__exit__(None, None, None))
        self.both("main", lambda core: core.module.forks())
        self.enter("main", "a", 60, None)
        self.same_slots = False
        self.both("main", Core.new_page)
        self.promise(1e6)
        self.enter("main", "a", 60, None)
        self.enter("main", "a", 60, None)
        self.both("main", lambda core: core.blocks.clear())
        self.pages_say_the_same()

    @invariant()
    def pages_say_the_same(self) -> None:
        one, other = self.cores
        if self.same_slots:
            in_use = {core.words[layout.SLOTS_IN_USE] for core in self.cores}
            assert len(in_use) == 1
            for index in range(CAPACITY):
                assert one.row(index, one.page) == other.row(index, other.page)
                self.same_times(one.words_of(one.page, index), other.words_of(other.page, index))
        armed = [
            sum(core.words[layout.deadline_word(index)] != 0.0 for index in range(CAPACITY))
            for core in self.cores
        ]
        assert armed[0] == armed[1]
        for number in self.open_blocks():
            rows = one.row_of(number), other.row_of(number)
            assert rows[0][not self.same_keys :] == rows[1][not self.same_keys :]
            memory, index, _ = one.blocks[number].place
            memory_, index_, _ = other.blocks[number].place
            self.same_times(one.words_of(memory, index), other.words_of(memory_, index_))

    def same_times(self, one: tuple[float, ...], other: tuple[float, ...]) -> None:
        for word in TIMES:
            if word == layout.ENTERED and not any(map(_is_renewed, (one, other))):
                continue  # it speaks of an earlier block, or of none
            assert abs(one[word] - other[word]) < TOLERANCE


def _is_renewed(words: tuple[float, ...]) -> bool:
    return words[layout.RENEWED_ENTRY] == words[layout.ENTRY]


@short_and_long
def test_both_cores_do_the_same(size: Size) -> None:
    TwoCores.steps = 0
    how = settings(
        max_examples=size.of(30, 200, 600),
        stateful_step_count=40,
        report_multiple_bugs=False,
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(TwoCores, settings=how)
    print(f"{TwoCores.steps} steps")
