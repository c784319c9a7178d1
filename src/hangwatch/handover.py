"""What the watcher and its keeper tell each other, each time one SOCK_SEQPACKET datagram.

Layout of a message: its kind (1 byte), a number (8 bytes, little-endian), then bytes
that depend on the kind. Both ends are forks of one program, so there is no version.

The keeper understands nothing of a worker: it keeps descriptors, and a `state` that
only watchers read and write (`watcher/takeover.py`).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

MAX_BYTES = 65536
MAX_DESCRIPTORS = 253  # linux/net/scm.h, SCM_MAX_FD: more can't travel in one message

_HEAD = struct.Struct("<cQ")


class Kind(Enum):
    """The kinds of messages; what their number and their bytes mean."""

    # From the watcher.
    PING = b"p"
    """I run. Number: of connected workers."""
    READY = b"r"
    """I have taken over every worker and visited every page. Number: of connected workers."""
    KEEP = b"k"
    """Keep the worker of this number: the descriptors attached, and its state."""
    NOTE = b"n"
    """The state of this worker is now this one."""
    DROP = b"d"
    """Let go of this worker."""
    # From the keeper.
    KEPT = b"K"
    """I have this worker."""
    REFUSED = b"R"
    """I can't keep this worker; the bytes say why."""
    STOP = b"S"
    """End, once every report is complete. Number: 0."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message, with the descriptors that came with it, which are the receiver's."""

    kind: Kind
    number: int
    content: bytes
    descriptors: list[int]
    truncated: bool


@dataclass(slots=True)
class Kept:
    """What a keeper keeps of one worker."""

    descriptors: list[int]
    state: bytes


def encode(kind: Kind, number: int, content: bytes = b"") -> bytes:
    """Encode a message."""
    return _HEAD.pack(kind.value, number) + content


def send(link: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Send an encoded message, and descriptors with it; never blocks.

    Raises:
        BlockingIOError: there is no room for it just now.
        OSError: the other side is gone, or the kernel takes no descriptors just now.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    if descriptors:
        socket.send_fds(link, [message], descriptors, flags)
    else:
        link.send(message, flags)


def receive(link: socket.socket) -> Message | None:
    """Receive a message; None if the other side is gone. Never blocks.

    Of a set of descriptors that the kernel had to truncate, none is left open.

    Raises:
        BlockingIOError: nothing is there.
        ValueError: what came is no message; its descriptors are closed.

    Source: unix(7) on SCM_RIGHTS and MSG_CTRUNC.
    """
    descriptors = array.array("i")
    try:
        data, ancillary, flags, _ = link.recvmsg(
            MAX_BYTES,
            socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
    except BlockingIOError:
        raise
    except OSError:
        return None
    if not data:
        return None
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    truncated = bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))
    try:
        kind_byte, number = _HEAD.unpack_from(data)
        kind_of_message = Kind(kind_byte)
    except (struct.error, ValueError):
        close_all(descriptors)
        raise ValueError(f"no message: {data[:20]!r}") from None
    if truncated:
        close_all(descriptors)
        del descriptors[:]
    return Message(kind_of_message, number, data[_HEAD.size :], list(descriptors), truncated)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that came with a message, or went with one."""
    for descriptor in descriptors:
        os.close(descriptor)
