"""Rows about what lies between a worker and its server: locks, full pipes, strangers' bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil

from conformance.row import FILE, LOCAL, Outcome, promise
from conformance.stage import PATIENCE, SOON, Server, Stage, hang, request_line
from support.processes import Gate


class UserError(Exception):
    """What a block's body raises."""


@promise(
    "A worker that is killed while it arms keeps no other worker's timers back.",
    LOCAL,
    by_chance=True,
)
def queue_lock(stage: Stage) -> Outcome:
    """Workers are killed in the midst of arming; then one that is left hangs."""
    loops, pause = 12, 0.01
    go = Gate()

    def loop() -> None:
        stage.say("loops")
        while True:
            with stage.timer.expires(60, "step"):
                pass

    def survivor() -> None:
        go.wait()
        stage.hang_after(1)()

    stage.play(*[loop] * loops, survivor, max_interval=SOON)
    for said in stage.hear("loops", loops):
        time.sleep(pause)
        os.kill(said.pid, signal.SIGKILL)
    go.open()
    return stage.must_be_killed()


@promise("Arming neither waits nor raises because the server is slow.", FILE)
def slow_server(stage: Stage) -> Outcome:
    """A worker enters 1,000 blocks while everything on the server's side stands still."""
    blocks = 1000
    go = Gate()

    def body() -> None:
        with stage.timer.expires(60, "first"):
            pass
        stage.say("ready")
        go.wait()
        errors: list[tuple[int, str]] = []
        for number in range(1, blocks + 1):
            try:
                with stage.timer.expires(60, "step"):
                    pass
            except Exception as error:
                errors.append((number, type(error).__name__))
        first, name = errors[0] if errors else (0, "")
        stage.say("failed", len(errors), f"{name} at block {first}")
        hang()

    server = stage.play(body, max_interval=SOON)
    (worker,) = stage.hear("ready")
    process = psutil.Process(server.pid)
    stopped = [process, *process.children(recursive=True)]
    for one in stopped:
        if one.pid != worker.pid:
            one.suspend()
    start = time.monotonic()
    go.open()
    within = max(PATIENCE, stage.window)
    said = stage.overhear("failed", 1, within)
    if not said:
        return Outcome(False, f"1,000 blocks not done within {within:g} s")
    failed = int(said[0].value)
    took = said[0].at - start
    if failed:
        return Outcome(False, f"{failed} of {blocks:,} blocks raised, first {said[0].scope}")
    return Outcome(True, f"{blocks:,} of {blocks:,} blocks entered, in {took * 1000:,.0f} ms")


@promise("Who keeps the FIFO open delays no kill.", FILE)
def hold_open(stage: Stage) -> Outcome:
    """A stranger opens the FIFO for writing and keeps it; then a worker hangs."""
    go = Gate()

    def body() -> None:
        go.wait()
        stage.hang_after(1)()

    stage.play(body, max_interval=SOON)
    stage.open_fifo()
    go.open()
    return stage.must_be_killed()


@promise("A bad line of the FIFO is dropped alone.", FILE)
def garbage(stage: Stage) -> Outcome:
    """Twenty requests and one line that is none come at once."""
    good = 20

    def log_event(name: str, request: object) -> None:
        stage.say(name, note=getattr(request, "scope_id", ""))

    def idle() -> None:
        stage.say("idle")
        hang()

    # A round is long enough for all of them to be taken in one.
    stage.play(idle, max_interval=2, log_event=log_event)
    (worker,) = stage.hear("idle")
    overdue = time.time() - 1
    # Signal 0: the timers expire, and nobody is killed for it.
    lines = [request_line(worker.pid, f"scope {n}", overdue, 0) for n in range(good)]
    stage.write("".join([*lines, '{"version": 1, "pid": \n']))
    until = time.monotonic() + stage.window + 1
    expired: set[str] = set()
    while len(expired) < good and time.monotonic() < until:
        left = until - time.monotonic()
        expired |= {said.scope for said in stage.overhear("timer expired", 1, left)}
    return Outcome(len(expired) == good, f"{len(expired)} of {good} good requests taken")


@promise("A release that fails never replaces the exception of the block's body.")
def masked_error(stage: Stage) -> Outcome:
    """A body fails in a block whose release fails, too: its server is gone, or never was."""
    stop, gone = Gate(), Gate()
    unserved = stage.another("unserved")
    stage.warm_up_logging()

    def error_of(client: object | None, lose: Callable[[], object]) -> str:
        try:
            with stage.timer.expires(60, "step", client):
                lose()
                raise UserError("the body's own")
        except Exception as error:
            return type(error).__name__

    def lose_the_server() -> None:
        stop.open()
        gone.wait()
        if stage.pair == LOCAL:
            stage.queue.close()

    def body() -> None:
        stage.say("raised", note=error_of(None, lose_the_server))
        if stage.pair == LOCAL:
            stage.say("raised", note=error_of(unserved.client(), unserved.queue.close))
        else:
            os.mkfifo(unserved.path)
            reader = os.open(unserved.path, os.O_RDONLY | os.O_NONBLOCK)
            stage.say("raised", note=error_of(unserved.client(), lambda: os.close(reader)))
        hang()

    def then(server: Server) -> None:
        stop.wait()
        server.stop()
        gone.open()

    stage.play(body, then=then, max_interval=SOON)
    raised = [said.scope for said in stage.hear("raised", 2)]
    names = " and ".join(dict.fromkeys(raised))
    return Outcome(set(raised) == {UserError.__name__}, f"the caller sees {names}")
