"""What processes hold open, and what they have left behind."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def held_by(*pids: int) -> list[tuple[int, int, int]]:
    """Return the descriptors, the memfds among them, and the threads of each that lives."""
    counts = []
    for pid in pids:
        with contextlib.suppress(OSError):
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            memfds = sum(link.startswith("/memfd:") for link in links)
            counts.append((len(links), memfds, len(os.listdir(f"/proc/{pid}/task"))))
    return counts


def left_below_us() -> dict[int, str]:
    """Return the processes that are our children, and their names; of a subreaper, orphans, too."""
    found = {}
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


def errors_in(text: str) -> list[str]:
    """Return what a log says of exceptions that nobody caught, and of crashes."""
    return re.findall(r"^(?:Traceback|Fatal Python error)(?:.*\n)+?(?=\S)(.*)", text, re.M)
