"""What a machine can do to a watcher and its workers: clocks, memory, disks, /proc, crowds."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support.namespaces import run_alone
from support.nursery import Worker
from support.processes import is_alive
from support.raw_worker import answer, hello, join, memfd
from support.sizes import Size, short_and_long
from support.stepped_clock import SteppedClock
from support.watchers import CONNECT, RunningWatcher, StartWatcher, wait_until

TESTS = str(Path(__file__).parents[1])

HEALTHY = """
import sys, time, hangwatch
from select import select
print("in", flush=True)
while not select([sys.stdin], [], [], 0.02)[0]:
    with hangwatch.expires(after=1000, scope="healthy"):
        time.sleep(0.002)
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""
HANGS = """
import sys, time, hangwatch
with hangwatch.expires(after=float(sys.argv[1]), scope="hangs"):
    print("in", flush=True)
    time.sleep(1000)
"""


def start_healthy(watcher: RunningWatcher, **options: Any) -> Callable[[], None]:
    """Start a worker that must never be hurt; what is returned asserts that it was not."""
    worker = watcher.connected_worker(HEALTHY, stdin=subprocess.PIPE, **options)
    assert worker.read_line() == "in"

    def check() -> None:
        assert worker.poll() is None, "the healthy worker was hurt"
        worker.communicate("end\n")
        assert worker.returncode == -signal.SIGKILL, "and was still watched"

    return check


def hang(watcher: RunningWatcher, after: float = 0.3, **options: Any) -> Worker:
    """Start a worker that hangs; return it once it is inside of its block."""
    worker = watcher.connected_worker(HANGS, str(after), **options)
    assert worker.read_line() == "in"
    return worker


