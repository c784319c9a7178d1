"""Which handler of a function catches what an instruction of it raises."""

from __future__ import annotations

from collections.abc import Iterator

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from types import CodeType


def handler_at(code: CodeType, at: int) -> int | None:
    """Return where a function catches what an instruction raises; None: it does not.

    Args:
        code: the function's.
        at: the instruction, as `frame.f_lasti` has it.

    Source: CPython, InternalDocs/exception_handling.md, "Format of the exception table".
    """
    numbers = _numbers_in(code.co_exceptiontable)
    for start, length, handler, _ in zip(numbers, numbers, numbers, numbers, strict=True):
        if start <= at // 2 < start + length:
            return handler
    return None


def _numbers_in(table: bytes) -> Iterator[int]:
    number = 0
    for byte in table:
        number = number << 6 | byte & 63
        if not byte & 64:
            yield number
            number = 0
