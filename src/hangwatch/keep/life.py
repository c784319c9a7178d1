"""One watcher process, as its keeper sees it: from the fork to the end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic

from hangwatch import handover
from hangwatch.handover import Kept, Kind, Message
from hangwatch.keep.signals import STOPPING_SIGNALS
from hangwatch.process import read_stat
from hangwatch.watcher.reception import lack_of_descriptors

Watch = Callable[[socket.socket, dict[int, Kept]], None]
"""What a watcher process does, given its link to the keeper and who is connected."""

_log = logging.getLogger("hangwatch.keep")

# A watcher says five times a second that it runs. A stopped one is replaced at once; one
# that is not may be starved of CPU, and a replacement would be starved as well.
_STOPPED_FOR = 1.0
_SILENT_FOR = 5.0
_LOOK_AGAIN = 0.25


class WatcherLife:
    """A watcher process, forked now.

    Args:
        watch: what it does; the process ends when this returns.
        kept: everything that is kept; what the watcher hands over is put there.
        leave_parent: called in the forked process first.

    Attributes:
        pid: its process id, ours until it is waited for.
        pidfd: readable once it has ended.
        link: our end of the line to it.
        answers: what it could not be told yet.
        ready: whether it has visited every page.
        workers: how many are connected, as it said last.
        talks_nonsense: whether it has sent what is no message.
        look_at: when to see whether it still runs (CLOCK_MONOTONIC).

    Raises:
        OSError: no process or no descriptor is left.
    """

    def __init__(
        self, watch: Watch, kept: dict[int, Kept], leave_parent: Callable[[], None]
    ) -> None:
        self._kept = kept
        self.talks_nonsense = False
        self.answers: deque[bytes] = deque()
        self.ready = False
        self.workers = 0
        with contextlib.ExitStack() as undo:
            self.link, its_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self.link.close)
            with its_link:
                # A signal that comes before the watcher can hear it waits until it can.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
                try:
                    # What is there now is shared by all forks: no collection touches it.
                    gc.freeze()
                    self.pid = os.fork()
                    if self.pid == 0:
                        self.link.close()
                        _be_watcher(leave_parent, watch, its_link, kept)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # One that we could not attend to would take us for dead, and stay.
            undo.callback(self.kill)
            self.pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self.has_spoken()

    def has_spoken(self) -> None:
        """Note that it runs, or that it can't be blamed for its silence."""
        self._silent_since = monotonic()
        self.look_at = self._silent_since + _STOPPED_FOR

    def listen(self) -> bool:
        """Take what it has sent, and tell whether that was anything; never blocks."""
        heard = False
        while not self.answers:
            try:
                message = handover.receive(self.link)
            except BlockingIOError:
                break
            except ValueError:
                self.talks_nonsense = True
                break
            if message is None:
                break
            heard = True
            self.has_spoken()
            self._take(message)
            self.speak()
        return heard

    def speak(self) -> None:
        """Send what it was not told yet, as far as there is room."""
        while self.answers:
            try:
                handover.send(self.link, self.answers[0], [])
            except BlockingIOError:
                return
            except OSError:  # it has ended
                self.answers.clear()
            else:
                self.answers.popleft()

    def tell_to_stop(self) -> None:
        """Ask it to end once every report is complete."""
        self.answers.append(handover.encode(Kind.STOP, 0))
        self.speak()

    def why_replace(self) -> str | None:
        """Look whether it still runs; say why it must be replaced, or None."""
        if self.talks_nonsense:
            return f"the watcher (process {self.pid}) talks nonsense"
        now = monotonic()
        silent = now - self._silent_since
        stat = read_stat(self.pid)
        if stat is None or stat.state in "Tt":
            return f"the watcher (process {self.pid}) is stopped"
        if silent >= _SILENT_FOR:
            return f"the watcher (process {self.pid}) has done nothing for {silent:.1f} s"
        self.look_at = now + _LOOK_AGAIN
        return None

    def kill(self) -> None:
        """End it; a fork that never runs again can't act beside its successor."""
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it, after a last look at what it sent."""
        self.answers.clear()
        self.listen()
        self.link.close()
        os.close(self.pidfd)

    def _take(self, message: Message) -> None:
        kind, number = message.kind, message.number
        if kind is Kind.PING or kind is Kind.READY:
            self.workers = number
            self.ready |= kind is Kind.READY
        elif kind is Kind.KEEP:
            problem = _problem_with(message)
            if problem is None:
                self._kept[number] = Kept(message.descriptors, message.content)
                self.answers.append(handover.encode(Kind.KEPT, number))
            else:
                _log.warning("a worker can't be kept: %s", problem)
                handover.close_all(message.descriptors)
                self.answers.append(handover.encode(Kind.REFUSED, number, problem.encode()))
        elif kind is Kind.NOTE and number in self._kept:
            # A part of a state is none: the one before is better than that.
            if not message.truncated:
                self._kept[number].state = message.content
        elif kind is Kind.DROP and number in self._kept:
            handover.close_all(self._kept.pop(number).descriptors)


def _problem_with(message: Message) -> str | None:
    if message.truncated:
        return "its descriptors did not all arrive: the keeper is at its limit of open files"
    if len(message.descriptors) < 2:
        return "the watcher did not send its socket and its page"
    return lack_of_descriptors(max(message.descriptors))


def _be_watcher(
    leave_parent: Callable[[], None], watch: Watch, link: socket.socket, kept: dict[int, Kept]
) -> None:
    status = 1
    try:
        leave_parent()
        watch(link, kept)
        status = 0
    except BaseException:
        _log.exception("the watcher failed")
    finally:
        os._exit(status)
