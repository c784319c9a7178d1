"""The handshake's two messages, each one SOCK_SEQPACKET datagram of JSON.

A worker says hello, with its page's descriptor attached and perhaps that of its
stack channel; the watcher welcomes it or says why not. After that the worker
sends one byte, `connection.RING`, whenever the watcher should look at its page.

Layout of a hello: {"hangwatch": version, "page_fd": int, "monotonic": float,
"fenced": bool, "labels": {str: str}, "command": [str, ...], "python": str,
"stacks": null or {"fd": int, "own": int, "all": int}, "error_file": null or str,
"pid": int, "main_ident": int}.
Layout of a reply: {"hangwatch": version, "welcome": bool, "reason": str, "on_expiry": str,
"forced": bool}.
Unknown keys are ignored, so that some can be added without a new version.

"hangwatch" is the version of all that the two sides share, the page included. Each side refuses
another one, and says what both have. A watcher answers with its own version; only to version 1,
which reads no other, it answers with that.
"""

from __future__ import annotations

import json
from collections import namedtuple
from math import isfinite

from hangwatch.errors import ProtocolError, VersionError
from hangwatch.page import layout
from hangwatch.policy import NOTHING_CHOSEN, Policy, known_on_expiry

TYPE_CHECKING = False  # typing itself takes long to import, as dataclasses does
if TYPE_CHECKING:
    from typing import TypeGuard

VERSION = layout.VERSION
_READS_NO_OTHER = 1
MAX_BYTES = 16384
MAX_DESCRIPTORS = 2
_MAX_LABELS, _MAX_ARGUMENTS, _MAX_TEXT = 32, 32, 256
_MAX_PATH = 4095  # linux/limits.h: PATH_MAX is 4096 bytes, the last one NUL


class StackChannel(namedtuple("StackChannel", ("fd", "own", "all"))):
    """Where a worker's Python stacks appear, and how to ask for them.

    Attributes:
        fd: number of the memfd in the worker's process.
        own: signal that makes the thread that gets it write its stack.
        all: signal that makes it write every thread's.
    """

    __slots__ = ()

    fd: int
    own: int
    all: int


class Hello(
    namedtuple(
        "Hello",
        "page_fd monotonic fenced labels command python stacks error_file pid main_ident",
        defaults=(None, 0, 0),
    )
):
    """What a worker says of itself. Nothing in it names a process to act on.

    Attributes:
        page_fd: number of the page's memfd in the worker's process.
        monotonic: the worker's CLOCK_MONOTONIC in seconds, to find a foreign time namespace.
        fenced: whether the watcher's memory fence reaches this process.
        labels: rank and the like, from an allow-list of environment variables.
        command: the command line, perhaps cut.
        python: the version of its Python.
        stacks: its stack channel, or None where it has none.
        error_file: absolute path of the file in which its launcher looks for the reason of
            its end, or None.
        pid: what it takes for its process id: another in a pid namespace of its own; 0: unknown.
        main_ident: `threading.get_ident()` of its main thread; 0: unknown.
    """

    __slots__ = ()

    page_fd: int
    monotonic: float
    fenced: bool
    labels: dict[str, str]
    command: list[str]
    python: str
    stacks: StackChannel | None
    error_file: str | None
    pid: int
    main_ident: int


class Reply(namedtuple("Reply", ("reason", "policy"), defaults=(NOTHING_CHOSEN,))):
    """What the watcher answers.

    Attributes:
        reason: why the worker is not welcome; None: it is.
        policy: of the watcher's, what a worker acts on: `on_expiry` and `force`.
    """

    __slots__ = ()

    reason: str | None
    policy: Policy


def encode_hello(hello: Hello) -> bytes:
    """Encode a hello; of what is long, only as much as fits into `MAX_BYTES`."""
    stacks, error_file = hello.stacks, hello.error_file
    if not _is_path(error_file):
        error_file = None
    labels = dict(list(hello.labels.items())[:_MAX_LABELS])
    command = [word[:_MAX_TEXT] for word in hello.command[:_MAX_ARGUMENTS]]
    while True:
        message = json.dumps(
            {
                "hangwatch": VERSION,
                "page_fd": hello.page_fd,
                "monotonic": hello.monotonic,
                "fenced": hello.fenced,
                "labels": {key[:_MAX_TEXT]: value[:_MAX_TEXT] for key, value in labels.items()},
                "command": command,
                "python": hello.python,
                "stacks": stacks and {"fd": stacks.fd, "own": stacks.own, "all": stacks.all},
                "error_file": error_file,
                "pid": hello.pid,
                "main_ident": hello.main_ident,
            }
        ).encode("ascii")
        if len(message) <= MAX_BYTES:
            return message
        if command:
            command.pop()
        elif error_file is not None:
            error_file = None
        elif labels:
            labels.popitem()
        else:
            return message


