"""`hangwatch.paused`: timers stand still, and go on with what was left to them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from queue import Queue

import pytest

import hangwatch
from hangwatch import failpoints
from hangwatch.page import layout
from support.nursery import LIMIT, Worker
from support.pages import QuietClient, quiet_page
from support.sizes import Size, short_and_long
from support.watchers import RunningWatcher, StartWatcher, first_recovered, wait_until


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


def let_time_pass() -> None:
    time.sleep(0.2)


def stood_still_until(when: float, before: float, timer: hangwatch.Expiration) -> bool:
    """Tell whether a timer had `before` seconds left until `when`, and has run since."""
    left = timer.remaining()
    return before - (time.monotonic() - when) - 1e-6 <= left <= before


def test_clocks_stand_still_and_go_on(client: QuietClient) -> None:
    with hangwatch.expires(60, "work") as work:
        with hangwatch.paused("upload", after=600) as pause:
            before = work.remaining()
            let_time_pass()
            assert work.remaining() == before, "it stands still"
            assert pause.remaining() < 600, "the pause's own does not"
            reader = client.reader()
            assert reader.is_paused()
            ends = time.monotonic()
        assert not reader.is_paused()
        reader.close()
        assert stood_still_until(ends, before, work)


def test_a_pause_ends_with_the_outermost(client: QuietClient) -> None:
    with hangwatch.expires(60, "work") as work:
        with hangwatch.paused("outer", after=600):
            before = work.remaining()
            with hangwatch.paused("inner", after=600), hangwatch.paused("inner", after=600):
                let_time_pass()
            assert client.reader().is_paused(), "the inner one's end resumes nothing"
            let_time_pass()
            assert work.remaining() == before
            ends = time.monotonic()
        assert stood_still_until(ends, before, work)


def test_pauses_of_several_threads_overlap(client: QuietClient) -> None:
    second, first_ended = threading.Barrier(2), threading.Event()
    ends = 0.0

    def other() -> None:
        nonlocal ends
        with hangwatch.paused("second", after=600):
            second.wait()
            first_ended.wait()
            let_time_pass()
            ends = time.monotonic()

    with hangwatch.expires(60, "work") as work:
        thread = threading.Thread(target=other)
        with hangwatch.paused("first", after=600):
            let_time_pass()
            thread.start()
            second.wait()
            before = work.remaining()
            let_time_pass()
        assert client.reader().is_paused()
        assert work.remaining() == before
        first_ended.set()
        thread.join()
        assert not client.reader().is_paused()
        assert stood_still_until(ends, before, work)


def test_blocks_that_begin_end_or_are_renewed_meanwhile(client: QuietClient) -> None:
    step = threading.Barrier(2)

    def begin() -> None:
        with hangwatch.expires(60, "begins") as begins:
            assert begins.remaining() == 60, "it has not begun to run"
            step.wait()
            step.wait()
            assert stood_still_until(ends, 60, begins)
            step.wait()

    with hangwatch.expires(60, "renewed") as renewed, hangwatch.expires(60, "cancelled") as never:
        never.cancel()
        with hangwatch.paused("pause", after=600):
            let_time_pass()
            renewed.renew(30)
            with hangwatch.expires(60, "ends"):
                assert hangwatch.expires(60) is not None
            thread = threading.Thread(target=begin)
            thread.start()
            step.wait()
            let_time_pass()
            ends = time.monotonic()
        step.wait()
        assert stood_still_until(ends, 30, renewed)
        assert client.armed() == {"renewed": 1, "cancelled": 1, "begins": 1}
        step.wait()
        thread.join()


def test_it_decorates_and_is_asynchronous(client: QuietClient) -> None:
    import asyncio

    @hangwatch.paused("upload", after=600)
    def upload() -> bool:
        return client.reader().is_paused()

    async def main() -> bool:
        async with hangwatch.paused("upload", after=600):
            return client.reader().is_paused()

    assert upload()
    assert asyncio.run(main())
    assert not client.reader().is_paused()


def test_a_pause_of_a_forked_child_is_its_own(client: QuietClient) -> None:
    import os

    with hangwatch.expires(60, "work") as work:
        pause = hangwatch.paused("parent's", after=600)
        pause.__enter__()
        child = os.fork()
        if child == 0:
            pause.__exit__(None, None, None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.reader().is_paused()
        before, ends = work.remaining(), time.monotonic()
        pause.__exit__(None, None, None)
        assert stood_still_until(ends, before, work)


HEALTHY = """
import sys, threading, hangwatch
def work():
    with hangwatch.expires(0.1, "in a thread"):
        inside.wait()
        done.wait()
