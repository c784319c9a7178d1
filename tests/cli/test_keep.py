"""How a keeper is started by hangwatch itself: what it is told, and what others are told."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import hangwatch
from hangwatch.errors import LaunchError
from hangwatch.keep import startup
from hangwatch.keep.startup import Startup
from hangwatch.policy import DEFAULT, OnExpiry
from hangwatch.watcher.settings import Settings
from support.nursery import LIMIT
from support.processes import comm
from support.watchers import CONNECT, watcher_below

OURS = Settings(allowed_uids=frozenset({os.geteuid()}))
SETTINGS = {
    "default": OURS,
    "everything": Settings(
        DEFAULT._replace(
            on_expiry=OnExpiry.RAISE,
            grace=0.1,
            signal=64,
            force=True,
            tree=False,
            stacks=False,
            kill_debugged=True,
        ),
        gap=1e-9,
        report_dir="/reports",
        allowed_uids=OURS.allowed_uids,
        spared_pid=2**22,
    ),
    "spaces": replace(OURS, report_dir="/ a  folder\twith 'quotes' and \"more\" "),
    "newlines": replace(OURS, report_dir="/a\nb\r\n--signal\n9"),
    "options": replace(OURS, report_dir="/--no-tree"),
    "no UTF-8": replace(OURS, report_dir=os.fsdecode(b"/\xff\xfe/\xc3\x28")),
    "beyond the BMP": replace(OURS, report_dir="/\N{HEDGEHOG}"),
    "very long": replace(OURS, report_dir="/x" * 5_000_000),
}

READ = """
import hashlib, os, sys
from hangwatch.keep import startup
told = startup.read(int(sys.argv[1]))
try:
    os.fstat(int(sys.argv[1]))
except OSError:
    digest = hashlib.sha256(ascii(told).encode()).hexdigest()
    print("closed", os.get_inheritable(told.lifeline), digest)
