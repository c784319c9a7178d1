"""Waiting: one epoll, a handler for each descriptor, and a clock finer than epoll's."""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from time import monotonic

from hangwatch.process import wait_readable

_log = logging.getLogger("hangwatch.watcher")

_FD_SETSIZE = 1024
READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT


class Loop:
    """The descriptors that one thread waits for, and what to do about each."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def __contains__(self, descriptor: int) -> bool:
        return descriptor in self._handlers

    def add(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Call `handler` whenever `descriptor` is readable, or its other end is gone."""
        self._epoll.register(descriptor, READABLE)
        self._handlers[descriptor] = handler

    def listen_for(self, descriptor: int, events: int) -> None:
        """Choose what `descriptor` is listened to for; 0: only for its other end's end."""
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed; twice does no harm."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def sleep(self, until: float) -> None:
        """Wait until `until` (CLOCK_MONOTONIC), or until a descriptor has news."""
        # epoll_wait counts in milliseconds and wakes 0.6 ms late; select in microseconds,
        # but it takes no descriptor from FD_SETSIZE on; select(2).
        within = max(0.0, until - monotonic())
        if self._epoll.fileno() < _FD_SETSIZE:
            select.select([self._epoll], [], [], within)
        else:
            wait_readable(self._epoll.fileno(), within)

    def dispatch(self) -> None:
        """Call the handlers of the descriptors that have news."""
        for descriptor, _ in self._epoll.poll(0, 256):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                guarded(handler)


def guarded(step: Callable[[], None]) -> None:
    """Take a step; whatever is wrong with one worker must not end the watch of others."""
    try:
        step()
    except Exception:
        _log.exception("a step of the watcher failed")
