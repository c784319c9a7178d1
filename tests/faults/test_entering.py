"""Entering and leaving a block fails for a wrong argument or for nobody configured, only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.watchers import RunningWatcher

pytestmark = pytest.mark.core

WITHOUT_IMPORTS = """
import sys, hangwatch

class NothingIsFound:
    def find_spec(self, name, path=None, target=None):
        print("imports", name)

before = set(sys.modules)
sys.meta_path.insert(0, NothingIsFound())
if sys.argv[1] == "elsewhere":
    import os
    os.environ["HANGWATCH_ADDRESS"] = "/nonexistent"
for chosen in {}, {"on_expiry": "raise"}, {"raises": TimeoutError}, {"grace": 2.0}:
    with hangwatch.expires(60, "first", **chosen) as block:
        block.renew()
        block.renew(50)
        block.cancel()
        block.renew()
        assert block.remaining() > 0
with hangwatch.paused("a checkpoint", 60):
    pass
assert [item for item in hangwatch.watch([1, 2], 60)] == [1, 2]

@hangwatch.expires(60)
def function():
    pass

@hangwatch.expires(60)
def generator():
    yield 1

@hangwatch.expires(60)
async def coroutine():
    pass

function()
assert list(generator()) == [1]
coroutine().close()
print(*sorted(set(sys.modules) - before), "done")
"""


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_block_imports_nothing(watcher: RunningWatcher, where: str) -> None:
    worker = watcher.interpreter("-c", WITHOUT_IMPORTS, where, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (0, "done\n"), out + err


OF_A_PAIR = """
import multiprocessing, os, sys, hangwatch
if sys.argv[1] == "queue":
    client = hangwatch.LocalTimerClient(multiprocessing.get_context("fork").Queue())
else:
    os.mkfifo(sys.argv[2])
    reader = os.open(sys.argv[2], os.O_RDONLY | os.O_NONBLOCK)
    client = hangwatch.FileTimerClient(sys.argv[2])
before = set(sys.modules)
for scope in "short", "long " * 200:
    with hangwatch.expires(60, scope, client=client) as block:
        block.renew()
    client.acquire(scope, 2e9)
    client.release(scope)
print(*sorted(set(sys.modules) - before), "done", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("transport", ["queue", "FIFO"])
def test_a_block_of_a_pair_imports_nothing(
    watcher: RunningWatcher, transport: str, tmp_path: Path
) -> None:
    where = tmp_path / "fifo"
    worker = watcher.interpreter("-c", OF_A_PAIR, transport, where, stderr=subprocess.PIPE)
    out, err = worker.communicate(timeout=60)
    assert (worker.returncode, out) == (0, "done\n"), out + err


WHILE_IMPORTING = """
import importlib.machinery, os, signal, sys, threading, hangwatch
imported, slow = sys.argv[1:]
begun = threading.Event()

class SlowDisk:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == slow else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        begun.set()
        threading.Event().wait()

sys.modules.pop(imported, None)
sys.modules.pop(slow, None)
sys.meta_path.insert(0, SlowDisk())
threading.Thread(target=__import__, args=(imported,), daemon=True).start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    with hangwatch.expires(60, "the child's first"):
        print("entered", flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
os._exit(abs(os.waitstatus_to_exitcode(status)))
"""


@pytest.mark.parametrize(
    ("imported", "slow"),
    [
        ("json", "json.decoder"),
        ("logging", "string"),
        ("ctypes", "ctypes._endian"),
        ("inspect", "inspect"),
        ("faulthandler", "faulthandler"),
    ],
)
def test_a_child_that_was_forked_while_a_thread_imports_enters_a_block(
    watcher: RunningWatcher, imported: str, slow: str
) -> None:
    worker = watcher.interpreter("-c", WHILE_IMPORTING, imported, slow, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (0, "entered\n"), out + err


NO_DESCRIPTORS = """
import os, resource, sys, hangwatch
free = int(sys.argv[1])
# Numbers that are used beyond the limit do not count.
taken = [os.dup(1) for _ in range(40)]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, most))
for descriptor in taken[:free]:
    os.close(descriptor)
with hangwatch.expires(60, "first"):
    print("first")
with hangwatch.expires(60, "first"):
    print("again")
with hangwatch.paused("why", 60), hangwatch.expires(60, "raises", on_expiry="raise"):
    print("others")
for descriptor in taken[free:]:
    os.close(descriptor)
"""


@pytest.mark.parametrize("free", range(7))
def test_without_descriptors_a_block_runs_and_nobody_watches(
    watcher: RunningWatcher, free: int
) -> None:
    worker = watcher.interpreter("-c", NO_DESCRIPTORS, str(free), stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (0, "first\nagain\nothers\n"), out + err
    # Each of them is told of in one line.
    assert all("runs on unwatched" in line for line in err.splitlines()), err
    assert free < 6 or not err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root")
def test_after_a_chroot_a_block_runs(watcher: RunningWatcher, tmp_path: Path) -> None:
    script = """
import os, sys, hangwatch
os.chroot(sys.argv[1])
os.chdir("/")
with hangwatch.expires(60, "first", on_expiry="raise"), hangwatch.paused("why", 60):
    print("ran")
"""
    worker = watcher.interpreter("-c", script, tmp_path, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (0, "ran\n"), out + err


AT_THE_END = """
import atexit, gc, os, sys, threading, hangwatch
how = sys.argv[1]

class Resource:
    def __init__(self, name):
        self.name = name
        self.open = hangwatch.expires(60, name)
        if how != "first":
            self.open.__enter__()
    def __del__(self, expires=hangwatch.expires, paused=hangwatch.paused, write=os.write):
        try:
            with expires(60, "closing"), paused("why", 60), expires(60):
                pass
            with expires(60, "closing") as block:
                block.renew()
            self.open.__exit__(None, None, None)
            write(1, b"closed\\n")
        except BaseException as error:
            write(1, repr(error).encode())

def wait():
    with hangwatch.expires(60, "of a thread that nobody waits for"):
        threading.Event().wait()

if how != "first":
    for chosen in {}, {"on_expiry": "raise"}:
        with hangwatch.expires(60, "closing", **chosen):
            pass
    threading.Thread(target=wait, daemon=True).start()
    forgotten = hangwatch.paused("never ended", 60)
    forgotten.__enter__()
if how == "lost":
    os.environ["HANGWATCH_ADDRESS"] = "/nonexistent"
if how == "unwatched":
    os.environ["HANGWATCH_ADDRESS"] = "off"
sys.modules["kept to the very end"] = Resource("module")
atexit.register(Resource("atexit").__del__)
in_a_cycle = Resource("cycle")
in_a_cycle.self = in_a_cycle
"""


@pytest.mark.parametrize("how", ["first", "later", "lost", "unwatched"])
def test_at_the_interpreter_s_end_no_block_raises(watcher: RunningWatcher, how: str) -> None:
    worker = watcher.interpreter("-c", AT_THE_END, how, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert worker.returncode == 0
    assert set(out.split()) == {"closed"}, out + err
    assert len(out.split()) >= 3
    assert all("runs on unwatched" in line for line in err.splitlines()), err
