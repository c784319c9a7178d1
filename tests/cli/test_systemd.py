"""systemd's side of things, shown by systemd's own tools; no systemd runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hangwatch.keep.address import default_address
from support.nursery import LIMIT
from support.raw_worker import answer, hello, memfd
from support.watchers import wait_until, watcher_below

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
HANG = "import time, hangwatch\nwith hangwatch.expires(0.2, 'stuck'): time.sleep(1000)"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}")
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hw-systemd-") as name:
        yield Path(name)


def listens(address: str) -> bool:
    """Tell whether somebody listens at an address, without connecting; proc_net(5)."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    accepts = "00010000"
    return any(fields[-1] == address and fields[3] == accepts for fields in sockets)


def activated(address: str, *options: str) -> subprocess.Popen[str]:
    """Start a service that a connection to `address` will activate; systemd listens there."""
    service = subprocess.Popen(
        [
            *(tool("systemd-socket-activate"), *options, "--listen", address),
            *("--setenv", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"),
            *(sys.executable, "-m", "hangwatch", "serve"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: listens(address) or service.poll() is not None, "systemd listens, or ends")
    assert service.poll() is None, f"it ended with {service.returncode}: {service.communicate()}"
    return service


def test_socket_activation(folder: Path) -> None:
    """A worker's connection starts the service; who waits in the backlog is served, too."""
    address = str(folder / "s")
    service = activated(address, "--seqpacket")
    try:
        # The first connection starts it, which may take longer than a worker waits.
        assert answer(address, hello(), [memfd()]) is None
        worker = subprocess.run(
            [sys.executable, "-c", HANG],
            env={**os.environ, "HANGWATCH_ADDRESS": address},
            check=False,
            timeout=LIMIT,
        )
        assert worker.returncode == -9
        first = watcher_below(service.pid)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: watcher_below(service.pid) not in (None, first), "a successor")
        assert answer(address, hello(), [memfd()]) is None
    finally:
        service.terminate()
        _, err = service.communicate(timeout=LIMIT)
    assert service.returncode == 0, err
    assert "overran 'stuck'" in err
    assert Path(address).exists(), "a socket that was passed is not ours to remove"


def test_a_passed_socket_of_another_kind_is_refused(folder: Path) -> None:
    address = str(folder / "s")
    service = activated(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(address)
        _, err = service.communicate(timeout=LIMIT)
    assert service.returncode == 1
    assert "ListenSequentialPacket=" in err


def test_the_service_manager_is_told_by_the_main_process_and_hears_of_a_dead_watcher(
    folder: Path,
) -> None:
    """NotifyAccess=main: credentials and all, as systemd checks them."""
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    notify.bind(str(folder / "notify"))
    notify.settimeout(LIMIT)
    service = subprocess.Popen(
        [sys.executable, "-m", "hangwatch", "serve", "--address", str(folder / "s")],
        env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "800000"},
        stderr=subprocess.DEVNULL,
    )

    def hear() -> str:
        message, ancillary, _, _ = notify.recvmsg(4096, 1024)
        (_, kind, credentials), *_ = ancillary
        assert kind == socket.SCM_CREDENTIALS
        assert struct.unpack("3i", credentials)[0] == service.pid
        return message.decode()

    try:
        assert hear().splitlines()[:2] == ["READY=1", "STATUS=watching 0 workers"]
        assert "WATCHDOG=1" in hear()
        # While there is no watcher, there is no sign of life either.
        watcher = watcher_below(service.pid)
        assert watcher is not None
        os.kill(watcher, signal.SIGSTOP)
        told_without = 0
        while True:
            heard = hear()
            if watcher_below(service.pid) not in (None, watcher):
                break
            told_without += "WATCHDOG=1" in heard
        assert told_without <= 1, "one may have been due to what it did before it was stopped"
        while "WATCHDOG=1" not in heard:
            heard = hear()
    finally:
        service.terminate()
        service.wait(LIMIT)
    while "STOPPING=1" not in hear():
        pass
    notify.close()


def test_the_units_are_valid(folder: Path) -> None:
    units = [str(path) for path in sorted(UNITS.iterdir())]
    assert [Path(unit).name for unit in units] == ["hangwatch.service", "hangwatch.socket"]
    verify = [tool("systemd-analyze"), "verify", "--man=no", *units]
    result = subprocess.run(
        verify,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_socket_is_where_serve_listens_by_itself() -> None:
    (path,) = re.findall(
        r"^ListenSequentialPacket=(\S+)$", (UNITS / "hangwatch.socket").read_text(), re.M
    )
    assert path == f"%t/hangwatch/{Path(default_address()).name}"


def allowed_calls() -> set[str]:
    """Expand the unit's SystemCallFilter=."""
    found: set[str] = set()
    (group,) = re.findall(
        r"^SystemCallFilter=(\S+)$", (UNITS / "hangwatch.service").read_text(), re.M
    )
    groups = [group, "@default"]
    while groups:
        text = subprocess.run(
            [tool("systemd-analyze"), "syscall-filter", groups.pop()],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = re.findall(r"^ +(@?[\w-]+)$", text, re.M)
        groups += [name for name in names if name.startswith("@")]
        found |= set(names)
    return found


def test_the_unit_s_system_call_filter_lets_it_work(folder: Path) -> None:
    """All calls of a whole life: a hang, evidence, a kill, a dead watcher, the end."""
    log = folder / "calls"
    service = subprocess.Popen(
        [
            *(tool("strace"), "-f", "-qq", "-e", "signal=none", "-o", str(log)),
            *(sys.executable, "-m", "hangwatch", "serve", "--address", str(folder / "s")),
            *("--report-dir", str(folder / "reports")),
        ],
        stderr=subprocess.DEVNULL,
    )
    wait_until((folder / "s").exists, "the socket")
    wait_until(lambda: pids(service.pid), "the keeper")
    (keeper,) = pids(service.pid)
    wait_until(lambda: watcher_below(keeper), "the watcher")
    os.kill(watcher_below(keeper) or -1, signal.SIGKILL)
    worker = subprocess.run(
        [sys.executable, "-c", HANG],
        env={**os.environ, "HANGWATCH_ADDRESS": str(folder / "s")},
        check=False,
        timeout=LIMIT,
    )
    assert worker.returncode == -9
    wait_until(lambda: list((folder / "reports").glob("[!.]*/report.json")), "a report")
    os.kill(keeper, signal.SIGTERM)
    service.wait(LIMIT)
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", log.read_text(), re.M))
    assert {"pidfd_send_signal", "membarrier", "memfd_create"} & calls
    assert calls - allowed_calls() == set()


def pids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children]
