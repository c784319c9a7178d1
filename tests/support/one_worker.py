"""A worker that does what it is told, one step at a time, in the thread or task that it is told.

Run as a program, with the number of a socket's descriptor, it serves a `Conductor`. Each run has
a page of its own, which nobody watches, and threads of its own. Blocks are real statements: to
enter one, a thread's or task's `level` begins a statement and calls itself within it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import hangwatch
from support.nursery import LIMIT
from support.pages import QuietClient, quiet_page

THREADS = ("thread 1", "thread 2", "thread 3")
LOOPING = THREADS[0]
"""The thread that runs the loop, if one runs; its tasks can be told something then, it can't."""
TASKS = ("task 1", "task 2", "task 3")
ALL = 10**6
"""Blocks that are left at once: however many there are, and the thread or task ends."""


def _here(after: float) -> hangwatch.Expiration:
    return hangwatch.expires(after)


def _there(after: float) -> hangwatch.Expiration:
    return hangwatch.expires(after)


_PLACES = {
    f"{Path(__file__).name}#{make.__code__.co_firstlineno + 1}": make for make in (_here, _there)
}
PLACES = tuple(_PLACES)
"""Names of blocks that have none: a file and a line, without the folder."""

Command = dict[str, Any]
Answer = dict[str, Any]


class Conductor:
    """Tells a worker, another process, what to do; the worker lives as long as it answers."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.one_worker", str(its.fileno())],
                pass_fds=[its.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid

    def tell(self, who: str, do: str, **rest: object) -> Answer:
        """Have something done; return what came of it, ``before`` and ``after`` among it.

        Raises:
            EOFError, OSError: the worker has ended, or does not answer: it is ended.
        """
        try:
            self._connection.send({"who": who, "do": do, **rest})
            if not self._connection.poll(LIMIT):
                raise TimeoutError(f"{who} does not answer to {do}")
            answer: Answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.kill()
            self.close()
            raise
        return answer

    @property
    def is_alive(self) -> bool:
        return not self._connection.closed

    def close(self) -> None:
        """Let the worker end."""
        self._connection.close()
        self._process.wait()


class _Leave(Exception):  # noqa: N818  # no error
    """Some blocks are left at once, by returning or by being raised."""

    def __init__(self, before: float, levels: int, by_exception: bool) -> None:
        self.before = before
        self.levels = levels
        self.by_exception = by_exception

    def is_over(self) -> bool:
        """Count a level; tell whether it was the last one. If not, and if so be it, go on."""
        self.levels -= 1
        if self.levels and self.by_exception:
            raise self
        return not self.levels


class _Run:
    """One run: a page, its threads, and all timers so far by their names."""

    def __init__(self, connection: Connection, client: QuietClient) -> None:
        self.client = client
        self.timers: dict[str, hangwatch.Expiration] = {}
        self.inboxes: dict[str, Callable[[Command], None]] = {}
        self._connection = connection
        self._threads: dict[str, threading.Thread] = {}

    def serve(self, before: float) -> None:
        for name in THREADS:
            self._start(name)
        self.answer(before, descriptor=self.client.page.descriptor.number)
        while (command := self._connection.recv())["do"] != "end the run":
            if command["do"] == "start a thread":
                before = monotonic()
                self._threads[command["who"]].join()
                self._start(command["who"])
                self.answer(before)
            else:
                self.inboxes[command["who"]](command)
        before = monotonic()
        for thread in self._threads.values():
            thread.join()
        self.answer(before)

    def answer(self, before: float, **rest: object) -> None:
        self._connection.send(
            {"before": before, "after": monotonic(), "ident": threading.get_ident(), **rest}
        )

    def _start(self, name: str) -> None:
        actor = _Thread(self)
        self.inboxes[name] = actor.inbox.put
        self._threads[name] = threading.Thread(target=actor.run, name=name, daemon=True)
        self._threads[name].start()


class _Actor:
    """What a thread and a task have in common."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def _timer(self, command: Command) -> hangwatch.Expiration:
        name, scope = command["timer"], command.get("scope")
        if scope is not None:
            after = command["limit"]
            if command["pauses"]:
                self._run.timers[name] = hangwatch.paused(scope, after)
            elif scope in _PLACES:
                self._run.timers[name] = _PLACES[scope](after)
            else:
                self._run.timers[name] = hangwatch.expires(after, scope)
        return self._run.timers[name]

    def _leave(self, command: Command, before: float) -> _Leave:
        leave = _Leave(before, command["levels"], command["by_exception"])
        if leave.by_exception:
            raise leave
        return leave

    def _handle(self, command: Command, before: float) -> None:
        """Do what begins and ends no block."""
        if command["do"] == "pass through":
            for number in range(command["count"]):
                with hangwatch.expires(60, f"passing {number}"):
                    pass
            self._run.answer(before)
            return
        try:
            method = getattr(self._run.timers[command["timer"]], command["do"])
            value = method(*command["arguments"])
        except hangwatch.HangwatchError as error:
            self._run.answer(before, refused=type(error))
        else:
            self._run.answer(before, refused=None, value=value)

    def _failed(self, before: float) -> None:
        self._run.answer(before, error=traceback.format_exc())


