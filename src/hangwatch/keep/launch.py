"""Launch a watcher process and tie its life to ours."""

from __future__ import annotations

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
from hangwatch.keep import address
from hangwatch.watcher.settings import Settings

_READY_WITHIN = 15.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class WatcherProcess:
    """A `hangwatch serve` of our own, at an address that only our children know.

    Args:
        report_dir: the report folder; None keeps no reports.
        on_expiry: what happens to a worker whose block overran.
        grace: seconds between SIGTERM and SIGKILL.
        tree: whether a worker's descendants are killed with it.
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
        arguments = ["--address", self.address, *arguments_of(settings)]
        if events is not None:
            arguments += ["--events-to", str(events)]
        lifeline, self._lifeline = os.pipe()
        _all.add(self)
        # An abstract name: no file, no folder, nothing that can be too long; unix(7).
        name = f"hangwatch-{os.getpid()}-{secrets.token_hex(8)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            try:
                ready.bind(f"\0{name}")
                ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "hangwatch", "serve", *arguments),
                        *("--lifeline", str(lifeline)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_environment(f"@{name}"),
                    pass_fds=[lifeline] if events is None else [lifeline, events],
                    process_group=0,
                )
                self._wait_ready(ready)
            except OSError as error:
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


def _is_of_our_user(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Tell whether a message's sender is our own user, by the kernel's word; unix(7).

    Of a sender that gives no credentials of its own it is the real user.
    """
    return any(
        kind == socket.SCM_CREDENTIALS
        and _CREDENTIALS.unpack(data)[1] in (os.getuid(), os.geteuid())
        for _, kind, data in ancillary
    )


def arguments_of(settings: Settings) -> list[str]:
    """Return settings as options of ``hangwatch serve``."""
    options = {
        "--on-expiry": settings.on_expiry.value,
        "--grace": repr(settings.grace),
        "--signal": str(settings.signal or ""),
        "--gap": repr(settings.gap) if settings.gap else "",
        "--report-dir": settings.report_dir or "",
        "--spare": str(settings.spared_pid or ""),
    }
    flags = {
        "--force": settings.force,
        "--no-tree": not settings.tree,
        "--no-stacks": not settings.stacks,
        "--kill-debugged": settings.kill_debugged,
    }
    given = [word for name, value in options.items() if value for word in (name, value)]
    given += [word for uid in settings.other_users() for word in ("--allow-uid", str(uid))]
    return given + [name for name, is_set in flags.items() if is_set]


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
