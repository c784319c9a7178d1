"""A worker's error file: where torchrun looks for the reason of its end.

Runs in a helper process that has no other rights than the worker's user: the path is
the worker's word, and the folders in it may be anybody's.

Layout: {"message": {"message": str, "extraInfo": {"py_callstack": str, "timestamp":
str}}}; the timestamp is in whole seconds since the epoch. Source: torchrun's
documentation of its error propagation.
"""

from __future__ import annotations

import json
import os
import stat

from hangwatch import linux
from hangwatch.evidence import proc
from hangwatch.evidence.model import Case, Evidence
from hangwatch.evidence.report import overrun, shown, stack_lines
from hangwatch.process import Identity

CREATED = "written"
FILLED = "written to the empty file that was there"
_MOST_OTHERS = 16
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def content_of(case: Case, evidence: Evidence) -> bytes:
    """Return what the file is to hold; the same for the same arguments."""
    headline = overrun(case)
    # torchrun shows the call stack instead of the message.
    lines = [f"hangwatch: {headline}"]
    # The block's own comes first.
    threads = evidence.threads
    if threads and threads[0].holds_scope:
        lines += ["", *stack_lines(threads[0])]
        threads = threads[1:]
    else:
        lines += [f"missing: {reason}" for reason in evidence.missing]
    if threads:
        lines += ["", "the other threads, each one's innermost frame:"]
    for thread in threads[:_MOST_OTHERS]:
        frames = [f'File "{f.file}", line {f.line} in {f.function}' for f in thread.frames[:1]]
        lines.append(f"  {thread.name or hex(thread.id)}: {(frames or ['no Python frame'])[0]}")
    if len(threads) > _MOST_OTHERS:
        lines.append(f"  ({len(threads) - _MOST_OTHERS} more)")
    extra = {"py_callstack": "\n".join(map(shown, lines)), "timestamp": str(int(case.at))}
    return json.dumps({"message": {"message": headline, "extraInfo": extra}}).encode()


def take_rights_of(identity: Identity) -> None:
    """Give up, for good, every right that the worker's user doesn't have.

    Raises:
        OSError: this process may not become that user, or the worker is another's by now,
            or it lives among other files than we.

    Source: setresuid(2); prctl(2): PR_SET_PDEATHSIG is cleared when credentials change.
    """
    parent = os.getppid()
    uid, gid, groups = proc.credentials(identity.pid)
    if not proc.sees_our_files(identity.pid):
        raise PermissionError(None, "in the worker's mount namespace the path is another file's")
    if identity.is_dead() or uid != identity.uid:
        raise PermissionError(None, "the worker has died or has become another user")
    if uid == os.geteuid():
        return
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    linux.die_with(parent)


def write(path: str, content: bytes) -> str:
    """Write the file, unless there is something in it already.

    Returns:
        `CREATED`, `FILLED`, or why it is not written.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        created = True
    except FileExistsError:
        # A fifo with no reader fails here, one with a reader is found out below.
        file = os.open(path, os.O_WRONLY | _FLAGS)
        created = False
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            return "not written: it is not a regular file"
        if status.st_size:
            return "left alone: there is something in it already"
        try:
            if os.write(file, content) == len(content):
                return CREATED if created else FILLED
            problem = "not written: there is no room for it"
        except OSError as error:
            problem = f"not written: {error.strerror}"
        # torchrun's agent does not survive half a file.
        _undo(path, file, created)
        return problem
    finally:
        os.close(file)


def take_back(path: str, content: bytes, created: bool) -> str:
    """Remove what `write` wrote, unless the worker has written there meanwhile.

    Returns:
        What came of it.
    """
    file = os.open(path, os.O_RDWR | _FLAGS)
    try:
        if (
            not stat.S_ISREG(os.fstat(file).st_mode)
            or os.pread(file, len(content) + 1, 0) != content
        ):
            return "left alone: it is the worker's own by now"
        _undo(path, file, created)
        return "removed: the worker was not killed"
    finally:
        os.close(file)


def _undo(path: str, file: int, created: bool) -> None:
    if created:
        os.unlink(path)
    else:
        os.ftruncate(file, 0)
