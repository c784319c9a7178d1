"""Requests of the legacy road can't be weapons: whomever they name, who is killed is a worker."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hangwatch
from hangwatch.timer._targets import RefusedError, hold_descendant
from hangwatch.timer.api import TimerRequest
from support.namespaces import run_alone

SERVER = r"""
import json, multiprocessing, os, subprocess, sys, time
import hangwatch
from hangwatch.timer.api import TimerRequest

name, folder = sys.argv[1:]
sleeper = ["sleep", "1000"]
# Not our stdout: who reads it is to see our end.
worker = subprocess.Popen(sleeper, stdout=subprocess.DEVNULL)
try:
    stranger = subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, user=65534).pid
except OSError:  # an ordinary user, also one that is root in a user namespace of one
    stranger = None
if name == "file":
    server = hangwatch.FileTimerServer(f"{folder}/fifo", max_interval=0.05, report_dir=None)
else:
    queue = multiprocessing.Queue()
    server = hangwatch.LocalTimerServer(queue, max_interval=0.05, report_dir=None)
server.start()
keeper = server._companion.pid
watcher = int(open(f"/proc/{keeper}/task/{keeper}/children").read().split()[0])
print(json.dumps({"worker": worker.pid, "keeper": keeper, "watcher": watcher,
                  "other user's": stranger}), flush=True)
for line in sys.stdin:
    if name == "file":
        hangwatch.FileTimerClient(f"{folder}/fifo")._send_request(
            hangwatch.FileTimerRequest(int(line), "forged", time.time() - 1, 9))
    else:
        queue.put(TimerRequest(int(line), "forged", time.time() - 1))
    if int(line) == worker.pid:
        worker.wait()
        print(worker.returncode, flush=True)
server.stop()
print("server alive", flush=True)
"""

FORGER = r"""
import json, os, subprocess, sys, time
from support.processes import is_alive

name, server_code, folder = sys.argv[1:]
sibling = subprocess.Popen(["sleep", "1000"])
server = subprocess.Popen([sys.executable, "-c", server_code, name, folder],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
pids = json.loads(server.stdout.readline())
worker = pids.pop("worker")
ended = subprocess.Popen(["true"]); ended.wait()
innocent = {"server": server.pid, "sibling": sibling.pid, **{k: v for k, v in pids.items() if v}}
numbers = [1, 0, -1, -os.getpgid(0), -sibling.pid, ended.pid, 2**22, 2**31 - 1, -2**31 + 1,
           *innocent.values()]
for number in numbers:
    server.stdin.write(f"{number}\n")
server.stdin.write(f"{worker}\n")  # the last one is a true worker: by then all were judged
server.stdin.flush()
assert server.stdout.readline().strip() == "-9", "the true worker was not killed"
for what, pid in innocent.items():
    assert is_alive(pid), f"{what} was hurt"
server.stdin.close()
assert server.stdout.readline().strip() == "server alive"
assert server.wait() == 0
for what in innocent.keys() - {"server", "keeper", "watcher"}:
    assert is_alive(innocent[what]), f"{what} was hurt"
print("held")
"""


@pytest.mark.parametrize("name", ["local", "file"])
def test_forged_requests_hurt_nobody(name: str, tmp_path: Path) -> None:
    assert "held" in run_alone(FORGER, name, SERVER, str(tmp_path))


REUSED = r"""
import os, signal, sys, time
import hangwatch
from hangwatch.timer.api import TimerRequest
from support.processes import is_alive

def child_with(pid):
    # proc_sys_kernel: the next process of this namespace gets the number after it.
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(pid - 1))
    made = os.fork()
    if made == 0:
        signal.pause()
    return made

