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
import sys
import threading
from time import monotonic, sleep

from hangwatch import wire
from hangwatch.errors import AddressError, ProtocolError, WatcherUnavailableError
from hangwatch.worker.labels import error_file_from
from hangwatch.worker.own_descriptor import OwnDescriptor

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.wire import Reply, StackChannel

ANSWER_WITHIN = 1.0
RING = b"!"
_MOST_BYTES = 16384
_LONGEST_PATH = 107  # unix(7): sun_path is 108 bytes, the last one NUL
_RETRY = "start one with 'hangwatch run' or 'hangwatch serve', or correct HANGWATCH_ADDRESS"


def connect(
    address: str,
    page_descriptor: int,
    stacks: StackChannel | None,
    fenced: bool,
    labels: dict[str, str],
) -> WatcherSocket:
    """Connect to the watcher at `address` and hand it this process's page.

    Args:
        address: path of the watcher's socket.
        page_descriptor: the page's memfd.
        stacks: this process's stack channel, if it has one.
        fenced: whether the watcher's memory fence reaches this process.
        labels: what the watcher's reports call this process.

    Returns:
        The connection.

    Raises:
        AddressError: the address can't be a watcher's: whoever set it is at fault.
        WatcherUnavailableError: nobody answers there within `ANSWER_WITHIN`, the
            watcher refuses this process, or belongs to another user.
        ProtocolError: whoever answers is no watcher.
        VersionError: it is a watcher of another version.
    """
    until = monotonic() + ANSWER_WITHIN
    descriptors = [page_descriptor] if stacks is None else [page_descriptor, stacks.fd]
    while True:
        connection = _open(address, until)
        try:
            _check_owner(connection, address)
            hello = wire.Hello(
                page_fd=page_descriptor,
                monotonic=monotonic(),
                fenced=fenced,
                labels=labels,
                command=list(sys.orig_argv),
                python=".".join(map(str, sys.version_info[:3])),
                stacks=stacks,
                error_file=error_file_from(os.environ),
                pid=os.getpid(),
                main_ident=threading.main_thread().ident or 0,
            )
            answer = _converse(connection, address, wire.encode_hello(hello), descriptors, until)
            if answer:
                reply = wire.decode_reply(answer, f"the watcher at {address}")
                if reply.reason is not None:
                    raise WatcherUnavailableError(
                        f"the watcher at {address} refuses this process: {reply.reason}"
                    )
                connection.setblocking(False)
                return WatcherSocket(connection, reply)
            if monotonic() > until:
                raise ProtocolError(f"whoever listens at {address} hung up: it is no watcher")
        except BaseException:
            connection.close()
            raise
        # A watcher that died in the middle of this has a successor before long.
        connection.close()
        sleep(0.02)


class _Socket(socket.socket):
    """A socket whose number its `OwnDescriptor` closes, if it still is ours."""

    def __del__(self) -> None:
        self.detach()


class WatcherSocket:
    """The connection to the watcher, once we are welcome.

    Attributes:
        policy: the watcher's; see `Reply`.
    """

    def __init__(self, connection: socket.socket, reply: Reply) -> None:
        self.policy = reply.policy
        self._socket = connection
        self._descriptor = OwnDescriptor(connection.fileno())

    def ring(self) -> bool:
        """Ask the watcher to look at this process's page.

        A full socket is a ring that the watcher has not heard yet: enough.

        Returns:
            False if the watcher is gone, or the program closed the descriptor.
        """
        if not self._descriptor.is_ours():
            return False
        try:
            self._socket.send(RING, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return True
        except OSError as error:
            # Out of socket memory for the moment is not gone.
            return error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EINTR)
        return True

    def fileno(self) -> int:
        """Return the descriptor's number."""
        return self._descriptor.number

    def close(self) -> None:
        """Hang up, unless the number is somebody else's by now."""
        self._socket.detach()
        self._descriptor.close()


def _open(address: str, until: float) -> socket.socket:
    if "\0" in address or len(os.fsencode(address)) > _LONGEST_PATH:
        raise AddressError(
            f"the watcher's address {address!r:.60} can't be a socket's path "
            f"(at most {_LONGEST_PATH} bytes, no NUL): choose a shorter one"
        )
    connection = _Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        while True:
            try:
                connection.connect(address)
            except BlockingIOError:  # the queue of newcomers is full
                if monotonic() > until:
                    raise WatcherUnavailableError(
                        f"the watcher at {address} is too busy to take newcomers: try again later"
                    ) from None
                sleep(0.01)
            else:
                return connection
    except OSError as error:
        connection.close()
        if isinstance(error, WatcherUnavailableError):
            raise
        raise _unreachable(address, error) from None
    except BaseException:
        connection.close()
        raise


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
            f"the way to {address} is closed to user {os.geteuid()}: start a watcher of your own, "
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


def _converse(
    connection: socket.socket, address: str, hello: bytes, descriptors: list[int], until: float
) -> bytes:
    """Say hello and hear the answer; empty if the other side hung up before it gave one."""
    try:
        connection.settimeout(max(0.01, until - monotonic()))
        socket.send_fds(connection, [hello], descriptors, socket.MSG_NOSIGNAL)
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
