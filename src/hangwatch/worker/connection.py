"""The worker's connection to the watcher: hello, then one byte at a time.

Arming never waits for the watcher and never fails because of it. Only the first
arm of a process waits, at most `ANSWER_WITHIN` seconds, for the handshake.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Callable
from time import monotonic, sleep

from hangwatch import wire
from hangwatch.errors import (
    AddressError,
    HangwatchError,
    ProtocolError,
    WatcherUnavailableError,
)
from hangwatch.policy import NOTHING_CHOSEN
from hangwatch.worker.own_descriptor import OwnDescriptor

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.wire import Hello

ANSWER_WITHIN = 1.0
RING = b"!"
_MOST_BYTES = 16384
_LONGEST_PATH = 107  # unix(7): sun_path is 108 bytes, the last one NUL
_RETRY = "start one with 'hangwatch run' or 'hangwatch serve', or correct HANGWATCH_ADDRESS"


class WatcherSocket(socket.socket):
    """The connection to a watcher.

    The program may close its number, and use that for something else: it is looked at each time.

    Attributes:
        policy: the watcher's, once we are welcome; see `wire.Reply`.
    """

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.policy = NOTHING_CHOSEN
        self._descriptor = OwnDescriptor(self.fileno())
        self.setblocking(False)

    def ring(self) -> bool:
        """Ask the watcher to look at this process's page.

        A full socket is a ring that the watcher has not heard yet: enough.

        Returns:
            False if the watcher is gone, or the program closed the descriptor.
        """
        if not self._descriptor.is_ours():
            return False
        try:
            self.send(RING, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return True
        except OSError as error:
            # Out of socket memory for the moment is not gone.
            return error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EINTR)
        return True

    def close(self) -> None:
        """Hang up, unless the number is somebody else's by now."""
        self.detach()
        self._descriptor.close()

    def __del__(self) -> None:
        self.detach()  # `OwnDescriptor` closes it


def connect(address: str, hello: Callable[[], Hello]) -> WatcherSocket:
    """Connect to the watcher at `address` and hand it this process's page.

    Args:
        address: path of the watcher's socket.
        hello: returns what this process says of itself.

    Returns:
        The connection.

    Raises:
        AddressError: the address can't be a watcher's: whoever set it is at fault.
        WatcherUnavailableError: nobody answers there within `ANSWER_WITHIN`, the
            watcher refuses this process, or belongs to another user.
        ProtocolError: whoever answers is no watcher.
        VersionError: it is a watcher of another version.
    """
    if "\0" in address or len(os.fsencode(address)) > _LONGEST_PATH:
        raise AddressError(
            f"the watcher's address {address!r:.60} can't be a socket's path "
            f"(at most {_LONGEST_PATH} bytes, no NUL): choose a shorter one"
        )
    until = monotonic() + ANSWER_WITHIN
    while True:
        connection = WatcherSocket()
        try:
            problem = _try(connection, address, hello, until)
            if problem is None:
                return connection
            if monotonic() > until:
                raise problem
        except BaseException:
            connection.close()
            raise
        connection.close()
        sleep(0.02)


def _try(
    connection: WatcherSocket, address: str, hello: Callable[[], Hello], until: float
) -> HangwatchError | None:
    """Connect once; return None if we are welcome, an error if that may be so a moment later."""
    try:
        connection.connect(address)
    except BlockingIOError:  # the queue of new connections is full
        return WatcherUnavailableError(
            f"the watcher at {address} is too busy to accept new connections: try again later"
        )
    except OSError as error:
        raise _unreachable(address, error) from None
    _check_owner(connection, address)
    answer = _converse(connection, address, hello(), until)
    if not answer:  # a watcher that died in the middle of this has a successor before long
        return ProtocolError(
            f"the process that listens at {address} disconnected: it is no watcher"
        )
    reply = wire.decode_reply(answer, f"the watcher at {address}")
    if reply.reason is not None:
        raise WatcherUnavailableError(
            f"the watcher at {address} refuses this process: {reply.reason}"
        )
    connection.setblocking(False)
    connection.policy = reply.policy
    return None


def _unreachable(address: str, error: OSError) -> AddressError | WatcherUnavailableError:
    if error.errno == errno.ENOENT:
        return WatcherUnavailableError(f"there is no watcher at {address}: {_RETRY}")
    if error.errno == errno.EPROTOTYPE:
        return AddressError(f"{address} is a socket, but no watcher's: correct HANGWATCH_ADDRESS")
    if error.errno == errno.ECONNREFUSED:
        try:
            is_socket = stat.S_ISSOCK(os.stat(address).st_mode)
        except OSError:
            is_socket = True
        if not is_socket:
            return AddressError(f"{address} is not a socket: correct HANGWATCH_ADDRESS")
        return WatcherUnavailableError(f"nobody listens at {address} any more: {_RETRY}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return WatcherUnavailableError(
            f"user {os.geteuid()} may not connect to {address}: start a watcher of your own, "
            f"or start that one as root with --allow-uid {os.geteuid()}"
        )
    return WatcherUnavailableError(f"can't connect to {address} ({error.strerror}): {_RETRY}")


def _check_owner(connection: socket.socket, address: str) -> None:
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (os.geteuid(), 0):
        raise WatcherUnavailableError(
            f"the watcher at {address} belongs to user {uid}, not to {os.geteuid()} or root: "
            "start one of your own"
        )


def _converse(connection: socket.socket, address: str, hello: Hello, until: float) -> bytes:
    """Say hello and hear the answer; empty if the other side disconnected before it gave one."""
    message = wire.encode_hello(hello)
    descriptors = [hello.page_fd] if hello.stacks is None else [hello.page_fd, hello.stacks.fd]
    try:
        connection.settimeout(max(0.01, until - monotonic()))
        socket.send_fds(connection, [message], descriptors, socket.MSG_NOSIGNAL)
        connection.settimeout(max(0.01, until - monotonic()))
        answer = connection.recv(_MOST_BYTES)
    except TimeoutError:
        raise WatcherUnavailableError(
            f"the watcher at {address} did not answer within {ANSWER_WITHIN:g} s: is it stopped?"
        ) from None
    except ConnectionError:
        return b""
    except OSError as error:
        raise _unreachable(address, error) from None
    return answer
