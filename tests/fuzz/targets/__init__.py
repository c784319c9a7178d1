"""What is fuzzed. Each module has `check`, which an input must pass, and `TOKENS`.

`TOKENS` are pieces that inputs of this kind are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fuzz.bounds import Check
from fuzz.targets import dump, fifo, handshake, page

CORPUS = Path(__file__).parents[1] / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """One of what is fuzzed; `most` is how many bytes its inputs may have."""

    name: str
    check: Check
    tokens: list[bytes]
    most: int

    @property
    def corpus(self) -> Path:
        """The folder with the inputs that are kept."""
        return CORPUS / self.name

    def kept(self) -> list[Path]:
        """Return the inputs that are kept."""
        return sorted(path for path in self.corpus.iterdir() if path.is_file())

    def seeds(self) -> list[Path]:
        """Return those that others are made of: not what takes long by its size alone."""
        return [path for path in self.kept() if not path.name.startswith("large-")]


TARGETS = {
    target.name: target
    for target in (
        Target("handshake", handshake.check, handshake.TOKENS, 17_000),
        Target("page", page.check, page.TOKENS, 4096),
        Target("fifo", fifo.check, fifo.TOKENS, 10_000),
        Target("dump", dump.check, dump.TOKENS, 10_000),
    )
}
