"""A worker's Python stacks, asked for by signal and read from its memfd.

A request can crash the process that it is sent to (CPython issues 116008 and 131580), runs a
handler that the program may have installed for the signal, and ends C's sleep() early. So
only a worker that is about to be killed is asked. A signal that nobody catches kills. So nothing
is asked without looking first: the block is still overdue, the signal is caught and not blocked,
the descriptor is still the memfd that the worker registered. The first request is a signal that a
program ignores which has replaced the worker by exec a moment ago.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep

from hangwatch import linux
from hangwatch.evidence import faulthandler_text, proc
from hangwatch.evidence.model import Frame, ThreadStack
from hangwatch.failpoints import failpoint
from hangwatch.process import Identity
from hangwatch.wire import StackChannel

ANSWER_WITHIN = 0.5
_MOST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose stacks to ask for.

    Attributes:
        identity: the worker.
        channel: what the worker registered; None if it registered nothing.
        unasked: why nothing is to be asked at all; None: ask.
        inode: the memfd's device and inode, as it came with the handshake.
        ident: `threading.get_ident()` of the thread inside the block; `native_id` its
            kernel id.
        names: names of threads by ident, as far as they are known.
        is_overdue: a fresh look whether the block has not ended.
        debugger: the debugger to assume where no stacks show whether it is at work; None: none.
        answer_within: seconds that the worker has for each request.
    """

    identity: Identity
    channel: StackChannel | None
    inode: tuple[int, int]
    ident: int
    native_id: int
    names: dict[int, str]
    is_overdue: Callable[[], bool]
    unasked: str | None = None
    debugger: str | None = None
    answer_within: float = ANSWER_WITHIN


def collect(asked: Asked) -> tuple[list[ThreadStack], list[str]]:
    """Collect the stacks: first of the block's own thread, then of all.

    Returns:
        The threads, the block's own first, and what is missing and why.
    """
    channel = asked.channel
    if asked.unasked is not None:
        return [], [f"Python stacks: {asked.unasked}"]
    if channel is None:
        return [], ["Python stacks: the worker has no stack channel"]
    own, problem = _dump(asked, channel.own, [asked.native_id])
    missing = [] if problem is None else [f"the block's own stack: {problem}"]
    tids = [asked.native_id, *proc.task_ids(asked.identity.pid)]
    everyone, problem = _dump(asked, channel.all, tids)
    if problem is not None:
        missing.append(f"the other threads: {problem}")
    if (own and own[0].cut) or any(thread.cut for thread in everyone):
        missing.append("frames: faulthandler stops at 100 in a thread")
    return _merge(asked, own, everyone), missing


def _merge(
    asked: Asked, own: list[faulthandler_text.Dumped], everyone: list[faulthandler_text.Dumped]
) -> list[ThreadStack]:
    stacks: dict[int, tuple[list[Frame], bool, str | None]] = {}
    if own:
        stacks[asked.ident] = own[0].frames, own[0].cut, None
    for thread in everyone:
        if thread.ident is not None:
            stacks.setdefault(thread.ident, (thread.frames, thread.cut, thread.name))
    return sorted(
        (
            ThreadStack(
                ident, asked.names.get(ident) or name, ident == asked.ident, list(frames), cut
            )
            for ident, (frames, cut, name) in stacks.items()
        ),
        key=lambda thread: not thread.holds_scope,
    )


def _dump(
    asked: Asked, signal: int, tids: list[int]
) -> tuple[list[faulthandler_text.Dumped], str | None]:
    pid = asked.identity.pid
    assert asked.channel is not None
    path = f"/proc/{pid}/fd/{asked.channel.fd}"
    tid, problem = who_takes(pid, signal, tids)
    if tid is None:
        return [], problem
    try:
        memfd = _open(path, asked.inode)
    except OSError as error:
        return [], f"the worker's stack descriptor can't be opened ({error.strerror})"
    if memfd is None:
        return [], "the worker's stack descriptor was closed and is another file now"
    try:
        if not asked.identity.is_theirs():
            return [], "the process is another user's by now"
        if asked.identity.is_dead():
            return [], "the process died"
        os.ftruncate(memfd, 0)
        if not asked.is_overdue():
            return [], "the block ended meanwhile"
        if signal == asked.channel.own:
            failpoint("evidence.asking")
        try:
            linux.signal_thread(pid, tid, signal)
        except OSError as error:
            return [], f"the stack request can't be sent ({error.strerror})"
        problem = _wait_for(asked, memfd, tid, signal)
        text = os.pread(memfd, _MOST_BYTES, 0).decode("utf-8", "replace")
        os.ftruncate(memfd, 0)
    finally:
        os.close(memfd)
    threads, threads_cut = faulthandler_text.parse(text)
    if problem is None and not threads:
        problem = "the signal was taken, and nothing was written: another handler has it"
    if problem is None and threads_cut:
        problem = f"faulthandler stops at 100; {len(proc.task_ids(pid))} kernel threads run"
    return threads, problem


def _open(path: str, inode: tuple[int, int]) -> int | None:
    """Open a file, if it is that inode: to open another one may already do something.

    Raises:
        OSError: it can't be opened.

    Source: open(2), O_PATH.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(found)
        if (status.st_dev, status.st_ino) != inode:
            return None
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(found)


def who_takes(pid: int, signal: int, tids: list[int]) -> tuple[int | None, str | None]:
    """Find the first of some threads in which a signal would be handled now.

    Returns:
        Its kernel id, or None; and why those before it would not take it.
    """
    problem = "the thread has ended"
    for tid in tids:
        masks = proc.signal_masks(pid, tid)
        if masks is None:
            continue
        state = proc.state(pid, tid)
        if state == "D":
            problem = "it is in an uninterruptible sleep (state D), where no signal arrives"
        elif state in ("T", "t"):
            problem = f"it is stopped (state {state}), where no signal arrives"
        elif not proc.has(masks.caught, signal):
            return None, "the program no longer catches the request's signal"
        elif proc.has(masks.blocked, signal):
            problem = "the thread masks the request's signal"
        else:
            return tid, None
    return None, problem


def _wait_for(asked: Asked, memfd: int, tid: int, signal: int) -> str | None:
    # The handler runs with its own signal blocked: a signal that is neither pending nor
    # blocked has been dealt with (sigaction(2), without SA_NODEFER). But it is neither, too,
    # for the moment between leaving the queue and entering the handler. So it must look
    # done, and nothing be added, for a while: long where the thread runs, or wrote nothing.
    until = monotonic() + asked.answer_within
    done_since, size = monotonic(), 0
    while monotonic() < until:
        masks = proc.signal_masks(asked.identity.pid, tid)
        state = proc.state(asked.identity.pid, tid)
        if masks is None or asked.identity.is_dead():
            return "the process died during the dump"
        before, size = size, os.fstat(memfd).st_size
        busy = masks.pending | masks.shared_pending | masks.blocked
        if proc.has(busy, signal) or size != before:
            done_since = monotonic()
        enough = 0.1 if size == 0 else 0.03 if state == "R" else 0.004
        if monotonic() - done_since >= enough:
            return None
        sleep(0.001)
    return f"no complete answer within {asked.answer_within:g} s"
