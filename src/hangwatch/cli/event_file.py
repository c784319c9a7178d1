"""Events as lines of JSON in a file. docs/events.md shows one of each kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from hangwatch.watcher.events import Event


class EventFile:
    """A file to which events are appended, each line by one write.

    Args:
        path: the file, made if need be; a FIFO needs a reader.
        say: told, once, if an event can't be written.

    Raises:
        OSError: it can't be opened: whoever named it is at fault.
    """

    def __init__(self, path: str, say: Callable[[str], None]) -> None:
        # Without O_NONBLOCK a FIFO that nobody reads would hold us up.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        os.set_blocking(self._descriptor, True)
        self._path = path
        self._say = say
        self._failed = False

    def append(self, event: Event) -> None:
        """Append an event, unless it is one for programs of ours alone."""
        if event["event"] == "alive":
            return
        line = json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"events can't be written to {self._path} ({error.strerror})")
