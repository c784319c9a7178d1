"""What the clients of the drop-in pairs have in common.

A block's transport is shared memory, the page, if the client's server has a companion watcher.
Otherwise it is the pair's own, the queue or the FIFO. A block keeps the transport with which it
began: if it changed over, it would leave a timer behind that kills a healthy worker.
"""

from __future__ import annotations

import abc
import os
import time
import weakref
from math import isfinite

from hangwatch.policy import NOTHING_CHOSEN, OnExpiry, Policy, decide
from hangwatch.timer._acquired import Acquired
from hangwatch.timer._built_in_client import BuiltInClient
from hangwatch.timer._overrides import is_overridden, remember
from hangwatch.timer._replacing import Replaced, replace_outer
from hangwatch.timer._requested import Requested, RequestedBlock
from hangwatch.worker.arguments import NOTHING_ASKED, Asked, name_of
from hangwatch.worker.client import WorkerClient
from hangwatch.worker.expiration import forget_keys, timer
from hangwatch.worker.warnings import warn

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.blocks import Other
    from hangwatch.worker.core import Expiration

_OF_THIS_PROCESS = ("_requested", "_acquired", "_worker", "_warned", "_replaced")


@remember("acquire", "release")
class DropInClient(BuiltInClient):
    """A client of a drop-in pair."""

    def __init__(self) -> None:
        self._requested = Requested(self._send)
        self._acquired = Acquired()
        self._worker: WorkerClient | None = None
        self._warned = False
        self._replaced: Replaced = {}
        _clients.add(self)

    def _forget_parent(self) -> None:
        """In a forked child: forget the parent's timers and requests, they are not ours."""
        self._requested.forget()
        self._replaced = {}

    def __getstate__(self) -> dict[str, object]:
        return {name: at for name, at in vars(self).items() if name not in _OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        DropInClient.__init__(self)

    @abc.abstractmethod
    def _link(self) -> str | None:
        """Return the address file that the server's companion watcher would have, if any."""

    @abc.abstractmethod
    def _send(self, scope_id: str, expiration_time: float) -> bool:
        """Send a request through the queue or the FIFO, as `Requested` wants it."""

    def _may_connect(self) -> bool:
        """Tell whether shared memory may be used: nobody overrode what it would bypass."""
        return True

    def _state(self) -> str:
        connected = self._worker is not None and self._worker.is_connected
        return "connected to a watcher" if connected else "not connected to a watcher"

    def _policy(self) -> Policy:
        """Return what an overrun leads to, as far as a block doesn't choose it."""
        return NOTHING_CHOSEN

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Acquire a timer; one of the same name that the caller holds already is replaced.

        Args:
            scope_id: its name.
            expiration_time: when it expires, in seconds since the epoch; negative releases.
        """
        if not isfinite(expiration_time):
            raise ValueError(f"expiration_time must be a finite number, not {expiration_time!r}")
        if expiration_time < 0:
            self.release(scope_id)
            return
        worker = self._connected()
        if worker is None:
            self._requested.replace(scope_id, expiration_time)
            return
        block = timer(max(expiration_time - time.time(), 1e-9), scope_id)
        self._acquired.release(scope_id)
        self._acquired.add(
            scope_id,
            block,
            lambda: worker.begin(block, self._as_in_page(NOTHING_ASKED), quiet=False, alone=True),
        )
        if self._requested.holds(scope_id):  # from before there was a watcher
            self._requested.drop(scope_id)

    def release(self, scope_id: str) -> None:
        """Release the timer of that name; if the caller holds none, another thread's."""
        if self._acquired.release(scope_id, anyones=True):
            return
        if scope_id in self._requested or self._connected() is None:
            self._requested.drop(scope_id)

    def _hangwatch_transport(self) -> DropInClient | None:
        return None if is_overridden(self, "acquire", "release") else self

    def begin(self, block: Expiration, asked: Asked) -> Other | None:
        """Arm a block's timer; see `worker.blocks.Transport`."""
        worker, name = self._connected(), name_of(block)
        # In a block that began with the queue or the FIFO, it replaces that block's timer.
        if worker is None or self._requested.holds(name):
            self._say_what_is_lost(asked)
            return RequestedBlock(self._requested, name, asked, block.after)
        other = worker.begin(block, self._as_in_page(asked), nests=False)
        return other or replace_outer(self._replaced, worker.page, block)

    def _as_in_page(self, asked: Asked) -> Asked:
        """Return what a block asks for, and its client."""
        return asked._replace(policy=decide(asked.policy, self._policy()))

    def _say_what_is_lost(self, asked: Asked) -> None:
        """Warn once that the queue, or the FIFO, carries no policy of a block."""
        if asked.policy not in (NOTHING_CHOSEN, Policy(OnExpiry.REAP)) and not self._warned:
            self._warned = True
            warn(
                "the timer server has no companion watcher, and knows neither on_expiry nor grace "
                "nor signal: blocks that are only to be reported run unwatched, the others are "
                "reaped its way"
            )

    def _lost(self) -> None:
        """Look for the watcher of a server that was started anew."""
        forget_keys()
        link = self._link()
        if self._worker is not None and link is not None:
            self._worker.move(link)

    def _connected(self) -> WorkerClient | None:
        """Return the connection to the companion watcher, if there is one."""
        if not self._may_connect():
            return None
        worker = self._worker
        if worker is not None and worker.is_connected:
            return worker
        link = self._link()
        if link is None or not os.path.lexists(link):
            return None
        if worker is None or worker.address != link:
            self._worker = worker = WorkerClient(link, on_lost=self._lost)
        worker.try_to_connect()
        return worker if worker.is_connected else None


_clients: weakref.WeakSet[DropInClient] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._forget_parent()


os.register_at_fork(after_in_child=_after_fork)
