"""Rows about the server's own life: starting, stopping, what it costs, what it says."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import psutil

from conformance.row import LOCAL, Outcome, death, promise
from conformance.stage import BEFORE_A_ROUND, SOON, Server, Stage, hang
from support.processes import Gate, Watched

_SCOPE = "the-forward-pass"


@promise("A stopped server leaves nothing behind, stops at once, and can be started again.")
def lifecycle(stage: Stage) -> Outcome:
    """Start and stop servers without a client, stop one with the defaults, start one again."""

    go = Gate()
    stage.warm_up_logging()

    def body() -> None:
        go.wait()
        stage.timer.configure(stage.client())
        try:
            stage.hang_after(1)()
        except Exception as error:
            # It could not even arm: that is as bad as not being killed.
            stage.say("raised", note=type(error).__name__)
            hang()

    # Whatever else runs for a server counts, too: a thread, or a process.
    def threads_and_children() -> int:
        return len(os.listdir("/proc/self/task")) + len(psutil.Process().children(recursive=True))

    def then(server: Server) -> None:
        before = threads_and_children()
        for number in range(2):
            cycled = stage.another(f"cycled{number}").server(max_interval=SOON)
            cycled.start()
            cycled.stop()
        stage.wait_until(lambda: threads_and_children() == before)
        stage.say("left", threads_and_children() - before)

        server.stop()
        server.start()
        go.open()

        default = stage.another("default").server()
        default.start()
        stage.say("stopping")
        start = time.monotonic()
        default.stop()
        stage.say("stopped", time.monotonic() - start)

    stage.play(body, then=then, max_interval=SOON)
    (left,) = stage.hear("left")
    (hangs,) = stage.hear("hangs")
    after = Watched(hangs.pid, hangs.at).death_within(stage.window)
    (stopping,) = stage.hear("stopping")
    within = min(stage.window, BEFORE_A_ROUND)
    stopped = stage.overhear("stopped", 1, stopping.at + within - time.monotonic())
    stop = f"stop() took {stopped[0].value:.2f} s" if stopped else f"no stop() within {within:g} s"
    raised = stage.overhear("raised", 1, 0)
    hung = raised[0].scope if raised else death(after, stage.window)
    holds = left.value == 0 and bool(stopped) and after is not None
    behind = f"{left.value:.0f} threads left behind"
    return Outcome(holds, f"{behind}; {stop}; a hang after stop() and start(): {hung}")


@promise("A closed queue is no reason to fill a disk.", LOCAL)
def log_storm(stage: Stage) -> Outcome:
    """The queue is closed under a server that runs."""
    records = 0
    make = logging.getLogRecordFactory()

    def count(*arguments: Any, **more: Any) -> logging.LogRecord:
        nonlocal records
        records += 1
        return make(*arguments, **more)

    def then(_: Server) -> None:
        stage.queue.close()
        before, busy, start = records, time.process_time(), time.monotonic()
        time.sleep(1)
        took = time.monotonic() - start
        stage.say("records", (records - before) / took)
        stage.say("busy", (time.process_time() - busy) / took)

    stage.warm_up_logging()
    # Every record that a logger lets through, whoever handles it.
    stage.play(before=lambda: logging.setLogRecordFactory(count), then=then, max_interval=SOON)
    (rate,), (busy,) = stage.hear("records"), stage.hear("busy")
    figure = f"{rate.value:,.0f} log records a second, {busy.value:.0%} CPU"
    return Outcome(rate.value < 50, figure)


@promise("A round costs what is due, not what there is.")
def scan(stage: Stage) -> Outcome:
    """Nothing is due: what does a round cost with 30,000 timers, and what with 1,000?"""
    few, many = 1_000, 30_000

    def then(_: Server) -> None:
        worker = stage.start_worker(hang)
        for count in (few, many):
            stage.say("round", _cost_of_a_round(stage.another(f"with{count}"), worker, count))

    stage.play(then=then, max_interval=SOON)
    with_few, with_many = stage.hear("round", 2)
    ratio = with_many.value / with_few.value
    cost = f"{with_many.value * 1000:,.3f} ms a round of {many:,} timers"
    return Outcome(ratio < 10, f"{cost}, {ratio:.1f} times that of {few:,}")


def _cost_of_a_round(stage: Stage, worker: int, count: int) -> float:
    server = stage.server()  # not started: nobody else goes a round
    far = time.time() + 1e6
    kind = stage.timer.TimerRequest if stage.pair == LOCAL else stage.timer.FileTimerRequest
    server.register_timers([kind(worker, f"scope {number}", far) for number in range(count)])
    costs = []
    for _ in range(10):
        start = time.perf_counter()
        expired = server.get_expired_timers(time.time())
        server.clear_timers(set())
        costs.append(time.perf_counter() - start)
        assert not expired
    # All of them were there, and far away: in the end they are due.
    (due,) = server.get_expired_timers(far + 1).values()
    assert len(due) == count
    return min(costs)


@promise("A kill is told at the default log level, with the scope's name.")
def silent(stage: Stage) -> Outcome:
    """A worker is killed, and nobody has set up any logging."""
    stage.play(stage.hang_after(1, _SCOPE), max_interval=SOON)
    (hangs,) = stage.hear("hangs")
    if Watched(hangs.pid, hangs.at).death_within(stage.window) is None:
        return Outcome(False, "not even killed")
    stage.wait_until(lambda: _SCOPE in stage.stderr)
    lines = [line for line in stage.stderr.splitlines() if _SCOPE in line]
    return Outcome(bool(lines), f"{len(lines) or 'no'} lines about it on standard error")
