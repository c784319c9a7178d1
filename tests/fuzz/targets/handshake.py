"""The handshake: a hello, as a watcher hears it; a reply, as a worker does.

In an input, NOW stands for the clock's reading.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from math import isfinite
from pathlib import Path
from time import monotonic
from zlib import crc32

from fuzz.bounds import check_report, strict
from hangwatch import handover, wire
from hangwatch.errors import ProtocolError
from hangwatch.evidence import proc
from hangwatch.evidence.model import Case, Evidence, Scope, ScopeThread, Worker
from hangwatch.handover import Kept
from hangwatch.page import layout
from hangwatch.policy import OnExpiry
from hangwatch.watcher import admission, events, news, takeover
from hangwatch.watcher.watched import Watched

TOKENS = [
    b"NOW",
    f'"hangwatch": {wire.VERSION}'.encode(),
    b'"hangwatch": 1',
    b'"page_fd": 3',
    b'"monotonic": NOW',
    b'"fenced": true',
    b'"labels": {',
    b'"rank": "0"',
    b'"command": [',
    b'"python": ',
    b'"stacks": {"fd": 4, "own": 62, "all": 61}',
    b'"error_file": "/',
    b'"pid": 1',
    b'"main_ident": 1',
    b'"welcome": true',
    b'"reason": ',
    b'"on_expiry": "raise"',
    b'"forced": true',
    b"[" * 16_000,
    b'{"a":' * 3000,
]
_US = frozenset({os.geteuid()})


def check(data: bytes) -> None:
    """Decode the bytes as each message of the handshake; knock at a watcher's door with them."""
    data = data.replace(b"NOW", repr(monotonic()).encode())
    # As much as `recv` gives.
    message = data[: wire.MAX_BYTES]
    with suppress(ProtocolError):
        _check_hello(wire.decode_hello(message))
    with suppress(ProtocolError):
        reply = wire.decode_reply(message)
        assert reply.reason is None or isinstance(reply.reason, str)
        assert reply.policy.on_expiry in (None, *OnExpiry)
        assert reply.policy.force in (True, False)
    open_before = _open_files()
    _check_admission(data)
    _check_handover(data)
    # What others left for the garbage collector may be closed meanwhile.
    assert _open_files() <= open_before, "a descriptor is left open"


def _check_hello(hello: wire.Hello) -> None:
    assert isfinite(hello.monotonic)
    assert len(hello.labels) <= 32
    assert len(hello.command) <= 32
    texts = [*hello.labels, *hello.labels.values(), *hello.command, hello.python]
    assert all(isinstance(text, str) and len(text) <= 256 for text in texts)
    stacks = hello.stacks
    numbers = [hello.page_fd, hello.pid, *([stacks.fd, stacks.own, stacks.all] if stacks else [])]
    assert all(type(number) is int and 0 <= number < 2**31 for number in numbers)
    assert 0 <= hello.main_ident < 2**64
    if stacks:
        assert proc.has(2**64 - 1, stacks.own) in (True, False)
        assert proc.has(2**64 - 1, stacks.all) in (True, False)
    if hello.error_file is not None:
        assert os.path.isabs(hello.error_file)
        assert len(hello.error_file.encode("utf-8", "surrogatepass")) < 4096
    encoded = wire.encode_hello(hello)
    assert len(encoded) <= wire.MAX_BYTES
    again = wire.decode_hello(encoded)
    assert again.stacks == hello.stacks
    assert again.command == hello.command[: len(again.command)]
    _check_labels(again, hello)
    case = Case(
        1e9,
        Worker(4242, 0, None, hello.labels, hello.command, hello.python),
        Scope("x", 1.0, 2.0, 1.0, 1, ScopeThread(hello.main_ident, 4242, "MainThread"), []),
    )
    check_report(case, Evidence())


def _check_labels(again: wire.Hello, hello: wire.Hello) -> None:
    """Compare the labels with those before they were encoded; a stranger may send too long ones."""
    assert list(again.labels.items()) == list(hello.labels.items())[: len(again.labels)]
    if again.labels != hello.labels:  # cut last of all
        assert (again.command, again.error_file) == ([], None)
        assert len(wire.encode_hello(hello)) > wire.MAX_BYTES // 2


def _check_admission(data: bytes) -> None:
    """Let a watcher hear it, and a successor take over whom it admits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptors = [layout.create_memfd() for _ in range(crc32(data) % 4)]
    with ours, theirs:
        if descriptors:
            socket.send_fds(theirs, [data], descriptors)
        else:
            theirs.send(data)
        for descriptor in descriptors:
            os.close(descriptor)
        worker, reason = None, ""
        try:
            worker, memfd = admission.admit(ours, _US)
        except ProtocolError as error:
            reason = str(error)
        if worker is None:
            # What `admission.refuse` sends must get there.
            assert len(wire.encode_reply(wire.Reply(reason))) <= wire.MAX_BYTES
            return
        state = takeover.state_of(worker)
        message = handover.encode(handover.Kind.KEEP, worker.number, state)
        assert len(message) <= handover.MAX_BYTES, "the keeper would get half of it"
        event = json.dumps(news.coming_or_going("joined", worker))
        # An incident's event has more in it; see `page`.
        assert len(event) <= events.MOST_BYTES - 8192, "who launched the watcher would get half"
        strict(event)
        kept = Kept(takeover.descriptors_of(worker, memfd), state)
        _close_but_connection(worker)
        successor = takeover.take_over(1, kept)
        _check_labels(successor.hello, worker.hello)
        assert successor.identity.pid == worker.identity.pid == os.getpid()
        successor.close()


def _close_but_connection(worker: Watched) -> None:
    worker.reader.close()
    os.close(worker.identity.pidfd)


def _check_handover(data: bytes) -> None:
    """What passes between watcher and keeper, both of which are ours."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, suppress(ValueError):
        theirs.send(data)
        message = handover.receive(ours)
        assert message is None or len(message.content) <= handover.MAX_BYTES


def _open_files() -> set[tuple[str, str]]:
    """Return the open descriptors, and what they are."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            found.add((path.name, os.readlink(path)))
    return found
