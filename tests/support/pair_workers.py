"""What workers of the drop-in pairs do, in processes that need not load pytest for it.

Who has a `gate` waits there; see `support.pairs.wait_at`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import hangwatch
from hangwatch.worker.client import WorkerClient
from support.pairs import client_at, hang, wait_at


def hang_on(queue: object) -> None:
    hangwatch.configure(client_at(queue))
    hang()


def hang_natively(queue: object) -> None:
    client = client_at(queue)
    with hangwatch.expires(0.2, "hang", client):
        worker: WorkerClient | None = client._worker
        if worker is None or not worker.is_connected:
            os._exit(7)
        time.sleep(1000)


def hang_with(client: hangwatch.TimerClient) -> None:
    with hangwatch.expires(0.2, "there", client):
        time.sleep(1000)


def overrun(gate: Connection, path: str, number: int, scope: str) -> None:
    with hangwatch.expires(0.2, scope, hangwatch.FileTimerClient(path, signal=number)):
        wait_at(gate)


def ignore_sigterm_for_long(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client = hangwatch.FileTimerClient(path, signal=signal.SIGTERM)
    with hangwatch.expires(0.2, "stubborn", client, grace=1000):
        time.sleep(1000)


def enter_a_longer_block(gate: Connection) -> None:
    # The first watcher promises to look again within 600 s; the second block is due later.
    with hangwatch.expires(600, "before"):
        pass
    wait_at(gate)
    with hangwatch.expires(601, "after") as timer:
        wait_at(gate)
        timer.renew(0.1)
        time.sleep(1000)


def acquire_and_end(gate: Connection, where: object) -> None:
    client_at(where).acquire("left", time.time() + 600)
    wait_at(gate)


def stay_in_two_blocks(gate: Connection) -> None:
    with hangwatch.expires(600, "outer"), hangwatch.expires(600, "inner"):
        wait_at(gate)


# Workers that nobody may end. A short limit that must not be overrun is given within a pause:
# so it can't be, however slow the machine is, before something else takes its place.


def _begin_pause() -> Callable[[], None]:
    """Pause this process; return what ends the pause.

    In a thread of its own: in this one, its end would be the end of blocks that began within it.
    """
    begun, end = threading.Event(), threading.Event()

    def pause() -> None:
        with hangwatch.paused("pause", 600):
            begun.set()
            end.wait()

    thread = threading.Thread(target=pause, daemon=True)
    thread.start()
    begun.wait()

    def end_it() -> None:
        end.set()
        thread.join()

    return end_it


def be_in_an_inner_block(gate: Connection, where: object) -> None:
    """An inner block of the same scope replaces the outer one, however they find their client."""
    client = client_at(where)
    hangwatch.configure(client)
    for _ in range(3):
        with hangwatch.expires(600, "s", client=client):
            pass
    end_pause = _begin_pause()
    with hangwatch.expires(0.1, "s") as outer, hangwatch.expires(600, "s", client=client):
        end_pause()
        wait_at(gate)
        outer.renew(600)


def cancel_and_renew(gate: Connection, where: object) -> None:
    end_pause = _begin_pause()
    with hangwatch.expires(0.1, "one") as one, hangwatch.expires(0.1, "two") as two:
        one.cancel()
        two.renew(600)
        end_pause()
        for scope in "one", "two":  # as they are afterwards, so they stay
            with hangwatch.expires(600, scope):
                pass
        wait_at(gate)


def be_in_a_pause(gate: Connection, where: object) -> None:
    with (
        hangwatch.expires(600, "step"),
        hangwatch.paused("step", 600),
        hangwatch.expires(0.1, "step"),
    ):
        wait_at(gate)


def call_by_hand(gate: Connection, where: object) -> None:
    """A call replaces an earlier one; a release ends it, also that of another thread."""
    client = client_at(where)
    with hangwatch.paused("pause", 600):
        client.acquire("beat", time.time() + 0.1)
        client.acquire("beat", time.time() + 600)
        client.acquire("end", time.time() + 0.1)
        thread = threading.Thread(target=client.release, args=("end",))
        thread.start()
        thread.join()
        client.release("nothing")  # that there is nothing to release does no harm
    wait_at(gate)


def fork_in_a_block(gate: Connection, where: object) -> None:
    """A forked child has timers of its own."""
    with hangwatch.paused("pause", 600), hangwatch.expires(0.1, "parent's"):
        pid = os.fork()
        if pid == 0:
            with hangwatch.expires(600, "parent's"):
                pass
            wait_at(gate)
            with hangwatch.expires(600, "parent's"):
                pass
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    os._exit(0 if status == 0 else 1)


SURVIVORS = [be_in_an_inner_block, cancel_and_renew, be_in_a_pause, call_by_hand, fork_in_a_block]


# Workers that must be ended.


def hang_after_an_inner_block(where: object) -> None:
    """The outer block has its own time anew."""
    with hangwatch.expires(0.4, "outer"):
        with hangwatch.expires(600, "outer"):
            pass
        time.sleep(1000)


def overrun_a_pause(where: object) -> None:
    with hangwatch.expires(600, "step"), hangwatch.paused("step", after=0.4):
        time.sleep(1000)


def hang_in_a_pause_of_the_same_name(where: object) -> None:
    with hangwatch.paused("step", after=0.4), hangwatch.expires(0.1, "step"):
        time.sleep(1000)


def leave_the_second_armed(where: object) -> None:
    """Neither the end of a block around, nor that of an older timer, ends a later one."""
    client = client_at(where)
    with hangwatch.expires(600, "around"):
        client.acquire("first", time.time() + 600)
        client.acquire("second", time.time() + 0.4)
    client.release("first")
    time.sleep(1000)


def hang_in_one_of_two_threads(where: object) -> None:
    """Two threads in one scope have a timer each."""
    entered = threading.Event()

    def other() -> None:
        with hangwatch.expires(0.4, "shared"):
            entered.set()
            time.sleep(1000)

    threading.Thread(target=other, daemon=True).start()
    entered.wait()
    with hangwatch.expires(600, "shared"):
        pass
    time.sleep(1000)


HANGING = [
    hang_after_an_inner_block,
    overrun_a_pause,
    hang_in_a_pause_of_the_same_name,
    leave_the_second_armed,
    hang_in_one_of_two_threads,
]
