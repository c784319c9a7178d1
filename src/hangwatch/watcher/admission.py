"""Admit a newcomer: who it is, what it sent, whether that is safe to map."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import socket
from time import monotonic

from hangwatch import wire
from hangwatch.errors import PageError, ProtocolError
from hangwatch.process import Identity, may_signal
from hangwatch.watcher.identity import credentials_of, identify, refuse_descriptors
from hangwatch.watcher.page_reader import PageReader
from hangwatch.watcher.watched import Watched

_CLOCKS_APART = 10.0


def admit(connection: socket.socket, allowed_uids: frozenset[int]) -> tuple[Watched, int]:
    """Read a newcomer's hello and take it in.

    Args:
        connection: its socket, readable.
        allowed_uids: who may be watched.

    Returns:
        The worker, which has not been told yet that it is welcome, and its page's memfd,
        the caller's to close.

    Raises:
        ProtocolError: it is not a worker that can be watched, and why. Its socket is
            still open, nothing else of it is.
        BlockingIOError: nothing is there to read after all.
    """
    _check_user(connection, allowed_uids)
    # Read first: a connection that is closed with something unread loses our reply.
    message, descriptors = _receive(connection)
    try:
        identity = identify(connection)
        try:
            worker = _take_in(connection, identity, wire.decode_hello(message), descriptors)
            refuse_descriptors(connection)
            return worker, descriptors.pop(0)
        except BaseException:
            os.close(identity.pidfd)
            raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def refuse(connection: socket.socket, reason: Exception) -> None:
    """Tell a newcomer why it isn't welcome, and hang up."""
    with contextlib.suppress(OSError):
        connection.send(wire.refusal_of(reason), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    connection.close()


def _check_user(connection: socket.socket, allowed_uids: frozenset[int]) -> None:
    pid, uid = credentials_of(connection)
    if pid <= 0 or uid in allowed_uids:  # of pid 0 `identify` says more
        return
    # A stranger's hello is read, see `admit`. Its descriptors get no numbers here; the kernel
    # closes them, and should that take long the keeper replaces us.
    connection.recv(1, socket.MSG_DONTWAIT)
    ours = os.geteuid()
    way = "start it with" if ours == 0 else "start one as root with"
    raise ProtocolError(
        f"the watcher serves user {', '.join(map(str, sorted(allowed_uids)))}, this is user {uid}: "
        f"{way} --allow-uid {uid}, or one as user {uid}"
    )


def _take_in(
    connection: socket.socket, identity: Identity, hello: wire.Hello, descriptors: list[int]
) -> Watched:
    apart = monotonic() - hello.monotonic
    if not -1.0 < apart < _CLOCKS_APART:
        raise ProtocolError(
            f"its clock differs by {abs(apart):.0f} s: is it in another time namespace?"
        )
    if not may_signal(identity.uid, identity.pid):
        raise ProtocolError(
            f"user {identity.uid}, as whom it comes, may not end it: its real user is another, "
            "and it must become that user for good before it connects"
        )
    if len(descriptors) != (1 if hello.stacks is None else 2):
        raise ProtocolError(f"it sent {len(descriptors)} descriptors, not what its hello says")
    inode = (0, 0)
    if hello.stacks is not None:
        status = os.fstat(descriptors[1])
        inode = (status.st_dev, status.st_ino)
        # It is emptied in the end, with our rights: it must be nobody's file.
        if status.st_dev != _device_of_memfds():
            raise ProtocolError("its stack channel is no memfd")
    try:
        reader = PageReader(descriptors[0])
    except PageError as error:
        raise ProtocolError(str(error)) from None
    return Watched(connection, identity, hello, reader, inode)


@functools.cache
def _device_of_memfds() -> int:
    """Return the device of all memfds; no file that has a path is there. memfd_create(2)."""
    descriptor = os.memfd_create("hangwatch-device", os.MFD_CLOEXEC)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * array.array("i").itemsize)
    message, ancillary, flags, _ = connection.recvmsg(
        wire.MAX_BYTES, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    problem = None
    if flags & socket.MSG_CTRUNC:
        problem = (
            f"it sent more than {wire.MAX_DESCRIPTORS} descriptors, or none were left for them"
        )
    elif flags & socket.MSG_TRUNC:
        problem = f"its hello is longer than {wire.MAX_BYTES} bytes"
    elif not message:
        problem = "it hung up before its hello"
    if problem is not None:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ProtocolError(problem)
    return message, list(descriptors)
