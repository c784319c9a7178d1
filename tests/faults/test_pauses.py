"""`hangwatch.paused`: timers stand still, and go on with what was left to them."""

from __future__ import annotations

import gc
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

import hangwatch
from hangwatch import page
from support.pages import QuietClient, quiet_page
from support.watchers import RunningWatcher, StartWatcher, wait_until

NEARLY = 0.5


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


def slept() -> float:
    """Let some time pass, and return how much that was at least."""
    began = time.monotonic()
    time.sleep(0.2)
    return time.monotonic() - began


def test_clocks_stand_still_and_go_on(client: QuietClient) -> None:
    with hangwatch.expires(60, "work") as work:
        with hangwatch.paused("upload", after=600) as pause:
            before = work.remaining()
            slept()
            assert work.remaining() == before, "it stands still"
            assert pause.remaining() < 600, "the pause's own does not"
            reader = client.reader()
            assert reader.is_paused()
        assert not reader.is_paused()
        reader.close()
        assert before - NEARLY < work.remaining() <= before


def test_a_pause_ends_with_the_outermost(client: QuietClient) -> None:
    with hangwatch.expires(60, "work") as work:
        before = work.remaining()
        with hangwatch.paused("outer", after=600):
            with hangwatch.paused("inner", after=600), hangwatch.paused("inner", after=600):
                passed = slept()
            assert client.reader().is_paused(), "the inner one's end resumes nothing"
            passed += slept()
        assert before - NEARLY < work.remaining() <= before
        assert 60 - work.remaining() < passed + NEARLY


def test_pauses_of_several_threads_overlap(client: QuietClient) -> None:
    second, first_ended = threading.Barrier(2), threading.Event()

    def other() -> None:
        with hangwatch.paused("second", after=600):
            second.wait()
            first_ended.wait()
            slept()

    with hangwatch.expires(60, "work") as work:
        thread = threading.Thread(target=other)
        with hangwatch.paused("first", after=600):
            slept()
            thread.start()
            second.wait()
            before = work.remaining()
            slept()
        assert client.reader().is_paused()
        assert work.remaining() == before
        first_ended.set()
        thread.join()
        assert not client.reader().is_paused()
        assert before - NEARLY < work.remaining() <= before


def test_blocks_that_begin_end_or_are_renewed_meanwhile(client: QuietClient) -> None:
    step = threading.Barrier(2)

    def begin() -> None:
        with hangwatch.expires(60, "begins") as begins:
            assert begins.remaining() == 60, "it has not begun to run"
            step.wait()
            step.wait()
            assert 60 - NEARLY < begins.remaining() <= 60
            step.wait()

    with hangwatch.expires(60, "renewed") as renewed, hangwatch.expires(60, "cancelled") as never:
        never.cancel()
        with hangwatch.paused("pause", after=600):
            slept()
            renewed.renew(30)
            with hangwatch.expires(60, "ends"):
                assert hangwatch.expires(60) is not None
            thread = threading.Thread(target=begin)
            thread.start()
            step.wait()
            slept()
        step.wait()
        assert 30 - NEARLY < renewed.remaining() <= 30
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
        before = work.remaining()
        pause.__exit__(None, None, None)
        assert before - NEARLY < work.remaining() <= before


HEALTHY = """
import threading, time, hangwatch
def work():
    with hangwatch.expires(1.0, "in a thread"):
        inside.wait(); time.sleep(2.5)
inside = threading.Barrier(2)
with hangwatch.expires(1.0, "around"):
    with hangwatch.paused("upload", after=60):
        thread = threading.Thread(target=work); thread.start()
        inside.wait()
        thread.join()
    with hangwatch.expires(1.0, "later"): pass
print("survived")
"""


def test_nobody_is_judged_during_a_pause(watcher: RunningWatcher) -> None:
    worker = watcher.worker(HEALTHY)
    out, _ = worker.communicate(timeout=30)
    assert (worker.returncode, out) == (0, "survived\n")
    assert [r for r in watcher.reports() if r["worker"]["pid"] == worker.pid] == []


def test_what_is_overdue_after_a_pause_is_found(watcher: RunningWatcher) -> None:
    """Its time is nearly used up before the pause: it falls due soon after, by itself."""
    worker = watcher.worker(
        """
import time, hangwatch
with hangwatch.expires(0.6, "hangs after"):
    time.sleep(0.3)
    with hangwatch.paused("long", after=60): time.sleep(6)
    time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    report = watcher.report(pid=worker.pid)
    assert report["scope"]["name"] == "hangs after"
    assert 0.6 <= report["scope"]["inside_s"] < 5, "suspended time is not counted"


def test_a_pause_that_overruns_is_judged_itself(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import time, hangwatch
with hangwatch.expires(0.3, "suspended"):
    with hangwatch.paused("checkpoint upload", after=0.8): time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    report = watcher.report(pid=worker.pid)
    assert "overran the pause 'checkpoint upload'" in report["headline"]
    assert (report["scope"]["pauses"], report["scope"]["enclosing"]) == (True, ["suspended"])


def test_reports_of_others_show_who_is_paused(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    script = """
import sys, time, hangwatch
with hangwatch.expires(60, "work"), hangwatch.paused("upload", after=600):
    print("paused", flush=True); sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE}
    resting = watcher.worker(script, **pipes)
    assert resting.stdin is not None
    assert resting.stdout is not None
    assert resting.stdout.readline() == "paused\n"
    hung = watcher.worker(
        "import time, hangwatch\nwith hangwatch.expires(3, 'h'): time.sleep(1000)"
    )
    hung.communicate(timeout=30)
    report = watcher.report(pid=hung.pid)
    (other,) = report["others"]
    assert [(s["name"], s["pauses"]) for s in other["scopes"]] == [
        ("work", False),
        ("upload", True),
    ]
    assert other["scopes"][0]["inside_s"] < 2, "its clock stands still"
    (text,) = watcher.report_dir.glob(f"*-{hung.pid}/report.txt")
    assert f"pid {resting.pid} in the pause 'upload' for" in text.read_text()
    resting.stdin.close()
    assert resting.wait(30) == 0
    resting.stdout.close()


