"""Functions whose every call is a block, and generators whose every step is one."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Generator

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from hangwatch.worker.core import Expiration

    Function = TypeVar("Function", bound=Callable[..., Any])

# Of a code object; the inspect module takes long to import.
_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200


def decorate(function: Function, block: Callable[[], Expiration]) -> Function:
    """Put a block around each call of a function; around each step, if it is a generator.

    Args:
        function: a function, coroutine function, generator or async generator.
        block: returns a new block.

    Raises:
        TypeError: it is none of these: the caller's fault.
    """
    if isinstance(function, type) or not callable(function):
        what = "a class" if isinstance(function, type) else type(function).__name__
        raise TypeError(
            f"expires decorates functions, coroutine functions and generators, not {what}: "
            "decorate the method itself, below @classmethod or @staticmethod"
        )
    wrapped: Any
    flags = _flags_of(function)
    if flags & _ASYNC_GENERATOR:
        wrapped = _async_generator(function, block)
    elif flags & _GENERATOR:
        wrapped = _generator(function, block)
    elif flags & _COROUTINE:

        @functools.wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with block():
                return await function(*args, **kwargs)

        wrapped = coroutine
    else:

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with block():
                return function(*args, **kwargs)

        wrapped = call
    return wrapped  # type: ignore[no-any-return]


def _flags_of(function: Any) -> int:
    """Return the flags of a function's code, as `inspect` looks for it."""
    while True:
        inner = getattr(function, "__func__", None)  # a method
        if isinstance(function, functools.partial):
            inner = function.func
        if getattr(function, "_is_coroutine_mark", None) is not None:
            return _COROUTINE  # inspect.markcoroutinefunction
        if inner is None:
            flags: int = getattr(getattr(function, "__code__", None), "co_flags", 0)
            return flags
        function = inner


def _generator(
    function: Callable[..., Generator[Any, Any, Any]], block: Callable[[], Expiration]
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(function)
    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[Any], Any] = inner.send
        given: Any = None
        while True:
            item = None  # what was given away is kept alive by nobody here
            try:
                with block():
                    item = step(given)
            except StopIteration as stop:
                return stop.value
            try:
                given = yield item
                step = inner.send
            except GeneratorExit:
                with block():
                    inner.close()
                raise
            except BaseException as error:
                given, step = error, inner.throw

    return generator


def _async_generator(
    function: Callable[..., AsyncGenerator[Any, Any]], block: Callable[[], Expiration]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(function)
    async def generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[Any], Any] = inner.asend
        given: Any = None
        while True:
            item = None  # what was given away is kept alive by nobody here
            try:
                with block():
                    item = await step(given)
            except StopAsyncIteration:
                return
            try:
                given = yield item
                step = inner.asend
            except GeneratorExit:
                with block():
                    await inner.aclose()
                raise
            except BaseException as error:
                given, step = error, inner.athrow

    return generator
