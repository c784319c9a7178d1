"""`on_expiry="raise"`: TimerExpired within the block, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import hangwatch
from support.nursery import LIMIT
from support.sizes import Size, short_and_long
from support.watchers import CONNECT, RunningWatcher, StartWatcher

RACE = """
import contextlib, os, random, signal, subprocess, sys, time
import hangwatch
from hangwatch.page import layout
from hangwatch.watcher.page_reader import PageReader
from hangwatch.worker.client import client_at

TimerExpired = hangwatch.TimerExpired
blocks, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]))

def spin(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass

def plain(limit, takes):
    with hangwatch.expires(limit, "race", on_expiry="raise"):
        spin(takes)

def nested(limit, takes):
    with hangwatch.expires(limit, "race", on_expiry="raise"):
        with hangwatch.expires(60, "inner"):
            spin(takes)
        with hangwatch.expires(60):
            pass

def in_a_stack(limit, takes):
    with contextlib.ExitStack() as stack:
        stack.enter_context(hangwatch.expires(limit, "race", on_expiry="raise"))
        spin(takes)

def renewed(limit, takes):
    with hangwatch.expires(limit, "race", on_expiry="raise") as timer:
        timer.renew()
        spin(takes)

@hangwatch.expires(60, "step")
def steps(takes):
    for _ in range(3):
        spin(takes / 3)
        yield

def around_steps(limit, takes):
    with hangwatch.expires(limit, "race", on_expiry="raise"):
        for _ in steps(takes):
            pass

def tight(limit, takes):
    caught.clear()
    laps, most = 0, int(takes * laps_a_second)
    try:
        with hangwatch.expires(limit, "race", on_expiry="raise"):
            while laps < most:  # cpython#130279
                laps += 1
    except TimerExpired:
        caught.append("here")
        raise

caught = []
began, laps = time.perf_counter(), 0
while laps < 10**6:
    laps += 1
laps_a_second = laps / (time.perf_counter() - began)

def paused(limit, takes):
    with hangwatch.expires(limit, "race", on_expiry="raise"):
        with hangwatch.paused("pause", 60):
            pass
        spin(takes)

FORMS = [plain] * 4 + [tight] * 3 + [nested, in_a_stack, in_a_stack, renewed, around_steps, paused]

with hangwatch.expires(60, "first", on_expiry="raise"):
    pass  # connects
client = client_at(os.environ["HANGWATCH_ADDRESS"])
reader = PageReader(client.page.descriptor.number)
number = reader.raise_signal()
assert number
# Besides those that the watcher sends, signals at every moment: the handler alone decides.
hammer = subprocess.Popen([sys.executable, "-c",
    "import os, random, sys, time\\n"
    "while True:\\n"
    "    os.kill(int(sys.argv[1]), int(sys.argv[2]))\\n"
    "    time.sleep(random.uniform(2e-5, 3e-4))\\n",
    str(os.getpid()), str(number)], stderr=subprocess.DEVNULL)
raised = done = 0
if sys.argv[3] == "traced":
    def trace(frame, event, argument):
        return trace
    sys.settrace(trace)
try:
    # On a busy machine it takes longer until enough of them have overrun, or ended in time.
    while done < blocks or raised < blocks // 100 or done - raised < blocks // 10:
        done += 1
        limit = rng.uniform(5e-5, 4e-4)
        form = rng.choice(FORMS)
        takes = limit * rng.uniform(0.5, 1.3)
        try:
            form(limit, takes)
        except TimerExpired as expired:
            assert expired.scope == "race" and expired.inside >= limit, expired
            assert form is not tight or caught, "it passed by the except around it"
            raised += 1
        # Out here it would end the program.
        [n * n for n in range(10)]
        if raised % 50 == 1:
            assert reader.armed() == [], (form, reader.armed())
finally:
    sys.settrace(None)
    hammer.kill(); hammer.wait()
assert reader.armed() == []
"""


@pytest.mark.core
@short_and_long
@pytest.mark.parametrize(
    ("first", "how"),
    [("", "plain"), ("import asyncio\n", "plain"), ("", "traced")],
    ids=["without asyncio", "with asyncio", "traced"],
)
def test_timer_expired_never_appears_outside_of_its_block(
    start_watcher: StartWatcher, first: str, how: str, size: Size
) -> None:
    """Blocks whose end races their deadline; what begins and ends them asks asyncio, if it can."""
    watcher = start_watcher(grace=1000)
    blocks = str(size.of(2_500, 50_000, 100_000))
    script = f"{CONNECT}{first}{RACE}"
    worker = watcher.interpreter("-c", script, blocks, "5", how, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out, err) == (0, "", "")
    # Gone: the last one, by the program's end.
    assert {report["outcome"] for report in watcher.reports()} <= {"raised", "recovered", "gone"}


# Does something, and raises at one of its lines, if it may be raised there.
AT_EACH_STEP = """
import contextlib, os, sys, time, hangwatch
from hangwatch.worker import soft_ending

def reaches(step, act):
    # Whether there are so many steps; at the last one comes the signal.
    steps = 0
    def trace(frame, event, argument):
        nonlocal steps
        steps += 1
        if steps == step:
            sys.settrace(None)
            soft_ending._raise(0, frame)
        return trace
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(hangwatch.expires(1e-6, "outer", on_expiry="raise"))
            time.sleep(1e-5)
            sys.settrace(trace)
            act()
    finally:
        sys.settrace(None)
    return steps >= step
"""
OTHER_BLOCKS = """
from hangwatch.watcher.page_reader import PageReader
from hangwatch.worker.client import client_at

reader = PageReader(client_at(os.environ["HANGWATCH_ADDRESS"]).page.descriptor.number)

def act():
    with hangwatch.expires(60, "inner"): pass
    with hangwatch.expires(60, "chosen", on_expiry="report", grace=1, signal=10): pass
    with hangwatch.paused("pause", 60): pass

step, more = 1, True
while more:
    try:
        more = reaches(step, act)
    except hangwatch.TimerExpired:
        pass
    assert reader.armed() == [], (step, reader.armed())
    step += 1
assert step > 100, step
"""
THE_HANDLER = """
# Stands for a frame in which a block is being left.
leaving = {"__name__": "hangwatch.leaving", "soft_ending": soft_ending, "sys": sys}
exec("def leave(): soft_ending._raise(0, sys._getframe()); sys.settrace(None)", leaving)

step = 1
while reaches(step, leaving["leave"]):
    step += 1
assert step > 10, step
"""


def run_unwatched(script: str) -> None:
    worker = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HANGWATCH_ADDRESS": "/nobody/listens/here"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr


@pytest.mark.parametrize("first", ["", "import asyncio\n"], ids=["without asyncio", "with asyncio"])
def test_raised_at_each_step_it_leaves_no_slot_armed(first: str) -> None:
    """At each line that runs while other blocks, and then its own, begin and end."""
    run_unwatched(first + AT_EACH_STEP + OTHER_BLOCKS)


def test_a_signal_at_each_step_of_the_handler_raises_nothing_either() -> None:
    """What it interrupts is still the block's end, whatever code the handler calls."""
    run_unwatched(AT_EACH_STEP + THE_HANDLER)


def outcome(watcher: RunningWatcher, script: str) -> tuple[int, str, dict[str, Any]]:
    """Run a worker to its end; return its status, its output and the report of it."""
    worker = watcher.connected_worker(script)
    out, _ = worker.communicate()
    return worker.returncode, out, watcher.report(pid=worker.pid)


def actions(report: dict[str, Any]) -> list[str]:
    return [f"{action['action']}: {action['result']}" for action in report["actions"]]


def test_it_wakes_a_main_thread_that_sleeps_and_says_what_overran(
    watcher: RunningWatcher,
) -> None:
    status, out, report = outcome(
        watcher,
        """
import time, hangwatch
try:
    with hangwatch.expires(0.3, "soft", on_expiry="raise", grace=1000):
        try: time.sleep(1000)
        except Exception: print("swallowed")
except hangwatch.TimerExpired as expired:
    print(expired.scope, expired.limit, expired.inside >= 0.3)
with hangwatch.expires(60, "after"): print("goes on")
""",
    )
    assert (status, out) == (0, "soft 0.3 True\ngoes on\n")
    assert report["outcome"] == "raised"
    assert "TimerExpired" in report["headline"]
    assert actions(report) == ["raise: asked", "look: the block has ended"]
    assert any("only a worker that is about to be killed" in why for why in report["missing"])


def test_uncaught_it_ends_the_program_with_a_traceback(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(on_expiry="raise", grace=1000)
    worker = watcher.connected_worker(
        "import time, hangwatch\nwith hangwatch.expires(0.3, 'soft'): time.sleep(1000)",
        stderr=subprocess.PIPE,
    )
    _, err = worker.communicate()
    assert worker.returncode == 1
    assert "TimerExpired: 'soft' has taken" in err
    assert watcher.report(pid=worker.pid)["outcome"] == "raised"


SWALLOWS = """
import time, hangwatch
with hangwatch.expires(0.3, "swallows", on_expiry="raise", grace=0.5):
    while True:
        try: time.sleep(1000)
        except hangwatch.TimerExpired: print("TimerExpired", flush=True)
"""
IN_C = """
import hangwatch
with hangwatch.expires(0.3, "in C", on_expiry="raise", grace=0.5):
    sum(range(10**15))  # a loop in C that looks at no signal
"""


@pytest.mark.parametrize(("script", "prints"), [(SWALLOWS, ["TimerExpired"]), (IN_C, [])])
def test_a_worker_that_stays_in_the_block_for_the_grace_is_reaped(
    watcher: RunningWatcher, script: str, prints: list[str]
) -> None:
    status, out, report = outcome(watcher, script)
    assert out.splitlines() in (prints, []), "raised once, if it came to that within the grace"
    assert report["outcome"] == "reaped"
    first, second, *_ = report["actions"]
    assert (first["action"], first["result"]) == ("raise", "asked")
    assert second["action"] == "SIGTERM"
    assert second["at_s"] - first["at_s"] >= 0.5
    assert died_of_sigterm(status, report)


def died_of_sigterm(status: int, report: dict[str, Any]) -> bool:
    """Tell whether a worker died of SIGTERM, or SIGKILL followed it because that took too long."""
    names = [action["action"] for action in report["actions"]]
    ends = names[names.index("SIGTERM") :]
    if ends == ["SIGTERM", "confirm"]:
        return status == -15
    return status in (-15, -9) and ends == ["SIGTERM", "SIGKILL", "confirm"]


def test_the_outermost_overdue_block_catches_it(watcher: RunningWatcher) -> None:
    status, out, _ = outcome(
        watcher,
        """
import signal, time, hangwatch
signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))
try:
    with hangwatch.expires(0.4, "outer", on_expiry="raise", grace=1000):
        try:
            with hangwatch.expires(0.3, "inner", on_expiry="raise", grace=1000):
                time.sleep(1)  # both are overdue when the signal gets through
                signal.pthread_sigmask(signal.SIG_UNBLOCK, range(34, 65))
                time.sleep(1000)
        except hangwatch.TimerExpired as expired:
            print("through the inner one:", expired.scope)
            raise
except hangwatch.TimerExpired as expired:
    print("caught:", expired.scope)
""",
    )
    assert (status, out) == (0, "through the inner one: outer\ncaught: outer\n")


C_BELOW_OUR_FRAMES = """
import os, time, hangwatch

def a_step_of_an_iteration():
    read_end, write_end = os.pipe()
    for line in hangwatch.watch(os.fdopen(read_end), 0.3): pass

def a_decorated_function():
    hangwatch.expires(0.3)(time.sleep)(1000)

def a_decorated_generator():
    @hangwatch.expires(0.3)
    def generate(): yield from map(time.sleep, [1000])
    list(generate())

def a_pause():
    with hangwatch.expires(60), hangwatch.paused("pause", 0.3): time.sleep(1000)

for form in (a_step_of_an_iteration, a_decorated_function, a_decorated_generator, a_pause):
    try: form()
    except hangwatch.TimerExpired: print("raised in", form.__name__)
"""


def test_every_form_is_ended_softly(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(on_expiry="raise", grace=1000)
    worker = watcher.connected_worker(C_BELOW_OUR_FRAMES)
    out, _ = worker.communicate()
    assert worker.returncode == 0
    assert out.splitlines() == [
        "raised in a_step_of_an_iteration",
        "raised in a_decorated_function",
        "raised in a_decorated_generator",
        "raised in a_pause",
    ]
    reports = watcher.wait_for_reports(4, pid=worker.pid)
    assert [report["outcome"] for report in reports] == ["raised"] * 4


def test_a_worker_that_catches_it_and_goes_on_within_the_block_was_not_ended(
    watcher: RunningWatcher,
) -> None:
    worker = watcher.connected_worker(
        """
import sys, time, hangwatch
with hangwatch.expires(0.3, "goes on", on_expiry="raise", grace=1000) as timer:
    try: time.sleep(1000)
    except hangwatch.TimerExpired: timer.renew(1000)
    sys.stdin.readline()
print("ended by itself")
""",
        stdin=subprocess.PIPE,
    )
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "recovered"
    assert actions(report)[-1] == "look: the block has got more time"
    assert worker.communicate() == ("ended by itself\n", "")
    assert worker.returncode == 0


def test_it_may_be_raised_again_for_another_interval(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import time, hangwatch
with hangwatch.expires(0.3, "twice", on_expiry="raise", grace=1000) as timer:
    for _ in range(2):
        try: time.sleep(1000)
        except hangwatch.TimerExpired as expired: print(expired.limit); timer.renew(0.5)
    timer.cancel()
""",
    )
    out, _ = worker.communicate()
    assert worker.returncode == 0
    first, second = map(float, out.split())
    assert (first, round(second, 6)) == (0.3, 0.5)


def test_a_server_may_force_it(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(on_expiry="raise", force=True, grace=1000)
    for choice in ("reap", "report"):
        status, out, report = outcome(
            watcher,
            f"""
import time, hangwatch
try:
    with hangwatch.expires(0.3, "forced", on_expiry={choice!r}): time.sleep(1000)
except hangwatch.TimerExpired: print("raised")
""",
        )
        assert (status, out, report["outcome"]) == (0, "raised\n", "raised")


RAISES = """
import time, hangwatch
class Odd(Exception):
    def __init__(self, one, another): pass
for raises in (TimeoutError, KeyboardInterrupt, hangwatch.TimerExpired, Odd):
    try:
        with hangwatch.expires(0.3, "own", raises=raises, grace=1000): time.sleep(1000)
    except BaseException as error:
        cause = error.__cause__
        print(type(error).__name__, "'own' has taken" in str(error), getattr(cause, "limit", cause))
"""


def test_a_block_may_name_the_exception(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(RAISES)
    out, _ = worker.communicate()
    assert worker.returncode == 0
    assert out.splitlines() == [
        "TimeoutError True 0.3",
        "KeyboardInterrupt True 0.3",
        "TimerExpired True None",
        "TimerExpired True None",  # one that can't be made of a message
    ]
    reports = watcher.wait_for_reports(4, pid=worker.pid)
    assert [report["outcome"] for report in reports] == ["raised"] * 4


# Where nothing can be raised: each has a function `hang(seconds)` that is in the block so long.
THREAD = """
import threading, time, hangwatch
def hang(seconds):
    def work():
        with hangwatch.expires(0.3, "elsewhere"{choices}): time.sleep(seconds)
    thread = threading.Thread(target=work); thread.start(); thread.join()
"""
TASK = """
import asyncio, time, hangwatch
def hang(seconds):
    async def work():
        async with hangwatch.expires(0.3, "elsewhere"{choices}): await asyncio.sleep(seconds)
    async def main():
        task = asyncio.create_task(work())
        while not task.done():
            try: spin(0.01); await asyncio.sleep(0)
            except hangwatch.TimerExpired: print("a neighbour was hit")
        await task
    asyncio.run(main())
"""
# In an interpreter of its own: a forked worker has asyncio from the beginning.
LATE_ASYNCIO = """
import sys, time, hangwatch
def work(after, seconds):
    with hangwatch.expires(after, "elsewhere"{choices}): time.sleep(seconds)
work(1000, 0)
assert "asyncio" not in sys.modules
def hang(seconds):
    import asyncio
    async def task(): work(0.3, seconds)
    asyncio.run(task())
"""
TRIO = """
import time, hangwatch, trio
def hang(seconds):
    async def work():
        with hangwatch.expires(0.3, "elsewhere"{choices}): await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    async def neighbour():
        while True:
            try: spin(0.01); await trio.sleep(0)
            except hangwatch.TimerExpired: print("a neighbour was hit")
    async def main():
        global nursery
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(neighbour)
    trio.run(main)
"""
GREENLET = """
import time, hangwatch
from greenlet import greenlet
def hang(seconds):
    def work():
        with hangwatch.expires(0.3, "elsewhere"{choices}): main.switch()
    main = greenlet.getcurrent()
    other = greenlet(work); other.switch()
    try: spin(seconds)
    except hangwatch.TimerExpired: print("a neighbour was hit")
    other.switch()
"""
NO_SIGNAL = """
import signal, time, hangwatch
for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1): signal.signal(number, lambda *_: None)
def hang(seconds):
    with hangwatch.expires(0.3, "elsewhere"{choices}): spin(seconds)
"""
GENERATOR = """
import time, hangwatch
def hang(seconds):
    def work():
        with hangwatch.expires(0.3, "elsewhere"{choices}): yield
    generator = work(); next(generator)
    try: spin(seconds)
    except hangwatch.TimerExpired: print("a neighbour was hit")
    next(generator, None)
"""
ELSEWHERE = {
    "thread": (THREAD, "not possible: Python raises in the main thread alone"),
    "task": (TASK, "not possible: it would hit whichever task of the event loop runs"),
    "asyncio imported late": (LATE_ASYNCIO, "not possible: it would hit whichever task"),
    "trio": (TRIO, "not possible: it would hit whichever task of the event loop runs"),
    "greenlet": (GREENLET, "not possible: it would hit whichever task of the event loop runs"),
    "no free signal": (NO_SIGNAL, "not possible: the worker has no signal for it"),
    "generator that waits": (GENERATOR, "asked"),
}
SPIN = """
import time
def spin(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until: pass
"""


@pytest.fixture(params=list(ELSEWHERE))
def elsewhere(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return a program whose block can't be raised in, and what a report says of that."""
    if request.param in ("trio", "greenlet"):
        pytest.importorskip(request.param)
    script, why = ELSEWHERE[request.param]
    return SPIN + script, why


def test_where_it_can_t_be_raised_the_worker_has_its_grace_and_is_reaped(
    watcher: RunningWatcher, watcher_with: StartWatcher, elsewhere: tuple[str, str]
) -> None:
    """Be it that the block asks for it, or that the server has it for all."""
    script, why = elsewhere
    servers = watcher_with(on_expiry="raise", grace=0.5)
    for server, choices in ((watcher, ", on_expiry='raise', grace=0.5"), (servers, "")):
        hangs = f"{CONNECT}{script.format(choices=choices)}hang(1000)\n"
        worker = server.interpreter("-c", hangs)
        out, _ = worker.communicate(timeout=LIMIT)
        report = server.report(pid=worker.pid)
        assert (out, report["outcome"]) == ("", "reaped")
        assert died_of_sigterm(worker.returncode, report)
        first, second, *_ = report["actions"]
        assert (first["action"], second["action"]) == ("raise", "SIGTERM")
        assert first["result"].startswith(why)
        assert second["at_s"] - first["at_s"] >= 0.4, "the first has waited for an answer"


def test_where_it_can_t_be_raised_nothing_fails_and_who_leaves_in_the_grace_lives(
    watcher: RunningWatcher, elsewhere: tuple[str, str]
) -> None:
    script, _ = elsewhere
    healthy = script.format(choices=", on_expiry='raise', grace=1000")
    ends = "hang(0)\nhang(1)\nprint('survived')\ninput()\n"
    worker = watcher.interpreter(
        "-c", f"{CONNECT}{healthy}{ends}", stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    report = watcher.report(pid=worker.pid)
    out, err = worker.communicate("\n", timeout=LIMIT)
    assert (worker.returncode, out, err) == (0, "survived\n", "")
    assert report["outcome"] == "recovered"


def test_in_a_generator_that_goes_on_it_is_raised(watcher: RunningWatcher) -> None:
    """Its block is open while its consumer is at work, who is not hit."""
    status, out, report = outcome(
        watcher,
        SPIN
        + """
import time, hangwatch
def rows():
    with hangwatch.expires(0.3, "rows", on_expiry="raise", grace=1000):
        yield
        time.sleep(1000)
generator = rows()
next(generator)
try: spin(0.6)
except hangwatch.TimerExpired: print("the consumer was hit")
try: next(generator)
except hangwatch.TimerExpired: print("raised in the generator")
""",
    )
    assert (status, out, report["outcome"]) == (0, "raised in the generator\n", "raised")


def test_a_client_of_one_s_own_can_t_do_it(watcher: RunningWatcher) -> None:
    class Own(hangwatch.TimerClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            raise AssertionError("acquired")

        def release(self, scope_id: str) -> None:
            raise AssertionError("released")

    for choices in ({"on_expiry": "raise"}, {"raises": TimeoutError}):
        block = hangwatch.expires(60, client=Own(), **choices)
        with pytest.raises(hangwatch.UnsupportedError, match="Own can't pause, nor take on_e"):
            block.__enter__()


TRACED = """
import sys, time, hangwatch
def work():
    with hangwatch.expires(0.6, "soft", on_expiry="raise", grace=1000):
        time.sleep(0.1)
    return "left"
first, seen = work.__code__.co_firstlineno, []
def local(frame, event, argument):
    if event == "line":
        seen.append(frame.f_lineno - first)
        if seen == [1, 2, 1]:  # at the line of the `with` again: about to leave it
            until = time.monotonic() + 1
            while time.monotonic() < until: time.sleep(0.01)
    return local
sys.settrace(lambda frame, event, argument: local if frame.f_code is work.__code__ else None)
print(work())
assert sys.gettrace() is not None
sys.settrace(None)
input()
"""


def test_a_trace_function_at_the_block_s_end_is_not_hit(watcher: RunningWatcher) -> None:
    """What it raised would skip the block's `__exit__`, and end the tracing."""
    worker = watcher.connected_worker(TRACED, stdin=subprocess.PIPE)
    report = watcher.report(pid=worker.pid)
    out, _ = worker.communicate("\n")
    assert (worker.returncode, out) == (0, "left\n")
    assert report["outcome"] == "recovered"


def test_a_program_that_takes_the_signal_for_itself_is_reaped(watcher: RunningWatcher) -> None:
    status, out, report = outcome(
        watcher,
        """
import os, signal, time, hangwatch
from hangwatch.watcher.page_reader import PageReader
from hangwatch.worker.client import client_at
with hangwatch.expires(0.5, "taken", on_expiry="raise", grace=0.2):
    client = client_at(os.environ["HANGWATCH_ADDRESS"])
    signal.signal(PageReader(client.page.descriptor.number).raise_signal(), signal.SIG_DFL)
    time.sleep(1000)
""",
    )
    assert out == ""
    assert died_of_sigterm(status, report)
    assert actions(report)[0] == "raise: failed: the program no longer catches the request's signal"


def test_it_pickles() -> None:
    import pickle

    expired = pickle.loads(pickle.dumps(hangwatch.TimerExpired("scope", 1.0, 2.0)))
    assert (expired.scope, expired.limit, expired.inside) == ("scope", 1.0, 2.0)
    assert not isinstance(expired, Exception)


def test_a_block_within_a_context_manager_is_ended_softly(watcher: RunningWatcher) -> None:
    script = """
import contextlib, time, hangwatch
@contextlib.contextmanager
def step():
    with hangwatch.expires(0.3, "step", on_expiry="raise", grace=60):
        yield
try:
    with step():
        while True: time.sleep(0.01)
except hangwatch.TimerExpired as expired:
    print(expired.scope, flush=True)
"""
    worker = watcher.connected_worker(script)
    assert worker.read_line() == "step"
    assert worker.wait() == 0
