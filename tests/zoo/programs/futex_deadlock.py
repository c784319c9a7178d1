"""Two threads, two locks, taken in opposite order."""

import threading

import hangwatch

first, second = threading.Lock(), threading.Lock()
both = threading.Barrier(2)


def other() -> None:
    with second:
        both.wait()
        first.acquire()


def stuck_here() -> None:
    second.acquire()


threading.Thread(target=other, name="the other", daemon=True).start()
with hangwatch.expires(after=0.4, scope="deadlock"), first:
    both.wait()
    stuck_here()
