"""`hangwatch serve`: a keeper, which forks the watcher."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket

from hangwatch import linux
from hangwatch.errors import LaunchError
from hangwatch.failpoints import failpoint
from hangwatch.handover import Kept
from hangwatch.keep import address, quiet_log
from hangwatch.keep.keeper import Keeper
from hangwatch.keep.signals import STOPPING_SIGNALS, SignalPipe
from hangwatch.keep.systemd import Notifier, take_listener
from hangwatch.process import read_stat
from hangwatch.watcher.events import Events
from hangwatch.watcher.settings import Settings
from hangwatch.watcher.watcher import Watcher


def serve(
    path: str | None, settings: Settings, lifeline: int | None = None, events: int | None = None
) -> None:
    """Watch until SIGTERM, SIGINT, or the launcher's end.

    Args:
        path: where to listen; by default on the socket that systemd passed, else at
            `address.default_address`.
        settings: what the watcher is told.
        lifeline: a descriptor whose end of file says that the launcher has gone. Keeper
            and watcher then end as soon as no worker is left. While the launcher is
            stopped, watching is paused.
        events: a socket that the launcher hears `Event`s from.

    Raises:
        AddressError: it can't listen there.
        LaunchError: the kernel lacks what nothing can stand in for.
    """
    quiet_log.install()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    listener = None if path is not None else take_listener(os.environ)
    ours = None
    if listener is None:
        others = settings.other_users()
        ours = os.path.abspath(path or address.default_address(bool(others)))
        listener = address.listen(ours, others)
    launcher = None
    if lifeline is not None:
        launcher = os.getppid()

    def watch(successor: bool, link: socket.socket, kept: dict[int, Kept]) -> None:
        if not _watch(listener, link, kept, settings, lifeline, launcher, events, successor):
            # The keeper, who would do so, is gone.
            _remove(ours)

    try:
        _prepare()
        keeper = Keeper(watch, Notifier(os.environ))
        # Whatever our launcher had blocked is nothing that we or our helpers want blocked.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        keeper.run()
    finally:
        _remove(ours)


def _prepare() -> None:
    linux.name_process("hw-keeper")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise LaunchError(
            f"no process can be held by a pidfd here ({error.strerror}): hangwatch needs "
            "Linux 5.3 or newer, and a sandbox that allows pidfd_open"
        ) from None
    # Ignored, as a launcher may have left it, our children would vanish without a word.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A terminal's other programs may have set it to stop background writers.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _remove(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _watch(
    listener: socket.socket,
    link: socket.socket,
    kept: dict[int, Kept],
    settings: Settings,
    lifeline: int | None,
    launcher: int | None,
    events: int | None,
    successor: bool,
) -> bool:
    """Be the watcher process; tell, at its end, whether the keeper still lives."""
    linux.name_process("hw-watcher")
    failpoint("handover.forked")
    quiet_log.install()
    orphaned = False

    def paused() -> bool:
        if launcher is None or orphaned:
            return False
        stat = read_stat(launcher)
        return stat is not None and stat.state in "Tt"

    def lifeline_ended() -> None:
        nonlocal orphaned
        orphaned = True
        assert lifeline is not None
        watcher.loop.remove(lifeline)
        watcher.leave_when_alone()

    def signalled() -> None:
        # A terminal or a service manager signals the keeper as well, which tells us.
        if signals.take() and not watcher.keeper.alive:
            watcher.stop()

    # First, so that its epoll gets one of the low numbers that the keeper's signals had.
    watcher = Watcher(listener, link, settings, paused, Events(events), successor)
    signals = SignalPipe()
    watcher.loop.add(signals.fileno(), signalled)
    if lifeline is not None:
        watcher.loop.add(lifeline, lifeline_ended)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    watcher.take_over(kept)
    watcher.run()
    return watcher.keeper.alive