def test_who_pauses_while_evidence_is_gathered_is_left_alone(start_watcher: StartWatcher) -> None:
    """The deadline passes, and the pause begins before the first step: nobody is harmed."""
    watcher = start_watcher(grace=0.01)
    script = """
import sys, time, hangwatch
with hangwatch.expires(0.3, "late"):
    time.sleep(0.3 + float(sys.argv[1]))
    with hangwatch.paused("pause", after=60): time.sleep(2.5)
time.sleep(0.1)
"""
    workers = {}
    for late in (0.004, 0.008, 0.015, 0.03, 0.06):
        worker = watcher.worker(script, str(late))
        worker.communicate(timeout=30)
        workers[worker.pid] = worker.returncode
    watcher.server.stop()
    outcomes = {pid: [r for r in watcher.reports() if r["worker"]["pid"] == pid] for pid in workers}
    paused = [
        pid
        for pid, found in outcomes.items()
        if "the process has paused its timers" in str([r["actions"] for r in found])
    ]
    assert paused, "at least one of them paused in time"
    for pid in paused:
        assert outcomes[pid][0]["outcome"] == "recovered"
    for pid, status in workers.items():
        assert (status < 0) == ("reaped" in [r["outcome"] for r in outcomes[pid]])


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
        client.page.words[page.deadline_word(slot.index)] = page.NEVER
        assert not reader.is_paused()
        client.page.words[page.deadline_word(slot.index)] = slot.deadline
        reader.close()


def test_a_pause_that_outlives_the_block_around_it_goes_on(client: QuietClient) -> None:
    """A hook begins a pause within a step, and ends it after that."""
    started, done = threading.Event(), threading.Event()

    def other() -> None:
        with hangwatch.expires(60, "other") as work:
            started.set()
            done.wait()
            assert work.remaining() > 60 - NEARLY

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    pause = hangwatch.paused("across", after=600)
    with hangwatch.expires(60, "step"):
        pause.__enter__()
    slept()
    assert client.reader().is_paused()
    slept()
    slept()
    pause.__exit__(None, None, None)
    assert not client.reader().is_paused()
    done.set()
    thread.join()
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
        slept()
        del generator, thread
        gc.collect()
        assert not client.reader().is_paused()
        assert before - NEARLY < work.remaining() <= before


STARVED = """
import signal, sys, threading, time, hangwatch
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
every = float(sys.argv[1])
def now_and_then():
    while True:
        time.sleep(every)
        with hangwatch.paused("upload", after=60): time.sleep(every / 5)
threading.Thread(target=now_and_then, daemon=True).start()
with hangwatch.expires(1.0, "hangs", grace=1.0): time.sleep(1000)
"""


@pytest.mark.parametrize("every", [0.4, 0.01])
def test_pauses_now_and_then_save_nobody_who_hangs(
    start_watcher: StartWatcher, every: float
) -> None:
    watcher = start_watcher()
    worker = watcher.worker(STARVED, str(every))
    worker.communicate(timeout=40)
    assert worker.returncode == -9
    watcher.server.stop()
    outcomes = [report["outcome"] for report in watcher.reports()]
    assert outcomes[-1] == "reaped"
    assert len(outcomes) <= 2


def test_a_pause_in_clean_up_brings_no_second_exception(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(grace=20)
    worker = watcher.worker(
        """
import time, hangwatch
try:
    with hangwatch.expires(0.3, "work", on_expiry="raise"):
        try: time.sleep(1000)
        finally:
            with hangwatch.paused("emergency checkpoint", after=60): time.sleep(1.0)
            time.sleep(1.0)
            print("saved")
except hangwatch.TimerExpired: print("ended")
""",
    )
    out, _ = worker.communicate(timeout=30)
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
        while rounds < 4000:
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
            assert not client.armed().get("pause"), "struck at the very entry of what ends it"
            assert before - took - 1e-3 <= left <= before + 1e-6, (before, left, took)
    assert hits > 50, hits
    print("held")
"""


def test_an_interruption_in_the_middle_gives_no_time_away() -> None:
    import sys

    path = [entry for entry in sys.path if entry.endswith("tests")]
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(path=path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "held\n"


def test_a_pause_s_end_rings_for_what_is_due_before_the_watcher_looks(
    watcher: RunningWatcher,
) -> None:
    """While paused, the watcher promises to look when the pause is over at the latest."""
    worker = watcher.worker(
        """
import time, hangwatch
with hangwatch.expires(1.0, "due soon after"):
    with hangwatch.paused("pause", after=600): time.sleep(1.5)
    time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    wait_until(lambda: worker.poll() is not None, "the end", 1)
    assert watcher.report(pid=worker.pid)["scope"]["late_s"] < 60
