"""Rows about blocks: how they are named, what they cost, and how they go together."""

from __future__ import annotations

import threading
import time

from conformance.row import Outcome, Row
from conformance.stage import SOON, Stage, Watched, hang

_BLOCKS = 20


def scope_name(stage: Stage) -> Outcome:
    """An inner block ends, then the outer one hangs; neither was given a name."""

    def body() -> None:
        with stage.timer.expires(1):
            with stage.timer.expires(60):
                pass
            stage.say("hangs")
            hang()

    stage.play(body, max_interval=SOON)
    return stage.must_be_killed()


def scope_cost(stage: Stage) -> Outcome:
    """Time blocks with and without a name."""

    def cost(scope: str | None) -> float:
        start = time.perf_counter()
        for _ in range(_BLOCKS):
            with stage.timer.expires(60, scope):
                pass
        return (time.perf_counter() - start) / _BLOCKS

    def body() -> None:
        # The least of some, and in turns: a busy machine slows down either.
        both = [(cost(None), cost("step")) for _ in range(15)]
        stage.say("default", min(default for default, _ in both))
        stage.say("named", min(named for _, named in both))

    stage.play(body, max_interval=SOON)
    (default,), (named,) = stage.hear("default"), stage.hear("named")
    ratio = default.value / named.value
    figure = f"{default.value * 1e6:,.1f} µs a block, {ratio:.1f} times that of a named one"
    return Outcome(ratio < 4, figure)


def threads(stage: Stage) -> Outcome:
    """One thread hangs in a scope that another one enters and leaves."""

    def pass_through() -> None:
        with stage.timer.expires(60, "step"):
            pass

    def body() -> None:
        with stage.timer.expires(1, "step"):
            other = threading.Thread(target=pass_through)
            other.start()
            other.join()
            stage.say("hangs")
            hang()

    stage.play(body, max_interval=SOON)
    return stage.must_be_killed()


def recursion(stage: Stage) -> Outcome:
    """A scope within itself: one worker goes deep and is healthy, one hangs after the inner."""
    after, levels, each = 2.0, 10, 0.3  # each level is quick, all of them are not

    def go_down(levels_left: int) -> None:
        with stage.timer.expires(after, "level"):
            time.sleep(each)
            if levels_left > 1:
                go_down(levels_left - 1)

    def healthy() -> None:
        stage.say("healthy")
        go_down(levels)
        stage.say("came through")
        hang()

    def hung() -> None:
        with stage.timer.expires(1, "step"):
            with stage.timer.expires(60, "step"):
                pass
            stage.say("hangs")
            hang()

    stage.play(healthy, hung, max_interval=SOON)
    (who,) = stage.hear("healthy")
    deep = Watched(who.pid, who.at)
    outcome = stage.must_be_killed()
    came_through = deep.death_within(levels * each) is None and stage.hear("came through") != []
    deep_figure = "" if came_through else "; a healthy recursion was killed"
    return Outcome(outcome.holds and came_through, outcome.figure + deep_figure)


ROWS = [
    Row(
        "scope-name",
        "An unnamed block ends its own timer, never that of the block around it.",
        scope_name,
    ),
    Row("scope-cost", "An unnamed block costs what a named one does.", scope_cost),
    Row("threads", "Threads in scopes of one name have timers of their own.", threads),
    Row(
        "recursion",
        "When the inner of two blocks of one scope ends, the outer is guarded anew.",
        recursion,
    ),
]
