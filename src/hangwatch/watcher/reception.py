"""Newcomers: heard, handed to the keeper, and only then welcome."""

from __future__ import annotations

import errno
import logging
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic

from hangwatch.errors import ProtocolError
from hangwatch.failpoints import failpoint
from hangwatch.handover import close_all
from hangwatch.watcher import admission
from hangwatch.watcher.identity import credentials_of
from hangwatch.watcher.keeper_link import KeeperLink
from hangwatch.watcher.loop import Loop
from hangwatch.watcher.refusals import Refusals
from hangwatch.watcher.takeover import descriptors_of, state_of
from hangwatch.watcher.watched import Watched

HELLO_WITHIN = 2.0
RESERVED_DESCRIPTORS = 64
"""What those who are watched may need, pipes of helpers for example; no newcomer gets it."""

_log = logging.getLogger("hangwatch.watcher")


@dataclass(eq=False, slots=True)
class _Newcomer:
    """A connection that has not been answered yet; `worker` once it has said hello."""

    connection: socket.socket
    until: float
    worker: Watched | None = None


class Reception:
    """Accepts connections, hears their hellos, and waits until the keeper has its copy.

    Args:
        listener: a listening SOCK_SEQPACKET socket.
        loop: what waits for it.
        keeper: who keeps a copy of each worker's descriptors.
        allowed_uids: who may be watched.
        welcome: called with each newcomer that may be watched from now on.

    Attributes:
        next_number: the keeper's number of the next newcomer.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: Loop,
        keeper: KeeperLink,
        allowed_uids: frozenset[int],
        welcome: Callable[[Watched], None],
    ) -> None:
        self.next_number = 1
        self._listener = listener
        self._loop = loop
        self._keeper = keeper
        self._allowed_uids = allowed_uids
        self._welcome = welcome
        self._refusals = Refusals()
        self._newcomers: dict[int, _Newcomer] = {}
        self._offered: dict[int, _Newcomer] = {}
        keeper.on_answer = self._answered
        listener.setblocking(False)
        loop.add(listener.fileno(), self._accept)

    def tick(self, now: float) -> None:
        """Look, a few times a second, for who was waited for too long."""
        if self._listener.fileno() not in self._loop:
            self._loop.add(self._listener.fileno(), self._accept)
        for newcomer in list(self._newcomers.values()):
            if newcomer.until < now:
                self._dismiss(newcomer, ProtocolError("no hello came in time"))
        for number, newcomer in list(self._offered.items()):
            if not self._keeper.alive:
                self._answered(number, None)
            elif newcomer.until < now:
                self._keeper.drop(number)
                self._answered(number, "the watcher's keeper does not answer: is it stopped?")
        self._refusals.tick(now)

    def end(self) -> None:
        """Log what has not been logged yet."""
        self._refusals.tick(inf)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    _log.warning("can't take a newcomer for now: %s", error.strerror)
                    self._loop.remove(self._listener.fileno())
                return
            failpoint("handshake.accepted")
            connection.setblocking(False)
            newcomer = _Newcomer(connection, monotonic() + HELLO_WITHIN)
            self._newcomers[connection.fileno()] = newcomer
            self._loop.add(connection.fileno(), lambda newcomer=newcomer: self._hear(newcomer))  # type: ignore[misc]
            if lack_of_descriptors(connection.fileno(), RESERVED_DESCRIPTORS // 2):
                # Those who come and say nothing must not use up the reserve.
                self._loop.remove(self._listener.fileno())
                return

    def _hear(self, newcomer: _Newcomer) -> None:
        try:
            worker, page = admission.admit(newcomer.connection, self._allowed_uids)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            self._dismiss(newcomer, error)
            return
        failpoint("handshake.heard")
        self._forget(newcomer)
        newcomer.worker = worker
        worker.number = self.next_number
        self.next_number += 1
        self._offered[worker.number] = newcomer
        try:
            descriptors = descriptors_of(worker, page)
        except OSError as error:  # the limit is lower than it was
            self._answered(worker.number, f"the watcher is out of room: {error.strerror}")
            return
        # All that it needs is open by now: of a crowd, the last ones find no room. Said after
        # its hello was read, since what closes with a hello unread loses our answer.
        problem = lack_of_descriptors(max(newcomer.connection.fileno(), *descriptors))
        if problem is not None:
            close_all(descriptors)
            self._answered(worker.number, problem)
        else:
            self._keeper.keep(worker.number, state_of(worker), descriptors)
            failpoint("handshake.offered")
            if not self._keeper.alive:
                self._answered(worker.number, None)

    def _answered(self, number: int, reason: str | None) -> None:
        """Go on with a newcomer now that the keeper has it, or has said why it can't."""
        newcomer = self._offered.pop(number, None)
        if newcomer is None or newcomer.worker is None:  # it was waited for too long
            return
        if reason is None:
            failpoint("handshake.kept")
            self._welcome(newcomer.worker)
        else:
            self._refuse(newcomer, ProtocolError(reason))
            newcomer.worker.close()

    def _dismiss(self, newcomer: _Newcomer, reason: Exception) -> None:
        self._forget(newcomer)
        self._refuse(newcomer, reason)

    def _refuse(self, newcomer: _Newcomer, reason: Exception) -> None:
        pid, _ = credentials_of(newcomer.connection)
        self._refusals.note(pid, str(reason), monotonic())
        admission.refuse(newcomer.connection, reason)

    def _forget(self, newcomer: _Newcomer) -> None:
        descriptor = newcomer.connection.fileno()
        self._loop.remove(descriptor)
        del self._newcomers[descriptor]


def lack_of_descriptors(number: int, reserved: int = RESERVED_DESCRIPTORS) -> str | None:
    """Say why no newcomer can be taken, if its descriptor got a number too close to the limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or number < limit - reserved:
        return None
    return (
        f"the watcher is at its limit of {limit} open files: raise it where the watcher is "
        "started ('ulimit -Hn', or LimitNOFILE= in its unit)"
    )
