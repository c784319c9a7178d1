"""What a machine can do to a watcher and its workers: clocks, memory, disks, /proc, crowds."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from support.namespaces import run_alone
from support.processes import is_alive
from support.raw_worker import answer, hello, memfd
from support.stepped_clock import SteppedClock
from support.watchers import RunningWatcher, StartWatcher, wait_until

TESTS = str(Path(__file__).parents[1])

HEALTHY = """
import sys, time, hangwatch
from select import select
while not select([sys.stdin], [], [], 0)[0]:
    with hangwatch.expires(after=60, scope="healthy"):
        time.sleep(0.02)
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""
HANGS = """
import sys, time, hangwatch
with hangwatch.expires(after=float(sys.argv[1]), scope="hangs"):
    print("in", flush=True)
    time.sleep(1000)
"""


def start_healthy(watcher: RunningWatcher, **options: object) -> Callable[[], None]:
    """Start a worker that must never be hurt; what is returned asserts that it was not."""
    worker = watcher.worker(HEALTHY, stdin=subprocess.PIPE, **options)

    def check() -> None:
        assert worker.poll() is None, "the healthy worker was hurt"
        worker.communicate("end\n", timeout=20)
        assert worker.returncode == -signal.SIGKILL, "and was still watched"

    return check


def hang(watcher: RunningWatcher, after: float = 0.3, **options: object) -> subprocess.Popen[str]:
    """Start a worker that hangs; return it once it is inside of its block."""
    worker = watcher.worker(HANGS, str(after), **options)
    assert worker.stdout is not None
    worker.stdout.readline()
    worker.stdout.close()
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
    shows = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(float(shows.stdout) - time.time()) < 60
    check = start_healthy(watcher, env=environment)
    time.sleep(0.3)
    for step in (3600, -3600, 0):
        hangs = hang(watcher, 1.0, env=environment)
        clock.step(step)
        began = time.monotonic()
        assert hangs.wait(20) == -signal.SIGKILL
        assert time.monotonic() - began > 0.5, "not before its time"
        report = watcher.report(pid=hangs.pid)
        assert 0.9 < report["scope"]["inside_s"] < 15
        at = datetime.fromisoformat(report["at"]).timestamp()
        assert abs(at - step - time.time()) < 60, "the step was made"
    clock.step(3600)
    time.sleep(0.3)
    check()


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
    out, err = worker.communicate(timeout=20)
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
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = len(os.listdir("/proc/self/fd")) - 1
for limit in range(used, used + 4):  # the page, the connection, the stack channel
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    with hangwatch.expires(60, "x"):
        pass
    time.sleep(1.1)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
print("well", flush=True)
with hangwatch.expires(0.3, "at last"):
    time.sleep(1000)
"""
    worker = watcher.worker(script, stderr=subprocess.PIPE)
    out, err = worker.communicate(timeout=20)
    assert (worker.returncode, out) == (-signal.SIGKILL, "well\n"), err
    assert err.count("runs on unwatched") >= 1
    assert "Traceback" not in err
    check()


def test_no_memory_for_a_newcomer_s_page_in_the_watcher(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    check = start_healthy(watcher)
    time.sleep(0.5)
    used = int(Path(f"/proc/{watcher.pid}/statm").read_text().split()[0]) * 4096
    resource.prlimit(watcher.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    refused = answer(watcher.address, hello(), [memfd()])
    assert refused is not None
    assert "memory" in refused.lower()
    resource.prlimit(watcher.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert answer(watcher.address, hello(), [memfd()]) is None
    check()


IN_A_SMALL_WORLD = """
import os, signal, subprocess, sys, time
from pathlib import Path
import hangwatch
HANGS = "import time, hangwatch\\nwith hangwatch.expires(0.5, 'hangs'): time.sleep(1000)"
def mount(*arguments): subprocess.run(["mount", *arguments], check=True)
def hang():
    return subprocess.run([sys.executable, "-c", HANGS], timeout=30).returncode
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
    time.sleep(0.5)
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
while not os.path.exists(address):
    time.sleep(0.02)
worker = subprocess.Popen([sys.executable, "-c", HANGS])
while not list(folder.glob("reports/[!.]*/report.txt")):
    time.sleep(0.05)