inside, done = threading.Barrier(2), threading.Event()
with hangwatch.expires(1000, "around") as around:
    with hangwatch.paused("upload", after=1000):
        around.renew(0.1)
        thread = threading.Thread(target=work); thread.start()
        inside.wait()
        print("paused", flush=True)
        sys.stdin.readline()
        done.set()
        thread.join()
        around.renew(1000)
    with hangwatch.expires(1000, "later"): pass
print("survived")
"""
HANGS = """
import time, hangwatch
with hangwatch.expires(0.3, "hangs"): time.sleep(1000)
"""


def test_nobody_is_judged_during_a_pause(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(HEALTHY, stdin=subprocess.PIPE)
    assert worker.read_line() == "paused"
    # Its blocks would be due by now, as this one is that began later.
    assert watcher.connected_worker(HANGS).wait() == -9
    out, _ = worker.communicate("go on\n")
    assert (worker.returncode, out) == (0, "survived\n")
    assert watcher.reports(pid=worker.pid) == []


def test_what_is_overdue_after_a_pause_is_found(watcher: RunningWatcher) -> None:
    """Its time is nearly used up before the pause: it falls due soon after.

    While paused, the watcher promises to look when the pause is over at the latest, so that
    the pause's end must ring.
    """
    worker = watcher.connected_worker(
        """
import time, hangwatch
began_at = time.time()
with hangwatch.expires(1e6, "hangs after") as timer:
    timer.renew(0.5)
    with hangwatch.paused("long", after=1e5):
        began = time.monotonic()
        time.sleep(1.0)
        paused = time.monotonic() - began
    print(began_at, paused, flush=True)
    time.sleep(1000)
""",
    )
    began_at, paused = map(float, worker.read_line().split())
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    assert report["scope"]["name"] == "hangs after"
    took = datetime.fromisoformat(report["at"]).timestamp() - began_at
    assert report["scope"]["inside_s"] >= 0.5, "it had all of its time"
    assert report["scope"]["inside_s"] < took - paused + 0.01, "suspended time is not counted"


def test_a_pause_that_overruns_is_judged_itself(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import time, hangwatch
with hangwatch.expires(1000, "suspended") as timer:
    with hangwatch.paused("checkpoint upload", after=0.5): timer.renew(0.1); time.sleep(1000)
""",
    )
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    assert "overran the pause 'checkpoint upload'" in report["headline"]
    assert (report["scope"]["pauses"], report["scope"]["enclosing"]) == (True, ["suspended"])


def test_reports_of_others_show_who_is_paused(watcher: RunningWatcher) -> None:
    script = """
import sys, time, hangwatch
began = time.monotonic()
with hangwatch.expires(1000, "work"), hangwatch.paused("upload", after=1000):
    print(time.monotonic() - began, flush=True); sys.stdin.readline()
"""
    resting = watcher.connected_worker(script, stdin=subprocess.PIPE)
    ran_for = float(resting.read_line())
    hung = watcher.connected_worker(HANGS)
    assert hung.wait() == -9
    report = watcher.report(pid=hung.pid)
    (other,) = [other for other in report["others"] if other["pid"] == resting.pid]
    work, upload = other["scopes"]
    assert (work["name"], work["pauses"]) == ("work", False)
    assert (upload["name"], upload["pauses"]) == ("upload", True)
    assert work["inside_s"] <= ran_for + 0.001, "its clock stands still"
    assert upload["inside_s"] >= 0.3, "the pause's own does not"
    (text,) = watcher.report_dir.glob(f"*-{hung.pid}/report.txt")
    assert f"pid {resting.pid} in the pause 'upload' for" in text.read_text()
    resting.communicate("end\n")
    assert resting.returncode == 0


