"""Rows about who is killed: the worker that overran, for certain, and nobody else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from conformance.row import FILE, Outcome, Row, death
from conformance.stage import (
    SOON,
    WINDOW,
    Body,
    Gate,
    Server,
    Stage,
    Watched,
    deaths,
    hang,
    start_process,
)

_ESCALATED_WITHIN = 12.0
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def pid_reuse(stage: Stage) -> Outcome:
    """Two workers die before their time is up, and others get their pids.

    One of them has armed its timer as usual, the other by a request that it made by hand. A third
    one, also by hand, lives on, to show that such requests count.
    """
    after = 2.0
    start, die = Gate(), Gate()

    def armed() -> None:
        with stage.timer.expires(after, "step"):
            stage.say("armed")
            die.wait()
            os._exit(0)

    def by_hand() -> None:
        stage.request(os.getpid(), "step", after)
        stage.say("armed")
        die.wait()
        os._exit(0)

    def overruns() -> None:
        stage.request(os.getpid(), "step", after)
        stage.say("armed")
        stage.say("overruns")
        hang()

    def innocent() -> None:
        stage.say("innocent")
        hang()

    def then(_: Server) -> None:
        start.wait()
        for _number in range(2):
            die.open()
            pid = os.wait()[0]
            start_with_pid(pid, innocent)

    stage.play(armed, by_hand, overruns, then=then, max_interval=0.5)
    stage.hear("armed", 3)
    (said,) = stage.hear("overruns")
    overrun = Watched(said.pid, said.at)
    time.sleep(0.3)  # the server gets the requests
    start.open()
    innocents = [Watched(said.pid) for said in stage.hear("innocent", 2)]
    killed = deaths(innocents, after + 2)
    ended = overrun.death_within(after + WINDOW) is not None
    figure = f"{killed} of 2 innocent processes killed"
    return Outcome(killed == 0 and ended, figure if ended else f"{figure}, a hung one not")


def start_with_pid(pid: int, body: Body) -> None:
    """Fork a process with a certain pid, which must be free; pid_namespaces(7)."""
    for _ in range(50):
        _LAST_PID.write_text(str(pid - 1))
        got = start_process(body)
        if got == pid:
            return
        # Somebody else forked in between.
        os.kill(got, signal.SIGKILL)
        os.waitpid(got, 0)
    raise AssertionError(f"pid {pid} can't be had")


class House:
    """A server with one worker, its parent process, and a stranger, in a session of their own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

        def idle() -> None:
            stage.say("idle")
            hang()

        def parent() -> None:
            os.setsid()
            stage.say("parent")
            start_process(lambda: stage.play_here(idle, max_interval=SOON))
            hang()

        start_process(parent)
        self.parent = Watched(stage.hear("parent")[0].pid)
        self.server = Watched(stage.hear("started")[0].pid)
        self._worker = Watched(stage.hear("idle")[0].pid)
        self.stranger = Watched(start_process(hang))

    def ask_to_kill(self, pid: int) -> None:
        """Forge an overdue request."""
        self._stage.request(pid, "forged", -1)

    def is_hurt(self) -> bool:
        """Tell whether anybody here is dead."""
        return deaths([self.parent, self.server, self._worker, self.stranger], 0) > 0

    def spares_its_worker(self) -> str:
        """Ask for the real worker's end: return what its server said, if it is not acted upon."""
        self._stage.request(self._worker.pid, "step", -1)
        # When is another row's question.
        if Watched(self._worker.pid).death_within(3 * WINDOW) is not None:
            return ""
        return f"nor did a real one: {self._stage.stderr!r}"


def forged(stage: Stage) -> Outcome:
    """Servers are asked to kill who never was a worker of theirs."""
    houses = [House(stage.another(f"house{n}")) for n in range(5)]
    targets = {
        "pid 1": 1,
        "pid 0": 0,
        "the server": houses[2].server.pid,
        "its parent": houses[3].parent.pid,
        "a stranger": houses[4].stranger.pid,
    }
    for house, target in zip(houses, targets.values(), strict=True):
        house.ask_to_kill(target)
    time.sleep(1.5)
    hurt = [name for house, name in zip(houses, targets, strict=True) if house.is_hurt()]
    # By itself, and last: this one is about every process that there is.
    everybody = House(stage.another("everybody"))
    everybody.ask_to_kill(-1)
    time.sleep(1.5)
    if everybody.is_hurt():
        hurt.append("pid -1")
    requests = f"{len(targets) + 1} forged requests"
    if hurt:
        return Outcome(False, f"{len(hurt)} of {requests} killed somebody: {', '.join(hurt)}")
    # None of that means anything if the servers do not listen any more.
    deaf = [said for house in (*houses, everybody) if (said := house.spares_its_worker())]
    return Outcome(not deaf, ", ".join([f"none of {requests} killed anybody", *deaf]))


def agent_suicide(stage: Stage) -> Outcome:
    """A worker is killed: what becomes of the server's process, torchrun's agent?"""
    server = stage.play(stage.hang_after(1), max_interval=SOON)
    (hangs,) = stage.hear("hangs")
    after = Watched(hangs.pid, hangs.at).death_within(WINDOW)
    survives = Watched(server.pid).death_within(2) is None
    fate = "goes on" if survives else "is killed, too"
    return Outcome(
        after is not None and survives,
        f"worker {death(after, WINDOW)}; the server's process {fate}",
    )


def retry(stage: Stage) -> Outcome:
    """A worker that ignores SIGTERM hangs in a block whose signal is SIGTERM."""

    def body() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stage.hang_after(1)()

    stage.play(body, signal_of_client=signal.SIGTERM, max_interval=SOON)
    (hangs,) = stage.hear("hangs")
    after = Watched(hangs.pid, hangs.at).death_within(_ESCALATED_WITHIN)
    return Outcome(after is not None, death(after, _ESCALATED_WITHIN))


ROWS = [
    Row(
        "pid-reuse",
        "A process that got a dead worker's pid is never killed in its place.",
        pid_reuse,
        alone=True,
    ),
    Row(
        "forged",
        "No request gets anybody killed who is no worker of that server.",
        forged,
        alone=True,
    ),
    Row(
        "agent-suicide",
        "The server never signals its own process.",
        agent_suicide,
        (FILE,),
    ),
    Row(
        "retry",
        "A worker that ignores the first signal is killed all the same.",
        retry,
        (FILE,),
    ),
]