server = hangwatch.FileTimerServer(sys.argv[1] + "/fifo", max_interval=0.05)
server._keeps_its_own_way = lambda: True
victim = child_with(300)
assert victim == 300
server.register_timers([hangwatch.FileTimerRequest(300, "of the dead", time.time() + 0.2, 9)])
os.kill(victim, 9)
os.waitpid(victim, 0)
innocent = child_with(300)
assert innocent == 300, innocent
server.register_timers([hangwatch.FileTimerRequest(300, "of the living", time.time() + 600, 9)])
# Whose time is up after that of the dead one: once it is killed, that one's has passed.
later = child_with(310)
server.register_timers([hangwatch.FileTimerRequest(310, "later", time.time() + 0.4, 9)])
server.start()
_, status = os.waitpid(later, 0)
assert os.WTERMSIG(status) == 9
assert is_alive(innocent), "who got a dead worker's number was killed"
assert (300, "of the dead") not in server._timers
assert (300, "of the living") in server._timers
# A request of its own counts for it, of course.
server.register_timers([hangwatch.FileTimerRequest(300, "its own", time.time(), 9)])
_, status = os.waitpid(innocent, 0)
assert os.WTERMSIG(status) == 9
server.stop()
print("held")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may choose the next process id")
def test_who_gets_a_dead_worker_s_number_is_not_killed(tmp_path: Path) -> None:
    assert "held" in run_alone(REUSED, str(tmp_path))


def test_what_is_refused_stays_in_sight_until_it_is_due(caplog: pytest.LogCaptureFixture) -> None:
    server = hangwatch.LocalTimerServer(multiprocessing.Queue(), 0.01, report_dir=None)
    server.register_timers([TimerRequest(-3, scope, time.time() + 600) for scope in ("one", "two")])
    assert sorted(server._timers) == [(-3, "one"), (-3, "two")]
    server._run_watchdog()
    assert sorted(server._timers) == [(-3, "one"), (-3, "two")]
    assert "refused a timer that would end process -3" in caplog.text
    server.register_timers([TimerRequest(-3, "one", time.time() - 1)])
    server._run_watchdog()
    assert server._timers == {}
    assert "reaping" not in caplog.text


class TestWhoMayBeHeld:
    @pytest.mark.parametrize("pid", [-(2**40), -1, 0, 1, 2**22 + 1, 2**40])
    def test_numbers_of_nobody(self, pid: int) -> None:
        with pytest.raises(RefusedError):
            hold_descendant(pid, set())

    def test_ourselves_and_our_parent(self) -> None:
        with pytest.raises(RefusedError, match="that is the server's own"):
            hold_descendant(os.getpid(), set())
        with pytest.raises(RefusedError):
            hold_descendant(os.getppid(), set())

    def test_a_grandchild_unless_it_is_spared(self) -> None:
        code = (
            "import subprocess, sys;"
            "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0);"
            "print(child.pid, flush=True); child.wait()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            grandchild = int(child.stdout.readline())
            held = hold_descendant(grandchild, set())
            assert held.pid == grandchild
            os.close(held.pidfd)
            with pytest.raises(RefusedError, match="belongs to the watcher"):
                hold_descendant(grandchild, {child.pid})
            child.stdin.write("\n")
            child.stdin.close()


def test_a_worker_that_dies_while_the_server_looks_leaves_no_timer_to_who_gets_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A timer without a held process would end whoever has the number when it is due."""
    server = hangwatch.LocalTimerServer(multiprocessing.Queue(), max_interval=1.0, report_dir=None)
    targets = server._targets
    is_gone = targets.is_gone
    for looks_until_it_dies in range(1, 4):
        worker = subprocess.Popen(["sleep", "1000"])
        server.register_timers([TimerRequest(worker.pid, "step", time.time() + 600)])
        assert targets.pids() == [worker.pid]
        looks = 0

        def dies_after(
            pid: int,
            worker: subprocess.Popen[bytes] = worker,
            until: int = looks_until_it_dies,
        ) -> bool:
            nonlocal looks
            looks += 1
            answer = is_gone(pid)
            if looks == until:
                worker.kill()
                worker.wait()
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(targets, "is_gone", dies_after)
            server.clear_timers(set())
        assert [pid for pid, _ in server._timers] == targets.pids()
        worker.kill()
        worker.wait()
        server.clear_timers(set())
        assert (targets.pids(), server._timers) == ([], {})
    targets.close()
