"""Asynchronous exceptions in the middle of everything leave no slot armed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.sizes import Size, short_and_long

STORM = """
import ctypes, os, random, signal, sys, threading, time
sys.path[:0] = {path!r}
import hangwatch
from hangwatch.watcher.page_reader import PageReader
from support.pages import quiet_page

sys.setswitchinterval(1e-4)
kind, blocks = sys.argv[1], int(sys.argv[2])
rng = random.Random(7)

class Storm(BaseException): pass

def nested(depth):
    if depth == 0:
        return
    with hangwatch.expires(60):
        nested(depth - 1)
        with hangwatch.expires(60, scope="named"):
            pass

def once(reused):
    with hangwatch.expires(60, scope="outer"):
        nested(rng.randrange(3))
        with reused, reused:
            pass

raging = False
striking = threading.Lock()

def strike_by_signal(*_):
    if raging:
        raise KeyboardInterrupt

def strike_from_thread(ident):
    exception = ctypes.py_object(Storm)
    while True:
        time.sleep(rng.uniform(1e-5, 6e-4))
        with striking:
            if raging:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(ident), exception
                )

def calm_down():
    global raging
    while True:
        try:
            raging = False
            with striking:
                pass
            for _ in range(100):
                pass
            return
        except (KeyboardInterrupt, Storm):
            pass

if kind == "signal":
    signal.signal(signal.SIGALRM, strike_by_signal)
    signal.setitimer(signal.ITIMER_REAL, 3e-4, 3.7e-4)
else:
    threading.Thread(
        target=strike_from_thread, args=(threading.get_ident(),), daemon=True
    ).start()

def rage():
    # A function, since CPython 3.13 leaves a loop's jump back out of the try around it.
    global raging, done
    raging = True
    while done < blocks:
        once(reused)
        done += 6

with quiet_page() as client:
    reader = client.reader()
    reused = hangwatch.expires(60, scope="reused")
    done = hits = 0
    while done < blocks:
        try:
            rage()
            calm_down()
        except (KeyboardInterrupt, Storm):
            raging = False
            while True:
                try:
                    calm_down()
                    break
                except (KeyboardInterrupt, Storm):
                    pass
            hits += 1
            left = reader.armed()
            assert not left, (left, [reader.details(slot) for slot in left])
    calm_down()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert hits > 100, hits
    assert reader.armed() == []
    print(hits)
"""


@short_and_long
@pytest.mark.parametrize("kind", ["signal", "thread"])
def test_storm_of_exceptions_leaves_no_slot_armed(kind: str, size: Size) -> None:
    blocks = str(size.of(40_000, 100_000, 300_000))
    path = [entry for entry in sys.path if entry.endswith("tests")]
    result = subprocess.run(
        [sys.executable, "-c", STORM.format(path=path), kind, blocks],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
