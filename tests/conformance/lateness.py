"""Rows about when a worker is judged: in time, by the right clock, never on stale data."""

from __future__ import annotations

import ctypes
import os
import time

from conformance.clock import SteppedClock
from conformance.row import LOCAL, Outcome, Row
from conformance.stage import SOON, WINDOW, Gate, Server, Stage, Watched, deaths, hang, hold_the_gil


def late(stage: Stage) -> Outcome:
    """A worker hangs, and everything else is as it is by default."""
    stage.play(stage.hang_after(1))
    return stage.must_be_killed()


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


def server_gil(stage: Stage) -> Outcome:
    """The server's process keeps the GIL in C while a worker's time is up."""
    go = Gate()

    def then(_: Server) -> None:
        go.wait()
        hold_the_gil(WINDOW + 3)

    stage.play(stage.hang_after(1), then=then, max_interval=SOON)
    # The request has long come to the server when it gets stuck.
    time.sleep(0.3)
    go.open()
    return stage.must_be_killed()


def false_kill(stage: Stage) -> Outcome:
    """The server's process keeps the GIL from before ten workers release until after."""
    workers, after, held_for = 10, 2.5, 4.0
    hold, leave = Gate(), Gate()

    def body() -> None:
        with stage.timer.expires(after, "step"):
            stage.say("inside")
            leave.wait()
        stage.say("released")
        hang()

    def then(_: Server) -> None:
        hold.wait()
        stage.say("holds")
        hold_the_gil(held_for)

    stage.play(*[body] * workers, then=then, max_interval=SOON)
    inside = {said.pid: said for said in stage.hear("inside", workers)}
    time.sleep(0.3)
    hold.open()
    stage.hear("holds")
    healthy = [Watched(pid) for pid in inside]
    time.sleep(0.1)
    leave.open(workers)
    for said in stage.hear("released", workers):
        if said.at - inside[said.pid].at >= after:
            raise AssertionError("the machine is so busy that a worker did overrun")
    killed = deaths(healthy, held_for + 1.5)
    return Outcome(killed == 0, f"{killed} of {workers} healthy workers killed")


def wall_clock(stage: Stage) -> Outcome:
    """The clock is stepped by an hour, forth under healthy workers and back under hung ones.

    Of each kind there are two: one armed its timer as usual, one by a request made by hand.
    """
    forth, back = stage, stage.another("back")
    clocks = {each: SteppedClock(f"{each.path}.clock") for each in (forth, back)}

    def healthy() -> None:
        with forth.timer.expires(60, "healthy"):
            forth.say("healthy")
            hang()

    def healthy_by_hand() -> None:
        forth.request(os.getpid(), "healthy", 60)
        forth.say("healthy")
        hang()

    def hung_by_hand() -> None:
        back.request(os.getpid(), "step", 2)
        back.say("hangs")
        hang()

    forth.play(healthy, healthy_by_hand, before=clocks[forth].install, max_interval=SOON)
    back.play(back.hang_after(2), hung_by_hand, before=clocks[back].install, max_interval=SOON)
    innocent = [Watched(said.pid) for said in forth.hear("healthy", 2)]
    hung = [Watched(said.pid, said.at) for said in back.hear("hangs", 2)]
    # The servers get the requests; nobody's time is up yet.
    time.sleep(0.5)
    clocks[forth].step(3600)
    clocks[back].step(-3600)
    unseen = 2 - deaths(hung, WINDOW + 1)
    killed = deaths(innocent, 0)
    figure = f"+1 h: {killed} of 2 healthy workers killed; -1 h: {unseen} of 2 hangs unseen"
    return Outcome(killed == unseen == 0, figure)


ROWS = [
    Row("late", "A hang is ended soon after its limit at the default `max_interval`.", late),
    Row(
        "gil-arm",
        "A block is armed when it is entered, even if it keeps the GIL from then on.",
        gil_arm,
        (LOCAL,),
    ),
    Row("server-gil", "A server's process that keeps the GIL delays no kill.", server_gil),
    Row("false-kill", "Who released in time is never killed.", false_kill),
    Row("wall-clock", "Steps of the wall clock neither kill nor spare.", wall_clock),
]
