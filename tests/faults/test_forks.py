"""Every way to get a child: it has a page of its own, and never touches its parent's."""

from __future__ import annotations

import subprocess

import pytest

from support.watchers import RunningWatcher

pytestmark = pytest.mark.core

PRELUDE = """
import ctypes, gc, multiprocessing, os, signal, subprocess, sys, threading
import time, traceback
import hangwatch
from hangwatch.page import layout
from hangwatch.page.view import View
from hangwatch.worker.client import client_at

c_library = ctypes.PyDLL(None)

def fork_in_c():
    # Python's hooks don't run: such are the workers of uWSGI.
    return c_library.fork()

def page():
    return client_at(os.environ["HANGWATCH_ADDRESS"]).page

def contents():
    # As the watcher sees it: what is mapped may be private by now.
    with open(f"/proc/{os.getpid()}/fd/{page().descriptor.number}", "rb") as file:
        whole = bytearray(file.read(layout.HEADER_BYTES + 64 * layout.SLOT_BYTES))
    whole[16:24] = bytes(8)  # the watcher's word
    return bytes(whole)

def scopes():
    view = page().view
    return sorted(view.read_details(slot.index).scope for slot in view.armed())

def child_of(fork, body):
    child = fork()
    if child == 0:
        signal.alarm(30)
        status = 1
        try:
            body()
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
"""


def held(watcher: RunningWatcher, script: str, *arguments: str) -> None:
    worker = watcher.connected_worker(PRELUDE + script, *arguments, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert worker.returncode == 0, out + err
    assert out.endswith("held\n")


UNTOUCHED = """
fork = {"python": os.fork, "c": fork_in_c}[sys.argv[1]]
what = sys.argv[2]
held, used = hangwatch.expires(60, "held"), hangwatch.expires(60, "used")
again = hangwatch.expires(60, "again")
for block in held, used, again:
    block.__enter__()
again.__exit__(None, None, None)
pause = hangwatch.paused("pause", 60)
if what in ("pause", "forgotten pause"):
    pause.__enter__()
before = contents()

def body():
    global used, pause
    if what == "nothing":
        pass
    elif what == "forgotten":
        used = None
        gc.collect()
    elif what == "left":
        used.__exit__(None, None, None)
    elif what == "renewed":
        used.renew()
        used.renew(5)
    elif what == "cancelled":
        used.cancel()
        assert used.remaining() > 0
    elif what == "pause":
        pause.__exit__(None, None, None)
    elif what == "forgotten pause":
        pause = None
    elif what == "debugger":
        import bdb
    elif what == "blocks":
        for scope in "again", "held", "of its own":
            with hangwatch.expires(60, scope) as block:
                block.renew()
                assert scope in scopes()
        assert scopes() == [], scopes()
        with hangwatch.paused("why", 60):
            pass

child_of(fork, body)
assert contents() == before
used.renew()
assert contents() != before
print("held")
"""


@pytest.mark.parametrize("fork", ["python", "c"])
@pytest.mark.parametrize(
    "what",
    [
        "nothing",
        "forgotten",
        "left",
        "renewed",
        "cancelled",
        "pause",
        "forgotten pause",
        "debugger",
        "blocks",
    ],
)
def test_a_child_touches_nothing_of_its_parent_s(
    watcher: RunningWatcher, fork: str, what: str
) -> None:
    held(watcher, UNTOUCHED, fork, what)


@pytest.mark.parametrize("fork", ["python", "c"])
def test_a_child_of_a_thread_and_its_child_have_pages_of_their_own(
    watcher: RunningWatcher, fork: str
) -> None:
    held(
        watcher,
        """
fork = {"python": os.fork, "c": fork_in_c}[sys.argv[1]]
inside, leave = threading.Barrier(3), threading.Event()

# A child of a fork in C keeps whatever another thread was doing to the interpreter's lock: where
# one waited for it, the child waits for ever for a thread that it doesn't have. So nobody asks
# for the lock, and the fork begins when all the others are known to sleep.
sys.setswitchinterval(600)

def stay():
    leave.wait()

def work(name):
    with hangwatch.expires(60, name):
        inside.wait()
        stay()

def others_sleep():
    frames = sys._current_frames()
    main = frames[threading.main_thread().ident]
    asleep = [main.f_code.co_name in ("_wait_for_tstate_lock", "join")]
    for thread in threads:
        frame = frames[thread.ident]
        within = {outer.f_code.co_name for outer, _ in traceback.walk_stack(frame)}
        asleep.append(frame.f_code is threading.Condition.wait.__code__ and "stay" in within)
    return all(asleep)

threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in "ab"]
for thread in threads: thread.start()
inside.wait()

def grandchild():
    with hangwatch.expires(60, "grandchild"):
        assert scopes() == ["grandchild"], scopes()

def child():
    gc.collect()
    with hangwatch.expires(60, "child"):
        assert scopes() == ["child"], scopes()
        child_of(fork, grandchild)
        assert scopes() == ["child"], scopes()

def forker():
    while not others_sleep(): time.sleep(0.001)
    with hangwatch.expires(60, "forker"):
        before = contents()
        child_of(fork, child)
        assert contents() == before
        passed.append(True)

passed = []
thread = threading.Thread(target=forker)
thread.start()
thread.join()
assert passed and scopes() == ["a", "b"], scopes()
leave.set()
for thread in threads: thread.join()
assert scopes() == []
print("held")
""",
        fork,
    )


def test_a_child_that_hangs_is_killed_and_its_parent_is_not(watcher: RunningWatcher) -> None:
    held(
        watcher,
        """
with hangwatch.expires(60, "parent"):
    child = fork_in_c()
    if child == 0:
        with hangwatch.expires(0.3, "child of a fork in C"):
            time.sleep(100)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
assert scopes() == []
print("held")
""",
    )


def test_a_child_that_becomes_another_program_is_no_fork(watcher: RunningWatcher) -> None:
    held(
        watcher,
        """
from hangwatch.worker.chosen_core import core
mine, forks = page(), core.forks()
with hangwatch.expires(60, "open"):
    before = contents()
    pid = os.posix_spawn("/bin/true", ["true"], os.environ)
    os.waitpid(pid, 0)
    subprocess.run(["true"], check=True)
    assert core.forks() == forks
    assert contents() == before
    assert page() is mine and scopes() == ["open"]
with hangwatch.expires(60, "open"):
    assert scopes() == ["open"]
print("held")
""",
    )


def test_children_of_multiprocessing_have_pages_of_their_own(watcher: RunningWatcher) -> None:
    held(
        watcher,
        """
def body(number):
    with hangwatch.expires(60, f"child {number}"):
        return scopes()

with hangwatch.expires(60, "parent"):
    before = contents()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(body, range(4), chunksize=1) == [[f"child {n}"] for n in range(4)]
    assert contents() == before
print("held")
""",
    )
