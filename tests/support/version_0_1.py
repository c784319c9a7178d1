"""A peer of hangwatch 0.1.0, as recorded from it: a worker's hello and page, a watcher's answer."""

from __future__ import annotations

import fcntl
import json
import os
import time

_PAGE_BYTES = 1_310_784
_HEADER = b"hangwat\x02\x00\x10\x00\x00\x00\x00\x00\x00".ljust(64, b"\0")
_SEALS = 7

REFUSAL = (
    b'{"hangwatch": 1, "welcome": false, "reason": "the worker speaks protocol 3, this side 1: '
    b'install the same version of hangwatch on both sides", "on_expiry": "", "forced": false}'
)
"""What its watcher answers to a hello of version 3."""


def page() -> int:
    """Create a page's memfd as its worker does."""
    descriptor = os.memfd_create("hangwatch-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, _PAGE_BYTES)
    os.pwrite(descriptor, _HEADER, 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def hello() -> bytes:
    """Return what its worker says."""
    return (
        b'{"hangwatch": 1, "page_fd": 3, "monotonic": %r, "fenced": true, "labels": {}, '
        b'"command": ["python", "train.py"], "python": "3.11.7", "stacks": null, '
        b'"error_file": null, "pid": 15906, "main_ident": 139956638751616}' % time.monotonic()
    )


def why_refused(message: bytes) -> str:
    """Read a watcher's answer as its worker does, which reads no other version than its own."""
    fields = json.loads(message)
    assert fields["hangwatch"] == 1
    assert fields.get("welcome") is not True
    return str(fields.get("reason", ""))
