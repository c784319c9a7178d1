"""Rows about who is killed: the worker that overran, for certain, and nobody else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from conformance.row import FILE, Outcome, death, promise
from conformance.stage import SOON, Body, Server, Stage, fork, hang, killed
from support.processes import Gate, Watched

_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@promise("A process that got a dead worker's pid is never killed in its place.", alone=True)
def pid_reuse(stage: Stage) -> Outcome:
    """Three workers die before their time is up, or of it, and others get their pids.

    One of them armed its timer as usual. For the others requests were made by hand, the last one
    for a worker that is overdue: when that is dead, the server has taken them.
    """
    after = 2.0
    start, die = Gate(), Gate()

    def armed() -> None:
        stage.say("armed")
        with stage.timer.expires(after, "step"):
            die.wait()
            os._exit(0)

    def by_hand() -> None:
        stage.say("by hand")
        die.wait()
        os._exit(0)

    def overdue() -> None:
        stage.say("overdue")
        hang()

    def innocent() -> None:
        stage.say("innocent")
        hang()

    def then(_: Server) -> None:
        start.wait()
        for _number in range(3):
            fork_with_pid(os.wait()[0], innocent)

    stage.play(armed, by_hand, overdue, then=then, max_interval=SOON)
    stage.hear("armed")
    (lives,), (overruns,) = stage.hear("by hand"), stage.hear("overdue")
    stage.request(lives.pid, "step", after)
    ended = stage.takes_requests(Watched(overruns.pid))
    os.kill(overruns.pid, signal.SIGKILL)  # a zombie by now, at least of ours
    die.open(2)
    start.open()
    innocents = [Watched(said.pid) for said in stage.hear("innocent", 3)]
    time.sleep(after + 0.5)  # their time is up in any case
    ended &= stage.goes_on()
    hurt = killed(innocents)
    figure = f"{hurt} of 3 innocent processes killed"
    return Outcome(hurt == 0 and ended, figure if hurt or ended else f"{figure}, a hung one not")


def fork_with_pid(pid: int, body: Body) -> None:
    """Fork a process with a certain pid, which must be free; pid_namespaces(7)."""
    for _ in range(50):
        _LAST_PID.write_text(str(pid - 1))
        # Somebody else may fork in between, and get it.
        got = fork(lambda: body() if os.getpid() == pid else None)
        if got == pid:
            return
        os.waitpid(got, 0)
    raise AssertionError(f"pid {pid} can't be had")


class House:
    """A server, its parent process, and a stranger, in a session of their own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

        def idle() -> None:
            stage.say("idle")
            hang()

        def parent() -> None:
            os.setsid()
            stage.say("parent")
            fork(lambda: stage.play_here(later=idle, max_interval=SOON))
            hang()

        fork(parent)
        self.parent = Watched(stage.hear("parent")[0].pid)
        self.server = Watched(stage.hear("started")[0].pid)
        self.stranger = Watched(fork(hang))

    def survives(self, pid: int) -> bool:
        """Forge an overdue request; tell whether nobody here was killed for it.

        Raises:
            AssertionError: the server then takes no real request, so it may not have taken this.
        """
        self._stage.request(pid, "forged", -1)
        listens = self._stage.takes_requests(self._stage.start_later("idle"))
        if killed([self.parent, self.server, self.stranger]):
            return False
        assert listens, f"a real request was not taken: {self._stage.stderr!r}"
        return True


@promise("No request gets anybody killed who is no worker of that server.", alone=True)
def forged(stage: Stage) -> Outcome:
    """A server is asked to kill who never was a worker of its own; each time that works, anew."""
    targets: dict[str, Callable[[House], int]] = {
        "pid 1": lambda _: 1,
        "a stranger": lambda house: house.stranger.pid,
        "its parent": lambda house: house.parent.pid,
        "the server": lambda house: house.server.pid,
        "pid 0": lambda _: 0,
        # The last: this one is about every process that there is.
        "pid -1": lambda _: -1,
    }
    hurt: list[str] = []
    house = House(stage.another("house"))
    for name, pid in targets.items():
        if not house.survives(pid(house)):
            hurt.append(name)
            if len(hurt) < len(targets) and name != "pid -1":
                house = House(stage.another(f"house{len(hurt)}"))
    requests = f"{len(targets)} forged requests"
    if hurt:
        return Outcome(False, f"{len(hurt)} of {requests} killed somebody: {', '.join(hurt)}")
    return Outcome(True, f"none of {requests} killed anybody")


@promise("The server never signals its own process.", FILE)
def agent_suicide(stage: Stage) -> Outcome:
    """A worker is killed: what becomes of the server's process, torchrun's agent?"""
    server = stage.play(stage.hang_after(1), max_interval=SOON)
    (hangs,) = stage.hear("hangs")
    after = Watched(hangs.pid, hangs.at).death_within(stage.window)
    survives = stage.goes_on() and not server.is_killed()
    fate = "goes on" if survives else "is killed, too"
    return Outcome(
        after is not None and survives,
        f"worker {death(after, stage.window)}; the server's process {fate}",
    )


@promise("A worker that ignores the first signal is killed all the same.", FILE)
def retry(stage: Stage) -> Outcome:
    """A worker that ignores SIGTERM hangs in a block whose signal is SIGTERM."""
    within = stage.window + 7.0

    def body() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stage.hang_after(1)()

    stage.play(body, signal_of_client=signal.SIGTERM, max_interval=SOON)
    return stage.must_be_killed(within=within)
