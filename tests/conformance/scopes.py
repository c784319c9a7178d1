"""Rows about blocks: how they are named, what they cost, and how they go together."""

from __future__ import annotations

import threading
import time

from conformance.row import Outcome, promise
from conformance.stage import SOON, Stage, hang

_BLOCKS = 20


@promise("An unnamed block ends its own timer, never that of the block around it.")
def scope_name(stage: Stage) -> Outcome:
    """An inner block ends, then the outer one hangs; neither was given a name."""

    def body() -> None:
        stage.say("hangs")
        with stage.timer.expires(1):
            with stage.timer.expires(60):
                pass
            hang()

    stage.play(body, max_interval=SOON)
    return stage.must_be_killed()


@promise("An unnamed block costs what a named one does.")
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


@promise("Threads in scopes of one name have timers of their own.")
def threads(stage: Stage) -> Outcome:
    """One thread hangs in a scope that another one enters and leaves."""

    def pass_through() -> None:
        with stage.timer.expires(60, "step"):
            pass

    def body() -> None:
        stage.say("hangs")
        with stage.timer.expires(1, "step"):
            other = threading.Thread(target=pass_through)
            other.start()
            other.join()
            hang()

    stage.play(body, max_interval=SOON)
    return stage.must_be_killed()


@promise("When the inner of two blocks of one scope ends, the outer is guarded anew.")
def recursion(stage: Stage) -> Outcome:
    """A scope within itself: one worker goes deep and is healthy, one hangs after the inner."""
    # Each level is quick, even if the machine stands still for ten seconds; all of them are not.
    after, levels, each = 12.0, 9, 1.5

    def go_down(levels_left: int) -> None:
        with stage.timer.expires(after, "level"):
            time.sleep(each)
            if levels_left > 1:
                go_down(levels_left - 1)

    def healthy() -> None:
        go_down(levels)
        stage.say("came through")
        hang()

    def hung() -> None:
        stage.say("hangs")
        with stage.timer.expires(1, "step"):
            with stage.timer.expires(60, "step"):
                pass
            hang()

    stage.play(healthy, hung, max_interval=SOON)
    outcome = stage.must_be_killed()
    came_through = stage.overhear("came through", 1, levels * each + stage.window) != []
    deep_figure = "" if came_through else "; a healthy recursion was killed"
    return Outcome(outcome.holds and came_through, outcome.figure + deep_figure)
