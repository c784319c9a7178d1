"""A hang in a program that ignores SIGTERM."""

import signal
import time

import hangwatch

signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stuck_here() -> None:
    time.sleep(1000)


with hangwatch.expires(after=0.4, scope="sigterm ignored"):
    stuck_here()
