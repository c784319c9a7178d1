"""The watcher process: what `hangwatch serve` runs."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket

from hangwatch import linux
from hangwatch.keep import address
from hangwatch.keep.quiet_log import QuietHandler
from hangwatch.keep.systemd import Notifier, take_listener
from hangwatch.process import read_stat
from hangwatch.watch.settings import Settings
from hangwatch.watch.watcher import STOPPING_SIGNALS, Watcher, stop_on_signals


def serve(path: str | None, settings: Settings, lifeline: int | None = None) -> None:
    """Watch until SIGTERM, SIGINT, or the launcher's end.

    Args:
        path: where to listen; by default on the socket that systemd passed, else at
            `address.default_address`.
        settings: what to do about a block that overran.
        lifeline: a descriptor whose end of file says that the launcher has gone. The
            watcher then ends as soon as no worker is left. While the launcher is
            stopped, watching is paused.

    Raises:
        AddressError: it can't listen there.
    """
    logging.getLogger("hangwatch").addHandler(QuietHandler())
    logging.getLogger("hangwatch").setLevel(logging.INFO)
    # A signal that comes before the loop can hear it waits until it can.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    listener = None if path is not None else take_listener(os.environ)
    given = listener is not None
    if listener is None:
        path = os.path.abspath(path or address.default_address())
        listener = address.listen(path)
    try:
        _watch(listener, settings, lifeline)
    finally:
        if not given and path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _watch(listener: socket.socket, settings: Settings, lifeline: int | None) -> None:
    linux.name_process("hw-watcher")
    # Ignored, as a launcher may have left it, our helpers would vanish without a word.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A terminal's other programs may have set it to stop background writers.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    notifier = Notifier(os.environ)
    launcher = os.getppid() if lifeline is not None else None
    orphaned = False

    def paused() -> bool:
        if launcher is None or orphaned:
            return False
        stat = read_stat(launcher)
        return stat is not None and stat.state in "Tt"

    def tick() -> None:
        if notifier.wants_pings:
            notifier.tell("WATCHDOG=1", f"STATUS=watching {watcher.workers} workers")
        if orphaned and watcher.workers == 0:
            watcher.stop()

    def lifeline_ended() -> None:
        nonlocal orphaned
        orphaned = True
        assert lifeline is not None
        watcher.forget_descriptor(lifeline)
        tick()

    watcher = Watcher(listener, settings, paused, tick)
    if lifeline is not None:
        os.set_inheritable(lifeline, False)
        watcher.watch_descriptor(lifeline, lifeline_ended)
    stop_on_signals(watcher)
    # Whatever our launcher had blocked is nothing that we or our helpers want blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    notifier.tell("READY=1", "STATUS=watching 0 workers")
    watcher.run()
    notifier.tell("STOPPING=1")