class _Thread(_Actor):
    def __init__(self, run: _Run) -> None:
        super().__init__(run)
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            leave = self._level()
        except _Leave as raised:
            leave = raised
        self._run.answer(leave.before)

    def _level(self) -> _Leave:
        while True:
            command = self.inbox.get()
            before = monotonic()
            try:
                if command["do"] == "leave":
                    return self._leave(command, before)
                if command["do"] == "enter":
                    leave = self._enter(command, before)
                    if not leave.is_over():
                        return leave
                    self._run.answer(leave.before)
                elif command["do"] == "begin the loop":
                    before = asyncio.run(_Loop(self._run).serve(before))
                    self._run.answer(before)
                else:
                    self._handle(command, before)
            except _Leave:
                raise
            except Exception:
                self._failed(before)

    def _enter(self, command: Command, before: float) -> _Leave:
        try:
            if command["by_stack"]:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(self._timer(command))
                    self._run.answer(before)
                    return self._level()
            with self._timer(command):
                self._run.answer(before)
                return self._level()
        except _Leave as leave:
            return leave


class _Task(_Actor):
    def __init__(self, run: _Run, name: str) -> None:
        super().__init__(run)
        self._inbox: asyncio.Queue[Command] = asyncio.Queue()
        run.inboxes[name] = into(self._inbox)

    async def run(self) -> None:
        try:
            leave = await self._level()
        except _Leave as raised:
            leave = raised
        self._run.answer(leave.before)

    async def _level(self) -> _Leave:
        while True:
            command = await self._inbox.get()
            before = monotonic()
            try:
                if command["do"] == "leave":
                    return self._leave(command, before)
                if command["do"] == "enter":
                    leave = await self._enter(command, before)
                    if not leave.is_over():
                        return leave
                    self._run.answer(leave.before)
                else:
                    self._handle(command, before)
            except _Leave:
                raise
            except Exception:
                self._failed(before)

    async def _enter(self, command: Command, before: float) -> _Leave:
        try:
            if command["by_stack"] and command["by_async"]:
                async with contextlib.AsyncExitStack() as async_stack:
                    await async_stack.enter_async_context(self._timer(command))
                    self._run.answer(before)
                    return await self._level()
            if command["by_stack"]:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(self._timer(command))
                    self._run.answer(before)
                    return await self._level()
            if command["by_async"]:
                async with self._timer(command):
                    self._run.answer(before)
                    return await self._level()
            with self._timer(command):
                self._run.answer(before)
                return await self._level()
        except _Leave as leave:
            return leave


class _Loop:
    """An event loop, its tasks, and one more that starts and cancels them."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self, before: float) -> float:
        """Return when it was told to end."""
        inbox: asyncio.Queue[Command] = asyncio.Queue()
        self._run.inboxes["loop"] = into(inbox)
        for name in TASKS:
            self._start(name)
        self._run.answer(before)
        while (command := await inbox.get())["do"] != "end the loop":
            before = monotonic()
            await self._cancel(command["task"])
            self._start(command["task"])
            self._run.answer(before)
        before = monotonic()
        for name in TASKS:
            await self._cancel(name)
        return before

    def _start(self, name: str) -> None:
        self._tasks[name] = asyncio.create_task(_Task(self._run, name).run())

    async def _cancel(self, name: str) -> None:
        """Have `asyncio.CancelledError` leave all blocks of a task, if it has not ended."""
        self._tasks[name].cancel()
        await asyncio.wait([self._tasks[name]])


def into(inbox: asyncio.Queue[Command]) -> Callable[[Command], None]:
    """Return what puts a command into a queue of the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def put(command: Command) -> None:
        loop.call_soon_threadsafe(inbox.put_nowait, command)

    return put


def main() -> None:
    """Serve runs, until there is nobody to serve."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while connection.recv()["do"] == "begin a run":
            before = monotonic()
            with quiet_page() as client:
                _Run(connection, client).serve(before)


if __name__ == "__main__":
    main()