def test_steps_of_the_wall_clock(start_watcher: StartWatcher, tmp_path: Path) -> None:
    try:
        clock = SteppedClock(tmp_path / "clock")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        watcher = start_watcher()
    environment = watcher.environment(**clock.environment)

    def start(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        # The library stands before a process's own code: no fork of ours would have it.
        worker = watcher.interpreter(
            *("-c", CONNECT + script, *arguments), env=environment, **options
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "in\n"
        return worker

    hour = 3600.0
    healthy = start(HEALTHY, stdin=subprocess.PIPE)
    for step in (3600, -3600, 0):
        hangs = start(HANGS, "1.0")
        clock.step(step)
        assert hangs.wait() == -signal.SIGKILL
        hangs.communicate()
        report = watcher.report(pid=hangs.pid)
        assert 1.0 <= report["scope"]["inside_s"] < hour / 2, "at its time"
        at = datetime.fromisoformat(report["at"]).timestamp()
        assert abs(at - step - time.time()) < hour / 2, "the step was made"
    clock.step(3600)
    assert healthy.poll() is None, "the healthy worker was hurt"
    healthy.communicate("end\n")
    assert healthy.returncode == -signal.SIGKILL, "and was still watched"


def test_no_memory_for_a_page_in_the_worker(watcher: RunningWatcher) -> None:
    script = """
import resource, hangwatch
hangwatch.paused  # the api is there
import hangwatch.worker.client, ctypes, logging, hangwatch.wire, warnings
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 17), -1))
with hangwatch.expires(60, "x"):
    done = True
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(done)
"""
    worker = watcher.worker(script, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (0, "True\n"), err
    assert err.count("hangwatch: no page of timers can be made") == 1
    assert "runs on unwatched" in err


def test_no_descriptor_for_a_page_in_the_worker(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    check = start_healthy(watcher)
    script = """
import os, resource, time, hangwatch
hangwatch.paused  # the api is there
import hangwatch.worker.client, ctypes, logging, hangwatch.wire, warnings, linecache, traceback
client = hangwatch.worker.client.client_at(os.environ["HANGWATCH_ADDRESS"])
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = len(os.listdir("/proc/self/fd")) - 1
for limit in range(used, used + 4):  # the page, the connection, the stack channel
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    with hangwatch.expires(60, "x"):
        pass
    # It may try again at once, and not in a second.
    client._try_at = 0.0
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
while not client.is_connected:
    client._try_at = 0.0
    with hangwatch.expires(60, "connects"): pass
print("well", flush=True)
with hangwatch.expires(0.3, "at last"):
    time.sleep(1000)
"""
    worker = watcher.worker(script, stderr=subprocess.PIPE)
    out, err = worker.communicate()
    assert (worker.returncode, out) == (-signal.SIGKILL, "well\n"), err
    assert err.count("runs on unwatched") >= 1
    assert "Traceback" not in err
    check()


def test_no_memory_for_a_newcomer_s_page_in_the_watcher(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    check = start_healthy(watcher)
    # It stays, so that the watcher gives back nothing of what it takes for a newcomer.
    with join(watcher.address, memfd()):
        used = int(Path(f"/proc/{watcher.pid}/statm").read_text().split()[0]) * 4096
        resource.prlimit(watcher.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        refused = answer(watcher.address, hello(), [memfd()])
        assert refused is not None
        assert "memory" in refused.lower()
        resource.prlimit(watcher.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert answer(watcher.address, hello(), [memfd()]) is None
    check()


IN_A_SMALL_WORLD = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import hangwatch
from support.watchers import CONNECT, wait_until
HANGS = CONNECT + "import time, hangwatch\\nwith hangwatch.expires(0.3, 'hangs'): time.sleep(1000)"
def mount(*arguments): subprocess.run(["mount", *arguments], check=True)
def hang():
    return subprocess.run([sys.executable, "-c", HANGS]).returncode
"""


def in_a_small_world(script: str) -> str:
    """Run a script in pid and mount namespaces of its own, where it may mount and kill."""
    return run_alone(IN_A_SMALL_WORLD + script)


def test_a_full_disk_for_reports(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    out = in_a_small_world(f"""
folder = Path({str(tmp_path)!r})
mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder / "reports"))
log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
os.dup2(log, 2)
with hangwatch.serve(report_dir=folder / "reports"):
    (folder / "reports" / "filler").write_bytes(bytes(65536 - 4096))
    assert hang() == -signal.SIGKILL
    wait_until(lambda: "can't be written to" in (folder / "log").read_text(), "it is said")
    left = os.listdir(folder / "reports")
    (folder / "reports" / "filler").unlink()
    assert hang() == -signal.SIGKILL
print(left, len(os.listdir(folder / "reports")))
""")
    log = (tmp_path / "log").read_text()
    assert "can't be written to" in log
    assert "No space left on device" in log
    assert log.count("overran 'hangs'") == 2, "all of it stands in the log"
    assert log.count("<- holds the scope") == 2
    assert out == "['filler'] 1\n", "no half report is left, and the next one is written"


@pytest.mark.parametrize("kind", ["missing", "hidden"])
def test_no_proc(tmp_path: Path, kind: str) -> None:
    """Without /proc nobody can tell whether it still is the same program: it is reported."""
    # Whom a process may not trace it does not see, then: here, somebody with more capabilities.
    hide, drop = {
        "missing": ('mount("-t", "tmpfs", "tmpfs", "/proc")', []),
        "hidden": (
            'mount("-o", "remount,hidepid=2", "/proc")',
            ["setpriv", "--inh-caps=-all", "--bounding-set=-all"],
        ),
    }[kind]
    out = in_a_small_world(f"""
folder = Path({str(tmp_path)!r})
folder.chmod(0o700)
address = str(folder / "sock")
{hide}
serve = [sys.executable, "-m", "hangwatch", "serve", "--address", address]
server = subprocess.Popen(
    [*{drop!r}, *serve, "--report-dir", str(folder / "reports")], stderr=subprocess.PIPE, text=True
)
os.environ["HANGWATCH_ADDRESS"] = address
wait_until(lambda: os.path.exists(address), "the watcher")
worker = subprocess.Popen([sys.executable, "-c", HANGS])
wait_until(lambda: list(folder.glob("reports/[!.]*/report.txt")), "the report")
print(worker.poll(), list(folder.glob("reports/[!.]*/report.txt"))[0].read_text())
worker.kill()
subprocess.run([sys.executable, "-c", HANGS.replace("1000", "0")], check=True)
server.terminate()
print(server.wait(), "Traceback" in server.stderr.read())
""")
    assert out.startswith("None "), "it is left alone"
    assert "reported only" in out
    assert "won't say whether it is still the same program" in out
    assert out.endswith("0 False\n")


def test_no_children_file_is_needed(start_watcher: StartWatcher, tmp_path: Path) -> None:
    """Kernels without CONFIG_PROC_CHILDREN have no /proc/pid/task/tid/children."""
    if shutil.which("strace") is None:
        pytest.skip("no strace to trace with")
    script = """
import subprocess, time, hangwatch
child = subprocess.Popen(['sh', '-c', 'sleep 1000 & echo $!; wait'], stdin=subprocess.DEVNULL)
input()
with hangwatch.expires(0.3, 'hangs'): time.sleep(1000)
"""
    watcher = start_watcher()
    worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
    grandchild = int(worker.read_line())
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=openat", "-o", str(trace)]
    status = Path(f"/proc/{watcher.pid}/status")
    with subprocess.Popen([*command, "-p", str(watcher.pid)]) as tracer:
        wait_until(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text(), "it is traced")
        worker.write_line()
        assert worker.wait() == -signal.SIGKILL
        worker.close()
        wait_until(lambda: not is_alive(grandchild), "the grandchild has ended, too")
        assert watcher.report(pid=worker.pid)["process"]["children"], "and was seen"
        tracer.terminate()
    opened = trace.read_text()
    assert f'"/proc/{grandchild}/stat"' in opened
    assert "/children" not in opened


@pytest.fixture
def two_cores() -> Iterator[None]:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:2])
    yield
    os.sched_setaffinity(0, mine)


BUSY = "import os, select\nwhile not select.select([0], [], [], 0)[0]: sum(range(9999))"
STEADY = """
import sys, time, hangwatch
for _ in range(int(sys.argv[1])):
    with hangwatch.expires(after=60, scope="steady"):
        time.sleep(0.01)
"""


@short_and_long
@pytest.mark.usefixtures("two_cores")
def test_two_cores_under_eight_busy_processes(start_watcher: StartWatcher, size: Size) -> None:
    watcher = start_watcher()
    checks = [start_healthy(watcher) for _ in range(size.of(2, 4, 4))]
    hangs = watcher.connected_worker(HANGS, "0.3", stdin=subprocess.PIPE)
    turns = str(size.of(12, 100, 300))
    # Interpreters of their own, which have these two cores alone, as the watcher has.
    crowd = [
        subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) for _ in range(8)
    ]
    try:
        workers = [watcher.connected_worker(STEADY, turns) for _ in range(4)]
        for worker in workers:
            worker.communicate()
            assert worker.returncode == 0, "no false kill"
        assert hangs.wait() == -signal.SIGKILL
    finally:
        for process in crowd:
            process.communicate(b"end")
    hangs.close()
    for check in checks:
        check()


CROWD = """
import os, sys, time
import hangwatch
from hangwatch import linux, wire
from hangwatch.worker.client import client_at
crowd = int(sys.argv[1])
linux.fence()
gate, go = os.pipe()
heard, tell = os.pipe()
children = []
for _ in range(crowd):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(gate, 1)
        client = client_at(os.environ["HANGWATCH_ADDRESS"])
        # Whom a crowd keeps out for a second tries again, as workers do that go on arming.
        while not client.is_connected:
            with hangwatch.expires(after=1000, scope="armed"):
                time.sleep(0.1)
        with hangwatch.expires(after=1000, scope="armed"):
            os.write(tell, b"+")
            os.read(0, 1)
        os._exit(0)
    children.append(child)
os.close(go)  # all at once
answers = b""
while len(answers) < crowd:
    answers += os.read(heard, 1000)
print(answers.count(b"+"), flush=True)
sys.stdin.close()
os.close(0)
print(sum(os.waitpid(child, 0)[1] == 0 for child in children), flush=True)
"""


# Beside the long form others get no CPU for seconds, and evidence, for example, misses its two.
@pytest.mark.parametrize(
    "size",
    ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.alone])],
    indirect=True,
)
def test_a_thousand_workers_connect_at_once(start_watcher: StartWatcher, size: Size) -> None:
    """A hundred of them in the short form."""
    workers = size.of(100, 400, 1000)
    watcher = start_watcher()
    check = start_healthy(watcher)
    crowd = watcher.worker(CROWD, str(workers), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert int(crowd.read_line()) == workers, "all are watched"
    hangs = hang(watcher)
    assert hangs.wait() == -signal.SIGKILL, "and so is one more"
    assert crowd.stdin is not None
    crowd.stdin.close()
    assert int(crowd.read_line()) == workers, "and nobody was hurt"
    crowd.wait()
    crowd.close()
    check()


GARBAGE = """
import mmap, os, random, socket, sys
from select import select
from hangwatch.page import layout
from support.raw_worker import connect, hello, memfd
descriptor = memfd()
mapping = mmap.mmap(descriptor, layout.PAGE_BYTES)
rounds = 0
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
    connection.recv(4096)
    connection.setblocking(False)
    while not select([sys.stdin], [], [], 0)[0]:
        for _ in range(100):
            at = random.randrange(16, layout.slot_byte(100))
            mapping[at:at + 64] = random.choice([os.urandom(64), bytes(64), b"\\xff" * 64])
        try: connection.send(b"!")
        except OSError: pass
        rounds += 1
        if rounds == int(sys.argv[2]):
            print("enough", flush=True)
"""


@short_and_long
def test_a_page_that_is_filled_with_garbage_while_it_is_read(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str], size: Size
) -> None:
    watcher = start_watcher()
    check = start_healthy(watcher)
    environment = watcher.environment(PYTHONPATH=TESTS)
    arguments = (watcher.address, str(size.of(300, 2000, 20_000)))
    hostile = [
        watcher.worker(GARBAGE, *arguments, stdin=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    hangs = hang(watcher)
    assert hangs.wait() == -signal.SIGKILL
    for one in hostile:
        one.read_line()
    for one in hostile:
        one.communicate("end\n")
        # What reads as overdue may end whoever wrote it.
        assert one.returncode in (0, -signal.SIGKILL, -signal.SIGTERM)
    check()
    watcher.server.stop()
    log = capfd.readouterr().err
    assert not re.search(r"the watcher \(process \d+\) died", log)
    assert "Traceback" not in log


# The world's own process, which arms last, knows when all that was due before has been judged.
SENTINEL = """
from support.raw_worker import answer, hello, memfd
reported = threading.Event()
reaped = []
def heard(event):
    if event["event"] == "reaped": reaped.append((event["pid"], event["scope"]))
    if event["event"] == "reported": reported.set()
def wait_for_the_watcher(server, after=0.05):
    reported.clear()
    with hangwatch.expires(after, "sentinel", on_expiry="report"):
        reported.wait()
    # Nor does it fork any more, and take the next number, once it answers again.
    assert answer(server.address, hello(), [memfd()]) is None
def next_pid(number):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last: last.write(str(number - 1))
"""


@pytest.mark.parametrize("kernel", ["now", "before 6.5"])
def test_a_recycled_pid_is_never_signalled(kernel: str) -> None:
    """A worker's number is given to another process the moment it is free."""
    if os.geteuid() != 0:
        pytest.skip("only root may choose the next process id")
    faults = "" if kernel == "now" else "kernel.peer-pidfd=fail:ENODATA"
    out = in_a_small_world(
        f"os.environ['HANGWATCH_FAILPOINTS'] = {faults!r}\n{SENTINEL}"
        + """
from support.watchers import watcher_below
# It leaves its connection to a child, so that no end of file tells of its death.
LEAVES = CONNECT + '''
import ctypes, os, sys, time, hangwatch
block = hangwatch.expires(0.6, 'hangs')
block.__enter__()
if ctypes.CDLL(None).fork() == 0:  # which knows nothing of Python's fork hooks
    sys.stdin.readline()
os._exit(0)
'''
# It has said hello, and is no more when that is heard, its block overdue.
SAYS_HELLO = '''
import ctypes, os, socket, sys, time, hangwatch
from hangwatch.worker.client import client_at
from support.raw_worker import connect, hello
address = os.environ["HANGWATCH_ADDRESS"]
os.environ["HANGWATCH_ADDRESS"] = "/nowhere"
hangwatch.expires(0.01, 'is no more').__enter__()
page = client_at("/nowhere").page.descriptor.number
connection = connect(address)
socket.send_fds(connection, [hello(page_fd=page)], [page])
if 'and leaves' in sys.argv and ctypes.CDLL(None).fork() == 0:
    sys.stdin.readline()
os._exit(0)
'''
os.environ["PYTHONPATH"] = ":".join(sys.path)
def start(script, how):
    next_pid(500)
    command = [sys.executable, "-c", script, how]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert worker.pid == 500
    return worker
def stop(number):
    for pid in (server.pid, watcher): os.kill(pid, number)
hit = slow = 0
with hangwatch.serve(report_dir=None, grace=0.2, on_event=heard) as server:
    watcher = watcher_below(server.pid)
    for script, how in ((LEAVES, ""), (SAYS_HELLO, ""), (SAYS_HELLO, "and leaves")):
        wait_for_the_watcher(server)
        if script == SAYS_HELLO: stop(signal.SIGSTOP)
        with start(script, how) as worker:
            slow += worker.wait() != 0  # its block overran before it could leave
            stop(signal.SIGSTOP)
            next_pid(500)
            with subprocess.Popen(["sleep", "1000"]) as other:
                assert other.pid == 500, other.pid
                stop(signal.SIGCONT)
                # A handshake is over when one that began later is; 0.6 s are, when 0.7 are.
                assert answer(server.address, hello(), [memfd()]) is None
                wait_for_the_watcher(server, 0.7 if script == LEAVES else 0.05)
                hit += other.poll() is not None
                other.kill()
    assert hang() in (-signal.SIGTERM, -signal.SIGKILL)
print(hit, len([pid for pid, _ in reaped if pid == 500]) - slow, reaped[-1][1])
"""
    )
    assert out == "0 0 hangs\n"


def test_a_recycled_descendant_is_never_killed() -> None:
    """What a watcher that died had found below a worker has ended since, and its number is new."""
    if os.geteuid() != 0:
        pytest.skip("only root may choose the next process id")
    out = in_a_small_world(
        f"os.environ['HANGWATCH_FAILPOINTS'] = 'ladder.sent=kill@1'\n{SENTINEL}"
        + """
ASKED = CONNECT + '''
import os, signal, subprocess, sys, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
for _ in range(2):
    child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
sys.stdin.readline()
with hangwatch.expires(0.3, 'hangs'):
    time.sleep(1000)
'''
with hangwatch.serve(report_dir=None, grace=1000, on_event=heard) as server:
    worker = subprocess.Popen(
        [sys.executable, "-c", ASKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    first, second = int(worker.stdout.readline()), int(worker.stdout.readline())
    # The keeper has no successor for the watcher before it may go on.
    os.kill(server.pid, signal.SIGSTOP)
    print(file=worker.stdin, flush=True)
    assert worker.wait() == 7
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)  # which is the first process's of a pid namespace, ours
    next_pid(first)
    other = subprocess.Popen(["sleep", "1000"])
    assert other.pid == first
    assert os.waitpid(second, os.WNOHANG) == (0, 0), "so far nobody carries it out"
    os.kill(server.pid, signal.SIGCONT)
    killed = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    wait_for_the_watcher(server)
    print(killed, other.poll())
    other.kill(); other.wait()
"""
    )
    assert out == "-9 None\n"