print((worker.poll(), list(folder.glob("reports/[!.]*/report.txt"))[0].read_text()))
worker.kill()
subprocess.run([sys.executable, "-c", HANGS.replace("1000", "0")], check=True)
server.terminate()
print(server.wait(20), "Traceback" in server.stderr.read())
""")
    assert out.startswith("(None, "), "it is left alone"
    assert "reported only" in out
    assert "won't say whether it is still the same program" in out
    assert out.endswith("0 False\n")


def test_no_children_file_is_needed(start_watcher: StartWatcher, tmp_path: Path) -> None:
    """Kernels without CONFIG_PROC_CHILDREN have no /proc/pid/task/tid/children."""
    if shutil.which("strace") is None:
        pytest.skip("no strace to trace with")
    script = (
        "import subprocess, time, hangwatch\n"
        "child = subprocess.Popen(['sh', '-c', 'sleep 1000 & echo $!; wait'])\n"
        "with hangwatch.expires(1.5, 'hangs'): time.sleep(1000)\n"
    )
    watcher = start_watcher()
    worker = watcher.worker(script)
    assert worker.stdout is not None
    grandchild = int(worker.stdout.readline())
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=openat", "-o", str(trace)]
    with subprocess.Popen([*command, "-p", str(watcher.pid)]) as tracer:
        assert worker.wait(30) == -signal.SIGKILL
        worker.stdout.close()
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


@pytest.mark.usefixtures("two_cores")
def test_two_cores_under_eight_busy_processes(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    busy = "import time\nend = time.monotonic() + 6\nwhile time.monotonic() < end: sum(range(999))"
    crowd = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(8)]
    checks = [start_healthy(watcher) for _ in range(4)]
    steady = """
import time, hangwatch
end = time.monotonic() + 4
while time.monotonic() < end:
    with hangwatch.expires(after=3, scope="steady"):
        time.sleep(0.01)
"""
    workers = [watcher.worker(steady) for _ in range(4)]
    hangs = hang(watcher, 0.5)
    for worker in workers:
        worker.communicate(timeout=50)
        assert worker.returncode == 0, "no false kill"
    assert hangs.wait(40) == -signal.SIGKILL
    for process in crowd:
        process.wait(30)
    for check in checks:
        check()


THOUSAND = """
import os, sys, time
import hangwatch
from hangwatch import linux, wire
from hangwatch.worker.client import client_at
linux.fence()
gate, go = os.pipe()
heard, tell = os.pipe()
children = []
for _ in range(1000):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(gate, 1)
        client = client_at(os.environ["HANGWATCH_ADDRESS"])
        # Whom a crowd keeps out for a second tries again, as workers do that go on arming.
        until = time.monotonic() + 30
        while True:
            with hangwatch.expires(after=60, scope="armed"):
                if client.is_connected or time.monotonic() > until: break
                time.sleep(0.1)
        with hangwatch.expires(after=60, scope="armed"):
            os.write(tell, b"+" if client.is_connected else b"-")
            os.read(0, 1)
        os._exit(0)
    children.append(child)
os.close(go)  # all at once
answers = b""
while len(answers) < 1000:
    answers += os.read(heard, 1000)
print(answers.count(b"+"), flush=True)
sys.stdin.close()
os.close(0)
print(sum(os.waitpid(child, 0)[1] == 0 for child in children), flush=True)
"""


# Beside it others get no CPU for seconds, and evidence, for example, misses its two.
@pytest.mark.alone
@pytest.mark.timeout(120)
def test_a_thousand_workers_connect_at_once(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    check = start_healthy(watcher)
    crowd = watcher.worker(THOUSAND, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert crowd.stdout is not None
    assert crowd.stdin is not None
    assert int(crowd.stdout.readline()) == 1000, "all are watched"
    hangs = hang(watcher)
    assert hangs.wait(20) == -signal.SIGKILL, "and so is one more"
    crowd.stdin.close()
    assert int(crowd.stdout.readline()) == 1000, "and nobody was hurt"
    crowd.wait(20)
    crowd.stdout.close()
    check()


GARBAGE = """
import mmap, os, random, socket, sys, time
from hangwatch import page
from support.raw_worker import connect, hello, memfd
descriptor = memfd()
mapping = mmap.mmap(descriptor, page.PAGE_BYTES)
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
    connection.recv(4096)
    connection.setblocking(False)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        for _ in range(100):
            at = random.randrange(16, 64 + 100 * page.SLOT_BYTES)
            mapping[at:at + 64] = random.choice([os.urandom(64), bytes(64), b"\\xff" * 64])
        try: connection.send(b"!")
        except OSError: pass
