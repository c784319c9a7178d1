"""`hangwatch run`: a command with a watcher beside it, and nothing else different.

The command keeps our process group, our terminal and our standard streams. Signals that
a terminal sends reach it without us; those that were sent to us alone are passed on.
When it stops, so do we, so that a shell's job control sees one job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time

from hangwatch import linux
from hangwatch.errors import HangwatchError
from hangwatch.keep.launch import WatcherProcess
from hangwatch.watch.descendants import descendants_of

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AWAITED = {*_FORWARDED, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP}
_ORPHANS_MAY_TAKE = 2.0
_SI_KERNEL = 0x80


def run_watched(
    command: list[str], report_dir: str, on_expiry: str, grace: float, tree: bool
) -> int:
    """Run `command` watched; see the command line's help for the exit status."""
    inherited = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        linux.become_subreaper()
        watcher = WatcherProcess(report_dir, on_expiry, grace, tree)
    except (HangwatchError, OSError) as error:
        print(f"hangwatch: {error}; the command was not started", file=sys.stderr)
        return 125
    try:
        early = signal.sigtimedwait(_FORWARDED, 0)
        if early is not None:
            return 128 + early.si_signo
        environment = {**os.environ, "HANGWATCH_ADDRESS": watcher.address}
        try:
            pid = os.posix_spawnp(
                command[0],
                command,
                environment,
                setsigmask=inherited,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as error:
            print(f"hangwatch: {command[0]}: {error.strerror}", file=sys.stderr)
            return 127 if error.errno in (errno.ENOENT, errno.ENOTDIR) else 126
        status = _wait(pid, watcher)
        _end_orphans(watcher.pid)
    finally:
        watcher.stop()
    return status if status >= 0 else 128 - status


def _wait(command: int, watcher: WatcherProcess) -> int:
    """Wait for the command, passing on signals, reaping whatever falls to us."""
    warned = False
    while True:
        news = signal.sigwaitinfo(_AWAITED)
        if news.si_signo in _FORWARDED and news.si_code != _SI_KERNEL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(command, news.si_signo)
        elif news.si_signo == signal.SIGTSTP and news.si_code != _SI_KERNEL:
            os.kill(command, signal.SIGTSTP)
        elif news.si_signo == signal.SIGCONT:
            os.kill(command, signal.SIGCONT)
        status = _reap(command, watcher.pid)
        if status is not None:
            return status
        if not warned and watcher.ended() is not None:
            warned = True
            print("hangwatch: the watcher died; the command runs on unwatched", file=sys.stderr)


def _reap(command: int, watcher: int) -> int | None:
    while True:
        # A look first: the watcher's own end is for its Popen to see.
        try:
            news = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if news is None:
            return None
        if news.si_pid == watcher:
            # It can't be taken out of the queue before others without being waited for.
            return _reap_one(command)
        _, status = os.waitpid(news.si_pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            if news.si_pid == command:
                os.kill(os.getpid(), signal.SIGSTOP)
        elif news.si_pid == command:
            return os.waitstatus_to_exitcode(status)


def _reap_one(command: int) -> int | None:
    pid, status = os.waitpid(command, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _end_orphans(watcher: int) -> None:
    """End what the command left behind; as a subreaper we are its parent now."""
    for number, within in ((signal.SIGTERM, _ORPHANS_MAY_TAKE), (signal.SIGKILL, 1.0)):
        until = time.monotonic() + within
        sent: set[tuple[int, int]] = set()
        while True:
            left = descendants_of(os.getpid(), {watcher})
            for held in left:
                if (held.pid, held.start_ticks) not in sent:
                    sent.add((held.pid, held.start_ticks))
                    held.send(number)
                    held.send(signal.SIGCONT)
                os.close(held.pidfd)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(held.pid, os.WNOHANG)
            if not left:
                return
            if time.monotonic() > until:
                break
            time.sleep(0.01)
