"""Whatever one worker does, and in whatever order: its page says what a small model says.

A real process is told, step by step, which of its threads and tasks enters or leaves a block,
handles a timer or pauses; see `support.one_worker`. Another reads its page, as a watcher would.
The worker tells when each step began and ended, so the model knows each time only to lie
between two others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf
from time import monotonic
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

import hangwatch
from hangwatch.page import layout
from hangwatch.page.view import Armed
from hangwatch.watcher.page_reader import PageReader
from support.block_model import Between, Block, Model, Timer, exactly, later
from support.one_worker import ALL, LOOPING, PLACES, TASKS, THREADS, Answer, Conductor
from support.sizes import Size, short_and_long

STEPS_OF_A_RUN = 100
CHAIN = 33
"""A report names a block, and at most 32 around it."""

pytestmark = pytest.mark.core


def _of(find: Callable[[Any], Any]) -> st.SearchStrategy[Any]:
    """Draw one of what is found in the machine as it is at that moment."""
    return st.runner().flatmap(lambda machine: st.sampled_from(find(machine)))


ANYBODY = _of(lambda machine: machine.present())
LEAVING = _of(lambda machine: machine.leavings())
# Rather one's own than anybody's, of which most are not open.
HANDLE = st.one_of(
    _of(lambda machine: machine.own_handles() or machine.all_handles()),
    _of(lambda machine: machine.all_handles()),
)
# Entered through an ExitStack, which calls the methods by hand; in a task, by `async with`.
How = dict[str, bool]
HOW = st.fixed_dictionaries({"by_stack": st.booleans(), "by_async": st.booleans()})
SELDOM = st.sampled_from((False, False, True))
SCOPES = st.sampled_from(("a", "b", "c", "d", *PLACES))
# Of the small integers Python has one object each, of all others a new one for each block.
LIMITS = st.sampled_from((60, 90, 60.5, 1000))
# The shortest is over before the next step.
INTERVALS = st.sampled_from((None, 30, 2000.5, 1e-6))


class OneWorker(RuleBasedStateMachine):
    """Steps of one worker, and the model's."""

    steps = 0
    worker: Conductor | None = None

    def __init__(self) -> None:
        super().__init__()
        if OneWorker.worker is None or not OneWorker.worker.is_alive:
            OneWorker.worker = Conductor()
        self.conductor = OneWorker.worker
        self.model = Model()
        self.timers: list[Timer] = []
        self.loop_runs = False
        self.idents: dict[str, int] = {}
        began = self.conductor.tell("", "begin a run")
        path = f"/proc/{self.conductor.pid}/fd/{began['descriptor']}"
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.reader = PageReader(descriptor)
        os.close(descriptor)

    def teardown(self) -> None:
        self.reader.close()
        if self.conductor.is_alive:
            if self.loop_runs:
                self.conductor.tell("loop", "end the loop")
            for who in THREADS:
                self.conductor.tell(who, "leave", levels=ALL, by_exception=False)
            self.conductor.tell("", "end the run")

    def present(self) -> list[str]:
        """Return the threads and tasks that can be told something."""
        if self.loop_runs:
            return [who for who in (*THREADS, *TASKS) if who != LOOPING]
        return list(THREADS)

    def leavings(self) -> list[tuple[str, int]]:
        """Return who might leave how many blocks at once; the more often, the more likely."""
        return [(who, levels) for who in self.present() for levels in (1, 1, 1, 2, 3, ALL)]

    def own_handles(self) -> list[tuple[str, Timer]]:
        return [(who, block.timer) for who in self.present() for block in self.model.blocks[who]]

    def all_handles(self) -> list[tuple[str, Timer]]:
        return [(who, timer) for who in self.present() for timer in self.timers]

    def tell(self, who: str, do: str, **rest: object) -> tuple[Answer, Between]:
        OneWorker.steps += 1
        answer = self.conductor.tell(who, do, **rest)
        assert "error" not in answer, answer["error"]
        if who != "loop":
            self.idents[who] = answer["ident"]
        return answer, Between(answer["before"], answer["after"])

    def armed(self) -> dict[tuple[int, float], Armed]:
        return {(slot.index, slot.entry): slot for slot in self.reader.armed()}

    def enter(self, who: str, timer: Timer, how: How, **new: object) -> None:
        _, at = self.tell(who, "enter", timer=timer.name, **how, **new)
        before = {block.slot for block in self.model.open()}
        (slot,) = self.armed().keys() - before
        self.model.enter(who, timer, at).slot = slot

    def enter_a_new(self, who: str, pauses: bool, scope: str, limit: float, how: How) -> None:
        timer = Timer(f"timer {len(self.timers)}", scope, limit, pauses)
        self.timers.append(timer)
        self.enter(who, timer, how, scope=scope, limit=limit, pauses=pauses)

    # Each run chooses a few of the rules; this way, it has blocks and tasks whichever it chooses.
    @initialize(
        loop=st.booleans(),
        blocks=st.lists(
            st.tuples(st.integers(0, 5), SELDOM, SCOPES, LIMITS, HOW), min_size=1, max_size=6
        ),
    )
    def begin(self, loop: bool, blocks: list[tuple[int, bool, str, float, How]]) -> None:
        if loop:
            self.begin_the_loop()
        for number, pauses, scope, limit, how in blocks:
            who = self.present()[number % len(self.present())]
            self.enter_a_new(who, pauses, scope, limit, how)
            self.the_page_says_the_same()

    @rule(who=ANYBODY, scope=SCOPES, limit=LIMITS, how=HOW)
    def enter_a_block(self, who: str, scope: str, limit: float, how: How) -> None:
        self.enter_a_new(who, False, scope, limit, how)

    @rule(who=ANYBODY, scope=SCOPES, limit=LIMITS, how=HOW)
    def enter_a_pause(self, who: str, scope: str, limit: float, how: How) -> None:
        self.enter_a_new(who, True, scope, limit, how)

    @rule(handle=HANDLE)
    def enter_again(self, handle: tuple[str, Timer]) -> None:
        """One object is one block."""
        answer, _ = self.tell(handle[0], "__enter__", timer=handle[1].name, arguments=())
        assert answer["refused"] is hangwatch.HangwatchError

    @rule(handle=HANDLE)
    def leave_one(self, handle: tuple[str, Timer]) -> None:
        """Call ``__exit__`` by hand, in any thread or task; the statement's own does nothing."""
        who, timer = handle
        _, at = self.tell(who, "__exit__", timer=timer.name, arguments=(None, None, None))
        in_loop = self.loop_runs and who == LOOPING
        self.model.leave_one(who, timer, at, in_loop=in_loop)

    @rule(leaving=LEAVING, by_exception=st.booleans())
    def leave(self, leaving: tuple[str, int], by_exception: bool) -> None:
        """Leave blocks; to leave more than there are is to end, and another one begins."""
        who, levels = leaving
        _, at = self.tell(who, "leave", levels=levels, by_exception=by_exception)
        if levels > len(self.model.blocks[who]):
            self.start(who)
        self.model.leave(who, levels, at)

    @rule(by_exception=st.booleans())
    def leave_all_pauses(self, by_exception: bool) -> None:
        for who in self.present():
            blocks = self.model.blocks[who]
            pauses = [depth for depth, block in enumerate(blocks) if block.timer.pauses]
            if pauses:
                self.leave((who, len(blocks) - pauses[0]), by_exception)
                self.the_page_says_the_same()

    @rule(who=ANYBODY, levels=st.integers(1, 3), by_exception=st.booleans(), how=HOW)
    def go_round(self, who: str, levels: int, by_exception: bool, how: How) -> None:
        """Leave blocks and enter the same again, as a loop does."""
        timers = [block.timer for block in self.model.blocks[who][-levels:]]
        if timers:
            self.leave((who, len(timers)), by_exception)
        for timer in timers:
            self.the_page_says_the_same()
            self.enter_a_new(who, timer.pauses, timer.scope, timer.limit, how)

    def start(self, who: str) -> None:
        if who in TASKS:
            self.conductor.tell("loop", "start a task", task=who)
        else:
            self.conductor.tell(who, "start a thread")

    @rule(handle=HANDLE, interval=INTERVALS)
    def renew(self, handle: tuple[str, Timer], interval: float | None) -> None:
        arguments = () if interval is None else (interval,)
        block, _, at = self.handle(*handle, "renew", *arguments)
        if block is not None:
            block.renew(interval, at)

    @rule(handle=HANDLE)
    def cancel(self, handle: tuple[str, Timer]) -> None:
        block, *_ = self.handle(*handle, "cancel")
        if block is not None:
            block.cancel()

    @rule(handle=HANDLE)
    def ask_what_remains(self, handle: tuple[str, Timer]) -> None:
        block, answer, at = self.handle(*handle, "remaining")
        if block is None:
            return
        deadline = self.armed()[block.slot].deadline
        if block.is_cancelled:
            assert answer["value"] == inf
        elif self.model.paused_since is None or block.timer.pauses:
            assert answer["value"] in exactly(deadline) - at
        else:
            since = later(self.model.paused_since, block.began)
            assert answer["value"] in exactly(deadline) - since, "it stands still"

    def handle(
        self, who: str, timer: Timer, do: str, *arguments: float
    ) -> tuple[Block | None, Answer, Between]:
        """Use a timer; return the block whose timer it is, if it does what it is told."""
        answer, at = self.tell(who, do, timer=timer.name, arguments=arguments)
        block = self.model.block_of(timer)
        refused: type[Exception] | None = None
        if block is None:
            refused = hangwatch.HangwatchError
        elif do == "cancel" and timer.pauses:
            block, refused = None, hangwatch.UnsupportedError
        assert answer["refused"] is refused
        return block, answer, at

    @rule(who=ANYBODY, count=st.sampled_from((1, 20)))
    def pass_through_others(self, who: str, count: int) -> None:
        """Slots change hands: more scopes than a thread keeps slots for."""
        self.tell(who, "pass through", count=count)

    @rule(task=_of(lambda machine: (*TASKS, *TASKS, None) if machine.loop_runs else (None,)))
    def cancel_a_task(self, task: str | None) -> None:
        """Or, for want of one, end the loop or begin it."""
        if task is not None:
            _, at = self.tell("loop", "start a task", task=task)
            self.model.leave(task, ALL, at)
        elif self.loop_runs:
            _, at = self.tell("loop", "end the loop")
            for who in TASKS:
                self.model.leave(who, ALL, at)
            self.loop_runs = False
        else:
            self.begin_the_loop()

    def begin_the_loop(self) -> None:
        self.tell(LOOPING, "begin the loop")
        self.loop_runs = True

    @rule(seconds=st.sampled_from((0.0, 75.0, 1e6)))
    def promise(self, seconds: float) -> None:
        """Blocks that end before it ring, those that end after it are quiet."""
        OneWorker.steps += 1
        self.reader.promise(monotonic() + seconds)

    @invariant()
    def the_page_says_the_same(self) -> None:
        armed = self.armed()
        assert armed.keys() == {block.slot for block in self.model.open()}
        assert len({slot.index for slot in armed.values()}) == len(self.model.open())
        tasks: dict[str, set[float]] = {}
        for who in self.model.blocks:
            chain: list[tuple[str, float, int, str]] = []
            blocks = self.model.open_of(who)
            # What was overdue when a pause began is not moved when it ends.
            is_in_order = all(a.entered.high <= b.entered.low for a, b in pairwise(blocks))
            for block in blocks:
                slot = armed[block.slot]
                thread = LOOPING if who in TASKS else who
                name = block.timer.scope
                chain.insert(0, (name, block.timer.limit, self.idents[who], thread))
                if is_in_order:
                    assert [_said(details) for details in self.reader.chain(slot)] == chain[:CHAIN]
                details = self.reader.details(slot)
                assert details is not None
                assert self.reader.pauses(slot) == details.pauses == block.timer.pauses
                assert self.reader.was_skipped(slot) == block.is_skipped
                tasks.setdefault(who, set()).add(self.reader.task(slot))
                assert slot.deadline in block.deadline
                self.check_spent(block, slot)
        found = [task for who in tasks if who in TASKS for task in tasks[who]]
        assert len(set(found)) == len(found), "one for all blocks of a task, each another one"
        assert 0.0 not in found
        assert all(tasks[who] == {0.0} for who in tasks if who in THREADS)
        paused = any(block.timer.pauses for block in self.model.open())
        assert self.reader.is_paused() == paused

    def check_spent(self, block: Block, slot: Armed) -> None:
        now = monotonic()
        spent = self.reader.spent(slot, now)
        # A page keeps deadlines, and a float of the clock's has steps of up to 4 ns for a year.
        assert spent.limit == pytest.approx(block.interval, abs=1e-8)
        assert spent.inside in exactly(now) - block.entered
        if block.is_renewed and not block.is_cancelled:
            assert spent.since_renewal is not None
            assert spent.since_renewal in exactly(now) - block.began
        else:
            assert spent.since_renewal is None


def _said(details: layout.SlotDetails) -> tuple[str, float, int, str]:
    name = details.scope.rpartition("/")[2]
    return name, details.limit, details.ident, details.thread_name


@pytest.fixture
def steps() -> Iterator[Callable[[], int]]:
    """Count the steps of this test; afterwards, end the worker."""
    OneWorker.steps = 0
    yield lambda: OneWorker.steps
    if OneWorker.worker is not None and OneWorker.worker.is_alive:
        OneWorker.worker.close()


@short_and_long
def test_the_page_says_what_the_worker_does(steps: Callable[[], int], size: Size) -> None:
    enough = size.of(500, 5_000, 10_000)
    how = settings(
        max_examples=enough * 13 // 10 // STEPS_OF_A_RUN,
        stateful_step_count=STEPS_OF_A_RUN,
        report_multiple_bugs=False,
        # Not to explain: that traces, and makes shrinking a failure several times slower.
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
    )
    while steps() < enough:  # a few runs are cut short
        run_state_machine_as_test(OneWorker, settings=how)
    print(f"{steps()} steps")
