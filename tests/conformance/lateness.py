"""Rows about when a worker is judged: in time, by the right clock, never on stale data."""

from __future__ import annotations

import ctypes
import os
import time

from conformance.clock import SteppedClock
from conformance.row import LOCAL, Outcome, promise
from conformance.stage import (
    BEFORE_A_ROUND,
    SOON,
    Body,
    Server,
    Stage,
    hang,
    hold_the_gil_until,
    killed,
)
from support.processes import Gate, Watched


@promise("A hang is ended soon after its limit at the default `max_interval`.")
def late(stage: Stage) -> Outcome:
    """A worker hangs, and everything else is as it is by default."""
    stage.play(stage.hang_after(1))
    return stage.must_be_killed(within=min(stage.window, BEFORE_A_ROUND))


@promise("A block is armed when it is entered, even if it keeps the GIL from then on.", LOCAL)
def gil_arm(stage: Stage) -> Outcome:
    """The first thing in a block is a C call that keeps the GIL."""
    never, _ = os.pipe()

    def body() -> None:
        stuck = ctypes.PyDLL(None).read
        buffer = ctypes.create_string_buffer(1)
        stage.say("hangs")
        with stage.timer.expires(1, "step"):
            stuck(never, buffer, 1)

    stage.play(*[body] * 3, max_interval=SOON)
    return stage.must_be_killed(count=3)


@promise("A server's process that keeps the GIL delays no kill.")
def server_gil(stage: Stage) -> Outcome:
    """The server's process keeps the GIL in C while a worker's time is up."""
    hold, go_on = Gate(), Gate()

    def body() -> None:
        with stage.timer.expires(60, "first"):
            pass
        stage.say("is known")
        hold.wait()
        stage.hang_after(1)()

    def then(_: Server) -> None:
        hold.wait()
        stage.say("holds")
        hold_the_gil_until(go_on)

    stage.play(body, then=then, max_interval=SOON)
    stage.hear("is known")
    hold.open(2)
    stage.hear("holds")
    outcome = stage.must_be_killed()
    go_on.open()
    return outcome


@promise("Who released in time is never killed.")
def false_kill(stage: Stage) -> Outcome:
    """The server's process keeps the GIL from before ten workers release until after."""
    # Nobody overruns, even if the machine stands still for ten seconds meanwhile.
    workers, after = 10, 15.0
    hold, leave, go_on = Gate(), Gate(), Gate()

    def body() -> None:
        with stage.timer.expires(after, "step"):
            stage.say("inside")
            leave.wait()
        stage.say("released")
        hang()

    def then(_: Server) -> None:
        hold.wait()
        stage.say("holds")
        hold_the_gil_until(go_on)

    stage.play(*[body] * workers, then=then, max_interval=SOON)
    inside = stage.hear("inside", workers)
    entered = {said.pid: said.at for said in inside}
    time.sleep(0.3)  # a server that reads requests has read them
    hold.open()
    stage.hear("holds")
    leave.open(workers)
    for said in stage.hear("released", workers):
        if said.at - entered[said.pid] >= after:
            raise AssertionError("the machine is so busy that a worker did overrun")
    # All deadlines have passed before the server's process can read that they don't hold.
    time.sleep(max(0.0, max(entered.values()) + after + 0.1 - time.monotonic()))
    go_on.open()
    goes_on = stage.goes_on()
    hurt = killed([Watched(pid) for pid in entered])
    figure = f"{hurt} of {workers} healthy workers killed"
    deaf = "" if hurt or goes_on else ", a hung one not"
    return Outcome(hurt == 0 and goes_on, figure + deaf)


@promise("Steps of the wall clock neither kill nor spare.")
def wall_clock(stage: Stage) -> Outcome:
    """The clock is stepped by an hour, forth under healthy workers and back under hung ones.

    Of each kind there are two: one armed its timer as usual, for one a request was made by hand.
    """
    forth, back = stage, stage.another("back")
    clocks = {each: SteppedClock(f"{each.path}.clock") for each in (forth, back)}

    def says(each: Stage, word: str) -> Body:
        def body() -> None:
            each.say(word)
            hang()

        return body

    def healthy() -> None:
        with forth.timer.expires(60, "healthy"):
            forth.say("healthy")
            hang()

    def play(each: Stage, word: str, armed: Body, limit: float) -> list[Watched]:
        by_hand, overdue = says(each, "by hand"), says(each, "overdue")
        before = clocks[each].install
        each.play(armed, by_hand, overdue, before=before, max_interval=SOON)
        said = [*each.hear(word), *each.hear("by hand")]
        each.request(said[1].pid, "step", limit)
        # When that one is dead, the server has taken the request.
        if not each.takes_requests(Watched(each.hear("overdue")[0].pid)):
            raise AssertionError("a request by hand was not taken")
        return [Watched(one.pid) for one in said]

    innocent = play(forth, "healthy", healthy, 60)
    clocks[forth].step(3600)
    hung = play(back, "hangs", back.hang_after(2), 2)
    clocks[back].step(-3600)
    until = time.monotonic() + stage.window + 3
    unseen = sum(each.death_within(until - time.monotonic()) is None for each in hung)
    goes_on = forth.goes_on()
    hurt = killed(innocent)
    figure = f"+1 h: {hurt} of 2 healthy workers killed; -1 h: {unseen} of 2 hangs unseen"
    return Outcome(hurt == unseen == 0 and goes_on, figure)
