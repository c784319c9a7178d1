"""What a successor needs to know of a worker, and how it takes the worker over.

The kernel holds the rest: a worker's page is in shared memory, and who it is can be
asked of its socket anew.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import astuple
from math import inf
from typing import Any

from hangwatch import wire
from hangwatch.errors import ProtocolError
from hangwatch.handover import Kept, close_all
from hangwatch.page.view import Armed
from hangwatch.process import Identity
from hangwatch.watcher.descendants import Sentence
from hangwatch.watcher.events import Event
from hangwatch.watcher.identity import (
    credentials_of,
    has_hung_up,
    identify,
    kernel_gives_pidfds,
    read_out,
)
from hangwatch.watcher.page_reader import PageReader
from hangwatch.watcher.watched import Watched

# A worker that is only reported on may have this many open blocks that were reported.
_MOST_JUDGED = 256


class HasLeft(Exception):  # noqa: N818  # news, no error
    """A worker has ended while nobody watched, or has hung up.

    Attributes:
        event: what is to be told of it; None: it was told.
        uid: its user.
        sentence: what was to be done to it.
    """

    def __init__(
        self, pid: int, uid: int, labels: dict[str, str], told: bool, sentence: Sentence | None
    ) -> None:
        super().__init__(pid)
        self.event: Event | None = None
        if not told:
            self.event = {"event": "left", "at": time.time(), "pid": pid, "labels": labels}
        self.uid = uid
        self.sentence = sentence


def state_of(worker: Watched) -> bytes:
    """Encode what the next watcher shall know of a worker besides its descriptors."""
    return json.dumps(
        {
            "hello": wire.encode_hello(worker.hello).decode("ascii"),
            "stacks_inode": worker.stacks_inode,
            "welcomed": worker.welcomed,
            "left": worker.left,
            "start_ticks": worker.identity.start_ticks,
            "sentence": None if worker.sentence is None else astuple(worker.sentence),
            "judged": [
                (found.index, found.entry, found.deadline, None if again == inf else again)
                for found, again in sorted(worker.judged.items(), key=lambda item: item[0].deadline)
                # What is at issue is a successor's to deal with.
                if isinstance(found, Armed) and found != worker.at_issue
            ][-_MOST_JUDGED:],
        }
    ).encode("ascii")


def descriptors_of(worker: Watched, page: int) -> list[int]:
    """Duplicate what the keeper shall keep of a worker.

    Args:
        worker: a newcomer.
        page: its page's memfd; given away.

    Raises:
        OSError: none are left; nothing stays open.
    """
    descriptors = [page]
    try:
        descriptors.insert(0, os.dup(worker.connection.fileno()))
        if not kernel_gives_pidfds():
            descriptors.append(os.dup(worker.identity.pidfd))
    except OSError:
        close_all(descriptors)
        raise
    return descriptors


def take_over(number: int, kept: Kept) -> Watched:
    """Take over a worker of a watcher that has died.

    Args:
        number: what the keeper knows it by.
        kept: this process's own copy of what the keeper has.

    Raises:
        HasLeft: it has ended, or hung up.
        Exception: what was kept of it is of no use; nothing of it is left open.
    """
    descriptors = list(kept.descriptors)
    connection = socket.socket(fileno=descriptors.pop(0))
    reader = identity = None
    try:
        state = json.loads(kept.state)
        hello = wire.decode_hello(state["hello"].encode())
        sentence = _sentence(state["sentence"])
        reader = PageReader(descriptors[0])
        # Before another one is opened: a successor needs no more of them than its predecessor.
        os.close(descriptors.pop(0))
        identity = _identify_again(connection, descriptors, state["start_ticks"])
        # A sentence waits for the death of who is on its way out.
        on_its_way = sentence is None and has_hung_up(connection)
        if identity is None or identity.is_dead() or on_its_way:
            pid, uid = credentials_of(connection)
            read_out(connection)
            raise HasLeft(pid, uid, hello.labels, state["left"], sentence)
        return Watched(
            connection=connection,
            identity=identity,
            hello=hello,
            reader=reader,
            stacks_inode=(state["stacks_inode"][0], state["stacks_inode"][1]),
            number=number,
            welcomed=state["welcomed"],
            left=state["left"],
            sentence=sentence,
            judged={
                Armed(*slot): inf if again is None else again for *slot, again in state["judged"]
            },
        )
    except BaseException:
        connection.close()
        if reader is not None:
            reader.promise(0.0)  # which its watcher has promised, and nobody keeps
            reader.close()
        for descriptor in descriptors if identity is None else [identity.pidfd]:
            os.close(descriptor)
        raise


def _identify_again(
    connection: socket.socket, held: list[int], start_ticks: int
) -> Identity | None:
    """Hold the process at the other end; None: it has been waited for, and is no more."""
    if held:
        pid, uid = credentials_of(connection)
        return Identity(pid, uid, start_ticks, held[0])
    try:
        identity = identify(connection)
    except ProtocolError:
        # From Linux 6.5 to 6.15 the socket of a process that is no more has no pidfd.
        if has_hung_up(connection):
            return None
        raise
    if identity.start_ticks == start_ticks or not (identity.start_ticks and start_ticks):
        return identity
    os.close(identity.pidfd)  # its number is another's by now
    return None


def _sentence(kept: list[Any] | None) -> Sentence | None:
    if kept is None:
        return None
    number, doomed, until, reporter, block = kept
    return Sentence(
        number,
        tuple((pid, start) for pid, start in doomed),
        until,
        None if reporter is None else (reporter[0], reporter[1]),
        None if block is None else (block[0], block[1]),
    )