"""


def test_a_page_that_is_filled_with_garbage_while_it_is_read(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    pid = watcher.pid
    check = start_healthy(watcher)
    environment = watcher.environment(PYTHONPATH=TESTS)
    hostile = [watcher.worker(GARBAGE, watcher.address, env=environment) for _ in range(2)]
    hangs = hang(watcher)
    assert hangs.wait(30) == -signal.SIGKILL
    for one in hostile:
        one.communicate(timeout=30)
        # What reads as overdue may end whoever wrote it.
        assert one.returncode in (0, -signal.SIGKILL, -signal.SIGTERM)
    check()
    assert watcher.pid == pid, "the watcher lives"
    watcher.server.stop()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kernel", ["now", "before 6.5"])
def test_a_recycled_pid_is_never_signalled(kernel: str) -> None:
    """A worker's number is given to another process the moment it is free."""
    if os.geteuid() != 0:
        pytest.skip("only root may choose the next process id")
    faults = "handshake.accepted=sleep:0.3"
    if kernel != "now":
        faults += ",kernel.peer-pidfd=fail:ENODATA"
    out = in_a_small_world(
        f"os.environ['HANGWATCH_FAILPOINTS'] = {faults!r}\n"
        + """
def next_pid(number):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last: last.write(str(number - 1))
# It leaves its connection to a child, so that no end of file tells of its death.
LEAVES = '''
import ctypes, os, time, hangwatch
block = hangwatch.expires(1.0, 'hangs')
block.__enter__()
if ctypes.CDLL(None).fork() == 0:  # which knows nothing of Python's fork hooks
    time.sleep(3)
os._exit(0)
'''
# It has said hello, and is no more when that is heard, its block overdue.
SAYS_HELLO = '''
import ctypes, os, socket, sys, time, hangwatch
from hangwatch.worker.client import client_at
from support.raw_worker import connect, hello
os.environ["HANGWATCH_ADDRESS"] = "/nowhere"
hangwatch.expires(0.01, 'is no more').__enter__()
page = client_at("/nowhere").page.descriptor.number
connection = connect(sys.argv[1])
socket.send_fds(connection, [hello(page_fd=page)], [page])
if 'and leaves' in sys.argv and ctypes.CDLL(None).fork() == 0:
    time.sleep(3)
os._exit(0)
'''
hit = 0
os.environ["PYTHONPATH"] = ":".join(sys.path)
reaped = []
def heard(event):
    if event["event"] == "reaped": reaped.append(event["scope"])
with hangwatch.serve(report_dir=None, grace=0.2, on_event=heard) as server:
    for number in range(6):
        next_pid(500)
        script, how = ((LEAVES, ""), (SAYS_HELLO, ""), (SAYS_HELLO, "and leaves"))[number % 3]
        worker = subprocess.Popen([sys.executable, "-c", script, server.address, how])
        assert worker.pid == 500
        worker.wait()
        next_pid(500)
        other = subprocess.Popen(["sleep", "1000"])
        assert other.pid == 500, other.pid
        time.sleep(1.6)
        hit += other.poll() is not None
        other.kill(); other.wait()
    assert hang() in (-signal.SIGTERM, -signal.SIGKILL)
print(hit, reaped)
"""
    )
    assert out == "0 ['hangs']\n"


def test_a_recycled_descendant_is_never_killed() -> None:
    """What a watcher that died had found below a worker has ended since, and its number is new."""
    if os.geteuid() != 0:
        pytest.skip("only root may choose the next process id")
    faults = "ladder.sent=kill@1,handover.forked=sleep:1.5@2"
    out = in_a_small_world(
        f"os.environ['HANGWATCH_FAILPOINTS'] = {faults!r}\n"
        + """
ASKED = '''
import os, signal, subprocess, sys, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
for _ in range(2):
    print(subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL).pid, flush=True)
with hangwatch.expires(0.3, 'hangs'):
    time.sleep(1000)
'''
with hangwatch.serve(report_dir=None, grace=2) as server:
    worker = subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True)
    first, second = int(worker.stdout.readline()), int(worker.stdout.readline())
    assert worker.wait() == 7
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)  # which is the first process's of a pid namespace, ours
    with open("/proc/sys/kernel/ns_last_pid", "w") as last: last.write(str(first - 1))
    other = subprocess.Popen(["sleep", "1000"])
    assert other.pid == first
    assert os.waitpid(second, os.WNOHANG) == (0, 0), "so far nobody carries it out"
    killed = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    time.sleep(0.5)
    print(killed, other.poll())
    other.kill(); other.wait()
"""
    )
    assert out == "-9 None\n"
