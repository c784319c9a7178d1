"""Blocks that were entered by a call of ``__enter__``, as an ExitStack does."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from hangwatch.errors import HangwatchError
from hangwatch.worker.acquired import Holder, holder

Exit = tuple[Holder, Callable[..., None]]


class ByHand:
    """In the place of a key, until all such blocks are left.

    A look at ``__exit__`` may mean to leave then, not to enter.

    Attributes:
        key: the key in whose place it stands.
        exits: what ends each of them, and who entered it.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.exits: list[Exit] = []

    def note(self, end: Callable[..., None]) -> Exit:
        """Note what ends a block that the caller is about to enter."""
        noted = holder(), end
        self.exits.append(noted)
        return noted

    def forget(self, noted: Exit) -> None:
        """Forget a block that could not be entered."""
        self.exits.remove(noted)

    def take(self) -> Callable[..., None]:
        """Return what ends the block that this thread, or task, has entered last.

        Raises:
            HangwatchError: it has entered none: the caller's fault.
        """
        here = holder()
        for noted in reversed(self.exits):
            if noted[0] == here:
                self.exits.remove(noted)
                return noted[1]
        raise not_entered()


def not_entered() -> HangwatchError:
    """Return the error of who leaves without having entered."""
    return HangwatchError(
        "this thread leaves a block that it has not entered: pair __exit__ with __enter__"
    )
