"""What `expires` decorates and `watch` iterates over: each call, or each step, is a block."""

from __future__ import annotations

import functools
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)

from hangwatch.worker.chosen_core import core

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from hangwatch.worker.core import Expiration

    Function = TypeVar("Function", bound=Callable[..., Any])
    Item = TypeVar("Item")
else:
    Item = object

# Of a code object; the inspect module takes long to import.
_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200


def decorate(expires: Expiration, function: Function) -> Function:
    """Decorate a function: each call is a block.

    Args:
        expires: what is done anew for each call.
        function: a function, a coroutine function, a generator or an async generator; the
            timer of a generator runs only while it is at work on its next item.

    Raises:
        TypeError: it is none of these: the caller's fault.
    """
    block = _again(expires)
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


def _again(block: Expiration) -> Callable[[], Expiration]:
    """Return what makes another object for the same block, which nobody has entered yet."""
    return functools.partial(core.block, block.after, block.scope, block.lasti, block.asked)


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
        step = functools.partial(inner.send, None)
        while True:
            item = None  # what was given away is kept alive by nobody here
            try:
                with block():
                    item = step()
            except StopIteration as stop:
                return stop.value
            try:
                step = functools.partial(inner.send, (yield item))
            except BaseException as error:  # GeneratorExit, too: it is closed by a step
                step = functools.partial(inner.throw, error)

    return generator


def _async_generator(
    function: Callable[..., AsyncGenerator[Any, Any]], block: Callable[[], Expiration]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(function)
    async def generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        step = functools.partial(inner.asend, None)
        while True:
            item = None  # what was given away is kept alive by nobody here
            try:
                with block():
                    item = await step()
            except StopAsyncIteration:
                return
            try:
                step = functools.partial(inner.asend, (yield item))
            except BaseException as error:  # GeneratorExit, too: it is closed by a step
                step = functools.partial(inner.athrow, error)

    return generator


class Watched(Iterable[Item], AsyncIterable[Item]):
    """An iterable whose every step is a block.

    Args:
        iterable: what is iterated over.
        expires: what is done anew for each step.

    Raises:
        TypeError: `iterable` is none: the caller's fault.
    """

    def __init__(self, iterable: Iterable[Item] | AsyncIterable[Item], expires: Expiration) -> None:
        if not hasattr(iterable, "__aiter__") and not hasattr(iterable, "__iter__"):
            # The old way to be iterable: __getitem__ alone.
            iter(iterable)
        self._iterable = iterable
        self._block = _again(expires)

    def __iter__(self) -> Iterator[Item]:
        return _Steps(iter(self._iterable), self._block)  # type: ignore[arg-type]

    def __aiter__(self) -> AsyncIterator[Item]:
        return _AsyncSteps(aiter(self._iterable), self._block)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        try:
            return len(self) > 0
        except TypeError:
            return True

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


class _WithBlock:
    def __init__(self, iterator: Any, block: Callable[[], Expiration]) -> None:
        self._iterator = iterator
        self._block = block


class _Steps(_WithBlock, Iterator[Item]):
    def __next__(self) -> Item:
        with self._block():
            return next(self._iterator)  # type: ignore[no-any-return]


class _AsyncSteps(_WithBlock, AsyncIterator[Item]):
    async def __anext__(self) -> Item:
        with self._block():
            return await anext(self._iterator)