def decode_hello(message: bytes) -> Hello:
    """Decode a hello.

    Raises:
        ProtocolError: the message is none: the peer's fault.
        VersionError: it is of another version.
    """
    fields = _decode(message, "worker", "the worker", "its watcher")
    try:
        stacks = fields.get("stacks")
        error_file = fields.get("error_file")
        if not _is_path(error_file):
            raise ValueError("the error file is not an absolute path")
        hello = Hello(
            page_fd=_number(fields["page_fd"]),
            monotonic=float(fields["monotonic"]),  # type: ignore[arg-type]
            fenced=fields.get("fenced") is True,
            labels=_texts(fields.get("labels", {})),
            command=list(_texts(dict(enumerate(fields.get("command", [])))).values()),  # type: ignore[arg-type]
            python=str(fields.get("python", ""))[:_MAX_TEXT],
            stacks=None
            if not isinstance(stacks, dict)
            else StackChannel(
                _number(stacks["fd"]), *(_signal(stacks[key]) for key in ("own", "all"))
            ),
            error_file=error_file,
            pid=_number(fields.get("pid", 0)),
            main_ident=_ident(fields.get("main_ident", 0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"the hello is malformed ({error!r})") from None
    if not isfinite(hello.monotonic):
        raise ProtocolError("the hello's clock reading is not a number")
    return hello


def refusal_of(error: Exception) -> bytes:
    """Encode why a worker is refused, such that the worker can read it whatever its version."""
    old = isinstance(error, VersionError) and error.theirs == str(_READS_NO_OTHER)
    return encode_reply(Reply(str(error)), _READS_NO_OTHER if old else VERSION)


def encode_reply(reply: Reply, version: int = VERSION) -> bytes:
    """Encode the watcher's reply."""
    return json.dumps(
        {
            "hangwatch": version,
            "welcome": reply.reason is None,
            "reason": (reply.reason or "")[:1024],
            "on_expiry": reply.policy.on_expiry or "",
            "forced": bool(reply.policy.force),
        }
    ).encode("ascii")


def decode_reply(message: bytes, peer: str = "the watcher") -> Reply:
    """Decode the watcher's reply.

    Args:
        message: the reply.
        peer: whose it is, for errors.

    Raises:
        ProtocolError: whoever answered is no watcher.
        VersionError: it is one of another version.
    """
    fields = _decode(message, "watcher", peer, "this process")
    welcome = fields.get("welcome") is True
    on_expiry = known_on_expiry(fields.get("on_expiry"))
    return Reply(
        None if welcome else str(fields.get("reason", "")),
        Policy(on_expiry, force=fields.get("forced") is True),
    )


def _decode(message: bytes, kind: str, peer: str, we: str) -> dict[str, object]:
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        raise ProtocolError(f"the message is not one of a hangwatch {kind}") from None
    if not isinstance(fields, dict) or "hangwatch" not in fields:
        raise ProtocolError(f"the message is not one of a hangwatch {kind}")
    if fields["hangwatch"] != VERSION:
        theirs = _shown(fields["hangwatch"])
        raise VersionError(
            f"{peer} speaks version {theirs} of hangwatch's protocol, "
            f"{we} version {VERSION}: {layout.WHAT_TO_DO}",
            theirs,
            VERSION,
        )
    return fields


def _shown(version: object) -> str:
    """Show what should be a small number, and may be anything."""
    return ascii(version)[:20] if isinstance(version, int | str) else type(version).__name__


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"not a small whole number: {value!r:.40}")
    return value


def _signal(value: object) -> int:
    number = _number(value)
    if number == 0:
        raise ValueError("not a signal: 0")
    return number


def _ident(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise ValueError(f"not a thread: {value!r:.40}")
    return value


def _is_path(value: object) -> TypeGuard[str | None]:
    return value is None or (
        isinstance(value, str)
        and value.startswith("/")
        and "\0" not in value
        and len(value.encode("utf-8", "surrogatepass")) <= _MAX_PATH
    )


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > max(_MAX_LABELS, _MAX_ARGUMENTS):
        raise ValueError("labels or command have the wrong shape")
    return {str(key)[:_MAX_TEXT]: str(text)[:_MAX_TEXT] for key, text in value.items()}
