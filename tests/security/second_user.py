"""A second user: real processes of another uid, who found their way into the tests' folders.

Whatever is imported is imported as root first, since the second user may not be able to
reach this checkout or its virtual environment.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest

from hangwatch.watcher.settings import checked_settings
from support.nursery import Nursery, Worker
from support.watchers import RunningWatcher

UID = 54321
THIRD_UID = 54322
ANOTHER = UID if os.geteuid() != UID else THIRD_UID
"""Somebody else, whoever runs the tests."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")

_MODULES = [
    "hangwatch.cli",
    "hangwatch.cli.run",
    "hangwatch.evidence.error_file",
    "hangwatch.keep.launch",
    "hangwatch.keep.serve",
    "hangwatch.process",
    "hangwatch.worker.client",
    "hangwatch.worker.connection",
    "hangwatch.worker.soft_ending",
    "hangwatch.worker.stack_channel",
    "support.raw_worker",
    "ctypes",
    "faulthandler",
    "inspect",
    "json",
    "linecache",
    "logging",
    "mmap",
    "signal",
    "socket",
    "struct",
    "subprocess",
    "traceback",
]

_BECOME = """
import ctypes, faulthandler, inspect, json, linecache, logging, mmap, os, signal, socket, struct
import subprocess, sys, threading, time, traceback
sys.path[:0] = {path!r}
import hangwatch, hangwatch.cli, hangwatch.cli.run, hangwatch.timer.shared_memory_timer
from hangwatch import linux, wire
from hangwatch.evidence import error_file
from hangwatch.keep import launch, serve
from hangwatch.process import Identity
from hangwatch.worker import connection, soft_ending, stack_channel
from support.raw_worker import answer, hello, memfd

def become(uid={uid}):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # Of a program that this user had started itself, it would be true: PR_SET_DUMPABLE, prctl(2).
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)

def refused(act, *arguments):
    try:
        act(*arguments)
    except PermissionError:
        return
    raise AssertionError(f"{{act.__name__}}{{arguments}} was possible")
"""


@functools.cache
def _nursery() -> Nursery:
    return Nursery("hangwatch", *_MODULES)


def script(code: str, uid: int = UID) -> str:
    """Return a program that has `become()` and `refused()`, and everything imported."""
    path = [entry for entry in sys.path if entry]
    return _BECOME.format(path=path, uid=uid) + code


def start(
    code: str, *arguments: object, watcher: RunningWatcher | None = None, **options: Any
) -> Worker:
    """Fork a process that runs a `script`; its output and its errors are pipes of text."""
    if watcher is not None:
        options.setdefault("env", watcher.environment())
    return _nursery().fork(script(code), *map(str, arguments), stderr=subprocess.PIPE, **options)


def run(
    code: str, *arguments: object, watcher: RunningWatcher | None = None, **options: Any
) -> str:
    """Run a `script` to its end, which must be a good one; return its output and its errors."""
    process = start(code, *arguments, watcher=watcher, **options)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out + err


def may_watch_others() -> bool:
    """Tell whether this root has what a watcher of other users needs."""
    try:
        checked_settings(allow_uids=[ANOTHER])
    except Exception:
        return False
    return True


needs_rights = pytest.mark.skipif(
    os.geteuid() == 0 and not may_watch_others(),
    reason="root may not look into other users' processes here",
)
