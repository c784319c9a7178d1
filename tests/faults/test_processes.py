"""Forks, execs, exits: a child never touches its parent's timers."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.watchers import RunningWatcher

PRELUDE = """
import gc, os, signal, subprocess, sys, threading, time
import hangwatch
from hangwatch.watcher.page_reader import PageReader
from hangwatch.worker import stack_channel
from hangwatch.worker.client import client_at
def reader(): return PageReader(client_at(os.environ["HANGWATCH_ADDRESS"]).page.descriptor.number)
def scopes(page): return sorted(page.details(slot).scope for slot in page.armed())
def wait(child):
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
"""


def held(watcher: RunningWatcher, script: str) -> None:
    worker = watcher.connected_worker(PRELUDE + script, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert worker.returncode == 0, out + err
    assert out.endswith("held\n")


def test_a_child_that_leaves_its_parent_s_block_leaves_it_armed(watcher: RunningWatcher) -> None:
    held(
        watcher,
        """
with hangwatch.expires(60, "parent"):
    child = os.fork()
parent = child != 0
if not parent:
    os._exit(0)
wait(child)

before = hangwatch.expires(60, "parent")
before.__enter__()
page = reader()
child = os.fork()
if child == 0:
    before.__exit__(None, None, None)
    with hangwatch.expires(60, "child"): pass
    os._exit(0)
wait(child)
assert scopes(page) == ["parent"], scopes(page)

# And the child of a thread, while other threads are inside of blocks.
inside, leave = threading.Barrier(3), threading.Event()
def work(name):
    with hangwatch.expires(60, name):
        inside.wait(); leave.wait()
threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
for thread in threads: thread.start()
inside.wait()
def forker():
    child = os.fork()
    if child == 0:
        gc.collect()
        before.__exit__(None, None, None)
        os._exit(0)
    wait(child)
thread = threading.Thread(target=forker); thread.start(); thread.join()
assert scopes(page) == ["a", "b", "parent"], scopes(page)
leave.set()
for thread in threads: thread.join()
before.__exit__(None, None, None)
assert scopes(page) == []
print("held")
""",
    )


def test_a_child_starts_with_nothing_of_its_parent_s(watcher: RunningWatcher) -> None:
    held(
        watcher,
        """
with hangwatch.expires(60, "connect"): pass
client = client_at(os.environ["HANGWATCH_ADDRESS"])
socket, channel = client._socket.fileno(), stack_channel.open_channel()
page = client.page.descriptor.number
child = os.fork()
if child == 0:
    for descriptor in (socket, channel.fd, page):
        try: os.fstat(descriptor)
        except OSError: continue
        os._exit(1)
    mask = int(next(l for l in open("/proc/self/status") if l.startswith("SigCgt")).split()[1], 16)
    if mask >> (channel.own - 1) & 1 or mask >> (channel.all - 1) & 1: os._exit(2)
    with hangwatch.expires(60, "child"):
        mine = client_at(os.environ["HANGWATCH_ADDRESS"])
        if mine._socket is None or scopes(reader()) != ["child"]: os._exit(3)
    os._exit(0)
wait(child)
print("held")
""",
    )


def test_descriptors_that_the_program_closed_are_never_taken_for_ours(
    watcher: RunningWatcher,
) -> None:
    held(
        watcher,
        """
with hangwatch.expires(60, "connect"): pass
os.closerange(3, 100)
mine = [os.memfd_create(str(n)) for n in range(20)]
pair = __import__("socket").socketpair()
child = os.fork()
if child == 0:
    with hangwatch.expires(60, "child"): gc.collect()  # the parent's page is gone
    for descriptor in mine: os.fstat(descriptor)
    os._exit(0)
wait(child)
for n in range(100):
    with hangwatch.expires(50 - 0.1 * n, f"rings {n}"): pass
for descriptor in mine:
    assert os.fstat(descriptor).st_size == 0
pair[1].setblocking(False)
try: assert not pair[1].recv(10), "a ring went into a socket of the program's"
except BlockingIOError: pass
print("held")
""",
    )


def test_a_child_of_subprocess_with_a_preexec_function_harms_nobody(
    watcher: RunningWatcher,
) -> None:
    held(
        watcher,
        """
with hangwatch.expires(60, "parent"):
    page = reader()
    subprocess.run(["true"], preexec_fn=lambda: None, check=True)
    assert scopes(page) == ["parent"]
    with hangwatch.expires(60, "after"):
        assert scopes(page) == ["after", "parent"]
print("held")
""",
    )


def test_a_worker_that_ends_inside_of_a_block_is_no_incident(watcher: RunningWatcher) -> None:
    limit, pids = 0.3, []
    for ending in ("sys.exit(0)", "os._exit(0)", "os.execvp('true', ['true'])"):
        enter = f"print('ready', flush=True); hangwatch.expires({limit}, 'x').__enter__(); "
        worker = watcher.connected_worker(PRELUDE + enter + ending)
        worker.read_line()
        began = time.monotonic()
        assert worker.wait() == 0
        if time.monotonic() - began < limit:  # else it may have overrun its block
            pids.append(worker.pid)
        worker.communicate()
    # Its block begins after the others, and so overruns after they would have.
    later = watcher.connected_worker(PRELUDE + f"with hangwatch.expires({limit}): time.sleep(1000)")
    later.communicate()
    watcher.report(pid=later.pid)
    assert [watcher.reports(pid=pid) for pid in pids] == [[]] * len(pids)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to count with")
def test_the_quiet_path_makes_no_system_call() -> None:
    """The benchmark's own count."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "blocks.py"
    result = subprocess.run(
        [sys.executable, str(benchmark), "--system-calls"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "system calls in 50000 pairs: 0\n"


STANDS_ALONE = """
import time, hangwatch
client = hangwatch.SharedMemoryTimerClient()
with hangwatch.expires(after=3600, scope="around", client=client):
    client.acquire("first", time.time() + 3600)
    client.acquire("second", time.time() + 0.3)
client.release("first")
time.sleep(1000)
"""


def test_a_timer_acquired_by_a_call_outlives_the_block_around_it(
    watcher: RunningWatcher,
) -> None:
    with watcher.worker(STANDS_ALONE) as worker:
        assert worker.wait() == -signal.SIGKILL
    assert watcher.report(pid=worker.pid)["scope"]["name"] == "second"
