"""Launch a watcher process and tie its life to ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

from hangwatch.errors import LaunchError
from hangwatch.keep import address, startup
from hangwatch.watcher.settings import Settings

_READY_WITHIN = 15.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_FIRST_FREE = 3  # behind the standard streams


class WatcherProcess:
    """A keeper of our own, and its watcher, at an address that only our children know.

    Args:
        settings: what the watcher is told.
        at: where it listens; by default at an address of its own.
        events: a socket that it tells `Event`s to; still the caller's afterwards.

    Raises:
        LaunchError: it did not become ready: its message says why.
    """

    def __init__(
        self,
        settings: Settings,
        at: str | None = None,
        events: int | None = None,
    ) -> None:
        shared = bool(settings.other_users())
        self.address = os.path.abspath(at or address.private_address(shared))
        lifeline, self._lifeline = os.pipe()
        _all.add(self)
        # An abstract name: no file, no folder, nothing that can be too long; unix(7).
        name = f"hangwatch-{os.getpid()}-{secrets.token_hex(8)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            try:
                ready.bind(f"\0{name}")
                ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                self._process = self._start(f"@{name}", settings, lifeline, events)
                self._wait_ready(ready)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the address
                self._close()
                raise LaunchError(f"the watcher can't be started ({error})") from None
            finally:
                os.close(lifeline)

    @property
    def pid(self) -> int:
        """The watcher's process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Return the watcher's exit status if it has ended, else None."""
        return self._process.poll()

    def tell_to_stop(self) -> None:
        """Ask the watcher to end, and don't wait for it."""
        if self._process.poll() is None:
            # Not waited for yet, so the number is still its own.
            pidfd = os.pidfd_open(self._process.pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                # A watcher that somebody stopped can't see the signal; SIGCONT harms no other.
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)

    def stop(self, within: float | None = None) -> None:
        """End the watcher; returns when every report is complete.

        Args:
            within: seconds after which to return nevertheless; it then ends by itself.
        """
        self.tell_to_stop()
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            threading.Thread(target=self._process.wait, daemon=True).start()
        self._close()

    def _start(
        self, notify: str, settings: Settings, lifeline: int, events: int | None
    ) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as passed:

            def pass_on(descriptor: int) -> int:
                # Where our program closed its own, one of ours may have the number of a standard
                # stream, which is the keeper's own stream by then.
                ours = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
                passed.callback(os.close, ours)
                return ours

            descriptors = [pass_on(one) for one in (lifeline, events) if one is not None]
            told = startup.write(startup.Startup(settings, *descriptors))
            try:
                descriptors.append(pass_on(told))
            finally:
                os.close(told)
            return subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "hangwatch.keep"),
                    *(self.address, str(descriptors[-1])),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if _has_standard_error() else subprocess.DEVNULL,
                env=_environment(notify),
                pass_fds=descriptors,
                process_group=0,
            )

    def _close(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _wait_ready(self, ready: socket.socket) -> None:
        ready.settimeout(0.05)
        until = time.monotonic() + _READY_WITHIN
        while time.monotonic() < until:
            try:
                message, sender, _, _ = ready.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
                # The name can be read in /proc/net/unix, and any user can send there.
                if b"READY=1" in message and _is_of_our_user(sender):
                    return
            except TimeoutError:
                pass
            status = self._process.poll()
            if status is not None:
                self._close()
                raise LaunchError(f"the watcher ended with status {status} before it was ready")
        self._process.kill()
        self._process.wait()
        self._close()
        raise LaunchError(f"the watcher was not ready within {_READY_WITHIN:g} s")


def _has_standard_error() -> bool:
    """Tell whether a child that we start inherits a standard error stream."""
    try:
        return os.get_inheritable(2)
    except OSError:
        return False


def _is_of_our_user(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Tell whether a message's sender is our own user, by the kernel's word; unix(7).

    Of a sender that gives no credentials of its own it is the real user.
    """
    return any(
        kind == socket.SCM_CREDENTIALS
        and _CREDENTIALS.unpack(data)[1] in (os.getuid(), os.geteuid())
        for _, kind, data in ancillary
    )


def _environment(notify: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment["NOTIFY_SOCKET"] = notify
    for name in ("HANGWATCH_ADDRESS", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"):
        environment.pop(name, None)
    # The watcher must be this very hangwatch, wherever this program found it.
    found_in = str(Path(__file__).parents[2])
    paths = [found_in, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


_all: weakref.WeakSet[WatcherProcess] = weakref.WeakSet()


def _after_fork() -> None:
    # A child that lives on must not look like the launcher.
    for process in list(_all):
        process._close()


os.register_at_fork(after_in_child=_after_fork)
