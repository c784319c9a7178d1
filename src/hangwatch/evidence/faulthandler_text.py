"""The text that faulthandler writes, parsed. Source: CPython, Python/traceback.c."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hangwatch.evidence.model import Frame

# faulthandler writes no more; what does is the worker's own writing.
_MOST_FRAMES = _MOST_THREADS = 100
_THREAD = re.compile(
    r"(?:Current thread|Thread) 0x([0-9a-f]{1,16})(?: \[(.*)\])? \(most recent call first\):"
)
_STACK = "Stack (most recent call first):"
_FRAME = re.compile(r'  File (?:"(.*)"|(\?\?\?)), line (\d{1,9}|\?\?\?) in (.*)')
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")


@dataclass(slots=True)
class Dumped:
    """One thread in a dump; `ident` is None in a dump of the own thread only."""

    ident: int | None
    name: str | None
    frames: list[Frame]
    cut: bool = False


def parse(text: str) -> tuple[list[Dumped], bool]:
    """Parse a dump; lines that faulthandler doesn't write are passed over.

    Returns:
        The threads, and whether faulthandler left threads out (it stops at 100).
    """
    threads: list[Dumped] = []
    threads_cut = False
    for line in text.splitlines():
        header = _THREAD.fullmatch(line)
        if len(threads) == _MOST_THREADS and (header or line == _STACK):
            threads_cut = True
            break
        if header:
            threads.append(Dumped(int(header[1], 16), header[2], []))
        elif line == _STACK:
            threads.append(Dumped(None, None, []))
        elif line == "...":
            threads_cut = True
        elif threads and line == "  ...":
            threads[-1].cut = True
        elif threads and (frame := _FRAME.fullmatch(line)):
            number = int(frame[3]) if frame[3].isdigit() else 0
            file, function = frame[1] or "???", frame[4]
            frames = threads[-1].frames
            if len(frames) < _MOST_FRAMES:
                frames.append(Frame(_unescape(file), number, _unescape(function)))
            # Python 3.13 leaves out the mark.
            threads[-1].cut = len(frames) >= _MOST_FRAMES
    return threads, threads_cut


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code = int(match[1] or match[2] or match[3], 16)
        return chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else match[0]

    return _ESCAPE.sub(character, text)
