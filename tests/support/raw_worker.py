"""A worker made by hand, to say what a real one never would."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from typing import Any

from hangwatch import wire
from hangwatch.page import layout
from support.nursery import LIMIT


def memfd(
    size: int = layout.PAGE_BYTES,
    seals: int = layout.SEALS,
    header: bytes | None = None,
    flags: int = 0,
) -> int:
    """Create a page's memfd, or something like it."""
    good = layout.create_memfd()
    if header is None:
        header = os.pread(good, layout.HEADER_BYTES, 0)
    os.close(good)
    descriptor = os.memfd_create("raw", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    if not flags:
        os.pwrite(descriptor, header, 0)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def hello(**changes: Any) -> bytes:
    """Return a good hello with some fields changed."""
    fields: dict[str, Any] = {
        "hangwatch": wire.VERSION,
        "page_fd": 3,
        "monotonic": time.monotonic(),
        "fenced": True,
        "labels": {},
        "command": ["raw"],
        "python": "3.11",
        "stacks": None,
    }
    return json.dumps({**fields, **changes}).encode()


def connect(address: str) -> socket.socket:
    """Connect to a watcher, and say nothing yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(LIMIT)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def refusal(connection: socket.socket) -> str | None:
    """Read a watcher's answer; return None if it is a welcome, else why not."""
    return wire.decode_reply(connection.recv(wire.MAX_BYTES)).reason


def join(address: str, memfd: int) -> socket.socket:
    """Connect with a page's memfd as a worker that is welcome."""
    connection = connect(address)
    socket.send_fds(connection, [hello()], [memfd])
    reason = refusal(connection)
    if reason is not None:
        connection.close()
        raise AssertionError(f"refused: {reason}")
    return connection


def answer(address: str, message: bytes, descriptors: list[int]) -> str | None:
    """Say a hello; return None if it was welcome, else why it was refused."""
    with connect(address) as connection:
        if descriptors:
            socket.send_fds(connection, [message], descriptors)
        else:
            connection.send(message)
        return refusal(connection)