def test_a_worker_that_pauses_while_evidence_is_gathered_is_left_alone(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes, and the pause begins before the first step: nobody is harmed."""
    events: Queue[str] = Queue()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "incident.gathered=sleep:1")
        watcher = start_watcher(on_event=lambda event: events.put(event["event"]))
    script = """
import sys, hangwatch
with hangwatch.expires(0.3, "late") as timer:
    sys.stdin.readline()
    with hangwatch.paused("pause", after=1000):
        sys.stdin.readline()
        timer.renew(1000)
"""

    def start() -> Worker:
        worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
        while events.get(timeout=LIMIT) != "expired":
            pass
        worker.write_line()
        return worker

    worker, report = first_recovered(watcher, start)
    assert [action["result"] for action in report["actions"]] == [
        "the process has paused its timers"
    ]
    worker.communicate("end\n")
    assert worker.returncode == 0
    watcher.server.stop()
    assert len(watcher.reports(pid=worker.pid)) == 1


def test_a_pause_must_have_an_end(client: QuietClient) -> None:
    with hangwatch.paused("pause", after=60) as pause:
        with pytest.raises(hangwatch.UnsupportedError, match="must have an end"):
            pause.cancel()
        pause.renew(600)
        assert pause.remaining() > 599


def test_a_page_that_pauses_without_an_end_is_not_believed(client: QuietClient) -> None:
    with hangwatch.paused("pause", after=60):
        reader = client.reader()
        assert reader.is_paused()
        (slot,) = reader.armed()
        client.page.words[layout.deadline_word(slot.index)] = layout.NEVER
        assert not reader.is_paused()
        client.page.words[layout.deadline_word(slot.index)] = slot.deadline
        reader.close()


def test_a_pause_that_outlives_the_block_around_it_goes_on(client: QuietClient) -> None:
    """A hook begins a pause within a step, and ends it after that."""
    started, paused, done = threading.Event(), threading.Event(), threading.Event()
    before = 0.0

    def other() -> None:
        nonlocal before
        with hangwatch.expires(60, "other") as work:
            started.set()
            paused.wait()
            before = work.remaining()
            done.wait()
            found.append(stood_still_until(ends, before, work))

    found: list[bool] = []

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    pause = hangwatch.paused("across", after=600)
    with hangwatch.expires(60, "step"):
        pause.__enter__()
        paused.set()
    let_time_pass()
    assert client.reader().is_paused()
    let_time_pass()
    ends = time.monotonic()
    pause.__exit__(None, None, None)
    assert not client.reader().is_paused()
    done.set()
    thread.join()
    assert found == [True]
    assert client.armed() == {}


def test_a_pause_in_a_generator_that_outlives_its_thread(client: QuietClient) -> None:
    def pausing() -> Iterator[None]:
        with hangwatch.paused("in a generator", after=600):
            yield

    with hangwatch.expires(60, "work") as work:
        generator = pausing()
        thread = threading.Thread(target=next, args=[generator])
        thread.start()
        thread.join()
        assert client.reader().is_paused()
        before = work.remaining()
        let_time_pass()
        ends = time.monotonic()
        del generator, thread
        gc.collect()
        assert not client.reader().is_paused()
        assert stood_still_until(ends, before, work)


STARVED = """
import signal, sys, threading, time, hangwatch
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
every = float(sys.argv[1])
def now_and_then():
    while True:
        time.sleep(every)
        with hangwatch.paused("upload", after=1000): time.sleep(every / 5)
threading.Thread(target=now_and_then, daemon=True).start()
with hangwatch.expires(0.6, "hangs", grace=0.6): time.sleep(1000)
"""


@pytest.mark.parametrize("every", [0.2, 0.01])
def test_pauses_now_and_then_save_nobody_who_hangs(watcher: RunningWatcher, every: float) -> None:
    worker = watcher.connected_worker(STARVED, str(every))
    assert worker.wait() == -9

    def outcomes() -> list[str]:
        return [report["outcome"] for report in watcher.reports(pid=worker.pid)]

    wait_until(lambda: "reaped" in outcomes(), "the last report")
    assert outcomes()[-1] == "reaped"
    assert len(outcomes()) <= 2


def test_a_pause_in_clean_up_brings_no_second_exception(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import time, hangwatch
try:
    with hangwatch.expires(0.3, "work", on_expiry="raise", grace=1000):
        try: time.sleep(1000)
        finally:
            # Long enough for the watcher to ask again, if it did.
            with hangwatch.paused("emergency checkpoint", after=1000): time.sleep(0.5)
            time.sleep(0.5)
            print("saved")
except hangwatch.TimerExpired: print("ended")
""",
    )
    out, _ = worker.communicate()
    assert (worker.returncode, out) == (0, "saved\nended\n")


INTERRUPTED = """
import random, signal, sys, time
sys.path[:0] = {path!r}
import hangwatch
from support.pages import quiet_page

rng = random.Random(3)
def strike(*_): raise KeyboardInterrupt
with quiet_page() as client:
    signal.signal(signal.SIGALRM, strike)
    hits = 0
    with hangwatch.expires(1e5, "work") as work:
        rounds = 0
        while rounds < {rounds} or hits < 50:
            rounds += 1
            began = time.monotonic()
            before = work.remaining()
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 6e-4))
                with hangwatch.paused("pause", 600):
                    for _ in range(rng.randrange(300)): pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            left = work.remaining()
            took = time.monotonic() - began
            assert "pause" not in client.armed(), "struck at the very entry of what ends it"
            assert before - took - 1e-3 <= left <= before + 1e-6, (before, left, took)
"""


@short_and_long
def test_an_interruption_in_the_middle_gives_no_time_away(size: Size) -> None:
    path = [entry for entry in sys.path if entry.endswith("tests")]
    rounds = size.of(1000, 4000, 4000)
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(path=path, rounds=rounds)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
