"""The formats: page, handshake, faulthandler's text, /proc, reports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hangwatch import linux, wire
from hangwatch.errors import ProtocolError
from hangwatch.evidence import faulthandler_text, proc, publish, report
from hangwatch.evidence.model import (
    Action,
    Case,
    Evidence,
    Frame,
    Outcome,
    Report,
    Scope,
    ScopeThread,
    ThreadStack,
    Worker,
)
from hangwatch.page import layout
from hangwatch.policy import OnExpiry, Policy
from hangwatch.process import Identity, parse_stat, read_stat
from hangwatch.watcher.identity import pidfd_by_number
from hangwatch.worker.hello import labels_from
from support.nursery import nursery
from support.pages import write_details


@given(st.text(), st.integers(4, 200), st.booleans())
def test_cut_never_exceeds_its_room_nor_breaks_a_character(
    text: str, room: int, keep_end: bool
) -> None:
    encoded = layout.cut(text, room, keep_end=keep_end)
    assert len(encoded) <= room
    encoded.decode()


@given(st.data())
def test_what_is_known_of_a_worker_always_fits_into_a_message(data: st.DataObject) -> None:
    texts = st.text(st.sampled_from('\\"\x01é😀a'), max_size=300)
    hello = wire.Hello(
        page_fd=1,
        monotonic=1.5,
        fenced=True,
        pid=1,
        main_ident=1,
        labels=data.draw(st.dictionaries(texts, texts, max_size=20)),
        command=data.draw(st.lists(texts, max_size=40)),
        python=data.draw(texts),
        stacks=None,
        error_file=None,
    )
    assert len(wire.encode_hello(hello)) <= wire.MAX_BYTES


def test_details_survive_the_page() -> None:
    memory = memoryview(bytearray(layout.PAGE_BYTES))
    written = layout.SlotDetails(
        1.5, 7, 8, "loader", "all_reduce", Policy(OnExpiry.REAP, 0.0, 15), pauses=True
    )
    write_details(memory, 5, written)
    read = layout.read_details(memory, 5)
    for name in layout.SlotDetails.__slots__:
        assert getattr(read, name) == getattr(written, name)


def test_an_entry_counts_within_its_generation() -> None:
    entry = layout.next_generation(0.0)
    assert layout.times_entered(entry + 3) == 3
    assert layout.next_generation(entry + 3) > entry + 3
    assert layout.next_generation((2.0**20 - 1) * 2.0**32 + 5) == 0.0


@given(st.binary(max_size=300))
def test_a_hello_of_any_bytes_is_read_or_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_hello(message)


HELLO = wire.Hello(3, 1.0, True, {"rank": "2"}, ["python", "x.py"], "3.11", None)


def test_a_hello_survives_the_wire() -> None:
    with_stacks = HELLO._replace(
        stacks=wire.StackChannel(4, 62, 61), error_file="/attempt_0/2/\udcff.json"
    )
    for hello in (HELLO, with_stacks):
        assert wire.decode_hello(wire.encode_hello(hello)) == hello


def test_a_hello_with_a_huge_command_line_still_fits() -> None:
    hello = wire.Hello(3, 1.0, True, {}, ["ä" * 5000] * 5000, "3.11", None)
    assert len(wire.encode_hello(hello)) <= wire.MAX_BYTES


@pytest.mark.parametrize("path", ["/" + "ä" * 2047, "/" + "a" * 4095, "relative", "/nul\0"])
def test_an_error_file_that_can_t_be_sent_costs_nothing_else(path: str) -> None:
    hello = wire.Hello(3, 1.0, True, {"rank": "ä" * 256}, [], "3.11", None, path)
    received = wire.decode_hello(wire.encode_hello(hello))
    assert received.labels == hello.labels
    assert received.error_file in (path, None)
    with pytest.raises(ProtocolError):
        wire.decode_hello(json.dumps({"hangwatch": 3, "error_file": 3}).encode())


@given(
    st.dictionaries(
        st.sampled_from(
            ["page_fd", "monotonic", "fenced", "labels", "command", "stacks", "error_file"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
def test_a_hello_of_the_wrong_shape_is_refused_not_crashed_on(fields: dict[str, object]) -> None:
    good = json.loads(wire.encode_hello(HELLO))
    with contextlib.suppress(ProtocolError):
        hello = wire.decode_hello(json.dumps({**good, **fields}).encode())
        assert wire.decode_hello(wire.encode_hello(hello)) == hello


def test_another_version_is_told_what_to_do() -> None:
    with pytest.raises(ProtocolError, match="install the same hangwatch"):
        wire.decode_hello(b'{"hangwatch": 99}')
    with pytest.raises(ProtocolError, match="speaks version 2"):
        wire.decode_reply(b'{"hangwatch": 2}')


def test_a_reply_survives_the_wire() -> None:
    raises, nothing = Policy(OnExpiry.RAISE, force=True), Policy(force=False)
    for reply in (wire.Reply(None, raises), wire.Reply("too many", nothing)):
        assert wire.decode_reply(wire.encode_reply(reply)) == reply


DUMP = """\
Thread 0x00007f01 [loader] (most recent call first):
  File "/a/b \\xe4.py", line 12 in fetch
  ...

