"""The keeper: it forks the watcher, keeps what the watcher can't get back, forks the next.

It reads nothing that a worker wrote, opens no file of a worker's, and never waits for
anybody. A successor is a fork of it, without exec: it inherits every descriptor that is
kept, and no file system has to answer for it.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from time import monotonic

from hangwatch import linux
from hangwatch.handover import Kept
from hangwatch.keep.life import WatcherLife
from hangwatch.keep.signals import SignalPipe
from hangwatch.keep.systemd import Notifier
from hangwatch.process import wait_readable

_log = logging.getLogger("hangwatch.keep")

# Waking this late means that we did not run either, and can't say who was silent.
_OVERSLEPT = 0.5
_FIRST_BACK_OFF, _LONGEST_BACK_OFF = 0.1, 5.0
_DEAD_WITHIN = 0.3


class Keeper:
    """Keeps a watcher running.

    Args:
        watch: what each watcher process does, told whether it is a successor; when it
            returns, so does `run`.
        notifier: who is told how the watcher is.
    """

    def __init__(
        self, watch: Callable[[bool, socket.socket, dict[int, Kept]], None], notifier: Notifier
    ) -> None:
        self._watch = watch
        self._notifier = notifier
        self._kept: dict[int, Kept] = {}
        self._signals = SignalPipe()
        self._stopping = False
        self._lost_at: float | None = None

    def run(self) -> None:
        """Have a watcher until it ends by itself, or SIGTERM or SIGINT ends it and us."""
        # What a dead watcher leaves behind, its helpers, is ours to wait for.
        linux.become_subreaper()
        back_off = 0.0
        while not self._stopping:
            ready = False
            try:
                successor = self._lost_at is not None
                watch = partial(self._watch, successor)
                life = WatcherLife(watch, self._kept, self._signals.close)
            except OSError as error:
                _log.error("no watcher can be started: %s", error.strerror)
            else:
                status = self._attend(life)
                life.close()
                ready = life.ready
                if status == 0:
                    return
                if status is not None and not self._stopping:
                    how = f"with status {status}" if status > 0 else f"of signal {-status}"
                    _log.warning("the watcher (process %d) died %s and is replaced", life.pid, how)
            if self._lost_at is None:
                self._lost_at = monotonic()
            # Only a watcher that dies before it can do its work would do so again at once.
            back_off = 0.0 if ready else min(max(2 * back_off, _FIRST_BACK_OFF), _LONGEST_BACK_OFF)
            self._hear_signals(back_off)

    def _attend(self, life: WatcherLife) -> int | None:
        """Keep what a watcher hands over, until it ends or must be replaced.

        Returns:
            Its exit status, None if it had to be killed.
        """
        poll = select.poll()
        poll.register(life.pidfd, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        while True:
            poll.register(life.link, select.POLLOUT if life.answers else select.POLLIN)
            until = life.look_at
            poll.poll(max(0.0, until - monotonic()) * 1000 + 1)
            if monotonic() - until > _OVERSLEPT:
                life.has_spoken()
            life.speak()
            if life.listen() and life.ready:
                self._is_ready(life)
            status = self._reap(life)
            if status is not None:
                return status
            if self._hear_signals():
                life.tell_to_stop()
            if monotonic() >= life.look_at or life.talks_nonsense:
                reason = life.why_replace()
                if reason is not None:
                    _log.warning("%s and is replaced", reason)
                    life.kill()
                    # In state D it may not go; then it won't run beside its successor either.
                    wait_readable(life.pidfd, _DEAD_WITHIN)
                    self._reap(life)
                    return None

    def _hear_signals(self, within: float = 0.0) -> bool:
        """Wait for a signal that asks us to stop; tell whether the first one has come."""
        if not self._signals.wait(within) or self._stopping:
            return False
        self._stopping = True
        self._notifier.tell("STOPPING=1")
        return True

    def _is_ready(self, life: WatcherLife) -> None:
        self._notifier.watching(life.workers)
        if self._lost_at is not None:
            gap = (monotonic() - self._lost_at) * 1000
            self._lost_at = None
            _log.warning(
                "its successor (process %d) watches all %d workers, %.0f ms later",
                *(life.pid, life.workers, gap),
            )

    def _reap(self, life: WatcherLife) -> int | None:
        """Wait for every child that has ended; return the watcher's status if it has."""
        found = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return found
            if pid == 0:
                return found
            if pid == life.pid:
                found = os.waitstatus_to_exitcode(status)
