"""A thread's name goes with it: another thread may get its ident."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import hangwatch
from support.pages import QuietClient, quiet_page

pytestmark = pytest.mark.core


def names(client: QuietClient) -> set[str]:
    reader = client.reader()
    found = set(reader.thread_names().values())
    reader.close()
    return found


def run(body: Callable[[], object]) -> None:
    thread = threading.Thread(target=body, name="uploader")
    thread.start()
    thread.join()


def test_a_thread_that_has_ended_has_no_name_in_the_page() -> None:
    with quiet_page() as client:

        def upload() -> None:
            for scope in "abc":
                with hangwatch.expires(60, scope), hangwatch.expires(60), hangwatch.paused("p", 60):
                    assert names(client) == {"uploader"}
            assert names(client) == {"uploader"}

        run(upload)
        assert names(client) == set()


def test_a_block_that_outlives_its_thread_gives_the_name_back_when_it_ends() -> None:
    with quiet_page() as client:
        block = hangwatch.expires(60, "handed over")
        run(block.__enter__)
        assert client.armed() == {"handed over": 1}
        block.__exit__(None, None, None)
        assert client.armed() == {}
        assert names(client) == set()
