"""`hangwatch run`: a command with a watcher beside it, and nothing else different.

The command keeps our process group, our terminal and our standard streams. Signals that
a terminal sends reach it without us; those that were sent to us alone are passed on.
When it stops, so do we, so that a shell's job control sees one job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time

from hangwatch import linux
from hangwatch.cli.event_file import EventFile
from hangwatch.errors import HangwatchError
from hangwatch.keep.event_listener import EventListener
from hangwatch.keep.launch import WatcherProcess
from hangwatch.watcher.descendants import descendants_of
from hangwatch.watcher.settings import Settings

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AWAITED = {*_FORWARDED, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP}
_ORPHANS_MAY_TAKE = 2.0
_EVENTS_MAY_TAKE = 2.0
_SI_KERNEL = 0x80


def run_watched(command: list[str], settings: Settings, events: str | None) -> int:
    """Run `command` watched.

    Args:
        command: the words of the command.
        settings: what the watcher is told.
        events: path of the file to which events are appended; None: nowhere.

    Returns:
        The exit status, see the command line's help.
    """
    _open_standard_streams()
    inherited = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    # Ignored, children would vanish without a word.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener = None
    try:
        if events is not None:
            listener = EventListener(EventFile(events, _say).append)
        linux.become_subreaper()
        theirs = None if listener is None else listener.theirs.fileno()
        watcher = WatcherProcess(settings, events=theirs)
    except (HangwatchError, OSError) as error:
        _say(f"{error}; the command was not started")
        return 125
    if listener is not None:
        listener.listen()
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
        except (OSError, ValueError) as error:
            code = error.errno if isinstance(error, OSError) else errno.ENOENT
            _say(f"{command[0]!r}: {os.strerror(code or errno.ENOENT)}")
            return 127 if code in (errno.ENOENT, errno.ENOTDIR) else 126
        status = _wait(pid, watcher)
        _end_orphans(watcher.pid)
    finally:
        watcher.stop()
        if listener is not None:
            listener.stop(_EVENTS_MAY_TAKE)
    return status if status >= 0 else 128 - status


def _say(what: str) -> None:
    """Tell the user, if there is somebody to read it, and never wait for them."""
    data = f"hangwatch: {what}\n".encode(errors="backslashreplace")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(event & select.POLLOUT for _, event in poll.poll(0)):
            os.write(2, data)


def _open_standard_streams() -> None:
    # A pipe of ours must not get the number of a stream that the user closed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _wait(command: int, watcher: WatcherProcess) -> int:
    """Wait for the command, passing on signals, reaping whatever falls to us."""
    leads_session = os.getsid(0) == os.getpid()
    warned = False
    while True:
        news = signal.sigwaitinfo(_AWAITED)
        # What the kernel sends, a terminal's keys, goes to the command without us; but of
        # a terminal that hung up it tells the session's leader alone.
        by_kernel = news.si_code == _SI_KERNEL
        hung_up = news.si_signo == signal.SIGHUP and leads_session
        if news.si_signo != signal.SIGCHLD and (not by_kernel or hung_up):
            # Not ours to signal any more, if it is another user's by now, or gone.
            with contextlib.suppress(OSError):
                os.kill(command, news.si_signo)
        status = _reap(command, watcher.pid)
        if status is not None:
            return status
        if not warned and watcher.ended() is not None:
            warned = True
            _say("the keeper died; the watcher goes on until its last worker has left")


def _reap(command: int, watcher: int) -> int | None:
    """Take what has happened to our children; return the command's status if it ended."""
    while True:
        # A look first: the watcher's own end is for its Popen to see.
        try:
            news = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if news is None:
            return None
        # The watcher can't be taken out of the queue before the others; they come next time.
        pid = command if news.si_pid == watcher else news.si_pid
        pid, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if pid == command and os.WIFSTOPPED(status):
            # By the terminal, as a job, and so are we. SIGSTOP was meant for it alone.
            if os.WSTOPSIG(status) in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
                os.kill(os.getpid(), signal.SIGSTOP)
        elif pid == command:
            return os.waitstatus_to_exitcode(status)
        elif pid == 0 and news.si_pid == watcher:
            return None


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
