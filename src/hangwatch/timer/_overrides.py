"""Which methods of a class of ours somebody has overridden, or replaced on an object.

Whoever wrote a method of their own wants it called, so nothing may bypass it.
"""

from __future__ import annotations

from collections.abc import Callable

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import TypeVar

    Class = TypeVar("Class", bound=type)

_AS_BUILT = "_hangwatch_as_built"


def remember(*names: str) -> Callable[[Class], Class]:
    """Decorate a class: remember these methods of it as they are now."""

    def decorate(built: Class) -> Class:
        before = getattr(built, _AS_BUILT, {})
        setattr(built, _AS_BUILT, before | {name: getattr(built, name) for name in names})
        return built

    return decorate


def is_overridden(instance: object, *names: str) -> bool:
    """Tell whether any of these methods is not the one that we built."""
    built = getattr(type(instance), _AS_BUILT)
    return any(
        name in vars(instance) or getattr(type(instance), name) is not built[name] for name in names
    )
