"""The fenced blocks of the documents, and what the markers before them say.

A marker is an HTML comment in the line before a block, ``<!-- test: key=value ... -->``:

    status=N,M       the block's exit status, one of these; negative: the signal that ends it
    outcomes=A,B     the outcomes of its reports, in their order; without it there may be none
    types=WORD       what is typed once there is a report
    race=WHY         it may also end in another way: killed, or before there is a verdict
    gap=S            the watcher's option, in seconds
    unrun=REASON     it is not run, and why (quoted)
"""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").iterdir())
    if path.suffix in (".md", ".py")
)
KEYS = {"status", "outcomes", "types", "race", "gap", "unrun"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- test: (.*) -->\n\Z")
_FILE = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Fence:
    """One block of a page.

    Attributes:
        page: the page, below the project's root.
        line: the line of its fence.
        kind: what stands behind the fence; nothing: a picture, or commands for the reader.
        text: what is in it.
        marker: what the comment before it says.
        output: the text block that follows at once, the block's output; None: there is none.
    """

    page: str
    line: int
    kind: str
    text: str
    marker: dict[str, str] = field(default_factory=dict)
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name that a script has in the page's commands, from its first line."""
        named = _FILE.match(self.text)
        return None if named is None else named[1]

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands of a console block, each with the lines that it prints."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found

    @property
    def watches_itself(self) -> bool:
        """Whether a script says itself who watches it."""
        return any(call in self.text for call in ("serve(", "configure(", "Server("))


def fences_of(page: str) -> list[Fence]:
    """Return the blocks of a page, or of a script's docstring."""
    text = (ROOT / page).read_text()
    found: list[Fence] = []
    end = 0
    for match in _FENCE.finditer(text):
        kind, content = match.groups()
        between = text[end : match.start()]
        if kind == "text":
            assert found, f"{page}: output of nothing"
            assert not between.strip(), f"{page}: output must follow its block at once"
            found[-1] = Fence(**{**vars(found[-1]), "output": content})
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(page, line, kind, content, _marker(between, f"{page}:{line}")))
        end = match.end()
    return found


def _marker(before: str, where: str) -> dict[str, str]:
    match = _MARKER.search(before)
    if match is None:
        return {}
    marker = dict(word.split("=", 1) for word in shlex.split(match[1]))
    assert marker.keys() <= KEYS, f"{where}: {marker}"
    return marker


def undefined_names(script: str) -> list[str]:
    """Return the names that a script uses and does not define."""
    used: set[str] = set()
    defined = {*dir(builtins), "__file__", "__name__"}
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler
        ):
            defined.add(node.name or "")
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
    return sorted(used - defined)


_NUMBER = re.compile(r"0x[0-9a-f]+|\d{8}T\d{6}\.\d{3}Z|\d+(\.\d+)?(e-?\d+)?")


def without_numbers(text: str, folder: Path) -> str:
    """Replace what differs from run to run: numbers, times, and the folder."""
    return _NUMBER.sub("#", text.replace(f"{folder}/", ""))


def is_as_shown(lines: list[str], shown: list[str]) -> bool:
    """Compare lines with those of a page, where ``...`` stands for any lines, also none."""
    if not shown:
        return not lines
    if shown[0] == "...":
        return any(is_as_shown(lines[n:], shown[1:]) for n in range(len(lines) + 1))
    return bool(lines) and lines[0] == shown[0] and is_as_shown(lines[1:], shown[1:])