Current thread 0x00007f02 (most recent call first):
  <no Python frame>
...
"""


def test_a_dump_is_parsed() -> None:
    threads, cut = faulthandler_text.parse(DUMP)
    assert cut
    assert [(thread.ident, thread.name, thread.cut) for thread in threads] == [
        (0x7F01, "loader", True),
        (0x7F02, None, False),
    ]
    assert threads[0].frames == [Frame("/a/b ä.py", 12, "fetch")]
    assert threads[1].frames == []


@given(st.text())
def test_any_text_can_be_parsed_as_a_dump(text: str) -> None:
    faulthandler_text.parse(text)


def test_stat_with_brackets_in_the_name_is_parsed() -> None:
    line = "42 (a) (b c) S 7 " + " ".join(map(str, range(5, 53)))
    parsed = parse_stat(line)
    assert (parsed.pid, parsed.comm, parsed.state, parsed.ppid) == (42, "a) (b c", "S", 7)
    own = read_stat(os.getpid())
    assert own is not None
    assert own.ppid == os.getppid()
    began = proc.start_time(own.start_ticks)
    assert began is not None
    assert 0 <= time.time() - began < 100_000


def test_labels_come_from_the_allow_list_alone() -> None:
    environment = {"RANK": "3", "SLURM_PROCID": "9", "SLURM_JOB_ID": "17", "SECRET": "x"}
    assert labels_from(environment) == {"rank": "3", "run_id": "17"}


def make_report(scope: str = "forward", at: float = 1e9, pid: int = 42) -> Report:
    stuck = ThreadStack(1, "MainThread", True, [Frame("x.py", 3, "hang")], False)
    idle = [ThreadStack(n, None, False, [], True) for n in range(2, 30)]
    return Report(
        Outcome.REAPED,
        Case(
            at,
            Worker(pid, 0, 1e9, {"rank": "2"}, ["python", "x.py"], "3.11"),
            Scope(scope, 2.0, 2.001, 0.001, 7, ScopeThread(1, pid, "MainThread"), ["epoch"]),
        ),
        Evidence(threads=[stuck, *idle], missing=["wchan: not told"]),
        [Action("SIGKILL", 0.05, "sent"), Action("confirm", 0.06, "it is dead")],
    )


def test_a_report_has_what_its_schema_promises() -> None:
    written = json.loads(report.to_json(make_report()))
    assert written["schema"] == "hangwatch.report/1"
    assert written["outcome"] == "reaped"
    assert set(written["worker"]) >= {"pid", "start_time", "labels", "command"}
    assert set(written["scope"]) >= {"name", "limit_s", "inside_s", "late_s", "entry", "thread"}
    assert set(written["threads"][0]) >= {"id", "name", "holds_scope", "frames"}
    assert written["threads"][0]["frames"] == [{"file": "x.py", "line": 3, "function": "hang"}]
    assert set(written["process"]) >= {"state", "wchan", "cpu_s", "children"}
    assert written["actions"][0] == {"action": "SIGKILL", "at_s": 0.05, "result": "sent"}
    assert written["missing"] == ["wchan: not told"]


def test_the_headline_stands_alone() -> None:
    first = report.to_text(make_report()).splitlines()[0]
    for part in ("rank 2", "42", "'forward'", "2.001 s", "limit 2 s", "60 ms", "MainThread"):
        assert part in first


def test_a_log_record_shows_the_stuck_thread_first_and_not_all() -> None:
    text = report.to_text(make_report(), most_threads=5)
    assert "<- holds the scope" in text.split("\n\n")[1]
    assert "24 more threads" in text
    assert "more threads" not in report.to_text(make_report())


def test_reports_are_private_whole_and_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir(mode=0o755)
    (folder / "mine.txt").write_text("not a report")
    for number in range(publish.KEPT + 5):
        publish.publish(make_report(at=1e9 + number, pid=number), str(folder))
    kept = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    assert len(kept) == publish.KEPT
    assert kept[0].endswith("-forward-5"), "the oldest five are gone"
    assert (folder / "mine.txt").exists()
    assert not [name for name in kept if name.startswith(".")]
    newest = folder / kept[-1]
    assert stat.S_IMODE(newest.stat().st_mode) == 0o700
    for name in ("report.json", "report.txt"):
        assert stat.S_IMODE((newest / name).stat().st_mode) == 0o600
    json.loads((newest / "report.json").read_text())


def test_the_draft_of_a_helper_that_was_killed_is_removed_in_the_end(tmp_path: Path) -> None:
    for name in ("killed", "at-work"):
        publish.publish(make_report(scope=name), str(tmp_path))
    killed, at_work = (next(tmp_path.glob(f"*-{name}-*")) for name in ("killed", "at-work"))
    killed = killed.rename(tmp_path / f".{killed.name}.4711")
    at_work = at_work.rename(tmp_path / f".{at_work.name}.4712")
    os.utime(killed, (time.time() - 7200,) * 2)
    (tmp_path / ".mine").mkdir()
    os.utime(tmp_path / ".mine", (0, 0))
    publish.publish(make_report(), str(tmp_path))
    assert not killed.exists()
    assert at_work.exists()
    assert (tmp_path / ".mine").exists()


def test_a_clock_that_was_set_back_makes_new_reports_no_old_ones(tmp_path: Path) -> None:
    now = time.time()
    for number in range(publish.KEPT):
        publish.publish(make_report(at=now + 3600 + number, pid=number), str(tmp_path))
    for path in tmp_path.glob("*/report.json"):
        later = now + 3600 + int(path.parent.name.rpartition("-")[2])
        os.utime(path, (later, later))
    for number in range(3):
        publish.publish(make_report(at=now - 3 + number, pid=1000 + number), str(tmp_path))
    kept = sorted(int(entry.name.rpartition("-")[2]) for entry in tmp_path.iterdir())
    assert kept == [*range(3, publish.KEPT), 1000, 1001, 1002]


def test_what_others_write_at_the_same_time_is_no_old_report(tmp_path: Path) -> None:
    for number in range(publish.KEPT):
        publish.publish(make_report(pid=number), str(tmp_path))
    (others,) = tmp_path.glob("*-7/report.json")
    os.utime(others, (time.time() + 5,) * 2)
    publish.publish(make_report(pid=1000), str(tmp_path))
    assert others.exists()


def test_two_reports_of_one_millisecond_are_both_kept(tmp_path: Path) -> None:
    for _ in range(3):
        publish.publish(make_report(), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("scope", "slug"),
    [("forward", "forward"), ("/a/b.py#12", "a-b.py-12"), ("../..", "scope"), ("é" * 9, "scope")],
)
def test_a_scope_becomes_part_of_a_file_name(scope: str, slug: str) -> None:
    assert publish.slug(scope) == slug


def test_a_thread_s_signal_masks_are_read() -> None:
    masks = proc.signal_masks(os.getpid(), threading.get_native_id())
    assert masks is not None
    assert proc.has(masks.caught, 2), "Python catches SIGINT"
    assert proc.signal_masks(os.getpid(), 2**22 + 1) is None


def test_older_kernels_a_peer_is_held_by_its_number() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    held = Identity(process.pid, 0, 0, pidfd_by_number(process.pid))
    assert not held.is_dead()
    assert held.send(9) == "sent"
    process.wait()
    assert held.is_dead()
    assert held.send(9) == "already dead"
    os.close(held.pidfd)
    with pytest.raises(ProtocolError, match=r"can't be held|ended while"):
        pidfd_by_number(process.pid)


@pytest.mark.parametrize("send", [linux.tgkill, linux.signal_thread])
def test_a_signal_reaches_one_thread_and_none_of_another_process(
    send: Callable[[int, int, int], None],
) -> None:
    """With a thread's pidfd, and as older kernels do it."""
    script = (
        "import signal, threading, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "def work():\n"
        "    print(threading.get_native_id(), flush=True)\n"
        "    print(signal.sigwait([signal.SIGUSR1]) == signal.SIGUSR1, flush=True)\n"
        "threading.Thread(target=work).start()\n"
    )
    process = nursery().fork(script)
    tid = int(process.read_line())
    with pytest.raises(ProcessLookupError):
        send(os.getpid(), tid, signal.SIGUSR1)
    send(process.pid, tid, signal.SIGUSR1)
    out, _ = process.communicate()
    assert out == "True\n"


def test_the_fence_is_there_or_says_that_it_is_not() -> None:
    assert linux.register_fence() == linux.fence()
