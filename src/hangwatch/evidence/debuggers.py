"""Whether somebody is debugging a process: whoever is at a prompt has not hung."""

from __future__ import annotations

import os

from hangwatch.evidence import proc
from hangwatch.evidence.model import ThreadStack

_FILES = {"bdb.py": "bdb", "pdb.py": "pdb", "pydevd.py": "pydevd"}
_FOLDERS = {"pydevd": "pydevd", "_pydevd_bundle": "pydevd", "debugpy": "debugpy"}


def tracing(pid: int) -> str | None:
    """Say which process traces a process, as gdb does, or strace; None: nobody."""
    tracer = proc.tracer(pid)
    return None if tracer == 0 else f"process {tracer} traces it"


def in_stacks(threads: list[ThreadStack]) -> str | None:
    """Say which Python debugger is at work in one of these threads; None: none."""
    for thread in threads:
        for frame in thread.frames:
            folders = frame.file.split(os.sep)
            found = [_FILES.get(folders[-1]), *map(_FOLDERS.get, folders[:-1])]
            for debugger in filter(None, found):
                return f"{debugger} is at work in thread {thread.name or hex(thread.id)}"
    return None