"""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_reach_the_keeper_as_they_are(settings: Settings) -> None:
    """Into another process, which keeps the descriptor no longer than it must."""
    lifeline, end = os.pipe()
    told = Startup(settings, lifeline)
    descriptor = startup.write(told)
    assert not os.get_inheritable(descriptor)
    try:
        out = subprocess.run(
            [sys.executable, "-c", READ, str(descriptor)],
            pass_fds=[lifeline, descriptor],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        for one in (lifeline, end, descriptor):
            os.close(one)
    digest = hashlib.sha256(ascii(told).encode()).hexdigest()
    assert out == f"closed False {digest}\n"


def test_nobody_can_change_what_a_keeper_is_told() -> None:
    descriptor = startup.write(Startup(OURS, 0))
    try:
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"{}", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def sealed(content: bytes) -> int:
    descriptor = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, startup._SEALS)
    return descriptor


def fields(**other: object) -> bytes:
    descriptor = startup.write(Startup(OURS, 0))
    with open(descriptor, "rb") as file:
        file.seek(0)
        return json.dumps({**json.loads(file.read()), **other}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds nothing that a launcher writes"),
        (b"{", "holds nothing that a launcher writes"),
        (b"\xff", "holds nothing that a launcher writes"),
        (b"[" * 100_000, "holds nothing that a launcher writes"),
        (b"[]", "holds nothing that a launcher writes"),
        (b"{}", "holds nothing that a launcher writes"),
        (fields(hangwatch="0.0.7"), r"runs hangwatch 0\.0\.7, .* restart that program"),
        (fields(hangwatch=None), r"runs hangwatch None, .* restart that program"),
        (fields(more=1), "malformed .*more"),
        (fields(options=None), "malformed"),
        (fields(options={"grace": "1"}), "malformed .*grace must be a number of seconds"),
        (fields(options={"stack": 1}), "malformed .*no option 'stack'"),
        (fields(spared_pid="x"), "malformed"),
        (fields(lifeline=None), "malformed"),
        (fields(lifeline=2**20), "malformed .*Bad file descriptor"),
        (fields(events="3"), "malformed"),
    ],
)
def test_what_is_no_launcher_s_is_refused_in_words(content: bytes, says: str) -> None:
    with pytest.raises(LaunchError, match=says) as raised:
        startup.read(sealed(content))
    assert os.get_inheritable(0), "it names standard input, which is ours"
    assert "'hangwatch serve'" in str(raised.value) or "restart" in str(raised.value)


def pipe() -> int:
    return os.pipe()[0]


def file() -> int:
    return os.open(__file__, os.O_RDONLY)


def changeable() -> int:
    return os.memfd_create("changeable", os.MFD_ALLOW_SEALING)


@pytest.mark.parametrize("made", [pipe, file, changeable, lambda: 2**20, lambda: -1, lambda: 2**70])
def test_other_descriptors_are_neither_read_nor_closed(made: Callable[[], int]) -> None:
    descriptor = made()
    with pytest.raises(LaunchError, match=r"no sealed memfd; .* 'hangwatch serve'"):
        startup.read(descriptor)
    if 0 <= descriptor < 2**20:
        os.close(descriptor)


@pytest.mark.parametrize("words", [[], ["/a/path"], ["/a/path", "three"], ["/a/path", "3", "more"]])
def test_a_person_who_tries_it_is_told_what_to_do(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hangwatch.keep", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "to start a watcher, use 'hangwatch serve'" in result.stderr
    assert "Traceback" not in result.stderr


def test_ps_shows_what_it_is_and_where_it_listens() -> None:
    server = hangwatch.SharedMemoryTimerServer(report_dir=None)
    server.start()
    try:
        assert server.pid is not None
        pids = server.pid, watcher_below(server.pid)
        for pid in pids:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            assert words[1:5] == ["-P", "-m", "hangwatch.keep", server.address]
        assert [comm(pid) for pid in pids if pid] == ["hw-keeper", "hw-watcher"]
    finally:
        server.stop()


def test_nothing_of_a_startup_stays_open_in_keeper_and_watcher() -> None:
    server = hangwatch.SharedMemoryTimerServer(report_dir=None)
    server.start()
    try:
        assert server.pid is not None
        for pid in (server.pid, watcher_below(server.pid)):
            folder = Path(f"/proc/{pid}/fd")
            names = [os.readlink(one) for one in folder.iterdir() if one.is_symlink()]
            assert not [name for name in names if "hangwatch-startup" in name]
    finally:
        server.stop()


def test_reports_in_a_folder_with_an_awkward_name(tmp_path: Path) -> None:
    """The whole way: from `serve` to the report."""
    script = f"""
import sys, threading, hangwatch
reported = threading.Event()
def on_event(event):
    if event["event"] == "reported": reported.set()
with hangwatch.serve(report_dir=sys.argv[1], on_expiry="report", gap=1000, on_event=on_event):
    exec({CONNECT!r})
    with hangwatch.expires(0.1, "own"):
        reported.wait()
"""
    place = os.path.join(tmp_path, os.fsdecode(b"a b\n--force\n\xff'\""))
    subprocess.run([sys.executable, "-c", script, place], check=True, timeout=LIMIT)
    assert [*Path(place).glob("[!.]*/report.json")]


WITHOUT_STREAMS = f"""
import os, sys, threading
import hangwatch
for number in map(int, sys.argv[2]):
    os.closerange(number, number + 1)
reported = threading.Event()
def on_event(event):
    if event["event"] == "reported": reported.set()
with hangwatch.serve(report_dir=sys.argv[1], on_expiry="report", on_event=on_event):
    exec({CONNECT!r})
    with hangwatch.expires(0.1, "own"):
        reported.wait()
with open(sys.argv[1] + "/fine", "w"):
    pass
"""


@pytest.mark.parametrize("closed", ["0", "1", "01", "012"])
def test_a_program_without_standard_streams_has_a_watcher(tmp_path: Path, closed: str) -> None:
    """What the keeper inherits then has the number of one of its own standard streams."""
    subprocess.run(
        [sys.executable, "-c", WITHOUT_STREAMS, str(tmp_path), closed], check=True, timeout=LIMIT
    )
    assert (tmp_path / "fine").exists()


def test_an_address_that_can_t_be_is_a_launch_error() -> None:
    server = hangwatch.SharedMemoryTimerServer("/tmp/a\0b", report_dir=None)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="can't be started"):
        server.start()
    assert time.monotonic() - began < LIMIT
